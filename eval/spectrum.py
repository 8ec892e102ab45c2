"""Spectral comparison of two sets of images, with intervals. The estimator itself is dmd_dar.spectrum.

Gains are in dB: 0 preserved, below 0 lost, above 0 added (a failure as well).
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dmd_dar.spectrum import (
    BAND_EDGES,
    BAND_NAMES,
    QUANTISATION_POWER,
    Channel,
    Window,
    band_energies,
    hfer,
    image_psd,
    log_radial_psd,
    log_spectral_distance,
    modes,
    radial_frequencies,
    radial_psd,
    slope,
    with_hf,
)
from eval.stats import Interval, Sample, bootstrap

__all__ = [
    "BAND_EDGES",
    "BAND_NAMES",
    "QUANTISATION_POWER",
    "Channel",
    "Spectrum",
    "Window",
    "band_energies",
    "band_gains",
    "gain_curve",
    "hf_gain_by_class",
    "hfer",
    "image_psd",
    "log_radial_psd",
    "log_spectral_distance",
    "median_gains",
    "radial_frequencies",
    "radial_psd",
    "slope",
    "spectrum_of",
    "with_hf",
]

SLOPE_HF_LOW = 0.2
POWER_FLOOR = 1e-9  # a thousandth of the power of 8-bit rounding in a single mode


@dataclass(frozen=True)
class Spectrum:
    """What the comparisons need of one set of N images: F radial bins, columns of BAND_NAMES."""

    frequencies: Tensor  # (F,) cycles per pixel
    counts: Tensor  # (F,) modes per bin
    per_image: Tensor  # (N, F) radial power of each image
    energies: np.ndarray  # (N, 6)
    hfer: float

    @property
    def power(self) -> Tensor:
        return self.per_image.mean(0)

    @property
    def slopes(self) -> tuple[float, float]:
        """Slope of log power on log frequency over [2.5 / S, 0.45] and over [0.2, 0.45]."""
        whole = slope(self.frequencies, self.power, self.counts)
        return whole.item(), slope(self.frequencies, self.power, self.counts, low=SLOPE_HF_LOW).item()


def spectrum_of(images: Tensor, *, window: Window = "hann", channel: Channel = "y") -> Spectrum:
    """Measures float images (N, 3, H, W) in [0, 1] once, for any number of comparisons.

    Powers are held above POWER_FLOOR, so that a set without any detail reads a large loss and not minus infinity.
    A band without a mode (B0 of a 32-px image) has the energy NaN and so no gain.
    """
    frequencies, counts = radial_frequencies(*images.shape[-2:], window=window)
    per_image = image_psd(images, window=window, channel=channel)[1].clamp(min=POWER_FLOOR).cpu()
    bands = band_energies(images, window=window, channel=channel).clamp(min=POWER_FLOOR).cpu()
    empty = torch.bincount(modes(*images.shape[-2:]).band.flatten(), minlength=6)[:5] == 0
    energies = with_hf(bands.masked_fill(empty, torch.nan)).numpy()
    pooled_ratio, _ = hfer(images, window=window, channel=channel)
    return Spectrum(frequencies, counts, per_image, energies, pooled_ratio.item())


def decibel(ratio: np.ndarray) -> np.ndarray:
    return 10 * np.log10(ratio)


def band_gains(student: Sample, reference: Sample, *, paired: bool, rng: np.random.Generator) -> dict[str, Interval]:
    """gain_db[b] = 10 log10(mean_i E_b student / mean_i E_b reference) for B0..B4 and HF, from energies (N, 6)."""

    def gains(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:  # (R, N, 6) -> (R, 6)
        return decibel(ours.mean(1) / theirs.mean(1))

    value, low, high = bootstrap(gains, student, reference, paired=paired, rng=rng)
    return {name: Interval(float(value[b]), float(low[b]), float(high[b])) for b, name in enumerate(BAND_NAMES)}


def median_gains(student: Sample, reference: Sample) -> dict[str, float]:
    """gain_db_median[b]: median over pairs (same noise, same class) of the pair's own gain, from energies (N, 6)."""
    gains = np.median(decibel(student.values / reference.values), axis=0)
    return dict(zip(BAND_NAMES, gains.tolist(), strict=True))


def hf_gain_by_class(student: Sample, reference: Sample) -> dict[int, float]:
    """Gain of HF in dB within each class that both sets have, from energies (N, 6)."""
    shared = np.intersect1d(student.labels, reference.labels)
    return {int(label): float(decibel(_class_hf(student, label) / _class_hf(reference, label))) for label in shared}


def _class_hf(sample: Sample, label: int) -> float:
    return sample.values[sample.labels == label, BAND_NAMES.index("HF")].mean()


def gain_curve(student: Spectrum, reference: Spectrum) -> tuple[Tensor, float, float]:
    """10 log10(R / R_ref) of each bin (F,) in dB, the log-spectral distance and its signed mean."""
    curve = 10 * torch.log10(student.power / reference.power)
    distance, signed = log_spectral_distance(student.frequencies, student.power, reference.power)
    return curve, distance.item(), signed.item()
