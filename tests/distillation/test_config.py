"""What the configuration of a distillation allows, and the arms that are shipped."""

import re
from pathlib import Path

import pytest
import torch

from dmd_dar import config
from dmd_dar.distillation import job as distill
from dmd_dar.train.disk import log
from tests.distillation.test_job import RECIPES, ROOT, arguments, run
from tests.tiny import tiny_teacher


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    return tiny_teacher(tmp_path_factory.mktemp("teacher"))


def test_the_two_arms_differ_in_routing_and_out_dir_only(monkeypatch):
    monkeypatch.chdir(ROOT)
    for dar, residual in (("dar", "residual"), ("demo_dar", "demo_residual")):
        loaded = [config.load(distill.DistillConfig, [f"config={RECIPES / name}.yaml"]) for name in (dar, residual)]
        keys = {key for key, _, _ in config.differences(*loaded)}
        assert "student.routing.query" in keys and "out_dir" in keys
        assert all(key == "out_dir" or key.startswith("student.routing.") for key in keys)


def test_decoupled_matching_needs_guidance_and_uses_it(teacher, tmp_path):
    form = "matching.dm_form=decoupled"
    run(teacher, tmp_path / "run", form, "guidance_scale=2.5", "steps=1", f"regression.cache={tmp_path}")
    assert "student/dm" in log.read(tmp_path / "run" / "log.jsonl")[-1]
    with pytest.raises(config.ConfigError, match="guidance_scale = 1.0 .*decoupled"):
        config.load(distill.DistillConfig, arguments(teacher, tmp_path, form))


@pytest.mark.parametrize(
    "wrong, said",
    [
        ("student.lr=0", "student.lr"),
        ("rungs=[0.9,0.5]", "rungs"),
        ("regression.solver_steps=3", "solver_steps must be at least 4"),
        ("student.routing.scale=convex", "allow_change"),
        ("student.routing.chunksize=4", "chunk_size"),
        ("studnt.lr=1e-4", "nearest valid key: student.lr"),
        ("teacher.path=/nowhere", "teacher.path"),
        ("regression.metric=lpips", "DMD_DAR_WEIGHTS_DIR"),
        ("data.size=64", "data.size"),
        ("student.routing.chunk_size=5", "chunk_size"),
        ("batch_size=3", "accumulation"),
        ("student.ema=[0.9,0.9]", "student.ema"),
        ("student.ema=1.0", "student.ema"),
        ("gan={weight: 1.0, layers: [3]}", "gan.layers"),
        ("gan={feature_weight: 1.0, features: teacher}", "gan.feature_weight"),
        ("gan={weight: 1.0, hidden: 0}", "gan.hidden"),
        ("regression.metric=huber", "pseudo_huber"),
        ("sampler=deterministic matching.above_next_rung=true", "end and matching.above_next_rung true ask different"),
        ("sampler=deterministic regression.target=next_rung", "next_rung and matching.above_next_rung false ask"),
        ("regression.target=next_rung", "stochastic adds fresh noise to their x0: set sampler to deterministic"),
        (
            "sampler=deterministic regression.target=next_rung gan={weight: 1.0} matching.above_next_rung=true",
            "regression.target next_rung it is but a step",
        ),
        ("guidance_scale=2 matching={above_next_rung: true, dm_form: decoupled}", "guidance_time at every rung alike"),
        ("regression.by_rung=[1,1]", "2 factors for"),
        ("regression.by_rung=[0,1,1,1] matching.weight=0", "rung of factor 0"),
        ("rungs=[1,0.99] matching.above_next_rung=true", "matching.time.high = 0.98"),
        ("matching.start=4", "matching.start is 4 of 4 steps"),
        ("regression.weight=0 matching.start=2", "both 0 at student update 0: nothing"),
        ("regression.by_rung=[0,1,1,1] matching.start=1", "rung of factor 0"),
    ],
)
def test_mistakes_end_with_one_line_and_exit_code_2(teacher, tmp_path, wrong, said, capsys, monkeypatch):
    monkeypatch.setenv("DMD_DAR_WEIGHTS_DIR", str(tmp_path))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(SystemExit) as stop:
        keys = re.split(" (?=matching|regression|gan)", wrong)
        distill.main(arguments(teacher, tmp_path / "run", "launch.accumulation=2", *keys))
    message = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and message.startswith("error: ") and said in message


@pytest.mark.parametrize(
    ("weights", "update"),
    [
        ("regression={weight: 0.5, end_weight: 0.0, ramp_steps: 2}", 2),
        ("regression.weight=0 gan={weight: 0.0, end_weight: 0.1, ramp_steps: 2}", 0),
        ("regression={weight: 0.5, end_weight: 0.0} gan={weight: 0.0, end_weight: 1.0, ramp_start: 2}", 0),
        ("regression={end_weight: 0.0, ramp_steps: 1} gan={weight: 0.0, end_weight: 1.0, ramp_start: 3}", 1),
        ("regression={weight: 0.5, end_weight: 0.0, ramp_steps: 4} gan.weight=0", None),
        ("regression={weight: 0.5, end_weight: 0.0, ramp_steps: 2} gan.weight=0.1", None),
        ("regression.weight=0.5 gan={weight: 0.0, end_weight: 1.0, ramp_start: 2}", None),
    ],
)
def test_an_update_that_nothing_trains_is_refused(teacher, weights, update):
    given = arguments(teacher, Path("unused"), "matching.weight=0", *re.split(r" (?=gan|regression)", weights))
    if update is None:
        config.load(distill.DistillConfig, given)
        return
    with pytest.raises(config.ConfigError, match=f"matching.weight = 0.0 .*both 0 at student update {update}: nothing"):
        config.load(distill.DistillConfig, given)


def test_where_nothing_is_matched_its_start_does_not_matter():
    config.from_dict(distill.DistillConfig, {"steps": 20, "matching": {"weight": 0.0, "start": 30}}, where="test")


@pytest.mark.parametrize(
    "gan", [{}, {"weight": 0.0, "end_weight": 1.0, "ramp_start": 9}, {"weight": 1.0, "end_weight": 0.0}]
)
def test_a_rung_without_regression_needs_another_term_at_every_update(gan):
    regression = {"by_rung": [0.0, 1.0, 1.0, 1.0], "weight": 1.0}
    alone = {"steps": 20, "matching": {"weight": 0.0}, "regression": regression}
    with pytest.raises(config.ConfigError, match="rung of factor 0"):
        config.from_dict(distill.DistillConfig, {**alone, "gan": gan}, where="test")
    config.from_dict(distill.DistillConfig, {**alone, "gan": {"weight": 1.0}}, where="test")
    config.from_dict(distill.DistillConfig, {"steps": 20, "regression": regression}, where="test")
