"""Sliced Wasserstein distance between patches at each level of a Laplacian pyramid, as in arXiv:1710.10196 Section 5.

Patches are measured in the spread of the reference's, not in their own: a level whose contrast is halved is then as far
away as it looks. Over luma.
Legend: N images, P patches of an image, D = PATCH^2 pixels, L levels from the finest, T directions.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from dmd_dar.draws import Draws, sample_range
from dmd_dar.spectrum import MIN_SIZE, QUANTISATION_POWER, to_planes

from ..samples.images import UnfitError
from .spectrum import as_floats

PATCH = 7
PATCHES = 16  # of each image and level
DIRECTIONS = 128
SMALLEST = 16  # sides of the coarsest level
BINOMIAL = (1 / 16, 4 / 16, 6 / 16, 4 / 16, 1 / 16)  # the pyramid's low-pass filter
NULL_SPLITS = 4


@dataclass(frozen=True)
class LevelDistance:
    """The distance at one level beside what two sets of the reference's source and of these sizes would show."""

    value: float  # in standard deviations of the reference's patches
    null: float
    excess: float = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "excess", self.value - self.null)


def pyramid(planes: Tensor) -> list[Tensor]:
    """Laplacian levels of (n, H, W), the finest first; the last one is the low-pass that remains."""
    levels = []
    while min(planes.shape[-2:]) >= 2 * SMALLEST:
        coarse = _smooth(planes)[:, ::2, ::2]
        levels.append(planes - _enlarged(coarse, planes.shape[-2:]))
        planes = coarse
    return [*levels, planes]


def _smooth(planes: Tensor) -> Tensor:
    """Separable binomial filter, borders reflected."""
    kernel = planes.new_tensor(BINOMIAL)
    padded = F.pad(planes[:, None], (2, 2, 2, 2), mode="reflect")
    return F.conv2d(F.conv2d(padded, kernel.view(1, 1, 5, 1)), kernel.view(1, 1, 1, 5))[:, 0]


def _enlarged(planes: Tensor, size: Sequence[int]) -> Tensor:
    """Zeros between the samples, smoothed to unit gain."""
    spread = planes.new_zeros(len(planes), *size)
    spread[:, ::2, ::2] = 4 * planes
    return _smooth(spread)


def sliced_patches(images: Tensor | Iterable[Tensor], seed: int = 0) -> list[Tensor]:
    """Random patches of every level, L tensors (N, P, D) float32, the finest level first.

    images: (N, 3, H, W), uint8 or floats in [0, 1], or batches of them. Where the patches lie depends on (seed, level,
    place of the image) alone. UnfitError for sides below 32 px.
    """
    batches = [images] if isinstance(images, Tensor) else images
    parts, start = [], 0
    for batch in batches:
        if min(batch.shape[-2:]) < MIN_SIZE:
            size = "x".join(map(str, batch.shape[-2:]))
            raise UnfitError(f"sliced Wasserstein needs images of at least {MIN_SIZE} px for two levels, got {size}")
        for chunk in batch.split(256):
            draws = Draws(seed, "sliced", 0, sample_range(start, start + len(chunk), chunk.device))
            levels = pyramid(to_planes(as_floats(chunk))[:, 0].float())
            parts.append([_cut(level, draws, f"level {i}") for i, level in enumerate(levels)])
            start += len(chunk)
    return [torch.cat(level) for level in zip(*parts, strict=True)]


def _cut(level: Tensor, draws: Draws, name: str) -> Tensor:
    """(n, h, w) -> (n, P, D)."""
    count, height, width = level.shape
    top = draws.integers(f"{name}, top", height - PATCH + 1, PATCHES)
    left = draws.integers(f"{name}, left", width - PATCH + 1, PATCHES)
    side = torch.arange(PATCH, device=level.device)
    rows, columns = top[..., None, None] + side[:, None], left[..., None, None] + side  # (n, P, 7, 1), (n, P, 1, 7)
    index = (rows * width + columns).flatten(1)
    return level.flatten(1).gather(1, index).reshape(count, PATCHES, PATCH * PATCH)


