"""Images as metrics read them: streams of uint8 batches from tensors, folders of PNG or npy, and npy files.

Legend: N images, n of a batch. Nothing is resized here.
"""

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from dmd_dar.errors import UserError

KINDS = (".png", ".npy")
NUMBERS = "biuf"  # kinds of numpy's types: truth values, integers and floats
LARGEST_FLOAT = 8  # bytes: torch knows no longer ones
PNG_DEPTH = 24  # place of the byte that says how many bits a channel has
SAMPLES, GRID = "samples.json", "grid.png"  # what dmd_dar.sample writes beside its images; the grid is a contact sheet


class UnfitError(UserError, ValueError):
    """Images, features or statistics that a metric cannot take; the message names the set and the remedy."""


def share_of(count: int, rank: int, world: int) -> tuple[int, int]:
    """The first row of process `rank` of `world`, and the one after its last."""
    return count * rank // world, count * (rank + 1) // world


@dataclass(frozen=True)
class ImageStream:
    """N images of one size, read as they are needed. `read(start, stop)` gives those rows as uint8 (n, 3, H, W).

    `left_out` counts what else lies in their folder by its endings.
    """

    name: str
    count: int
    size: tuple[int, int]
    read: Callable[[int, int], Tensor] = field(repr=False)
    left_out: dict[str, int] = field(default_factory=dict)

    @property
    def others(self) -> str:
        """What is left out, in words; empty for nothing."""
        return in_words(self.left_out)

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


def in_words(endings: dict[str, int]) -> str:
    """How many files there are of each ending; empty for none."""
    return ", ".join(f"{count} {ending}" for ending, count in endings.items())


def open_images(source: Tensor | str | Path, name: str = "") -> ImageStream:
    """A tensor (N, 3, H, W), uint8 or floats in [0, 1]; a folder of PNG or npy files in the order of their names;
    or one npy file.

    An npy file holds one image or many, channels first or last, in any byte order. UnfitError naming the set or the
    file for an empty folder, mixed sizes, a channel count other than 3, numbers that are not finite or out of range,
    texts, raw bytes and pickles. Other files of a folder, and its folders, are left out and counted.
    """
    if isinstance(source, Tensor):
        images = as_pixels(source, name or "images")
        return ImageStream(name or "images", len(images), _size(images), lambda start, stop: images[start:stop])
    path = Path(source)
    if path.is_dir():
        return _open_folder(path, name or path.name)
    if path.is_file() and path.suffix.lower() == ".npy":
        return _stream(name or path.stem, [path], {})
    raise UnfitError(f"{path}: neither a folder of {' or '.join(KINDS)} files nor an npy file")


def _open_folder(path: Path, name: str) -> ImageStream:
    held = sorted(entry for entry in path.iterdir() if not entry.name.startswith("."))
    if (path / SAMPLES).is_file():
        held = [entry for entry in held if entry.name not in (SAMPLES, GRID)]
    files = [entry for entry in held if entry.suffix.lower() in KINDS and not entry.is_dir()]
    endings = Counter(
        "folder" if entry.is_dir() else entry.suffix.lower() or "no ending" for entry in held if entry not in files
    )
    left_out = dict(sorted(endings.items()))
    if not files:
        holds = f", which holds {in_words(left_out)}" if left_out else ""
        raise UnfitError(
            f"{path}: no {' or '.join(KINDS)} in this folder{holds}; name one that holds images, of other kinds"
            " converted to 8-bit RGB PNG"
        )
    return _stream(name, files, left_out)


def _stream(name: str, files: list[Path], left_out: dict[str, int]) -> ImageStream:
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

    return ImageStream(name, ends[-1], size, read, left_out)


def _header(file: Path) -> tuple[int, int, int]:
    """(images, height, width) without decoding the file."""
    if file.suffix.lower() == ".npy":
        images = _map_array(file)
        return len(images), *images.shape[2:]
    try:
        with file.open("rb") as opened:
            depth = opened.read(PNG_DEPTH + 1)[PNG_DEPTH:]
    except OSError as error:
        raise UnfitError(f"{file}: cannot be read: {error.strerror}; mend it or take it out") from error
    if depth == b"\x10":  # Pillow would cut the low byte off
        raise UnfitError(f"{file}: 16 bits a channel; convert it to 8-bit RGB, rounding")
    with _open_png(file) as image:
        if image.mode != "RGB":
            channels = len(image.getbands())
            raise UnfitError(f"{file}: {channels} channels of mode {image.mode}, not 3; convert it to 8-bit RGB")
        return 1, image.height, image.width


def _open_png(file: Path) -> Image.Image:
    try:
        return Image.open(file, formats=("PNG",))  # a JPEG of that name has lost detail
    except Image.DecompressionBombError as error:
        raise UnfitError(f"{file}: {error}; make it smaller") from error
    except Exception as error:  # Pillow raises all kinds on damaged files
        raise UnfitError(f"{file}: no readable PNG image; make it anew") from error


def _map_array(file: Path) -> np.ndarray:
    """(N, 3, H, W), read lazily."""
    try:
        array = np.load(file, mmap_mode="r", allow_pickle=False)
        if not isinstance(array, np.ndarray):
            raise ValueError("an npz archive")
    except Exception as error:  # numpy raises all kinds on damaged files
        raise UnfitError(f"{file}: no plain array ({error}); save numbers, never pickled objects") from error
    native(array.dtype, str(file))
    if array.ndim == 3:
        array = array[None]
    if array.ndim == 4 and len(array) and array.shape[1] == 3:
        return array
    if array.ndim == 4 and len(array) and array.shape[3] == 3:
        return array.transpose(0, 3, 1, 2)
    raise UnfitError(f"{file}: shape {array.shape}; expected (N, 3, H, W), (N, H, W, 3) or one such image")


def native(dtype: np.dtype, name: str) -> np.dtype:
    """The type in which torch takes such numbers: of this machine's byte order, floats of 64 bits at most.

    UnfitError naming the file for what are no numbers.
    """
    if dtype.kind == "V" and dtype.names is None:
        raise UnfitError(f"{name}: raw bytes ({dtype.str}), as bfloat16 is saved, of no stated meaning; save float32")
    if dtype.kind not in NUMBERS:
        raise UnfitError(f"{name}: holds {dtype}, no real numbers; save uint8, or floats in [0, 1]")
    if dtype.kind == "f" and dtype.itemsize > LARGEST_FLOAT:
        return np.dtype(np.float64)
    return dtype.newbyteorder("=")


def _read_file(file: Path, start: int, stop: int) -> Tensor:
    if file.suffix.lower() == ".npy":
        array = _map_array(file)
        return as_pixels(torch.from_numpy(np.array(array[start:stop], native(array.dtype, str(file)))), str(file))
    with _open_png(file) as image:
        try:
            pixels = np.array(image)
        except Exception as error:  # a truncated or corrupt PNG
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
    wide = images.to(torch.promote_types(images.dtype, torch.float32))  # half precision would round twice
    return (wide * 255).round().to(torch.uint8)


def _size(images: Tensor) -> tuple[int, int]:
    return images.shape[2], images.shape[3]
