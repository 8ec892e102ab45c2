"""Fixed lists of images, to be encoded once: each has `label_names`, `counts` by class, and images(first, stop).

The images of a class stand together, the classes in their order.
"""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dmd_dar.data.config import DataConfig
from dmd_dar.data.decode import ImageError
from dmd_dar.data.folder import held_out_files, read_listed
from dmd_dar.data.listing import SHOWN, THREADS, ImageFile, in_threads, list_images, unusable
from dmd_dar.data.sources import open_images
from dmd_dar.draws import Draws, sample_range
from dmd_dar.errors import UserError


class MiddleCrops:
    """The middle of every image of a folder, on one side of the split; with `cfg.flip` its mirror image follows it.

    Raises UserError where `list_images` does, and where a class has no image on that side.
    """

    def __init__(self, cfg: DataConfig, held_out: bool = False):
        self.cfg, self.listing = cfg, list_images(cfg.path)
        self.label_names = self.listing.label_names
        left_out = held_out_files(self.listing, cfg.held_out_share)
        self.files = [file for file in self.listing.files if (file in left_out) == held_out]
        self.copies = self.wanted_by(cfg, held_out)["copies"]
        labels = torch.tensor([file.label for file in self.files], dtype=torch.int64)
        self.counts = tuple((self.copies * torch.bincount(labels, minlength=len(self.label_names))).tolist())
        if bare := [name for name, count in zip(self.label_names, self.counts, strict=True) if not count]:
            names, side = ", ".join(map(repr, bare[:SHOWN])), "held out of" if held_out else "left for training in"
            raise UserError(f"data.path = {cfg.path}: no image is {side} {names}; set data.held_out_share")
        self.content = {"images": "middle", "data": self.listing.hash, **self.wanted_by(cfg, held_out)}

    @staticmethod
    def wanted_by(cfg: DataConfig, held_out: bool) -> dict[str, Any]:
        """What of `content` needs no look at the folder."""
        copies = 2 if cfg.flip and not held_out else 1
        wanted = {"images": "middle", "size": cfg.size, "shorter_side": cfg.shorter_side, "copies": copies}
        return wanted | {"held_out_share": cfg.held_out_share}

    def check(self) -> None:
        """Decode every image once; UserError naming up to five that cannot be used."""
        names = {file.name: file for file in self.files}
        for _ in in_threads(self.listing.folder, list(names), lambda name: self._crop(names[name]), "reading images"):
            pass

    def images(self, first: int, stop: int) -> tuple[Tensor, Tensor]:
        """uint8 (stop - first, 3, S, S) and labels."""
        chosen = [self.files[i // self.copies] for i in range(first, stop)]
        mirrored = [i % self.copies == 1 for i in range(first, stop)]
        with ThreadPoolExecutor(THREADS) as pool:
            crops = list(pool.map(self._named_crop, chosen, mirrored))
        labels = torch.tensor([file.label for file in chosen], dtype=torch.int64)
        return torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2), labels

    def _named_crop(self, file: ImageFile, mirrored: bool) -> np.ndarray:
        try:
            crop = self._crop(file)
        except (ImageError, OSError) as error:
            raise unusable(self.listing.folder, [(file.name, str(error))]) from error
        return crop[:, ::-1] if mirrored else crop

    def _crop(self, file: ImageFile) -> np.ndarray:
        """uint8 (S, S, 3)."""
        pixels, size = read_listed(self.listing.folder, file, self.cfg), self.cfg.size
        y, x = ((side - size) // 2 for side in pixels.shape[:2])
        return pixels[y : y + size, x : x + size]


class RandomCrops:
    """`n` random crops of any source of images, as many of each class as of any other, or one more; keyed by `seed`.

    Raises UserError where `open_images` does, and where there are fewer crops than classes.
    """

    def __init__(self, cfg: DataConfig, n: int, seed: int, device: torch.device | str = "cpu", held_out: bool = False):
        self.source, self.seed = open_images(cfg, device, held_out), seed
        self.label_names = self.source.label_names
        classes = len(self.label_names)
        if n < classes:
            raise UserError(f"n = {n}: fewer crops than the {classes} classes of data.name {cfg.name}; set n to more")
        self.counts = tuple(n // classes + (label < n % classes) for label in range(classes))
        self.labels = torch.arange(classes).repeat_interleave(torch.tensor(self.counts))
        self.content = {"images": "random", "data": self.source.hash, **self.wanted_by(cfg, seed)}

    @staticmethod
    def wanted_by(cfg: DataConfig, seed: int) -> dict[str, Any]:
        """What of `content` needs no look at the data."""
        wanted = {"images": "random", "name": cfg.name, "size": cfg.size, "seed": seed}
        more = ("shorter_side", "flip", "held_out_share") if cfg.name == "folder" else ()
        return wanted | {name: getattr(cfg, name) for name in more}

    def check(self) -> None:
        """Nothing is left to check: the source is open."""

    def images(self, first: int, stop: int) -> tuple[Tensor, Tensor]:
        """uint8 (stop - first, 3, S, S) and labels; crop i depends on seed and i alone."""
        draws = Draws(self.seed, "encode", 0, sample_range(first, stop, self.source.device))
        labels = self.labels[first:stop].to(self.source.device)
        return self.source.crops(labels, draws), labels
