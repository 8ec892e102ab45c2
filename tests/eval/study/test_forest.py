"""The figure seed by seed over several steps: one form of routing at all of them, their tests corrected by Holm."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch

from dmd_dar.distillation.config import DistillConfig
from eval.measure.results import Forest, ForestComparison, SeedDifference, jsonable
from eval.metrics.intervals import Interval
from eval.page import sections
from eval.samples.sets import ImageSet
from eval.study.forest import from_file, joined
from eval.study.runs import Run
from eval.study.twins import pairs_by_steps

RUNGS = {1: (1.0,), 2: (1.0, 0.75)}


def comparison(steps: str | None, p: float, p_holm: float | None = None) -> ForestComparison:
    gains, nearer = {"residual": -1.0, "dar": -0.5}, Interval(0.5, 0.2, 0.8)
    return ForestComparison(
        baseline="residual",
        steps=steps,
        method="bootstrap",
        pilot=False,
        p=p,
        p_holm=p_holm,
        seeds=[0],
        per_seed=[SeedDifference(0, gains, nearer)],
        gain_db=gains,
        difference_db=nearer,
    )


def forest(one: ForestComparison) -> Forest:
    return Forest(source="runs", label="", conclusion="", comparisons=[one])


def test_the_tests_of_several_steps_are_one_family():
    lines = joined([forest(comparison("1 step", 0.031)), forest(comparison("2 steps", 0.0078))]).comparisons
    assert [(one.p, one.p_holm) for one in lines] == [(0.031, 0.031), (0.0078, 0.0156)]
    equal = joined([forest(comparison(f"{n} steps", 0.031)) for n in (2, 4)])
    (table,) = sections.forest(equal, b"").tables
    told = [row[0].small for row in table.rows if row[0].small]
    assert told == ["bootstrap, p = 0.031, 0.062 after Holm"] * 2
    alone = joined([forest(comparison(None, 0.031))])
    assert alone.comparisons[0].p_holm is None and "p_holm" not in jsonable(alone)["comparisons"][0]
    assert "Holm" not in str(sections.forest(alone, b"").tables)


def test_a_comparison_of_several_steps_brings_its_correction(tmp_path):
    record: dict[str, Any] = {**jsonable(comparison(None, 0.031, 0.062)), "curve": {}}
    once = {name: value for name, value in record.items() if name != "p_holm"}
    whole = {"label": "", "conclusion": "", "steps": {"1 step": {"primary": record, "controls": {"x": once}}}}
    (tmp_path / "compare.json").write_text(json.dumps(whole))
    assert [one.p_holm for one in from_file(tmp_path / "compare.json").comparisons] == [0.062, None]


def run(name: str, steps: int, seed: int, query: str, lr: float = 2e-3) -> Run:
    cfg = DistillConfig(rungs=RUNGS[steps], seed=seed)
    routing = dataclasses.replace(cfg.student.routing, query=query, lr=lr)  # type: ignore[arg-type]
    student = dataclasses.replace(cfg.student, routing=routing)
    return Run(name, Path(name), dataclasses.replace(cfg, student=student), {})


def paired(made: list[tuple[int, str, int]], rates: dict[int, float] | None = None) -> dict[str, list[str]]:
    """Names of the routed students in the figure, by steps; `made`: steps, query and the number of seeds."""
    runs = [run(f"residual_{steps}_{seed}", steps, seed, "residual") for steps in RUNGS for seed in range(4)]
    for steps, query, seeds in made:
        lr = (rates or {}).get(steps, 2e-3)
        runs += [run(f"{query}_{steps}_{seed}", steps, seed, query, lr) for seed in range(seeds)]
    images = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    sets = [ImageSet(one.name, images, None, "student", True) for one in runs]
    return {title: [pair.dar.name for pair in pairs] for title, pairs in pairs_by_steps(runs, sets).items()}


def test_all_steps_show_one_form_of_routing():
    """The one with most pairs in total, though another has more at two steps."""
    found = paired([(2, "static", 3), (1, "timestep", 4), (2, "timestep", 2)])
    assert found == {"1 step": [f"timestep_1_{s}" for s in range(4)], "2 steps": ["timestep_2_0", "timestep_2_1"]}
    found = paired([(1, "timestep", 2), (2, "static", 3)])
    assert found == {"2 steps": [f"static_2_{s}" for s in range(3)]}
    assert paired([(1, "timestep", 1), (2, "timestep", 1)]) == {}


def test_how_fast_the_routers_learn_is_no_other_form():
    found = paired([(1, "timestep", 2), (2, "timestep", 2)], {1: 1e-3})
    assert list(found) == ["1 step", "2 steps"]
