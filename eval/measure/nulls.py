"""What sets are compared with: a reference, and for each distance from it what a set of its own source would read.

Legend: N images of a set, F radial bins.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from ..metrics import colour, sliced
from ..metrics.classifier import Modes
from ..metrics.features import FeatureDistance, compare_features
from ..metrics.neighbours import HalvesNull, Neighbours, PlacedNeighbours
from ..metrics.perceptual import LpipsPaired
from ..metrics.sliced import LevelDistance
from ..metrics.spectrum import Spectrum, gain_curve, labelled, log_spectral_distance
from .ledger import Ledger
from .one_set import MeasuredSet
from .suite import Suite, mean_lpips, modes_of, neighbours, neighbours_null

NULL_SPLITS = 8


@dataclass(frozen=True)
class Target:
    """A measured reference. `second`: another set of its source, whose distances are the null of the others'.

    Without one, and for the second set itself, nulls come from random halves of the reference.
    """

    measured: MeasuredSet
    second: MeasuredSet | None
    seed: int
    ledger: Ledger

    def second_for(self, one: MeasuredSet) -> MeasuredSet | None:
        return None if one is self.second else self.second

    @cached_property
    def sliced_null(self) -> list[float]:
        """Of each level, at the reference's own size."""
        second, own = None if self.second is None else self.second.slices, self.measured.slices
        return [level.null for level in sliced.sliced_wasserstein(own, own, second=second)]

    @cached_property
    def of_second(self) -> dict[str, Neighbours]:
        """KID, precision and recall of the second set by extractor; empty where it is of another size."""
        if self.second is None or len(self.second) != len(self.measured):
            return {}
        shared = self.measured.features.keys() & self.second.features.keys()
        pairs = {name: (self.second.features[name], self.measured.features[name]) for name in sorted(shared)}
        tried = {name: neighbours(*pair, self.seed, self.ledger) for name, pair in pairs.items()}
        return {name: near for name, near in tried.items() if near is not None}

    @cached_property
    def of_halves(self) -> dict[str, HalvesNull]:
        """The same from random halves of the reference."""
        known = sorted(self.measured.features.items())
        tried = {name: neighbours_null(values, self.seed, self.ledger) for name, values in known}
        return {name: near for name, near in tried.items() if near is not None}

    def prepare(self) -> None:
        """Whatever is made once, before comparisons run side by side."""
        _ = self.sliced_null, self.of_second, self.of_halves

    def null_of_neighbours(self, one: MeasuredSet, metric: str) -> Neighbours | HalvesNull | None:
        known = self.of_second if self.second_for(one) is not None else {}
        return known.get(metric) or self.of_halves.get(metric)


@dataclass(frozen=True)
class SpectralDistance:
    """The log-spectral distance in dB, its signed mean, and its null."""

    lsd: float
    lsd_signed: float
    lsd_null: float


def colour_nulls(one: MeasuredSet, target: Target, colour_labels: set[int] | None) -> dict[str, float]:
    """How far from no difference another set of the reference's source would read, by measure of colour; at the sizes
    that are compared, unpaired, and in the groups of classes that these have: one group where a set knows no classes.
    """
    other, second = target.measured, target.second_for(one)
    ours, theirs = one.source.classes, other.source.classes
    known = None if ours is None or theirs is None else colour_labels
    spread = 1 / len(one) + 1 / len(other)
    if second is None:
        rng, own = np.random.default_rng([target.seed, 5]), labelled(other.colour, other.source.labels)
        found, its_spread = colour.halved_null(own, known, rng, NULL_SPLITS), 4 / len(other)
    else:
        groups = colour.groups_of(second.source.classes, theirs, known)
        values = colour.colour_values(second.colour, other.colour, groups)
        found = {name: abs(value - colour.neutral(name)) for name, value in values.items()}
        its_spread = 1 / len(second) + 1 / len(other)
    return {name: null * (spread / its_spread) ** 0.5 for name, null in found.items()}


