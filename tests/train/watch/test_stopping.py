"""Colour held against the teacher's own at each look, and rules by which a run ends itself as finished."""

import json
import math
from pathlib import Path

import pytest
import torch

from dmd_dar import config
from dmd_dar.distillation import job as distill
from dmd_dar.distillation.config import DistillConfig
from dmd_dar.models.saved import load_network
from dmd_dar.schema import ConfigError
from dmd_dar.train.disk import checkpoint, log
from dmd_dar.train.watch.stopping import RULES, Stopping, broken
from tests.tiny import tiny_teacher
from tests.train.watch.test_health import fields, health_of, measured, read, step_of

ROOT = Path(__file__).parents[3]
BAD, GOOD = {"saturation_ratio": 1.3}, {"saturation_ratio": 1.1}


@pytest.fixture(scope="module")
def teacher():
    return measured(0.5 * fields())


def test_colour_is_held_against_the_teachers_own(teacher):
    own = read(0.5 * fields(), teacher)
    assert own["saturation_ratio"] == own["contrast_ratio"] == 1 and own["drift_y"] == own["speckle_db"] == 0
    x0 = 0.5 * fields()
    grey = (x0 * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1, keepdim=True)
    strong, pale = (read(grey + factor * (x0 - grey), teacher) for factor in (2.0, 0.2))
    assert broken("over_saturated", strong).startswith("saturation_ratio 1.") and not broken("washed_out", strong)
    assert broken("washed_out", pale).startswith("saturation_ratio 0.") and not broken("over_saturated", pale)
    assert strong["speckle_db"] > 3 > -3 > pale["speckle_db"]
    shifted = read(x0 + 20 / 127.5, teacher)
    assert shifted["drift_y"] == pytest.approx(20, abs=0.1) and shifted["drift_cb"] == pytest.approx(0, abs=0.1)
    assert broken("colour_drift", shifted) == "drift_y 20 above 16" and not broken("grid", shifted)


@pytest.mark.parametrize("rule", RULES)
def test_each_rule_has_its_range_and_the_teachers_own_is_inside(rule):
    neutral = {"saturation_ratio": 1.0, "contrast_ratio": 1.0, "diversity": 1.0}
    assert not broken(rule, {name: neutral.get(name, 0.0) for name in RULES[rule]}) and not broken(rule, {})
    for name, (low, high) in RULES[rule].items():
        assert not broken(rule, {name: math.nan})
        if low > -math.inf:
            assert broken(rule, {name: low - 1}) == f"{name} {low - 1:.3g} below {low:g}"
        if high < math.inf:
            assert broken(rule, {name: high + 1}) == f"{name} {high + 1:.3g} above {high:g}"


def stops(stopping: Stopping, records: list[dict[str, float]]) -> list[bool]:
    return [bool(stopping.on(step, one, None)) for step, one in enumerate(records, 1)]


def test_a_fault_has_to_stand_in_records_in_a_row():
    assert stops(Stopping(["over_saturated"]), [BAD, GOOD, BAD, BAD]) == [False, False, False, True]
    assert stops(Stopping(["over_saturated"], 1), [GOOD, BAD]) == [False, True]
    assert stops(Stopping(["over_saturated"], 1, after=3), [BAD, BAD, BAD]) == [False, False, True]
    assert stops(Stopping([]), [BAD] * 3) == stops(Stopping(["grid"]), [BAD] * 3) == [False] * 3
    past = Stopping(["past_best"], 1)
    assert not past.on(1, {"score": 5.0}, (4.0, 1)) and "score_above_best 3 above 2" in past.on(
        2, {"score": 7.0}, (4.0, 1)
    )
    clipped = {"saturation": 0.09, "teacher_saturation": 0.02}
    assert "saturation_above_teacher 0.07 above 0.03" in Stopping(["over_saturated"], 1).on(1, clipped, None)


def test_a_continued_count_is_that_of_an_uninterrupted_one():
    first, second = Stopping(["over_saturated"], 3), Stopping(["over_saturated"], 3)
    stops(first, [BAD, BAD])
    second.restore(json.loads(json.dumps(first.state())))
    assert second.on(3, BAD, None) == first.on(3, BAD, None) != ""
    held, other, without = Stopping(["over_saturated"], 3), Stopping(["over_saturated"], 4), Stopping(["grid"], 3)
    for one in (held, other, without):
        one.restore(json.loads(json.dumps(second.state())))
    assert held.stopped == second.stopped and not other.stopped and not without.stopped
    assert not other.on(4, BAD, None)  # counted anew


def test_a_resumed_health_stops_where_an_uninterrupted_one_does():
    def health():
        one = health_of(3 * fields(), every=1)
        one.stopping = Stopping(["over_saturated"], 3)
        return one

    whole, first, second = health(), health(), health()
    records = [whole(step, step_of(1.0), scored=False) for step in (1, 2, 3)]
    assert ["health/stopped" in record for record in records] == [False, False, True]
    for step in (1, 2):
        first(step, step_of(1.0), scored=False)
    second.restore(json.loads(json.dumps(first.state())))
    assert second(3, step_of(1.0), scored=False)["health/stopped"] == records[-1]["health/stopped"]


def test_a_run_ends_by_its_rule_as_finished(tmp_path, capsys):
    out = tmp_path / "run"
    argv = [f"config={ROOT}/configs/photos32/residual.yaml", f"teacher.path={tiny_teacher(tmp_path / 'teacher')}"]
    argv += ["steps=9", "batch_size=2", "fake_score.updates=1", "regression.weight=0", "preflight=false"]
    argv += ["log.wandb=disabled", "launch.cpu=true", f"out_dir={out}", "student.lr=0.05", "student.warmup=0"]
    argv += ["student.decay_steps=0", "student.ema=0", "checkpoint.every=2", "log.every=1", "log.health_every=1"]
    argv += ["log.health_samples=8", "log.samples_every=50"]
    rules = f"log.stop_when=[{','.join(RULES)}]"
    distill.main([*argv, rules, "log.stop_after=2"])
    records, told = log.read(out / "log.jsonl"), capsys.readouterr().err
    last = records[-1]
    assert last["step"] == 3 and last["health/stopped"].startswith("log.stop_when: ")
    assert "stopped at step 3 of 9 by log.stop_when: " in told and "student_best/ holds the best student" in told
    assert load_network(out / "student")[1].origin["steps"] == 3 and (out / "samples" / "step_00000003.png").exists()
    assert checkpoint.steps_saved(out / "checkpoints") == [2, 3]
    assert load_network(out / "student_best")[1].origin["steps"] == 2  # of the checkpoints that were due
    distill.main([*argv, rules, "log.stop_after=2"])
    assert "finished before, stopped at step 3 of 9 by " in capsys.readouterr().err
    assert log.read(out / "log.jsonl") == records
    distill.main(argv)
    assert log.read(out / "log.jsonl")[-1]["step"] == 9 and "by log.stop_when" not in capsys.readouterr().err


def test_a_rule_needs_signals():
    with pytest.raises(ConfigError, match="stop_when needs health signals, and health_every is 0"):
        config.load(DistillConfig, ["teacher.path=x", "log.stop_when=[grid]", "log.health_every=0"])
    with pytest.raises(ConfigError, match="log.stop_when"):
        config.load(DistillConfig, ["teacher.path=x", "log.stop_when=[ugly]"])
