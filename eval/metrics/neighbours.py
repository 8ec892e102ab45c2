"""KID, precision and recall of two sets over features of any extractor.

Legend: N and M rows, D features, k the number of neighbours, T the rows of a tile.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ..samples.images import UnfitError
from .features import Features, scaled
from .frechet import validate_features
from .record import OPTIONAL

KID_SUBSET = 1000
KID_SUBSETS = 100
NEIGHBOURS = 3
TILE = 1024


@dataclass(frozen=True)
class Kid:
    """Mean over subsets of the unbiased MMD^2, its standard deviation over them (nan for one subset), and their size.

    Values of different subset sizes are not to be compared.
    """

    value: float
    std: float
    subset_size: int
    subsets: int


@dataclass(frozen=True)
class PrecisionRecall:
    """Shares of generated images near real ones and of real images near generated ones; both depend on N."""

    precision: float
    recall: float
    neighbours: int
    images: int


@dataclass(frozen=True, kw_only=True)
class Neighbours:
    """KID of two sets over the features of one extractor, and where N is equal precision and recall, else None."""

    features: str
    kid: float
    kid_std: float
    kid_subset_size: int
    kid_subsets: int
    precision: float | None
    recall: float | None
    neighbours: int | None = field(default=None, metadata=OPTIONAL)  # k of precision and recall
    images: int
    comparable_to_published: bool
    upsampled: bool


@dataclass(frozen=True)
class HalvesNull:
    """What random parts of a reference read against each other; precision and recall hold for `images`."""

    kid: float
    kid_std: float
    precision: float
    recall: float
    images: int


@dataclass(frozen=True, kw_only=True)
class PlacedNeighbours(Neighbours):
    """With their null: what a second set of the reference's source reads, or else the reference's own halves."""

    null: Neighbours | HalvesNull | None


def polynomial_kernel(a: Tensor, b: Tensor) -> Tensor:
    """(x.y / D + 1)^3 for rows (N, D) and (M, D), (N, M)."""
    return (a @ b.T / a.shape[1] + 1) ** 3


def unbiased_mmd(a: Tensor, b: Tensor) -> float:
    """Unbiased estimate of MMD^2 under `polynomial_kernel` (arXiv:1801.01401); it may be negative."""
    within = 0.0
    for rows in (a, b):
        kernel = polynomial_kernel(rows, rows)
        within += ((kernel.sum() - kernel.trace()) / (len(rows) * (len(rows) - 1))).item()
    return within - 2 * polynomial_kernel(a, b).mean().item()


def kid(
    features: Tensor,
    reference: Tensor,
    *,
    seed: int = 0,
    subset_size: int = KID_SUBSET,
    subsets: int = KID_SUBSETS,
    names: tuple[str, str] = ("set", "reference"),
) -> Kid:
    """Over `subsets` random subsets of both sets, (N, D) and (M, D), that `seed` determines; one where it is all rows.

    UnfitError naming a set with fewer rows than `subset_size`: a smaller subset would be another number.
    """
    both = _pair(features, reference, names)
    for rows, name in zip(both, names, strict=True):
        if not 2 <= subset_size <= len(rows):
            fault = f"KID of {len(rows)} images, subset_size = {subset_size}"
            raise UnfitError(f"{name}: {fault}; give more images or a smaller subset_size, at least 2")
    if subset_size == len(both[0]) == len(both[1]):
        return Kid(unbiased_mmd(*both), float("nan"), subset_size, 1)
    rng = np.random.default_rng(seed)
    values = []
    for _ in range(subsets):
        picked = [rows[torch.from_numpy(rng.choice(len(rows), subset_size, replace=False))] for rows in both]
        values.append(unbiased_mmd(*picked))
    return Kid(float(np.mean(values)), float(np.std(values)), subset_size, subsets)


def _pair(features: Tensor, reference: Tensor, names: tuple[str, str]) -> tuple[Tensor, Tensor]:
    first, second = validate_features(features, names[0]), validate_features(reference, names[1])
    if first.shape[1] != second.shape[1]:
        raise UnfitError(f"{names[0]}: {first.shape[1]} features, but {second.shape[1]} in {names[1]}")
    return first, second


def squared_distances(rows: Tensor, others: Tensor) -> Tensor:
    """(T, D) and (M, D) -> (T, M), never below 0."""
    return (rows.square().sum(1)[:, None] + others.square().sum(1) - 2 * rows @ others.T).clamp(min=0)


def squared_radii(rows: Tensor, k: int) -> Tensor:
    """Squared distance of each row of (N, D) to its k-th nearest other, (N,)."""
    radii = []
    for start in range(0, len(rows), TILE):
        tile = squared_distances(rows[start : start + TILE], rows)
        own = torch.arange(len(tile))
        tile[own, start + own] = torch.inf  # rounding leaves the distance to itself above 0
        radii.append(tile.kthvalue(k, dim=1).values)
    return torch.cat(radii)


def share_covered(rows: Tensor, centres: Tensor, radii: Tensor) -> float:
    """Share of rows (N, D) that lie in a ball around some centre (M, D) of squared radius (M,)."""
    covered = sum(
        (squared_distances(rows[start : start + TILE], centres) <= radii).any(1).sum().item()
        for start in range(0, len(rows), TILE)
    )
    return covered / len(rows)


def precision_recall(
    features: Tensor, reference: Tensor, *, k: int = NEIGHBOURS, names: tuple[str, str] = ("set", "reference")
) -> PrecisionRecall:
    """Improved precision and recall (arXiv:1904.06991) of features (N, D) against a reference (N, D).

    UnfitError where the sets differ in N, since both numbers depend on it, or N <= k.
    """
    ours, theirs = _pair(features, reference, names)
    if len(ours) != len(theirs):
        raise UnfitError(
            f"precision and recall: {len(ours)} images in {names[0]}, {len(theirs)} in {names[1]};"
            f" take the first {min(len(ours), len(theirs))} of both"
        )
    if len(ours) <= k:
        raise UnfitError(f"precision and recall: {len(ours)} images for {k} neighbours; give at least {k + 1}")
    precision = share_covered(ours, theirs, squared_radii(theirs, k))
    recall = share_covered(theirs, ours, squared_radii(ours, k))
    return PrecisionRecall(precision, recall, k, len(ours))


def halved(reference: Features, seed: int = 0, subset_size: int = KID_SUBSET, subsets: int = KID_SUBSETS) -> HalvesNull:
    """A null of `compare_neighbours` from the reference alone.

    KID over `subsets` pairs of disjoint random subsets of the size that `compare_neighbours` takes, whose mean is 0;
    precision and recall of random halves of the reference, which hold for `images`, half as many.
    """
    target, rng = scaled(reference, reference), np.random.default_rng([seed, 3])
    size = min(subset_size, len(target) // 2)
    orders = (torch.from_numpy(rng.permutation(len(target))) for _ in range(subsets))
    values = [unbiased_mmd(target[order[:size]], target[order[size : 2 * size]]) for order in orders]
    order, half = torch.from_numpy(rng.permutation(len(target))), len(target) // 2
    names = reference.name, reference.name
    near = precision_recall(target[order[:half]], target[order[half : 2 * half]], names=names)
    return HalvesNull(float(np.mean(values)), float(np.std(values)), near.precision, near.recall, half)


def compare_neighbours(ours: Features, reference: Features, seed: int = 0, subset_size: int = KID_SUBSET) -> Neighbours:
    """KID, precision and recall of two sets of equal N in the units of their extractor.

    KID's subsets hold `subset_size` images, or half of a smaller set.
    """
    names, target = (ours.name, reference.name), scaled(reference, reference)
    values = scaled(ours, reference)
    near = precision_recall(values, target, names=names)
    distance = kid(values, target, seed=seed, subset_size=min(subset_size, len(target) // 2), names=names)
    return neighbours_of(ours, distance, near)


def neighbours_of(ours: Features, distance: Kid, near: PrecisionRecall | None) -> Neighbours:
    """The two together; `near` is None for sets of unequal N."""
    return Neighbours(
        features=ours.extractor.name,
        kid=distance.value,
        kid_std=distance.std,
        kid_subset_size=distance.subset_size,
        kid_subsets=distance.subsets,
        precision=None if near is None else near.precision,
        recall=None if near is None else near.recall,
        neighbours=None if near is None else near.neighbours,
        images=len(ours.values),
        comparable_to_published=ours.comparable,
        upsampled=ours.upsampled,
    )
