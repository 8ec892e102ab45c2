"""Images as metrics read them: streams of uint8 batches from tensors, folders of PNG or npy, and npy files.

Legend: N images, n of a batch. Nothing is resized here.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from tqdm import tqdm

from dmd_dar.errors import UserError

KINDS = (".png", ".npy")
PNG_DEPTH = 24  # place of the byte that says how many bits a channel has
SAMPLES = "samples.json"  # beside it, grid.png is a contact sheet and no sample


class UnfitError(UserError, ValueError):
    """Images, features or statistics that a metric cannot take; the message names the set and the remedy."""


def share_of(count: int, rank: int, world: int) -> tuple[int, int]:
    """The first row of process `rank` of `world`, and the one after its last."""
    return count * rank // world, count * (rank + 1) // world


@dataclass(frozen=True)
class ImageStream:
    """N images of one size, read as they are needed. `read(start, stop)` gives those rows as uint8 (n, 3, H, W)."""

    name: str
    count: int
    size: tuple[int, int]
    read: Callable[[int, int], Tensor] = field(repr=False)

    def batches(self, batch_size: int, rank: int = 0, world: int = 1) -> Iterator[tuple[int, Tensor]]:
        """(first row, uint8 (n, 3, H, W)) over the share of process `rank` of `world`, with a bar on a terminal."""
        start, stop = share_of(self.count, rank, world)
        with tqdm(total=stop - start, desc=self.name, unit="img", disable=None, leave=False) as bar:
            for first in range(start, stop, batch_size):
                images = self.read(first, min(first + batch_size, stop))
                yield first, images
                bar.update(len(images))

    def all(self) -> Tensor:
        """uint8 (N, 3, H, W)."""
        return self.read(0, self.count)


def open_images(source: Tensor | str | Path, name: str = "") -> ImageStream:
    """A tensor (N, 3, H, W), uint8 or floats in [0, 1]; a folder of PNG or npy files in the order of their names;
    or one npy file.

    An npy file holds one image or many, channels first or last. UnfitError naming the set or the file for an empty
    folder, mixed sizes, a channel count other than 3, numbers that are not finite or out of range, and pickles.
    """
    if isinstance(source, Tensor):
        images = as_pixels(source, name or "images")
        return ImageStream(name or "images", len(images), _size(images), lambda start, stop: images[start:stop])
    path = Path(source)
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in KINDS)
        if (path / SAMPLES).is_file():
            files = [file for file in files if file.name != "grid.png"]
        if not files:
            raise UnfitError(f"{path}: no {' or '.join(KINDS)} in this folder; name one that holds images")
        return _stream(name or path.name, files)
    if path.is_file() and path.suffix == ".npy":
        return _stream(name or path.stem, [path])
    raise UnfitError(f"{path}: neither a folder of {' or '.join(KINDS)} files nor an npy file")


def _stream(name: str, files: list[Path]) -> ImageStream:
    headers = [_header(file) for file in files]
    size = headers[0][1:]
    for file, header in zip(files, headers, strict=True):
        if header[1:] != size:
            height, width = header[1:]
            raise UnfitError(
                f"{file}: {height} x {width}, but {size[0]} x {size[1]} in {files[0].name}; one size a set"
            )
    ends = list(accumulate(header[0] for header in headers))

    def read(start: int, stop: int) -> Tensor:
        parts = []
        while start < stop:
            index = bisect_right(ends, start)
            first = ends[index] - headers[index][0]
            last = min(stop, ends[index])
            parts.append(_read_file(files[index], start - first, last - first))
            start = last
        return torch.cat(parts)

    return ImageStream(name, ends[-1], size, read)


def _header(file: Path) -> tuple[int, int, int]:
    """(images, height, width) without decoding the file."""
    if file.suffix.lower() == ".npy":
        images = _map_array(file)
        return len(images), *images.shape[2:]
    with file.open("rb") as opened:
        depth = opened.read(PNG_DEPTH + 1)[PNG_DEPTH:]
    if depth == b"\x10":  # Pillow would cut the low byte off
        raise UnfitError(f"{file}: 16 bits a channel; convert it to 8-bit RGB, rounding")
    with _open_png(file) as image:
        if image.mode != "RGB":
            channels = len(image.getbands())
            raise UnfitError(f"{file}: {channels} channels of mode {image.mode}, not 3; convert it to 8-bit RGB")
        return 1, image.height, image.width


def _open_png(file: Path) -> Image.Image:
    try:
        return Image.open(file)
    except Image.DecompressionBombError as error:
        raise UnfitError(f"{file}: {error}; make it smaller") from error
    except (UnidentifiedImageError, OSError) as error:
        raise UnfitError(f"{file}: no readable image; make it anew") from error


def _map_array(file: Path) -> np.ndarray:
    """(N, 3, H, W), read lazily."""
    try:
        array = np.load(file, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise UnfitError(f"{file}: no plain array ({error}); save numbers, never pickled objects") from error
    if array.ndim == 3:
        array = array[None]
    if array.ndim == 4 and len(array) and array.shape[1] == 3:
        return array
    if array.ndim == 4 and len(array) and array.shape[3] == 3:
        return array.transpose(0, 3, 1, 2)
    raise UnfitError(f"{file}: shape {array.shape}; expected (N, 3, H, W), (N, H, W, 3) or one such image")


def _read_file(file: Path, start: int, stop: int) -> Tensor:
    if file.suffix.lower() == ".npy":
        return as_pixels(torch.from_numpy(np.array(_map_array(file)[start:stop])), str(file))
    with _open_png(file) as image:
        try:
            pixels = np.array(image)
        except (OSError, SyntaxError) as error:  # a truncated or corrupt PNG
            raise UnfitError(f"{file}: {error}; make it anew") from error
    return torch.from_numpy(pixels).permute(2, 0, 1)[None]


def as_pixels(images: Tensor, name: str) -> Tensor:
    """uint8 (N, 3, H, W) as they are, floats in [0, 1] quantised by rounding. UnfitError naming the set otherwise."""
    if images.ndim != 4 or images.shape[1] != 3 or not len(images):
        raise UnfitError(f"{name}: expected (N >= 1, 3, H, W), got {tuple(images.shape)}")
    if images.dtype == torch.uint8:
        return images
    if not images.is_floating_point():
        raise UnfitError(f"{name}: {images.dtype}; expected uint8, or floats in [0, 1]")
    broken = (~torch.isfinite(images)).flatten(1).any(1).nonzero().flatten()
    if len(broken):
        raise UnfitError(f"{name}: {len(broken)} images hold numbers that are not finite, first {broken[0].item()}")
    low, high = images.min().item(), images.max().item()
    if low < 0 or high > 1:
        raise UnfitError(f"{name}: values from {low:.4g} to {high:.4g}; floats must be in [0, 1]")
    return (images * 255).round().to(torch.uint8)


def _size(images: Tensor) -> tuple[int, int]:
    return images.shape[2], images.shape[3]
