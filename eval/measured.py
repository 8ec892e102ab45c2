"""One set of images, measured once for all its comparisons.

Legend: N images of a set, F radial bins.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from eval import features, frechet, maps, sliced, structure
from eval.features import Features
from eval.sets import ImageSet
from eval.spectrum import Spectrum, as_floats, spectrum_of

CHROMA = ("cb", "cr")
DIVERSITY_IMAGES = 256  # of a class, whose pairs are looked at
SLICED_IMAGES = 512  # of a set, whose patches are sorted: their distances cost more than all else together


@dataclass(frozen=True)
class Measured:
    """Everything about one set that the comparisons need, measured once."""

    source: ImageSet
    luma: Spectrum
    chroma: dict[str, Spectrum]
    structure: structure.Structure
    lines: np.ndarray  # (N, 2, 4, 5), see maps.grid_lines
    plane: Tensor  # (H, W) mean log power, dB
    wavelet_energy: np.ndarray  # (3, 3) mean log energy, finest level first, columns LH, HL, HH
    wavelet_kurtosis: np.ndarray  # (3, 3) medians
    patches: list[Tensor]
    features: dict[str, Features]
    spread: dict[int, float]  # diversity of each class in pixels
    spread_of_all: dict[int, float]  # of all images as one class

    def __len__(self) -> int:
        return self.source.count


def measure_one(one: ImageSet, found: dict[str, Features]) -> Measured:
    """`found`: its features by extractor."""
    wavelets = [structure.wavelet_statistics(as_floats(batch)) for batch in one.batches()]
    energy, kurtosis = (np.concatenate(parts) for parts in zip(*wavelets, strict=True))
    some, labels = _some(one)
    return Measured(
        source=one,
        luma=spectrum_of(one.batches()),
        chroma={channel: spectrum_of(one.batches(), channel=channel) for channel in CHROMA},
        structure=structure.structure_of(one.batches()),
        lines=np.concatenate([maps.grid_lines(batch) for batch in one.batches()]),
        plane=maps.mean_log_map(one.batches()),
        wavelet_energy=energy.mean(0),
        wavelet_kurtosis=np.median(kurtosis, axis=0),
        patches=sliced.sliced_patches(one.first(SLICED_IMAGES)),
        features=found,
        spread={} if one.labels is None else frechet.class_diversity(some, labels),
        spread_of_all=_spread_of_all(one),
    )


def _some(one: ImageSet) -> tuple[Tensor, Tensor]:
    """Small pixels (n, D) and labels of at most DIVERSITY_IMAGES of each class; nothing where classes are unknown."""
    classes = np.zeros(0, dtype=int) if one.classes is None else one.classes
    rows = np.sort(
        np.concatenate([np.flatnonzero(classes == c)[:DIVERSITY_IMAGES] for c in np.unique(classes)] or [[]])
    )
    rows = rows.astype(int)
    pixels = [features.small_pixels(one.rows(rows[i : i + 256].tolist())) for i in range(0, len(rows), 256)]
    return torch.cat(pixels) if pixels else torch.empty(0, 0), torch.from_numpy(classes[rows])


def _spread_of_all(one: ImageSet) -> dict[int, float]:
    pixels = features.small_pixels(one.first(DIVERSITY_IMAGES))
    return frechet.class_diversity(pixels, torch.zeros(len(pixels)))
