"""One set of images, measured once for all its comparisons.

Legend: N images of a set, F radial bins.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial, reduce
from operator import add
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ..metrics import colour, features, power_map, sliced, structure
from ..metrics.diversity import class_diversity
from ..metrics.features import Features
from ..metrics.intervals import Sample
from ..metrics.spectrum import Channel, Spectrum, as_floats, spectrum_of
from ..samples.parallel import Processes, Rows, grouped, one_thread, ungrouped
from ..samples.sets import BATCH, ImageSet
from .ledger import Ledger
from .suite import Suite, features_of

LUMA: Literal["y"] = "y"
CHROMA: tuple[Literal["cb", "cr"], ...] = ("cb", "cr")
DIVERSITY_IMAGES = 256  # of a class, whose pairs are looked at
SLICED_IMAGES = 512  # of a set, whose patches are sorted


@dataclass(frozen=True)
class MeasuredSet:
    """Everything about one set that the comparisons need, measured once."""

    source: ImageSet
    luma: Spectrum
    chroma: dict[str, Spectrum]
    structure: structure.Structure
    colour: np.ndarray  # (N, 6), columns of colour.COLUMNS
    lines: np.ndarray  # (N, 2, 4, 5), see power_map.grid_lines
    plane: Tensor  # (H, W) mean log power, dB
    wavelet_energy: np.ndarray  # (3, 3) mean log energy, finest level first, columns LH, HL, HH
    wavelet_kurtosis: np.ndarray  # (3, 3) medians
    slices: sliced.Slices
    features: dict[str, Features]
    spread: dict[int, float]  # diversity of each class in pixels
    spread_of_all: dict[int, float]  # of all images as one class

    def __len__(self) -> int:
        return self.source.count


@dataclass(frozen=True)
class Reading:
    """What is read from the images of one set, each by itself."""

    features: dict[str, Features]  # by extractor
    rows: Rows  # of `rows_of`


def read_one(one: ImageSet, suite: Suite, ledger: Ledger, processes: Processes | None = None) -> Reading:
    """Shared out among the processes, each of which gets all of it."""
    processes = processes or Processes()
    with one_thread(suite.small):
        features_by_name = features_of(one, suite, ledger, processes)
        rows = processes.joined(one.count, lambda rank, world: rows_of(one, rank, world))
    return Reading(features_by_name, rows)


def by_prompt(sample: Sample, source: ImageSet) -> Sample:
    """The first images' values as they are to be resampled: prompt by prompt, where they were made from prompts."""
    if not source.prompted or source.classes is None:
        return sample
    return Sample(sample.values, source.classes[: len(sample.values)], prompted=True)


@dataclass(frozen=True)
class SetRows:
    """What `rows_of` read of a set of images of `size`, as the comparisons take it."""

    size: tuple[int, int]
    rows: Rows

    @cached_property
    def groups(self) -> dict[str, Rows]:
        return ungrouped(self.rows)

    def spectrum(self, channel: str = LUMA) -> Spectrum:
        return Spectrum.of(self.size, self.groups[channel])

    @property
    def structure(self) -> structure.Structure:
        return structure.Structure.of(self.groups["structure"])

    @property
    def colour(self) -> np.ndarray:
        """(N, 6), columns of colour.COLUMNS."""
        energies = [self.groups[channel]["energies"].numpy() for channel in CHROMA]
        return colour.with_speckle(self.groups["colour"]["values"].numpy(), energies, self.size)

    @property
    def lines(self) -> np.ndarray:
        """(N, 2, 4, 5), see power_map.grid_lines."""
        return self.groups["grid"]["lines"].numpy()


def rows_of(one: ImageSet, rank: int = 0, world: int = 1) -> Rows:
    """All of READERS of each image of the share of process `rank` of `world`, from one reading of the stream; and
    `plane.total`, their log power summed, as a single row (1, H, K).
    """
    parts, planes = [], []
    for _, batch in one.stream.batches(BATCH, rank, world):
        images = as_floats(batch)
        planes.append(power_map.map_sum(images))
        parts.append(_read(images, tuple(READERS)))
    return {**_joined(parts), "plane.total": reduce(add, planes).total[None]}


