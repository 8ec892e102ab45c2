"""Sliced Wasserstein distance between patches at each level of a Laplacian pyramid, as in arXiv:1710.10196 Section 5.

Patches are normalised by the mean and spread of the reference's, not by their own: a level whose contrast is halved
is then as far away as it looks. Over luma.
Legend: N images, P patches of an image, D = PATCH^2 pixels, L levels from the finest, T directions.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from dmd_dar.draws import Draws, sample_range
from dmd_dar.spectrum import MIN_SIZE, QUANTISATION_POWER, to_planes
from eval.images import UnfitError
from eval.spectrum import as_floats

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

    @property
    def excess(self) -> float:
        return self.value - self.null


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


def _enlarged(planes: Tensor, size: tuple[int, int]) -> Tensor:
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


def sliced_wasserstein(
    patches: list[Tensor], reference: list[Tensor], *, second: list[Tensor] | None = None, seed: int = 0
) -> list[LevelDistance]:
    """Distance of each level, the finest first, from the `sliced_patches` of both sets; their seeds must agree.

    The mean over random directions of the 1-Wasserstein distance of the projected patches, in units of the standard
    deviation of the reference's pixels at that level. The null comes from `second`, another set of the reference's
    source, or else from random halves of the reference, rescaled to the sizes that are compared.
    """
    found = []
    for ours, theirs, *others in _projected([patches, reference] + ([second] if second else []), seed):
        null = _rescaled_null(ours, theirs, others[0] if others else None, seed)
        found.append(LevelDistance(wasserstein(ours, theirs), null))
    return found


def level_distances(patches: list[Tensor], reference: list[Tensor], seed: int = 0) -> list[float]:
    """The values of `sliced_wasserstein` without their nulls."""
    return [wasserstein(*pair) for pair in _projected([patches, reference], seed)]


def _projected(sets: list[list[Tensor]], seed: int) -> Iterator[list[Tensor]]:
    """For each level the patches of all sets, in units of the second's (the reference), on directions: (N, P, T)."""
    counts = sorted({len(levels) for levels in sets})
    if len(counts) > 1:
        raise UnfitError(f"images of {counts[0]} and of {counts[1]} levels do not compare; give images of one size")
    for i, levels in enumerate(zip(*sets, strict=True)):
        reference = levels[1]
        draws = Draws(seed, "sliced directions", i, sample_range(0, DIRECTIONS, reference.device))
        directions = F.normalize(draws.normal("direction", reference.shape[-1]), dim=1).T  # (D, T)
        mean, spread = reference.mean(), reference.std().clamp(min=QUANTISATION_POWER**0.5)
        yield [(level - mean) / spread @ directions for level in levels]


def wasserstein(ours: Tensor, theirs: Tensor) -> float:
    """Mean over the last axis of the 1-Wasserstein distances of the samples on the other ones, (..., T) each.

    Of sets of unequal size, the larger is read at the quantiles of the smaller.
    """
    rows = [one.flatten(0, -2).T.contiguous().sort(-1).values for one in (ours, theirs)]  # (T, N P)
    count = min(row.shape[-1] for row in rows)
    places = [(torch.arange(count) + 0.5).mul(row.shape[-1] / count).long() for row in rows]
    a, b = (row[:, place.to(row.device)] for row, place in zip(rows, places, strict=True))
    return (a - b).abs().mean(dtype=torch.float64).item()


def _rescaled_null(ours: Tensor, theirs: Tensor, second: Tensor | None, seed: int) -> float:
    """The distance falls as the root of 1 / N + 1 / M, images being what is independent."""
    wanted = 1 / len(ours) + 1 / len(theirs)
    if second is not None:
        return wasserstein(second, theirs) * (wanted / (1 / len(second) + 1 / len(theirs))) ** 0.5
    half, values = len(theirs) // 2, []
    for split in range(NULL_SPLITS):
        keys = Draws(seed, "sliced null", split, sample_range(0, len(theirs), theirs.device)).uniform("order")
        order = keys.argsort()
        values.append(wasserstein(theirs[order[:half]], theirs[order[half : 2 * half]]))
    return sum(values) / NULL_SPLITS * (wanted / (2 / half)) ** 0.5
