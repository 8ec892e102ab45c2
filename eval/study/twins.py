"""Runs of one report that differ in routing alone: which are twins, and their gains seed by seed."""

from collections.abc import Sequence

from dmd_dar import config
from dmd_dar.distillation.config import DistillConfig

from ..measure.results import Forest
from ..samples.sets import ImageSet
from .forest import Pair, from_runs
from .pairing import ROUTING, RunsByArm, book_keeping, different_networks, same_data
from .runs import Arm


def routed(arm: Arm) -> bool:
    return arm.cfg.student.routing.query != "residual"


def unequal(ours: DistillConfig, theirs: DistillConfig) -> list[str]:
    """Keys beyond routing and book-keeping in which two runs differ."""
    names = [name for name, _, _ in config.differences(ours, theirs)]
    return [name for name in names if not name.startswith(ROUTING) and not book_keeping(name)]


def twins(arm: Arm, arms: Sequence[Arm]) -> list[Arm]:
    """The residual ones among `arms` that differ from `arm` in routing alone."""
    return [other for other in arms if not routed(other) and not unequal(arm.cfg, other.cfg)]


def seed_pairs(arms: Sequence[Arm], sets: Sequence[ImageSet]) -> list[Pair]:
    """Routed students with their residual twins, of the form of routing with most seeds."""
    by_name = {one.name: one for one in sets}
    forms: dict[str, list[Pair]] = {}
    for arm in arms:
        others = twins(arm, arms) if routed(arm) else []
        if others:
            pair = Pair(arm.cfg.seed, by_name[others[0].name], by_name[arm.name])
            forms.setdefault(repr(arm.cfg.student.routing), []).append(pair)
    return max(forms.values(), key=len, default=[])


def several_seeds(pairs: Sequence[Pair]) -> bool:
    """Whether pairs are of two training seeds at least, each of which stands once."""
    return len({pair.seed for pair in pairs}) >= max(2, len(pairs))


def forest_of(pairs: list[Pair], arms: Sequence[Arm], reference: ImageSet, seed: int) -> Forest:
    """Gains of pairs seed by seed; a ConfigError where runs of one arm hold one network or their data differ.

    seed: of the resampling.
    """
    residual, dar = {pair.residual.name for pair in pairs}, {pair.dar.name for pair in pairs}
    groups: RunsByArm = {
        "residual": [arm for arm in arms if arm.name in residual],
        "dar": [arm for arm in arms if arm.name in dar],
    }
    for name, runs in groups.items():
        different_networks(name, runs)
    same_data(groups)
    return from_runs(pairs, reference, seed)
