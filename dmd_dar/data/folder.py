"""`folder`: random crops of a user's own images; the class is the folder that an image lies in.

A class is drawn uniformly, then an image of it, then a crop. The images of each class whose SHA-256 is lowest are held
out, so that copies of one file stay together. A batch is a pure function of its `Draws`.
"""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dmd_dar.data.config import DataConfig
from dmd_dar.data.decode import ImageError, read_image
from dmd_dar.data.images import to_model_range
from dmd_dar.data.listing import SHOWN, THREADS, ImageFile, Listing, in_threads, list_images, unusable
from dmd_dar.draws import Draws
from dmd_dar.errors import UserError


@dataclass(frozen=True)
class Picture:
    """One image, shrunk: its sides in pixels, and its pixels uint8 (H, W, 3) where they are kept in memory."""

    file: ImageFile
    height: int
    width: int
    colour: bool
    pixels: np.ndarray | None


def held_out_files(listing: Listing, share: float) -> set[ImageFile]:
    """Of each class the contents of lowest digest: round(share n) of n different ones, but from 1 to n - 1."""
    by_class: dict[int, list[ImageFile]] = {}
    for file in listing.files:
        by_class.setdefault(file.label, []).append(file)
    chosen = set()
    for files in by_class.values():
        digests = sorted({file.digest for file in files})
        count = min(max(round(share * len(digests)), 1), len(digests) - 1) if share else 0
        lowest = set(digests[:count])
        chosen |= {file for file in files if file.digest in lowest}
    return chosen


def read_listed(folder: Path, file: ImageFile, cfg: DataConfig) -> np.ndarray:
    """uint8 (H, W, 3) of a listed image, shrunk as `cfg` says; ImageError where it has changed or gives no crop."""
    with open(folder / file.name, "rb") as opened:
        if hashlib.file_digest(opened, "sha256").digest() != file.digest:
            raise ImageError("has changed since the run began")
        opened.seek(0)
        pixels = read_image(opened, cfg.max_megapixels, cfg.shorter_side)
    height, width = pixels.shape[:2]
    if min(height, width) < cfg.size:
        raise ImageError(f"{width} x {height}, smaller than data.size {cfg.size}, and none is enlarged")
    return pixels


class Folder:
    """Crops of side `cfg.size` of the images in `cfg.path`, on `device`.

    A training crop lies anywhere in its image and is mirrored half the time if `cfg.flip`. One of the `held_out` images
    is a tile, of those that stand side by side around the middle, and never mirrored. Each image is decoded at the
    start, so that faults show at once; up to `cfg.cache_gb` stay in memory, the others are decoded at every crop.

    Raises UserError where `list_images` does, where nothing is held out of a class although `held_out` asks for it, and
    naming up to five images that are damaged, too large, or smaller than a crop: none is enlarged.
    """

    def __init__(self, cfg: DataConfig, device: torch.device | str = "cpu", held_out: bool = False):
        self.cfg, self.held_out, self.device = cfg, held_out, torch.device(device)
        self.size, self.shape = cfg.size, (3, cfg.size, cfg.size)
        self.listing = list_images(cfg.path)
        self.label_names, self.hash = self.listing.label_names, self.listing.hash
        self.num_classes = len(self.label_names)
        self.pictures = self._pictures()
        self.all_kept = all(picture.pixels is not None for picture in self.pictures)
        self.colour_labels = tuple(sorted({picture.file.label for picture in self.pictures if picture.colour}))
        labels = torch.tensor([picture.file.label for picture in self.pictures], dtype=torch.int64)
        self.counts = torch.bincount(labels, minlength=self.num_classes).to(device)
        self.start = self.counts.cumsum(0) - self.counts  # the images of a class stand together
        if (bare := (self.counts == 0).nonzero().flatten().tolist()) and held_out:
            names = ", ".join(repr(self.label_names[label]) for label in bare[:SHOWN])
            raise UserError(
                f"data.path = {cfg.path}: no image is held out of {names}; add images or set data.held_out_share"
            )

    def __str__(self) -> str:
        """One line for the log."""
        total = len(self.listing.files)
        held_out = len(self.pictures) if self.held_out else total - len(self.pictures)
        kept = [picture.pixels.nbytes for picture in self.pictures if picture.pixels is not None]
        memory = f"{len(kept)} of {len(self.pictures)} in memory ({sum(kept) / 1e6:.1f} MB)"
        left_out = ", ".join(f"{count} {ending}" for ending, count in self.listing.left_out.items())
        ignored = f"; other files, left out: {left_out}" * bool(left_out)
        return f"{total} images in {self.num_classes} classes, {held_out} held out; {memory}{ignored}"

    def crops(self, labels: Tensor, draws: Draws) -> Tensor:
        """One random crop of an image of each label: labels (B,) -> uint8 (B, 3, size, size)."""
        chosen = (self.start[labels] + draws.integers("image", self.counts[labels])).tolist()
        places = draws.uniform("crop", 2).tolist()
        mirrored = (draws.uniform("mirror") < 0.5).tolist()
        if self.all_kept:
            crops = list(map(self._crop, chosen, places, mirrored))
        else:
            with ThreadPoolExecutor(THREADS) as pool:
                crops = list(pool.map(self._crop, chosen, places, mirrored))
        return torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).to(self.device)

    def batch(self, draws: Draws) -> tuple[Tensor, Tensor]:
        """x0 (B, 3, S, S) float32 in [-1, 1] and labels (B,), classes uniform."""
        labels = draws.integers("label", self.num_classes)
        return to_model_range(self.crops(labels, draws)), labels

    def _pictures(self) -> list[Picture]:
        """Of all images, those of this side of the split; all of them are decoded."""
        files = {file.name: file for file in self.listing.files}
        held_out, pictures, room = held_out_files(self.listing, self.cfg.held_out_share), [], self.cfg.cache_gb * 1e9
        opened = in_threads(self.listing.folder, list(files), lambda name: self._open(files[name]), "reading images")
        for picture in opened:
            if (picture.file in held_out) == self.held_out:
                kept = picture.pixels.nbytes <= room
                room -= picture.pixels.nbytes * kept
                pictures.append(picture if kept else replace(picture, pixels=None))
        return pictures

    def _open(self, file: ImageFile) -> Picture:
        pixels = read_listed(self.listing.folder, file, self.cfg)
        height, width = pixels.shape[:2]
        return Picture(file, height, width, bool((pixels != pixels[..., :1]).any()), pixels)

    def _crop(self, index: int, place: tuple[float, float], mirrored: bool) -> np.ndarray:
        """uint8 (S, S, 3) of one image, at `place` in (0, 1)^2 of where crops may lie."""
        picture, size, step = self.pictures[index], self.size, self.size if self.held_out else 1
        y, x = (_corner(side, size, step, u) for side, u in zip((picture.height, picture.width), place, strict=True))
        try:
            pixels = picture.pixels
            if pixels is None:
                pixels = read_listed(self.listing.folder, picture.file, self.cfg)
        except (ImageError, OSError) as error:
            raise unusable(self.listing.folder, [(picture.file.name, str(error))]) from error
        crop = pixels[y : y + size, x : x + size]
        return crop[:, ::-1] if mirrored and self.cfg.flip and not self.held_out else crop


def _corner(side: int, size: int, step: int, u: float) -> int:
    """The start of one of the crops of `size` that stand `step` apart around the middle of `side`."""
    last = (side - size) // step
    return (side - size - last * step) // 2 + step * int(u * (last + 1))
