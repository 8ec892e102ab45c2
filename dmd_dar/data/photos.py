"""`photos`: random crops of seven vendored photographs; the class is the photograph.

Every fifth 96-pixel tile is held out, and no training crop touches one. A batch is a pure function of its `Draws`.
"""

import hashlib
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dmd_dar.data.images import to_model_range
from dmd_dar.draws import Draws

FOLDER = Path(__file__).parent / "photos"
NAMES = ("astronaut", "brick", "camera", "chelsea", "coffee", "grass", "gravel")
COLOUR = ("astronaut", "chelsea", "coffee")
MIRRORED = ("brick", "chelsea", "coffee", "grass", "gravel")  # not astronaut and camera: lettering, a known pose
TILE = 96
HELD_OUT_EVERY = 5


def read_photos() -> list[Tensor]:
    """The photographs in the order of NAMES, each uint8 (H, W, 3); grey ones have three equal channels."""
    arrays = [np.array(Image.open(FOLDER / f"{name}.png").convert("RGB")) for name in NAMES]
    return [torch.from_numpy(array) for array in arrays]


@cache
def data_hash() -> str:
    """SHA-256 over the pixels and sizes of all photographs."""
    digest = hashlib.sha256()
    for photo in read_photos():
        digest.update(str(tuple(photo.shape)).encode() + photo.numpy().tobytes())
    return digest.hexdigest()


def held_out_mask(height: int, width: int) -> Tensor:
    """(height, width) bool: the pixels of held-out tiles. The diagonal pattern reaches every row and column."""
    row = torch.arange(height)[:, None] // TILE
    column = torch.arange(width)[None, :] // TILE
    return (2 * row + column) % HELD_OUT_EVERY == 0


def crop_positions(mask: Tensor, size: int, held_out: bool) -> Tensor:
    """Flat top-left indices y * W + x of all crops wholly inside (`held_out`) or wholly outside the mask."""
    wanted = mask if held_out else ~mask
    total = torch.nn.functional.pad(wanted.double().cumsum(0).cumsum(1), (1, 0, 1, 0))
    inside = total[size:, size:] - total[:-size, size:] - total[size:, :-size] + total[:-size, :-size]
    y, x = (inside == size * size).nonzero(as_tuple=True)
    return y * mask.shape[1] + x


class Photos:
    """Crops of side `size`, on `device`. `held_out` takes them from the held-out tiles alone, never mirrored."""

    num_classes = len(NAMES)
    label_names = NAMES
    colour_labels = tuple(NAMES.index(name) for name in COLOUR)

    def __init__(self, size: int, device: torch.device | str = "cpu", held_out: bool = False):
        photos = read_photos()
        positions = [crop_positions(held_out_mask(*photo.shape[:2]), size, held_out) for photo in photos]
        counts, pixels = [len(p) for p in positions], [photo.shape[0] * photo.shape[1] for photo in photos]

        def starts(lengths: list[int]) -> Tensor:
            return torch.tensor([0, *lengths]).cumsum(0)[:-1].to(device)

        self.size, self.shape, self.device = size, (3, size, size), torch.device(device)
        self.hash = data_hash()
        self.pixels = torch.cat([photo.reshape(-1, 3) for photo in photos]).to(device)  # (all pixels, 3) uint8
        self.positions = torch.cat(positions).to(device)
        self.pixel_start, self.position_start = starts(pixels), starts(counts)
        self.counts = torch.tensor(counts, device=device)
        self.widths = torch.tensor([photo.shape[1] for photo in photos], device=device)
        self.mirrored = torch.tensor([name in MIRRORED and not held_out for name in NAMES], device=device)

    def crops(self, labels: Tensor, draws: Draws) -> Tensor:
        """One random crop of each label's photograph: labels (B,) -> uint8 (B, 3, size, size)."""
        corner = self.positions[self.position_start[labels] + draws.integers("crop", self.counts[labels])]
        side = torch.arange(self.size, device=self.device)
        mirror = (draws.uniform("mirror") < 0.5) & self.mirrored[labels]
        columns = torch.where(mirror[:, None], side.flip(0), side)  # (B, S)
        offsets = side[None, :, None] * self.widths[labels][:, None, None] + columns[:, None, :]  # (B, S, S)
        index = (self.pixel_start[labels] + corner)[:, None, None] + offsets
        return self.pixels[index].permute(0, 3, 1, 2)

    def batch(self, draws: Draws) -> tuple[Tensor, Tensor]:
        """x0 (B, 3, S, S) float32 in [-1, 1] and labels (B,), classes uniform."""
        labels = draws.integers("label", self.num_classes)
        return to_model_range(self.crops(labels, draws)), labels