def chosen_rows(one: ImageSet, *readers: str) -> SetRows:
    """What these of READERS and ALONE say of each image, for a command that needs no more."""
    return SetRows(one.stream.size, _joined([_read(as_floats(batch), readers) for batch in one.batches()]))


def _read(images: Tensor, readers: Sequence[str]) -> Rows:
    return grouped({name: (READERS | ALONE)[name](images) for name in readers})


def _joined(parts: Sequence[Rows]) -> Rows:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _spectrum_rows(images: Tensor, channel: Channel) -> Rows:
    return spectrum_of(images, channel=channel).rows


def _wavelet_rows(images: Tensor) -> Rows:
    energy, kurtosis = (torch.from_numpy(values) for values in structure.wavelet_statistics(images))
    return {"energy": energy, "kurtosis": kurtosis}


def _patch_rows(images: Tensor) -> Rows:
    coarse, fine = (torch.from_numpy(values) for values in structure.patch_energies(images))
    return {"coarse": coarse, "fine": fine}


# What is said of each image by itself, from floats (n, 3, H, W) in [0, 1].
READERS: dict[str, Callable[[Tensor], Rows]] = {
    **{channel: partial(_spectrum_rows, channel=channel) for channel in (LUMA, *CHROMA)},
    "structure": structure.structure_rows,
    "wavelet": _wavelet_rows,
    "colour": colour.colour_rows,
    "grid": lambda images: {"lines": torch.from_numpy(power_map.grid_lines(images))},
}
ALONE: dict[str, Callable[[Tensor], Rows]] = {  # parts of the above, for who needs no more
    "hf_kurtosis": lambda images: {"values": torch.from_numpy(structure.hf_kurtosis(images))},
    "patches": _patch_rows,
}


def mean_plane(one: ImageSet, rows: Rows) -> Tensor:
    """Its mean log power over the plane of frequencies, (H, W) in dB, f = 0 at [H // 2, W // 2]."""
    return power_map.MapSum(one.count, one.stream.size[1], rows["plane.total"].sum(0)).mean


def measure_one(one: ImageSet, read: Reading, seed: int) -> MeasuredSet:
    """From what was read, and of at most a few hundred images what needs them together: patches and diversity.

    seed: of the directions on which patches are compared.
    """
    rows = SetRows(one.stream.size, read.rows)
    slices = sliced.Slices(sliced.sliced_patches(one.first(SLICED_IMAGES)), seed)
    _ = slices.ordered  # here, where sets are measured side by side
    return MeasuredSet(
        source=one,
        luma=rows.spectrum(),
        chroma={channel: rows.spectrum(channel) for channel in CHROMA},
        structure=rows.structure,
        colour=rows.colour,
        lines=rows.lines,
        plane=mean_plane(one, read.rows),
        wavelet_energy=rows.groups["wavelet"]["energy"].numpy().mean(0),
        wavelet_kurtosis=np.median(rows.groups["wavelet"]["kurtosis"].numpy(), axis=0),
        slices=slices,
        features=read.features,
        spread=class_spread(one),
        spread_of_all=_spread_of_all(one),
    )


def class_spread(one: ImageSet) -> dict[int, float]:
    """Diversity of each class in pixels, over the first DIVERSITY_IMAGES of it; empty where classes are unknown.

    In `small_pixels`: of pixels as they are, white noise would make distinct images of one that is repeated.
    """
    if one.classes is None:
        return {}
    of_class = [np.flatnonzero(one.classes == c)[:DIVERSITY_IMAGES] for c in np.unique(one.classes)]
    rows = np.sort(np.concatenate(of_class))
    pixels = [features.small_pixels(one.rows(rows[i : i + BATCH].tolist())) for i in range(0, len(rows), BATCH)]
    return class_diversity(torch.cat(pixels), torch.from_numpy(one.classes[rows]))


def _spread_of_all(one: ImageSet) -> dict[int, float]:
    pixels = features.small_pixels(one.first(DIVERSITY_IMAGES))
    return class_diversity(pixels, torch.zeros(len(pixels)))
