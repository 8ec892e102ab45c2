"""Structure of fine detail: what a matching power spectrum alone cannot show.

Noise shaped to the right spectrum has the right band energies, but no edges (kurtosis), no agreement between scales
(parent-child correlation), and it fills smooth regions (flat-patch energy). All on luma, wavelet db2.
Legend: N images, k x k coefficients of a sub-band, P patches, R resamples.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pywt
import torch
from torch import Tensor

from dmd_dar.spectrum import QUANTISATION_POWER, to_channel

from .intervals import UNDEFINED, Interval, Sample, bootstrap_interval
from .spectrum import as_floats, band_gains, decibel, labelled_pair, same_size, spectrum_of
from .verdict import Verdict, verdict_of

LEVELS = 3
BANDS = ("LH", "HL", "HH")
WAVELET = "db2"
PATCH = 4  # sub-band coefficients, 8 pixels
FLAT_SHARE = 0.1
LEAST_KURTOSIS = 0.1  # below this the reference itself has no heavy tails and a ratio says nothing
PIXELS_PER_CHUNK = 1 << 22  # transformed at once, in float64


def luma(images: Tensor) -> np.ndarray:
    """Float images (N, 3, H, W) in [0, 1] to luma (N, H, W) float64."""
    return to_channel(images.double()).cpu().numpy()


def details(plane: np.ndarray, levels: int) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Sub-bands (LH, HL, HH), each (N, k, k), finest level first; borders extended symmetrically."""
    coefficients = pywt.wavedec2(plane, WAVELET, mode="symmetric", level=levels, axes=(-2, -1))
    return coefficients[:0:-1]


def excess_kurtosis(values: np.ndarray) -> np.ndarray:
    """m4 / m2^2 - 3 over the last two axes, (N, k, k) -> (N,); 0 where nothing varies."""
    centred = values - values.mean((-2, -1), keepdims=True)
    second = (centred**2).mean((-2, -1))
    fourth = (centred**4).mean((-2, -1))
    varies = second > np.finfo(np.float64).eps
    return np.where(varies, fourth / np.where(varies, second, 1.0) ** 2 - 3.0, 0.0)


def wavelet_statistics(images: Tensor, levels: int = LEVELS) -> tuple[np.ndarray, np.ndarray]:
    """Log energy and excess kurtosis of every sub-band, (N, 3, H, W) -> two (N, levels, 3).

    Level 0 is the finest, the last axis is BANDS; the energy is the mean square plus the power of 8-bit rounding.
    """
    bands = [band for level in details(luma(images), levels) for band in level]
    energy = np.stack([np.log((band**2).mean((-2, -1)) + QUANTISATION_POWER) for band in bands], axis=1)
    kurtosis = np.stack([excess_kurtosis(band) for band in bands], axis=1)
    return energy.reshape(-1, levels, 3), kurtosis.reshape(-1, levels, 3)


def gradient_kurtosis(images: Tensor) -> np.ndarray:
    """Excess kurtosis of the differences of neighbours, down and across together, (N, 3, H, W) -> (N,)."""
    plane = luma(images)
    steps = [np.diff(plane, axis=axis).reshape(len(plane), 1, -1) for axis in (-2, -1)]
    return excess_kurtosis(np.concatenate(steps, axis=-1))


def hf_kurtosis(images: Tensor) -> np.ndarray:
    """Excess kurtosis of the level-1 HH sub-band of each image, (N, 3, H, W) -> (N,). Report the median."""
    return excess_kurtosis(details(luma(images), 1)[0][2])


