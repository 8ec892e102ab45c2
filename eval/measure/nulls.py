"""What sets are compared with: a reference, and for each distance from it what a set of its own source would read.

Legend: N images of a set, F radial bins.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from ..metrics import features, sliced
from ..metrics.spectrum import Spectrum, gain_curve, log_spectral_distance
from . import suite as distances
from .one_set import Measured
from .suite import Ledger, Suite

NULL_SPLITS = 8


@dataclass(frozen=True)
class Target:
    """A measured reference. `second`: another set of its source, whose distances are the null of the others'.

    Without one, and for the second set itself, nulls come from random halves of the reference.
    """

    measured: Measured
    second: Measured | None
    seed: int
    ledger: Ledger

    def second_for(self, one: Measured) -> Measured | None:
        return None if one is self.second else self.second

    @cached_property
    def sliced_null(self) -> list[float]:
        """Of each level, at the reference's own size."""
        second, own = None if self.second is None else self.second.slices, self.measured.slices
        return [level.null for level in sliced.sliced_wasserstein(own, own, second=second)]

    @cached_property
    def of_second(self) -> dict[str, dict[str, Any]]:
        """KID, precision and recall of the second set by extractor; empty where it is of another size."""
        if self.second is None or len(self.second) != len(self.measured):
            return {}
        shared = self.measured.features.keys() & self.second.features.keys()
        pairs = {name: (self.second.features[name], self.measured.features[name]) for name in sorted(shared)}
        found = {name: distances.neighbours(*pair, self.seed, self.ledger) for name, pair in pairs.items()}
        return {name: values for name, values in found.items() if values is not None}

    @cached_property
    def of_halves(self) -> dict[str, dict[str, Any]]:
        """The same from random halves of the reference."""
        known = sorted(self.measured.features.items())
        found = {name: distances.neighbours_null(values, self.seed, self.ledger) for name, values in known}
        return {name: values for name, values in found.items() if values is not None}

    def prepare(self) -> None:
        """Whatever is made once, before comparisons run side by side."""
        _ = self.sliced_null, self.of_second, self.of_halves

    def neighbours_null(self, one: Measured, metric: str) -> dict[str, Any] | None:
        known = self.of_second if self.second_for(one) is not None else {}
        return known.get(metric) or self.of_halves.get(metric)


def lsd(one: Measured, target: Target) -> dict[str, float]:
    """The log-spectral distance in dB, its signed mean, and its null, which falls as the root of 1 / N + 1 / M."""
    second = target.second_for(one)
    return lsd_beside_null(one.luma, target.measured.luma, None if second is None else second.luma, target.seed)


def lsd_beside_null(ours: Spectrum, other: Spectrum, second: Spectrum | None, seed: int) -> dict[str, float]:
    """`lsd` of spectra; the null is what `second`, of the other's source, reads, or else the other's random halves."""

    def spread(one: Spectrum) -> float:
        return 1 / len(one.per_image) + 1 / len(other.per_image)

    _, distance, signed = gain_curve(ours, other)
    if second is None:
        null, given = halved_lsd(other, np.random.default_rng([seed, 4]))
    else:
        null, given = gain_curve(second, other)[1], spread(second)
    return {"lsd": distance, "lsd_signed": signed, "lsd_null": null * (spread(ours) / given) ** 0.5}


def halved_lsd(other: Spectrum, rng: np.random.Generator) -> tuple[float, float]:
    """Mean distance of random halves of a set, and 1 / N + 1 / M of these."""
    half, values = len(other.per_image) // 2, []
    for _ in range(NULL_SPLITS):
        order = torch.from_numpy(rng.permutation(len(other.per_image)))
        parts = (other.per_image[order[:half]].mean(0), other.per_image[order[half : 2 * half]].mean(0))
        values.append(log_spectral_distance(other.frequencies, *parts)[0].item())
    return float(np.mean(values)), 2 / half


def sliced_levels(one: Measured, target: Target) -> list[dict[str, float]]:
    """Sliced Wasserstein distance of each level, the finest first, beside its null at the sizes that are compared."""
    other = target.measured
    if one is target.second:
        levels = sliced.sliced_wasserstein(one.slices, other.slices)
        pairs = [(level.value, level.null) for level in levels]
    else:
        images, others = (len(m.slices.patches[0]) for m in (one, other))
        scale = ((1 / images + 1 / others) * others / 2) ** 0.5
        values = sliced.level_distances(one.slices, other.slices)
        pairs = [(value, scale * null) for value, null in zip(values, target.sliced_null, strict=True)]
    return [{"value": value, "null": null, "excess": value - null} for value, null in pairs]


def over_features(one: Measured, target: Target, suite: Suite, ledger: Ledger) -> dict[str, Any]:
    """Frechet distances by the name of their features, KID, precision and recall, modes and paired LPIPS."""
    other, name = target.measured, one.source.name
    second = target.second_for(one)
    found: dict[str, Any] = {}
    near = {}
    for metric in sorted(one.features.keys() & other.features.keys()):
        pair = one.features[metric], other.features[metric]
        again = None if second is None else second.features.get(metric)
        found[metric] = ledger.attempt(metric, name, lambda p=pair, a=again: features.compare(*p, target.seed, a))
        call = distances.neighbours(*pair, target.seed, ledger)
        if call is not None:
            near[metric] = {**call, "null": target.neighbours_null(one, metric)}
    found = {metric: value for metric, value in found.items() if value is not None}
    for value in (*found.values(), *near.values()):  # published numbers are against real images
        value["comparable_to_published"] &= other.source.role == "real"
    found["neighbours"] = near
    found["modes"] = distances.modes_of(one.source, other.source, suite, target.seed, ledger)
    paired = one.source.paired and other.source.paired and suite.lpips is not None
    found["lpips_paired"] = distances.lpips_paired(one.source, other.source, suite, ledger) if paired else None
    return found
