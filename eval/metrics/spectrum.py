"""Spectral comparison of two sets of images, with intervals. The estimator itself is dmd_dar.spectrum.

Gains are in dB: 0 preserved, below 0 lost, above 0 added (a failure as well).
"""

from collections.abc import Iterable, Sequence
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
    compared_powers,
    hfer,
    hfer_of,
    image_psd,
    log_radial_psd,
    log_spectral_distance,
    radial_frequencies,
    radial_psd,
    slope,
    with_hf,
)

from ..samples.images import UnfitError
from .intervals import Interval, Sample, bootstrap

__all__ = [
    "BAND_EDGES",
    "BAND_NAMES",
    "QUANTISATION_POWER",
    "Channel",
    "Spectrum",
    "Window",
    "as_floats",
    "band_energies",
    "band_gain_db",
    "band_gains",
    "gain_curve",
    "hf_gain_by_class",
    "hf_gain_db",
    "hfer",
    "image_psd",
    "labelled",
    "labelled_pair",
    "log_radial_psd",
    "log_spectral_distance",
    "median_gains",
    "radial_frequencies",
    "radial_psd",
    "same_size",
    "slope",
    "spectrum_of",
    "with_hf",
]

HF = BAND_NAMES.index("HF")
SLOPE_HF_LOW = 0.2


@dataclass(frozen=True)
class Spectrum:
    """What the comparisons need of one set of N images: F radial bins, columns of BAND_NAMES."""

    size: tuple[int, int]  # height and width
    frequencies: Tensor  # (F,) cycles per pixel
    counts: Tensor  # (F,) modes per bin
    per_image: Tensor  # (N, F) radial power of each image
    energies: np.ndarray  # (N, 6)
    parts: Tensor  # (N, 2) energy at f > 1/4 and at 0 < f <= 1/4, corners included

    @staticmethod
    def of(size: tuple[int, int], rows: dict[str, Tensor], window: Window = "hann") -> "Spectrum":
        """Of images whose `rows` were joined."""
        frequencies, counts = radial_frequencies(*size, window=window)
        return Spectrum(size, frequencies, counts, rows["per_image"], rows["energies"].numpy(), rows["parts"])

    @property
    def rows(self) -> dict[str, Tensor]:
        """What is said of each image by itself: rows of several sets join to those of all their images."""
        return {"per_image": self.per_image, "energies": torch.from_numpy(self.energies), "parts": self.parts}

    @property
    def power(self) -> Tensor:
        return self.per_image.mean(0)

    @property
    def hfer(self) -> float:
        """Energy at f > 1/4 over energy at f > 0, pooled."""
        return hfer_of(self.parts)[0].item()

    @property
    def hfer_per_image(self) -> np.ndarray:
        return hfer_of(self.parts)[1].numpy()

    @property
    def slopes(self) -> tuple[float, float]:
        """Slope of log power on log frequency over [2.5 / S, 0.45] and over [0.2, 0.45]."""
        whole = slope(self.frequencies, self.power, self.counts)
        return whole.item(), slope(self.frequencies, self.power, self.counts, low=SLOPE_HF_LOW).item()


def as_floats(images: Tensor) -> Tensor:
    """uint8 images to floats in [0, 1]; floats as they are."""
    return images.float() / 255 if images.dtype == torch.uint8 else images


def spectrum_of(
    images: Tensor | Iterable[Tensor], *, window: Window = "hann", channel: Channel = "y", first: int = 0
) -> Spectrum:
    """Measures images (N, C, H, W) once, for any number of comparisons: uint8, floats in [0, 1], or batches of them.

    Powers are held above POWER_FLOOR, so that a set without any detail reads a large loss and not minus infinity.
    A band without a mode (B0 of a 32-px image) has the energy NaN and so no gain.
    UnfitError naming the first image that holds a number that is not finite, counted from `first`, and for batches of
    several sizes or none.
    """
    batches = [images] if isinstance(images, Tensor) else images
    parts = [_measure(as_floats(batch), window, channel) for batch in batches]
    if not parts:
        raise UnfitError("expected at least one batch of images, got none")
    for part in parts[1:]:
        same_size(part, parts[0], "a batch", "the first")
    rows = [part.rows for part in parts]
    whole = Spectrum.of(parts[0].size, {name: torch.cat([row[name] for row in rows]) for name in rows[0]}, window)
    bad = ~torch.isfinite(whole.parts).all(1)
    if bad.any():
        place = first + int(bad.nonzero()[0])
        raise UnfitError(f"image {place}: holds NaN or infinity, as do {int(bad.sum()) - 1} others; remove them")
    return whole


def _measure(images: Tensor, window: Window, channel: Channel) -> Spectrum:
    frequencies, counts = radial_frequencies(*images.shape[-2:], window=window)
    powers = compared_powers(images, window=window, channel=channel)
    size = (images.shape[-2], images.shape[-1])
    return Spectrum(size, frequencies, counts, powers.radial, powers.bands.numpy(), powers.parts)


