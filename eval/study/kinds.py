"""Which students of a report are of one kind but for their steps: the lines of quality over calls."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from ..samples.sets import ImageSet
from .few_steps import plain
from .runs import Run
from .twins import routed


def kinds(runs: Sequence[Run]) -> dict[str, str]:
    """What each run's student is, by the run's name: residual or DAR, with whatever else tells kinds apart.

    That is the form of its routing, what it learned from, its guidance and its sampler, which a single step knows
    nothing of. How long and how fast a student learned is no part of it: few steps may need more of it than many.
    """
    features = {run.name: _features(run) for run in runs}
    named: dict[str, str] = {}
    for run in runs:
        alike = [features[other.name] for other in runs if routed(other) == routed(run)]
        known = {name: {one[name] for one in alike if one[name]} for name in features[run.name]}
        apart = [word for name, word in features[run.name].items() if word and len(known[name]) > 1]
        named[run.name] = ", ".join(["DAR" if routed(run) else "residual", *apart])
    return named


def _features(run: Run) -> dict[str, str]:
    """In words; empty where one does not apply."""
    cfg = run.cfg
    learns = {"matching": cfg.matching.weight > 0, "regression": cfg.regression.used, "GAN": cfg.gan.used}
    form = vars(cfg.student.routing.form()) if routed(run) else {}
    return {
        "learns": " and ".join(name for name, used in learns.items() if used),
        **{name: f"{name} {value}" for name, value in form.items()},
        "guidance": f"guidance {plain(cfg.guidance_scale)}",
        "sampler": run.sampled_with.sampler or "",
    }


def told_apart(students: Mapping[str, ImageSet | None], runs: Sequence[Run]) -> dict[str, ImageSet | None]:
    """The sets of the runs' students by name; where these differ in rungs or guidance, with both, sampler and kind in
    their facts.
    """
    if len({run.few_steps for run in runs}) == 1:
        return dict(students)
    named, told = kinds(runs), dict(students)
    for run in runs:
        if one := students[run.name]:
            facts = replace(one.facts, **vars(run.sampled_with), kind=named[run.name])
            told[run.name] = replace(one, facts=facts)
    return told