def tail_ratio(kurtosis: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Ratio of excess kurtoses, elementwise; NaN where the reference has no heavy tails to preserve."""
    return np.where(reference >= LEAST_KURTOSIS, kurtosis / np.maximum(reference, LEAST_KURTOSIS), np.nan)


def kurtosis_ratio(student: Sample, reference: Sample, *, paired: bool, rng: np.random.Generator) -> Interval:
    """Ratio of the medians of `hf_kurtosis`; undefined where the reference has no heavy tails to preserve."""
    if np.isnan(tail_ratio(*(np.median(one.values) for one in (student, reference)))):
        return UNDEFINED

    def ratio(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:  # (R, N) -> (R,)
        return np.median(ours, axis=1) / np.maximum(np.median(theirs, axis=1), LEAST_KURTOSIS)

    return bootstrap_interval(ratio, student, reference, paired=paired, rng=rng)


def parent_child_corr(images: Tensor) -> np.ndarray:
    """Correlation of log |HH| at level 1 with its parent at level 2 within each image, (N, 3, H, W) -> (N,).

    Coefficient (i, j) has the parent (i // 2, j // 2); the outermost parents are left out since they see the border.
    Magnitudes are held above the amplitude of 8-bit rounding.
    """
    plane = luma(images)
    height, width = (n - n % 4 for n in plane.shape[-2:])
    coefficients = pywt.wavedec2(plane[:, :height, :width], WAVELET, mode="periodization", level=2, axes=(-2, -1))
    parent, child = (np.log(np.abs(level[2]) + QUANTISATION_POWER**0.5) for level in coefficients[1:])
    parent = parent.repeat(2, axis=-2).repeat(2, axis=-1)[:, 2:-2, 2:-2]
    child = child[:, 2:-2, 2:-2]
    parent = parent - parent.mean((-2, -1), keepdims=True)
    child = child - child.mean((-2, -1), keepdims=True)
    scale = np.sqrt((parent**2).sum((-2, -1)) * (child**2).sum((-2, -1)))
    return (parent * child).sum((-2, -1)) / np.maximum(scale, np.finfo(np.float64).eps)


def parent_child_difference(student: Sample, reference: Sample, *, paired: bool, rng: np.random.Generator) -> Interval:
    """Difference of the medians of `parent_child_corr`; below 0: scales agree less than in the reference."""

    def difference(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:  # (R, N) -> (R,)
        return np.median(ours, axis=1) - np.median(theirs, axis=1)

    return bootstrap_interval(difference, student, reference, paired=paired, rng=rng)


def flat_patch_energy(images: Tensor) -> np.ndarray:
    """Fine-scale energy in the flattest tenth of a set's 8-px patches: (N, 2), sum over and number of flat patches.

    A patch is flat by the variance of its level-1 approximation (coarse content, so that noise does not hide it);
    its energy is the mean of LH^2 + HL^2 + HH^2, above the power of 8-bit rounding. The tenth is taken over the set.
    """
    return flat_energy(*patch_energies(images))


def patch_energies(images: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Variance of the approximation and fine-scale energy of each 8-px patch, both (N, P)."""
    approximation, (horizontal, vertical, diagonal) = pywt.dwt2(luma(images), WAVELET, mode="symmetric", axes=(-2, -1))
    fine = _patches(horizontal**2 + vertical**2 + diagonal**2).mean(-1) + 3 * QUANTISATION_POWER
    return _patches(approximation).var(-1), fine


def flat_energy(coarse: np.ndarray, fine: np.ndarray) -> np.ndarray:
    """`flat_patch_energy` from the `patch_energies` of the whole set."""
    flat = coarse <= np.quantile(coarse, FLAT_SHARE)
    return np.stack([(fine * flat).sum(1), flat.sum(1)], axis=1)


def _patches(coefficients: np.ndarray) -> np.ndarray:
    """(N, k, k) -> (N, patches, PATCH^2), without the first coefficient of an axis, which sees the border only."""
    count = len(coefficients)
    rows, columns = ((n - 1) // PATCH for n in coefficients.shape[-2:])
    kept = coefficients[:, 1 : 1 + rows * PATCH, 1 : 1 + columns * PATCH]
    tiles = kept.reshape(count, rows, PATCH, columns, PATCH).swapaxes(2, 3)
    return tiles.reshape(count, rows * columns, PATCH * PATCH)


def flat_noise_db(student: Sample, reference: Sample, *, paired: bool, rng: np.random.Generator) -> Interval:
    """Energy per flat patch against the reference in dB, from `flat_patch_energy` (N, 2); above 0: noise was added."""

    return bootstrap_interval(lambda a, b: flat_gain(a, b, axis=1), student, reference, paired=paired, rng=rng)


def flat_gain(ours: np.ndarray, theirs: np.ndarray, axis: int = 0) -> np.ndarray:
    """The gain of `flat_noise_db` from (..., N, 2) each, the images on `axis`; NaN where no patch is flat."""
    ours, theirs = ours.sum(axis), theirs.sum(axis)
    with np.errstate(invalid="ignore"):
        return decibel(ours[..., 0] / ours[..., 1]) - decibel(theirs[..., 0] / theirs[..., 1])


@dataclass(frozen=True)
class Structure:
    """What the comparisons need of one set of N images."""

    kurtosis: np.ndarray  # (N,) of the level-1 HH sub-band
    gradient_kurtosis: np.ndarray  # (N,)
    parent_child: np.ndarray  # (N,)
    flat: np.ndarray  # (N, 2)

    @staticmethod
    def of(rows: dict[str, Tensor]) -> "Structure":
        """Of all images of a set, whose `structure_rows` were joined: which patches are flat is a matter of the set."""
        values = {name: part.numpy() for name, part in rows.items()}
        flat = flat_energy(values.pop("coarse"), values.pop("fine"))
        return Structure(**values, flat=flat)


def structure_rows(images: Tensor) -> dict[str, Tensor]:
    """What is said of each image (N, 3, H, W), uint8 or floats in [0, 1], by itself: float64, (N,), patches (N, P)."""
    parts = []
    for chunk in images.split(max(1, PIXELS_PER_CHUNK // (images.shape[-1] * images.shape[-2]))):
        chunk = as_floats(chunk)
        parts.append((hf_kurtosis(chunk), gradient_kurtosis(chunk), parent_child_corr(chunk), *patch_energies(chunk)))
    names = ("kurtosis", "gradient_kurtosis", "parent_child", "coarse", "fine")
    joined = (torch.from_numpy(np.concatenate(part)) for part in zip(*parts, strict=True))
    return dict(zip(names, joined, strict=True))


def structure_of(images: Tensor | Iterable[Tensor]) -> Structure:
    """Measures images (N, 3, H, W) once: uint8, floats in [0, 1], or batches of them; the split changes nothing."""
    rows = [structure_rows(batch) for batch in ([images] if isinstance(images, Tensor) else images)]
    return Structure.of({name: torch.cat([row[name] for row in rows]) for name in rows[0]})


def verdict(
    images: Tensor,
    reference: Tensor,
    *,
    labels: Tensor | None = None,
    reference_labels: Tensor | None = None,
    paired: bool = False,
    seed: int = 0,
) -> Verdict:
    """One word for what happened to fine detail: preserved, reduced, inflated, energy only or inconclusive.

    From the HF gain, the ratio of `hf_kurtosis` and `flat_noise_db`, each with its 95 % interval; see `verdict_of`.
    images (N, 3, H, W) and reference (M, 3, H, W): uint8 or floats in [0, 1], of one size. labels: classes (N,) within
    which the bootstrap resamples, see `labelled_pair`. paired: row i of both shares noise and class (N = M).
    UnfitError for NaN images.
    """
    rng = np.random.default_rng(seed)
    spectra = spectrum_of(images), spectrum_of(reference)
    same_size(*spectra, "the images", "the reference")
    structures = [structure_of(x) for x in (images, reference)]

    def samples(ours: np.ndarray, theirs: np.ndarray) -> tuple[Sample, Sample]:
        return labelled_pair((ours, theirs), (labels, reference_labels), paired)

    gains = band_gains(*samples(*(one.energies for one in spectra)), paired=paired, rng=rng)
    kurtosis = kurtosis_ratio(*samples(*(one.kurtosis for one in structures)), paired=paired, rng=rng)
    noise = flat_noise_db(*samples(*(one.flat for one in structures)), paired=paired, rng=rng)
    return verdict_of(gains["HF"], kurtosis, noise)
