"""Wavelet statistics of luma, and fd_wavelet: how far a set's are from a reference's, which sees blur and noise.

Legend: N images.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from dmd_dar.spectrum import QUANTISATION_POWER

from .frechet import feature_distance, null_distance, standardise
from .structure import LEVELS, details, luma


@dataclass(frozen=True)
class Distance:
    """A squared Frechet distance beside the value that two sets of the same source and the same sizes would show.

    excess: the value over its null.
    """

    value: float
    null: float
    comparable_to_published: bool = False
    excess: float = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "excess", self.value - self.null)


def wavelet_features(images: Tensor) -> Tensor:
    """Wavelet statistics of float images in [0, 1], (N, 3, H, W) -> (N, 20) float64.

    Columns, on luma: for each of 3 db2 levels from the finest, for LH, HL, HH, the pair (log energy, log kurtosis),
    then the mean and the log standard deviation. Energy is m2 + q with q the power of 8-bit rounding, and kurtosis
    (m4 + 6 q m2 + 3 q^2) / (m2 + q)^2: both as if Gaussian noise of that power were added, so an empty sub-band
    reads a finite energy and the kurtosis 3.
    """
    plane = luma(images)
    columns = []
    for level in details(plane, LEVELS):
        for band in level:
            second, fourth = (band**2).mean((-2, -1)), (band**4).mean((-2, -1))
            energy = second + QUANTISATION_POWER
            noisy = fourth + 6 * QUANTISATION_POWER * second + 3 * QUANTISATION_POWER**2
            columns += [np.log(energy), np.log(noisy / energy**2)]
    columns += [plane.mean((-2, -1)), 0.5 * np.log(plane.var((-2, -1)) + QUANTISATION_POWER)]
    return torch.from_numpy(np.stack(columns, axis=1))


def fd_wavelet(features: Tensor, reference: Tensor, null: float, names: tuple[str, str]) -> Distance:
    """Squared Frechet distance over `wavelet_features` in units of the reference's spread, with its null."""
    value = feature_distance(standardise(features, reference), standardise(reference, reference), names)
    return Distance(value, null)


def fd_null(reference: Tensor, size: int, rng: np.random.Generator, second: Tensor | None = None) -> float:
    """`null_distance` over features in units of the reference's spread, as `fd_wavelet` reads them."""
    scaled = None if second is None else standardise(second, reference)
    return null_distance(standardise(reference, reference), size, rng, scaled)[0]
