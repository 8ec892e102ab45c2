"""The configurations of studies: their arms differ in what they compare alone."""

from pathlib import Path

from dmd_dar import config
from dmd_dar.distillation import job as distill

RECIPES = Path(__file__).parents[2] / "configs" / "photos32"


def test_the_studys_arms_differ_in_routing_and_rates_only(monkeypatch):
    monkeypatch.chdir(RECIPES.parents[1])
    dar, residual, static = (
        config.load(distill.DistillConfig, [f"config={RECIPES}/study_{name}.yaml"])
        for name in ("dar", "residual", "static")
    )
    own = {"out_dir", "student.routing.query", "student.lr", "student.routing.lr"}
    for other in (residual, static):
        assert {key for key, _, _ in config.differences(dar, other)} <= own
    assert (dar.steps, dar.matching.start, dar.checkpoint.students) == (400, 300, (25, 50, 110, 200, 300))


def test_the_pilots_arms_differ_in_their_routing_only(monkeypatch):
    monkeypatch.chdir(RECIPES.parents[1])
    dar, residual, frozen = (
        config.load(distill.DistillConfig, [f"config={RECIPES}/pilot_{name}.yaml"])
        for name in ("dar", "residual", "frozen")
    )
    assert {key for key, _, _ in config.differences(dar, residual)} == {"out_dir", "student.routing.query"}
    assert {key for key, _, _ in config.differences(dar, frozen)} == {"out_dir", "student.routing.query"}
    assert dar.regression.weight > 0 and len(dar.rungs) == 4 and dar.student.routing.chunk_size == 4
