"""Frechet distance between Gaussians fitted to features, in float64, and the null beside it.

    d^2 = |mu_1 - mu_2|^2 + tr S_1 + tr S_2 - 2 tr (S_1^.5 S_2 S_1^.5)^.5

Over features that need no network none of these numbers is an FID; each carries comparable_to_published = False.
Ours rather than a library's, since each distance stands beside a null at its own sizes, which none gives.
Legend: N images, D features, A = centred features / sqrt(N - 1), so that S = A^T A.
"""

import numpy as np
import torch
from torch import Tensor

from ..samples.images import UnfitError
from .moments import Gaussian, finite

NULL_SPLITS = 8
LEAST_SPREAD = 1e-6  # features that do not vary over the reference are compared on this scale


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
    is_gaussian = isinstance(theirs, Gaussian)
    size = features.shape[1]
    other_size = theirs.mean.numel() if is_gaussian else theirs.shape[1]
    if size != other_size:
        raise UnfitError(f"{names[0]}: {size} features, but {other_size} in {names[1]}; take both from one extractor")
    if min(len(features), size if is_gaussian else len(theirs)) >= size:
        other = (theirs.mean, theirs.covariance) if is_gaussian else statistics(theirs)
        return frechet_distance(*statistics(features), *other)
    a = centred_root(features)
    b = symmetric_root(theirs.covariance) if is_gaussian else centred_root(theirs)
    mean = theirs.mean if is_gaussian else theirs.mean(0)
    return _assemble(features.mean(0), a.square().sum(), mean, b.square().sum(), trace_term_nuclear(a, b))


def standardise(features: Tensor, reference: Tensor, least_share: float = 0.0) -> Tensor:
    """(f - mean) / std of each feature over the reference set: no scale or unit dominates a distance.

    least_share: of features that share a unit, a std below this share of the root mean square of all counts as that.
    """
    std = reference.std(0)
    least = (least_share * std.square().mean().sqrt()).clamp(min=LEAST_SPREAD)
    return (features - reference.mean(0)) / std.maximum(least)


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
