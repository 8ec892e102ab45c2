"""Sets of images that are compared: samples of networks, real crops, folders of files.

Legend: N images of a set.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from dmd_dar.methods.generate import Generator
from dmd_dar.spectrum import MIN_SIZE

from .facts import SetFacts
from .images import SAMPLES, ImageStream, UnfitError, open_images

Role = Literal["real", "teacher", "undistilled", "student", "images", "null"]

FEWEST = 4  # images of a set
BATCH = 256
NO_LABEL = 1 << 62  # labels are below it
IN_MEMORY = 1 << 30  # bytes; a larger folder is read in batches, from disk each time


@dataclass(frozen=True)
class ImageSet:
    """Images of one origin. `paired`: row i shares noise and class with row i of every other paired set."""

    name: str
    images: Tensor | ImageStream  # uint8 (N, 3, H, W)
    labels: Tensor | None  # (N,) integers, None where the classes are not known
    role: Role
    paired: bool
    facts: SetFacts = SetFacts()
    generator: Generator | None = field(default=None, repr=False, compare=False)  # what made them, for its cost
    latents: Tensor | None = field(default=None, repr=False, compare=False)  # (N, C, h, w) that they were decoded from
    names: dict[int, str] = field(default_factory=dict, repr=False)  # of the labels, where the set itself says so
    prompted: bool = False  # whether these names are the prompts that the images were made from

    @cached_property
    def stream(self) -> ImageStream:
        return open_images(self.images, self.name) if isinstance(self.images, Tensor) else self.images

    @property
    def count(self) -> int:
        return self.stream.count

    @property
    def classes(self) -> np.ndarray | None:
        return None if self.labels is None else self.labels.cpu().numpy()

    def batches(self) -> Iterator[Tensor]:
        """uint8 (n, 3, H, W), all images in order."""
        return (images for _, images in self.stream.batches(BATCH))

    def first(self, most: int) -> Tensor:
        """uint8 (n, 3, H, W) of the first images, at most `most`."""
        return self.stream.read(0, min(self.count, most))

    def rows(self, indices: list[int]) -> Tensor:
        """uint8 (n, 3, H, W) of these images."""
        return torch.cat([self.stream.read(i, i + 1) for i in indices])


def read_set(path: str, role: Role = "images") -> ImageSet:
    """The set named after a folder of PNG or npy files, or after an npy file.

    Its classes and their names are those of a samples.json, as dmd_dar.sample writes it, where one lies beside the
    images; its facts say what else lies there. UnfitError as for `open_images`.
    """
    stream = open_images(path)
    small = 3 * stream.count * stream.size[0] * stream.size[1] <= IN_MEMORY
    labels, names, prompted = _described(Path(path) / SAMPLES, stream.count)
    images = stream.all() if small else stream
    facts = SetFacts(folder=str(path), left_out=stream.others or None)
    return ImageSet(stream.name, images, labels, role, paired=False, facts=facts, names=names, prompted=prompted)


def _described(path: Path, count: int) -> tuple[Tensor | None, dict[int, str], bool]:
    """What a samples.json says: the labels, the names of those that have one, and whether these are prompts."""
    if not path.is_file():
        return None, {}, False
    try:
        description = json.loads(path.read_bytes())  # bytes: of whatever encoding JSON is written in
        labels = description["labels"]
        if not isinstance(labels, list) or not all(type(label) is int and abs(label) < NO_LABEL for label in labels):
            raise ValueError("labels are integers, one for each image")
        names = {int(label): str(name) for label, name in description.get("names", {}).items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UnfitError(f"{path}: no list of labels ({error}); make the samples anew or remove the file") from error
    if len(labels) != count:
        raise UnfitError(f"{path}: {len(labels)} labels for {count} images; make the samples anew")
    return torch.tensor(labels, dtype=torch.int64), names, description.get("prompted") is True


def validate(one: ImageSet, reference: ImageSet) -> None:
    """UnfitError naming the set where its images or labels do not fit, or its size is not the reference's."""
    images = one.images
    if isinstance(images, Tensor) and (images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3):
        raise UnfitError(f"{one.name}: expected uint8 (N, 3, H, W), got {images.dtype} {tuple(images.shape)}")
    size, wanted = one.stream.size, reference.stream.size
    if size != wanted:
        sizes = ["x".join(map(str, pair)) for pair in (size, wanted)]
        raise UnfitError(f"{one.name}: images of {sizes[0]} px, but {sizes[1]} px in {reference.name}; give one size")
    if min(size) < MIN_SIZE:
        raise UnfitError(f"{one.name}: images of {size[0]}x{size[1]} px; spectra need {MIN_SIZE} px at least")
    if one.count < FEWEST:
        raise UnfitError(f"{one.name}: {one.count} images are too few; give at least {FEWEST}")
    if one.labels is not None and one.labels.shape != (one.count,):
        raise UnfitError(f"{one.name}: {one.count} images and labels {tuple(one.labels.shape)}; give one for each")
