"""Features of images: what an extractor is, how a stream is read through one, and those that need no weights.

Legend: N images, n of a batch, D features.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..samples.images import ImageStream, UnfitError
from .frechet import feature_distance, null_distance, standardise
from .moments import Gaussian, Moments, finite, merged
from .record import FLAT
from .wavelet import wavelet_features

PCA_COMPONENTS = 32
PCA_SIDE = 32  # larger images are averaged down to it first


@dataclass(frozen=True)
class Extractor:
    """`extract` maps uint8 (n, 3, H, W) to (n, D), each row by itself.

    least_size: the smallest side it takes; native_size: below it images are enlarged and the result says so;
    standardised: distances are taken in units of the reference's spread, held above `least_share` of the typical one.
    """

    name: str
    extract: Callable[[Tensor], Tensor] = field(repr=False)
    comparable_to_published: bool = False
    standardised: bool = False
    least_share: float = 0.0
    least_size: int = 1
    native_size: int = 1
    facts: dict[str, Any] = field(default_factory=dict)  # JSON-able: weights, preprocessing


@dataclass(frozen=True)
class Features:
    """Features (N, D) of the set `name`, in the order of its images."""

    name: str
    values: Tensor
    extractor: Extractor
    upsampled: bool

    @property
    def comparable(self) -> bool:
        """Whether distances of these may stand beside published ones; those of enlarged images may not."""
        return self.extractor.comparable_to_published and not self.upsampled


@dataclass(frozen=True, kw_only=True)
class FeatureDistance:
    """A squared Frechet distance over features, beside its null and what a reader needs to place it.

    null: what another set of the reference's source would read, None where it is not known; null_images: the size that
    it holds for; excess: the value over it.
    """

    metric: str
    value: float
    null: float | None
    null_images: int | None
    excess: float | None = field(init=False)
    images: int
    reference_images: int | None
    dimensions: int
    comparable_to_published: bool
    upsampled: bool
    facts: dict[str, Any] = field(default_factory=dict, metadata=FLAT)  # of the extractor

    def __post_init__(self) -> None:
        object.__setattr__(self, "excess", None if self.null is None else self.value - self.null)


def _batches(
    stream: ImageStream, extractor: Extractor, batch_size: int, rank: int, world: int
) -> Iterator[tuple[str, Tensor]]:
    """(which images these are, their features (n, D)), checked."""
    if min(stream.size) < extractor.least_size:
        size = " x ".join(map(str, stream.size))
        raise UnfitError(
            f"{stream.name}: {size} images are too small for {extractor.name}, which takes native crops of"
            f" {extractor.least_size}; leave this metric out or give larger images"
        )
    for first, images in stream.batches(batch_size, rank, world):
        where = f"{extractor.name} of {stream.name}, images {first} to {first + len(images) - 1}"
        with torch.no_grad():
            features = extractor.extract(images)
        finite(features, where)
        yield where, features


def extract(
    stream: ImageStream, extractor: Extractor, batch_size: int = 64, *, rank: int = 0, world: int = 1
) -> Features:
    """Features of all images, or of the share of process `rank` of `world`.

    UnfitError naming the set and the batch where a feature is not finite or the images are too small.
    """
    values = [features.cpu() for _, features in _batches(stream, extractor, batch_size, rank, world)]
    if not values:
        raise UnfitError(f"{stream.name}: no images for process {rank} of {world}")
    return Features(stream.name, torch.cat(values), extractor, upsampled(stream, extractor))


def upsampled(stream: ImageStream, extractor: Extractor) -> bool:
    """Whether the extractor enlarges these images."""
    return min(stream.size) < extractor.native_size


def extract_moments(
    stream: ImageStream, extractor: Extractor, batch_size: int = 64, *, rank: int = 0, world: int = 1
) -> Moments:
    """Their moments alone, for sets whose features do not fit in memory; `moments.merged` joins the processes'."""
    return merged(Moments.of(f, where) for where, f in _batches(stream, extractor, batch_size, rank, world))


