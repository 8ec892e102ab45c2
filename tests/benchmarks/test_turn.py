"""A guard: how many operations that start a kernel a turn has, at the pinned torch. Counts, not times."""

from pathlib import Path

import pytest
import torch

from benchmarks.turn import Arm, TurnBenchmark, build, teacher_of
from benchmarks.turn_cost import counted_calls, launches, shares
from dmd_dar.train.processes.runtime import LaunchConfig, Runtime

PINNED = next(
    line.partition("==")[2]
    for line in (Path(__file__).parents[2] / "constraints.txt").read_text().splitlines()
    if line.startswith("torch==")
)
BENCH = TurnBenchmark(updates=2, batch_size=1, cpu=True)


def turn_of(arm: Arm):
    return build(BENCH, teacher_of(BENCH, "demo net"), arm, Runtime(LaunchConfig(cpu=True)))


@pytest.mark.skipif(torch.__version__.partition("+")[0] != PINNED, reason=f"the counts are of torch {PINNED}")
@pytest.mark.parametrize(
    ("arm", "most"),
    [
        (Arm("residual"), 2730),
        pytest.param(Arm("DAR"), 3700, marks=pytest.mark.slow),
        pytest.param(Arm("residual", "shared_lora"), 3500, marks=pytest.mark.slow),
        (Arm("DAR", "shared_lora"), 4460),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_a_turn_starts_no_more_kernels_than_it_did(arm, most):
    found = launches(turn_of(arm))
    assert 0.95 * most <= found["all"] <= most and 400 <= found["draws"] <= 450


def test_the_parts_of_a_turn_are_timed_and_add_up():
    turn = turn_of(Arm("DAR"))
    found = shares(turn, 1)
    parts = {"backward", "optimiser", "draws", "rest", "student, without gradient", "student, forward"}
    parts |= {"fake_score, forward", "fake_score, without gradient", "teacher, without gradient"}
    assert set(found) == parts and sum(found.values()) == pytest.approx(1) and min(found.values()) > 0
    assert not any("forward" in vars(network) for network in turn.networks.values())


def test_a_turn_on_data_calls_each_network_once_an_update():
    turn = turn_of(Arm("residual", inputs="data"))
    with counted_calls(turn) as calls:
        turn.run()
    ours = {"student, without gradient": 2, "fake_score, forward": 2, "student, forward": 1}
    assert calls == {**ours, "teacher, without gradient": 1, "fake_score, without gradient": 1}