def lsd(one: MeasuredSet, target: Target) -> SpectralDistance:
    """Of luma; the null falls as the root of 1 / N + 1 / M."""
    second = target.second_for(one)
    return lsd_beside_null(one.luma, target.measured.luma, None if second is None else second.luma, target.seed)


def lsd_beside_null(ours: Spectrum, other: Spectrum, second: Spectrum | None, seed: int) -> SpectralDistance:
    """`lsd` of spectra; the null is what `second`, of the other's source, reads, or else the other's random halves."""

    def spread(one: Spectrum) -> float:
        return 1 / len(one.per_image) + 1 / len(other.per_image)

    _, distance, signed = gain_curve(ours, other)
    if second is None:
        null, its_spread = halved_lsd(other, np.random.default_rng([seed, 4]))
    else:
        null, its_spread = gain_curve(second, other)[1], spread(second)
    return SpectralDistance(distance, signed, null * (spread(ours) / its_spread) ** 0.5)


def halved_lsd(other: Spectrum, rng: np.random.Generator) -> tuple[float, float]:
    """Mean distance of random halves of a set, and 1 / N + 1 / M of these."""
    half, values = len(other.per_image) // 2, []
    for _ in range(NULL_SPLITS):
        order = torch.from_numpy(rng.permutation(len(other.per_image)))
        parts = (other.per_image[order[:half]].mean(0), other.per_image[order[half : 2 * half]].mean(0))
        values.append(log_spectral_distance(other.frequencies, *parts)[0].item())
    return float(np.mean(values)), 2 / half


def sliced_levels(one: MeasuredSet, target: Target) -> list[LevelDistance]:
    """Sliced Wasserstein distance of each level, the finest first, beside its null at the sizes that are compared."""
    other = target.measured
    if one is target.second:
        return sliced.sliced_wasserstein(one.slices, other.slices)
    images, others = (len(m.slices.patches[0]) for m in (one, other))
    scale = ((1 / images + 1 / others) * others / 2) ** 0.5
    values = sliced.level_distances(one.slices, other.slices)
    return [LevelDistance(value, scale * null) for value, null in zip(values, target.sliced_null, strict=True)]


@dataclass(frozen=True)
class OverFeatures:
    """What is compared over features: the fields of a `Comparison` of these names."""

    distances: dict[str, FeatureDistance]  # by extractor
    neighbours: dict[str, PlacedNeighbours]  # by extractor
    modes: Modes | None
    lpips_paired: LpipsPaired | None


def over_features(one: MeasuredSet, target: Target, suite: Suite, ledger: Ledger) -> OverFeatures:
    """Frechet distances, KID, precision and recall, modes and paired LPIPS.

    Published numbers are against real images, so that those against other sets are not comparable to them.
    """
    other, name = target.measured, one.source.name
    second, real = target.second_for(one), target.measured.source.role == "real"
    distances, near = {}, {}
    for metric in sorted(one.features.keys() & other.features.keys()):
        pair = one.features[metric], other.features[metric]
        again = None if second is None else second.features.get(metric)
        distance = ledger.attempt(metric, name, lambda p=pair, a=again: compare_features(*p, target.seed, a))
        if distance is not None:
            comparable = distance.comparable_to_published and real
            distances[metric] = replace(distance, comparable_to_published=comparable)
        around = neighbours(*pair, target.seed, ledger)
        if around is not None:
            comparable, null = around.comparable_to_published and real, target.null_of_neighbours(one, metric)
            fields: dict[str, Any] = {**vars(around), "comparable_to_published": comparable}
            near[metric] = PlacedNeighbours(**fields, null=null)
    modes = modes_of(one.source, other.source, suite, target.seed, ledger)
    paired = one.source.paired and other.source.paired and suite.lpips is not None
    return OverFeatures(distances, near, modes, mean_lpips(one.source, other.source, suite, ledger) if paired else None)
