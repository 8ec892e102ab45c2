"""Runs of one report that differ in routing alone: which are twins, and their gains seed by seed."""

from collections.abc import Mapping, Sequence

from dmd_dar import config
from dmd_dar.distillation.config import DistillConfig

from ..measure.results import Forest
from ..samples.sets import ImageSet
from .few_steps import FewSteps, titles
from .forest import Pair, from_runs, joined
from .pairing import ROUTING, RunsByArm, book_keeping, require_different_networks, require_same_data
from .runs import Run


def routed(run: Run) -> bool:
    return run.cfg.student.routing.query != "residual"


def unequal(ours: DistillConfig, theirs: DistillConfig) -> list[str]:
    """Keys beyond routing and book-keeping in which two runs differ."""
    names = [name for name, _, _ in config.differences(ours, theirs)]
    return [name for name in names if not name.startswith(ROUTING) and not book_keeping(name)]


def twins(run: Run, runs: Sequence[Run]) -> list[Run]:
    """The residual ones among `runs` that differ from `run` in routing alone, after as many updates."""
    alike = [other for other in runs if not routed(other) and not unequal(run.cfg, other.cfg)]
    return [other for other in alike if other.updates == run.updates]


def seed_pairs(runs: Sequence[Run], sets: Sequence[ImageSet]) -> list[Pair]:
    """Routed students with their residual twins, of the form of routing and the updates of which there are most seeds;
    where several have as many, of the most updates.
    """
    by_name = {one.name: one for one in sets}
    forms: dict[tuple[str, int], list[Pair]] = {}
    for run in runs:
        others = twins(run, runs) if routed(run) else []
        if others:
            pair = Pair(run.cfg.seed, by_name[others[0].name], by_name[run.name])
            forms.setdefault((repr(run.cfg.student.routing), run.updates), []).append(pair)
    return max(forms.items(), key=lambda form: (len(form[1]), form[0][1]), default=("", []))[1]


def several_seeds(pairs: Sequence[Pair]) -> bool:
    """Whether pairs are of two training seeds at least, each of which stands once."""
    return len({pair.seed for pair in pairs}) >= max(2, len(pairs))


def pairs_by_steps(runs: Sequence[Run], sets: Sequence[ImageSet]) -> dict[str, list[Pair]]:
    """`seed_pairs` of each of the few steps of which there are several seeds, by what tells these steps apart.

    All of them are of the one form of routing that has most pairs in total.
    """
    titled = titles(run.sampled_with for run in runs)
    residual = [run for run in runs if not routed(run)]
    forms: dict[str, list[Run]] = {}
    for run in runs:
        if routed(run):
            forms.setdefault(repr(run.cfg.student.routing.form()), []).append(run)
    found = [_by_steps([*residual, *own], sets, titled) for own in forms.values()]
    return max(found, key=lambda pairs: sum(map(len, pairs.values())), default={})


def _by_steps(runs: Sequence[Run], sets: Sequence[ImageSet], titled: Mapping[FewSteps, str]) -> dict[str, list[Pair]]:
    pairs = {title: seed_pairs([run for run in runs if run.sampled_with == few], sets) for few, title in titled.items()}
    return {title: found for title, found in pairs.items() if several_seeds(found)}


def forest_of(pairs: dict[str, list[Pair]], runs: Sequence[Run], reference: ImageSet, seed: int) -> Forest:
    """Gains of pairs seed by seed, by steps; a ConfigError where runs of one arm hold one network or their data differ.

    seed: of the resampling.
    """
    require_trained_apart([pair for some in pairs.values() for pair in some], runs)
    return joined([from_runs(some, reference, seed, title) for title, some in pairs.items()])


def require_trained_apart(pairs: Sequence[Pair], runs: Sequence[Run]) -> None:
    """Refuse one network in two pairs, and students of other data."""
    residual, dar = {pair.residual.name for pair in pairs}, {pair.dar.name for pair in pairs}
    groups: RunsByArm = {
        "residual": [run for run in runs if run.name in residual],
        "dar": [run for run in runs if run.name in dar],
    }
    for name, members in groups.items():
        require_different_networks(name, members)
    require_same_data(groups)