@dataclass(frozen=True)
class Slices:
    """The `sliced_patches` of a set on the random directions of `seed`; what it is compared by is made once."""

    patches: list[Tensor]
    seed: int = 0  # of the directions

    def projected(self, level: int) -> Tensor:
        """(N, P, T), about 0."""
        patches = self.patches[level]
        draws = Draws(self.seed, "sliced directions", level, sample_range(0, DIRECTIONS, patches.device))
        directions = F.normalize(draws.normal("direction", patches.shape[-1]), dim=1).T  # (D, T)
        grey = 0.5 if level == len(self.patches) - 1 else 0.0  # of the low-pass; a distance is that of differences
        return (patches - grey) @ directions

    @cached_property
    def ordered(self) -> list[Tensor]:
        """Of each level the projections in order, (T, N P)."""
        return [_ordered(self.projected(level)) for level in range(len(self.patches))]

    @cached_property
    def spread(self) -> list[float]:
        """Standard deviation of each level's pixels."""
        return [patches.std().clamp(min=QUANTISATION_POWER**0.5).item() for patches in self.patches]


def sliced_wasserstein(ours: Slices, reference: Slices, *, second: Slices | None = None) -> list[LevelDistance]:
    """Distance of each level, the finest first; the seeds of all sets must agree.

    The mean over random directions of the 1-Wasserstein distance of the projected patches, in units of the standard
    deviation of the reference's pixels at that level. The null comes from `second`, another set of the reference's
    source, or else from random halves of the reference, rescaled to the sizes that are compared.
    """
    distances = level_distances(ours, reference)
    nulls = _halves_null(reference) if second is None else level_distances(second, reference)
    images, others = len(ours.patches[0]), len(reference.patches[0])
    of_null = 2 / (others // 2) if second is None else 1 / len(second.patches[0]) + 1 / others
    scale = ((1 / images + 1 / others) / of_null) ** 0.5  # falls as the root of 1 / N + 1 / M, images being independent
    return [LevelDistance(value, scale * null) for value, null in zip(distances, nulls, strict=True)]


def level_distances(ours: Slices, reference: Slices) -> list[float]:
    """The values of `sliced_wasserstein` without their nulls."""
    if ours.seed != reference.seed:
        raise ValueError(f"patches on the directions of seeds {ours.seed} and {reference.seed} do not compare")
    counts = sorted({len(one.patches) for one in (ours, reference)})
    if len(counts) > 1:
        raise UnfitError(f"images of {counts[0]} and of {counts[1]} levels do not compare; give images of one size")
    levels = zip(ours.ordered, reference.ordered, reference.spread, strict=True)
    return [_distance(a, b) / spread for a, b, spread in levels]


def wasserstein(ours: Tensor, theirs: Tensor) -> float:
    """Mean over the last axis of the 1-Wasserstein distances of the samples on the other ones, (..., T) each.

    Of sets of unequal size, the larger is read at the quantiles of the smaller.
    """
    return _distance(_ordered(ours), _ordered(theirs))


def _ordered(values: Tensor) -> Tensor:
    """(..., T) -> (T, samples), each row in ascending order."""
    return values.flatten(0, -2).T.contiguous().sort(-1).values


def _distance(ours: Tensor, theirs: Tensor) -> float:
    """`wasserstein` of rows in order."""
    rows = ours, theirs
    count = min(row.shape[-1] for row in rows)
    places = [(torch.arange(count) + 0.5).mul(row.shape[-1] / count).long() for row in rows]
    a, b = (row[:, place.to(row.device)] for row, place in zip(rows, places, strict=True))
    return (a - b).abs().mean(dtype=torch.float64).item()


def _halves_null(reference: Slices) -> list[float]:
    """Of each level the mean distance of random halves of the images."""
    half, nulls = len(reference.patches[0]) // 2, []
    for level, spread in enumerate(reference.spread):
        projected, values = reference.projected(level), []
        for split in range(NULL_SPLITS):
            samples = sample_range(0, len(projected), projected.device)
            order = Draws(reference.seed, "sliced null", split, samples).uniform("order").argsort()
            values.append(wasserstein(projected[order[:half]], projected[order[half : 2 * half]]))
        nulls.append(sum(values) / NULL_SPLITS / spread)
    return nulls
