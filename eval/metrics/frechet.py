"""Frechet distance between Gaussians fitted to features, in float64, and the features that need no network.

    d^2 = |mu_1 - mu_2|^2 + tr S_1 + tr S_2 - 2 tr (S_1^.5 S_2 S_1^.5)^.5

Over features that need no network none of these numbers is an FID; each carries comparable_to_published = False.
Legend: N images, D features, A = centred features / sqrt(N - 1), so that S = A^T A.
"""

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from dmd_dar.spectrum import QUANTISATION_POWER

from ..samples.images import UnfitError
from .moments import Gaussian, finite
from .structure import details, luma

LEVELS = 3
NULL_SPLITS = 8
LEAST_SPREAD = 1e-6  # features that do not vary over the reference are compared on this scale


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


@dataclass(frozen=True)
class DiversityRatio:
    """Diversity within classes as a ratio to a reference's, with the least and the median of the classes."""

    by_class: dict[int, float]
    least: float
    median: float


def validate_features(features: Tensor, name: str) -> Tensor:
    """(N, D) as float64. UnfitError naming the set when there are fewer than 2 rows or a number is not finite."""
    if features.ndim != 2 or len(features) < 2:
        raise UnfitError(f"{name}: expected features (N >= 2, D), got {tuple(features.shape)}")
    return finite(features, name)