def labelled(values: np.ndarray, labels: Tensor | np.ndarray | None) -> Sample:
    """Per-image values (N, ...) with their classes; without labels all images are of one class."""
    return Sample(values, np.zeros(len(values), dtype=int) if labels is None else np.asarray(labels))


def labelled_pair(
    values: tuple[np.ndarray, np.ndarray], labels: Sequence[Tensor | np.ndarray | None], paired: bool
) -> tuple[Sample, Sample]:
    """Two sets' per-image values with the classes within which they are resampled: those of both, if both are known.

    Images of two paired sets share their class, so that one set's will do.
    """
    ours, theirs = labels
    if ours is None or theirs is None:
        ours = theirs = (theirs if ours is None else ours) if paired else None
    return labelled(values[0], ours), labelled(values[1], theirs)


def band_gain_db(
    images: Spectrum | Tensor | Iterable[Tensor],
    reference: Spectrum | Tensor | Iterable[Tensor],
    *,
    labels: Tensor | None = None,
    reference_labels: Tensor | None = None,
    paired: bool = False,
    seed: int = 0,
) -> dict[str, Interval]:
    """Gain 10 log10(mean E / mean E_ref) in dB of each band of BAND_NAMES, with its 95 % interval.

    images (N, C, H, W) and reference (M, C, H, W): uint8, floats in [0, 1], or batches of them, of one size, compared
    by their luma; or spectra of another channel or window. labels: classes (N,) within which the bootstrap resamples,
    see `labelled_pair`. paired: row i of both shares noise and class (N = M). A band without a mode (B0 of a 32-px
    image) reads NaN. UnfitError as for `spectrum_of`.
    """
    ours, theirs = (x if isinstance(x, Spectrum) else spectrum_of(x) for x in (images, reference))
    same_size(ours, theirs, "the images", "the reference")
    samples = labelled_pair((ours.energies, theirs.energies), (labels, reference_labels), paired)
    return band_gains(*samples, paired=paired, rng=np.random.default_rng(seed))


def same_size(ours: Spectrum, theirs: Spectrum, name: str, other: str) -> None:
    """UnfitError where two sets differ in image size, so that their energies and bins do not compare."""
    if ours.size != theirs.size:
        sizes = ["x".join(map(str, spectrum.size)) for spectrum in (ours, theirs)]
        raise UnfitError(f"{name} are {sizes[0]} px, {other} {sizes[1]} px; spectra compare at one size")


def decibel(ratio: np.ndarray) -> np.ndarray:
    return 10 * np.log10(ratio)


def pooled_gains(energies: np.ndarray, reference: np.ndarray, axis: int = 0) -> np.ndarray:
    """10 log10(mean E / mean E_ref) in dB, the means over the images on `axis`."""
    return decibel(energies.mean(axis) / reference.mean(axis))


def hf_gain_db(ours: Spectrum, reference: Spectrum) -> float:
    """The pooled gain of HF alone, without its interval."""
    return float(pooled_gains(ours.energies[:, HF], reference.energies[:, HF]))


def hfer_difference(shares: np.ndarray, reference: np.ndarray, axis: int = 0) -> np.ndarray:
    """Difference of the means over images of `hfer_per_image`."""
    return shares.mean(axis) - reference.mean(axis)


def band_gains(student: Sample, reference: Sample, *, paired: bool, rng: np.random.Generator) -> dict[str, Interval]:
    """gain_db[b] = 10 log10(mean_i E_b student / mean_i E_b reference) for B0..B4 and HF, from energies (N, 6)."""

    def gains(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:  # (R, N, 6) -> (R, 6)
        return pooled_gains(ours, theirs, axis=1)

    value, low, high = bootstrap(gains, student, reference, paired=paired, rng=rng)
    return {name: Interval(float(value[b]), float(low[b]), float(high[b])) for b, name in enumerate(BAND_NAMES)}


def median_gains(student: Sample, reference: Sample) -> dict[str, float]:
    """gain_db_median[b]: median over pairs (same noise, same class) of the pair's own gain, from energies (N, 6)."""
    gains = np.median(decibel(student.values / reference.values), axis=0)
    return dict(zip(BAND_NAMES, gains.tolist(), strict=True))


def hf_gain_by_class(student: Sample, reference: Sample) -> dict[int, float]:
    """Gain of HF in dB within each class that both sets have, from energies (N, 6)."""
    shared = np.intersect1d(student.labels, reference.labels)
    return {
        int(label): float(pooled_gains(*(one.values[one.labels == label, HF] for one in (student, reference))))
        for label in shared
    }


def gain_curve(student: Spectrum, reference: Spectrum) -> tuple[Tensor, float, float]:
    """10 log10(R / R_ref) of each bin (F,) in dB, the log-spectral distance and its signed mean."""
    curve = 10 * torch.log10(student.power / reference.power)
    distance, signed = log_spectral_distance(student.frequencies, student.power, reference.power)
    return curve, distance.item(), signed.item()