def compare_features(
    ours: Features, reference: Features | Gaussian, seed: int = 0, second: Features | None = None
) -> FeatureDistance:
    """Frechet distance of two sets with its null, and what a reader needs to place it.

    second: another set of the reference's source, for the null; without it, halves of the reference, drawn by `seed`.
    A reference that is known by its Gaussian alone has a null from `second` only, else None.
    """
    if isinstance(reference, Gaussian):
        count, (value, null) = reference.count, _against(ours, reference, second)
        null_images = None if second is None else len(second.values)
    else:
        count, target = len(reference.values), scaled(reference, reference)
        value = feature_distance(scaled(ours, reference), target, (ours.name, reference.name))
        again = None if second is None else scaled(second, reference)
        null, null_images = null_distance(target, len(ours.values), np.random.default_rng(seed), again)
    return FeatureDistance(
        metric=ours.extractor.name,
        value=value,
        null=null,
        null_images=null_images,
        images=len(ours.values),
        reference_images=count,
        dimensions=ours.values.shape[1],
        comparable_to_published=ours.comparable,
        upsampled=ours.upsampled,
        facts=ours.extractor.facts,
    )


def _against(ours: Features, reference: Gaussian, second: Features | None) -> tuple[float, float | None]:
    """The distance from a Gaussian, and that of `second`."""
    if ours.extractor.standardised:
        name = ours.extractor.name
        raise UnfitError(f"{name}: measured in units of the reference's spread; give the reference's images")
    value = feature_distance(ours.values, reference, (ours.name, "reference"))
    return value, None if second is None else feature_distance(second.values, reference, (second.name, "reference"))


def scaled(features: Features, reference: Features) -> Tensor:
    """The values (N, D) in float64, in units of the reference's spread where the extractor is `standardised`.

    UnfitError where the two come from different extractors.
    """
    if features.extractor.name != reference.extractor.name:
        fault = f"features of {features.extractor.name}, but {reference.extractor.name} in {reference.name}"
        raise UnfitError(f"{features.name}: {fault}")
    values, others = features.values.double(), reference.values.double()
    if not features.extractor.standardised:
        return values
    return standardise(values, others, features.extractor.least_share)


def wavelet() -> Extractor:
    """fd_wavelet: 20 wavelet statistics of the luma; sees blur and noise."""
    return Extractor("fd_wavelet", lambda images: wavelet_features(images.float() / 255), standardised=True)


def small_pixels(images: Tensor) -> Tensor:
    """uint8 (n, 3, H, W) -> (n, D) float64 in [0, 1], sides above PCA_SIDE averaged down to it."""
    height, width = (min(side, PCA_SIDE) for side in images.shape[2:])
    return F.adaptive_avg_pool2d(images.double() / 255, (height, width)).flatten(1)


def fit_pca(reference: Tensor, components: int = PCA_COMPONENTS, seed: int = 0) -> Extractor:
    """fd_pca: projections on the leading principal components of a random half of `reference`, uint8 (N, 3, H, W).

    The half depends on `seed` alone. Blind to fine blur; sees a mode that is dropped. UnfitError below 4 images.
    """
    if len(reference) < 4:
        raise UnfitError(f"fd_pca: fitted on {len(reference)} images; give at least 4")
    half = np.random.default_rng(seed).permutation(len(reference))[: len(reference) // 2]
    pixels = small_pixels(reference[torch.from_numpy(half)])
    mean = pixels.mean(0)
    _, spread, directions = torch.linalg.svd(pixels - mean, full_matrices=False)
    kept = int((spread > spread[0] * 1e-9).sum().clamp(max=components))
    basis = directions[:kept].T
    facts = {"components": kept, "fitted_on": len(pixels), "fit_seed": seed}
    return Extractor("fd_pca", lambda images: (small_pixels(images) - mean) @ basis, facts=facts)