def statistics(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (D,) and unbiased covariance (D, D) of float64 features (N, D)."""
    root = centred_root(features)
    return features.mean(0), root.T @ root


def centred_root(features: Tensor) -> Tensor:
    """A (N, D) with A^T A the unbiased covariance."""
    return (features - features.mean(0)) / (len(features) - 1) ** 0.5


def symmetric_root(covariance: Tensor) -> Tensor:
    """S^.5 of a symmetric positive semi-definite (D, D)."""
    values, vectors = torch.linalg.eigh((covariance + covariance.T) / 2)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def trace_term_eigh(covariance: Tensor, other: Tensor) -> float:
    """tr (S_1^.5 S_2 S_1^.5)^.5 from the eigenvalues of a symmetric matrix: for N >= D."""
    root = symmetric_root(covariance)
    product = root @ other @ root
    return torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum().item()


def trace_term_nuclear(root: Tensor, other: Tensor) -> float:
    """The same as the nuclear norm of A B^T, with A (N, D) and B (M, D) whose squares are the covariances.

    For N < D: no square root of a D x D. B may be S_2^.5 (D, D) where only the covariance is known.
    """
    return torch.linalg.svdvals(root @ other.T).sum().item()


def frechet_distance(mean_a: Tensor, cov_a: Tensor, mean_b: Tensor, cov_b: Tensor) -> float:
    """Squared Frechet distance of two Gaussians, means (D,) and covariances (D, D), computed in float64.

    arXiv:1706.08500 Eq. 6. UnfitError where the shapes do not fit each other or a number is not finite.
    """
    mean_a, cov_a, mean_b, cov_b = (torch.as_tensor(part).double() for part in (mean_a, cov_a, mean_b, cov_b))
    size = mean_a.numel()
    shapes = [tuple(part.shape) for part in (mean_a, cov_a, mean_b, cov_b)]
    if shapes != 2 * [(size,), (size, size)]:
        raise UnfitError(f"means and covariances of shapes {shapes}; expected (D,), (D, D) twice, with the same D")
    if not all(torch.isfinite(part).all() for part in (mean_a, cov_a, mean_b, cov_b)):
        raise UnfitError("a mean or a covariance is not finite")
    return _assemble(mean_a, cov_a.trace(), mean_b, cov_b.trace(), trace_term_eigh(cov_a, cov_b))


def _assemble(mean: Tensor, variance: Tensor, other_mean: Tensor, other_variance: Tensor, trace: float) -> float:
    return ((mean - other_mean).square().sum() + variance + other_variance).item() - 2 * trace


def feature_distance(
    features: Tensor, reference: Tensor | Gaussian, names: tuple[str, str] = ("set", "reference")
) -> float:
    """Squared Frechet distance of features (N, D) from others (M, D) or from a Gaussian; N, M >= D choose the route.

    UnfitError naming the set when its features are not finite, fewer than 2, or of another D than the reference's.
    """
    features = validate_features(features, names[0])
    theirs = reference if isinstance(reference, Gaussian) else validate_features(reference, names[1])
    given = isinstance(theirs, Gaussian)
    size = features.shape[1]
    other_size = theirs.mean.numel() if given else theirs.shape[1]
    if size != other_size:
        raise UnfitError(f"{names[0]}: {size} features, but {other_size} in {names[1]}; take both from one extractor")
    if min(len(features), size if given else len(theirs)) >= size:
        other = (theirs.mean, theirs.covariance) if given else statistics(theirs)
        return frechet_distance(*statistics(features), *other)
    a = centred_root(features)
    b = symmetric_root(theirs.covariance) if given else centred_root(theirs)
    mean = theirs.mean if given else theirs.mean(0)
    return _assemble(features.mean(0), a.square().sum(), mean, b.square().sum(), trace_term_nuclear(a, b))


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


def standardise(features: Tensor, reference: Tensor, least_share: float = 0.0) -> Tensor:
    """(f - mean) / std of each feature over the reference set: no scale or unit dominates a distance.

    least_share: of features that share a unit, a std below this share of the root mean square of all counts as that.
    """
    std = reference.std(0)
    least = (least_share * std.square().mean().sqrt()).clamp(min=LEAST_SPREAD)
    return (features - reference.mean(0)) / std.maximum(least)


def fd_wavelet(features: Tensor, reference: Tensor, null: float, names: tuple[str, str]) -> Distance:
    """Squared Frechet distance over `wavelet_features` in units of the reference's spread, with its null."""
    value = feature_distance(standardise(features, reference), standardise(reference, reference), names)
    return Distance(value, null)


def fd_null(reference: Tensor, size: int, rng: np.random.Generator, second: Tensor | None = None) -> float:
    """`null_distance` over features in units of the reference's spread, as `fd_wavelet` reads them."""
    scaled = None if second is None else standardise(second, reference)
    return null_distance(standardise(reference, reference), size, rng, scaled)[0]


def null_distance(
    reference: Tensor, size: int, rng: np.random.Generator, second: Tensor | None = None
) -> tuple[float, int]:
    """What a set of `size` images of the reference's own source would read against it, and the size that holds for.

    From `second`, another set of that source, or else the mean over random disjoint halves of the reference. Where
    both are larger than D the bias is proportional to 1/N + 1/M, and the value is rescaled to `size` and M; below
    there is no such law, and the value holds for the sizes that were compared. UnfitError for a reference of fewer than
    4 images and no `second`.
    """
    half = len(reference) // 2
    if second is not None:
        value = feature_distance(second, reference, ("second real set", "reference"))
        sizes = (len(second), len(reference))
    elif half < 2:
        raise UnfitError(f"reference: {len(reference)} images are too few for a null; give at least 4")
    else:
        splits = [torch.from_numpy(rng.permutation(len(reference))) for _ in range(NULL_SPLITS)]
        parts = [(reference[order[:half]], reference[order[half : 2 * half]]) for order in splits]
        value, sizes = float(np.mean([feature_distance(a, b) for a, b in parts])), (half, half)
    if min(sizes) <= reference.shape[1]:
        return value, sizes[0]
    return value * (1 / size + 1 / len(reference)) / sum(1 / n for n in sizes), size


def class_diversity(features: Tensor, labels: Tensor) -> dict[int, float]:
    """Mean distance |x_i - x_j| over the pairs of each class, features (N, D); not for classes of one image."""
    spread = {}
    for label in labels.unique().tolist():
        members = features[labels == label].double()
        if len(members) > 1:
            spread[int(label)] = torch.nn.functional.pdist(members).mean().item()
    return spread


def diversity_ratio(ours: dict[int, float], teachers: dict[int, float]) -> dict[int, float]:
    """Diversity of each class as a ratio to the teacher's; classes in which the teacher is constant are left out."""
    return {label: ours[label] / teachers[label] for label in ours if teachers.get(label, 0.0) > 0}


def diversity_ratios(ours: dict[int, float], teachers: dict[int, float]) -> DiversityRatio:
    """`diversity_ratio` by class, the least and the median of the classes; these are NaN where there is none."""
    by_class = diversity_ratio(ours, teachers)
    values = list(by_class.values())
    median = float(np.median(values)) if values else math.nan
    return DiversityRatio(by_class, min(values, default=math.nan), median)
