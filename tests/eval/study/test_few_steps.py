"""What tells students of several steps apart, and which of them are of one kind."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from dmd_dar import config
from dmd_dar.distillation.config import DistillConfig
from dmd_dar.models.saved import ModelCard, Saved
from eval.study import twins
from eval.study.few_steps import FewSteps, titles
from eval.study.kinds import kinds
from eval.study.runs import Run, reference_guidance, require_shared


def made(name: str, query: str = "residual", **changes: Any) -> Run:
    cfg = DistillConfig()
    routing = dataclasses.replace(cfg.student.routing, query=query)  # type: ignore[arg-type]
    student = dataclasses.replace(cfg.student, routing=routing)
    return Run(name, Path(name), dataclasses.replace(cfg, student=student, **changes), {})


def test_steps_are_named_as_far_as_they_differ():
    one, two, four = FewSteps((1.0,), 1.0), FewSteps((1.0, 0.75), 1.0), FewSteps((1.0, 0.9, 0.75, 0.5), 1.0)
    assert titles([four, four]) == {four: ""}
    assert list(titles([four, one, two, one]).items()) == [(one, "1 step"), (two, "2 steps"), (four, "4 steps")]
    other = FewSteps((1.0, 0.7500001), 1.0)  # equal to six digits
    assert titles([two, other, one]) == {
        one: "1 step",
        two: "2 steps at 1, 0.75",
        other: "2 steps at 1, 0.7500001",
    }
    guided = dataclasses.replace(two, guidance_scale=2.5)
    assert titles([two, guided]) == {two: "guidance 1", guided: "guidance 2.5"}
    followed = dataclasses.replace(one, sampler="Euler")
    again = dataclasses.replace(guided, sampler="re-noised")
    assert titles([followed, again]) == {
        followed: "1 step, guidance 1, Euler",
        again: "2 steps, guidance 2.5, re-noised",
    }


def test_a_kind_is_what_does_not_follow_from_the_steps():
    runs = [made("a", rungs=(1.0,), steps=9), made("b", seed=3), made("c", "timestep"), made("d", "static")]
    assert kinds(runs) == {"a": "residual", "b": "residual", "c": "DAR, query timestep", "d": "DAR, query static"}
    runs[1] = made("b", sampler="deterministic")
    assert kinds(runs[:3]) == {"a": "residual", "b": "residual", "c": "DAR"}  # one step knows no sampler
    several = [*runs[:2], made("e")]
    assert kinds(several) == {"a": "residual", "b": "residual, Euler", "e": "residual, re-noised"}
    alone = dataclasses.replace(runs[0].cfg.matching, weight=0.0)
    runs[1] = made("b", matching=alone, regression=dataclasses.replace(runs[0].cfg.regression, weight=1.0))
    assert kinds(runs[:2]) == {"a": "residual, matching and regression", "b": "residual, regression"}


def test_the_one_reference_has_the_guidance_that_runs_share_or_the_one_that_is_named():
    runs = [made("a", guidance_scale=1.5), made("b", guidance_scale=1.5, rungs=(1.0,)), made("c", guidance_scale=4.0)]
    assert reference_guidance(runs[:2], None) == 1.5 and reference_guidance(runs, 2.0) == 2.0
    message = r"guidance_scale is 1\.5 in a, 4\.0 in c; say which the reference has, guidance_scale=1\.5"
    with pytest.raises(config.ConfigError, match=message):
        reference_guidance(runs, None)


def test_students_as_of_other_updates_are_no_twins():
    def of(name: str, query: str, updates: int) -> Run:
        return dataclasses.replace(made(name, query), saved=Saved(ModelCard(origin={"steps": updates}), "", {}))

    early, late, routed = of("early", "residual", 50), of("late", "residual", 250), of("routed", "timestep", 250)
    assert twins.twins(routed, [early, late, routed]) == [late]
    assert twins.twins(routed, [early, routed]) == []


def test_one_form_of_guidance_for_all_runs_of_a_report():
    one = made("one", guidance_scale=2.0)
    within = dataclasses.replace(one.cfg.guidance, interval=(0.2, 0.9))
    other = dataclasses.replace(one, name="other", cfg=dataclasses.replace(one.cfg, guidance=within))
    require_shared([one, one], "runs")
    with pytest.raises(config.ConfigError, match="guidance .*interval"):
        require_shared([one, other], "runs")


def test_one_first_size_for_all_runs_of_a_report():
    one = made("one")
    other = dataclasses.replace(one, name="other", cfg=dataclasses.replace(one.cfg, height=24, width=40))
    with pytest.raises(config.ConfigError, match="24 x 40 in other, own x own in one"):
        require_shared([one, other], "runs")
