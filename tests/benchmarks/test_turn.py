"""A guard: how many operations that start a kernel a turn has, at the pinned torch. Counts, not times."""

from pathlib import Path

import pytest
import torch

from benchmarks.turn import Arm, TurnBenchmark, build, launches, shares
from dmd_dar.train.processes.runtime import LaunchConfig, Runtime

PINNED = next(
    line.partition("==")[2]
    for line in (Path(__file__).parents[2] / "constraints.txt").read_text().splitlines()
    if line.startswith("torch==")
)
BENCH = TurnBenchmark(updates=2, batch_size=1, cpu=True)


def turn_of(arm: Arm):
    return build(BENCH, "demo net", arm, Runtime(LaunchConfig(cpu=True)))


@pytest.mark.skipif(torch.__version__.partition("+")[0] != PINNED, reason=f"the counts are of torch {PINNED}")
@pytest.mark.parametrize(
    ("arm", "most"),
    [
        (Arm("residual"), 2730),
        pytest.param(Arm("DAR"), 4250, marks=pytest.mark.slow),
        pytest.param(Arm("residual", "shared_lora"), 3500, marks=pytest.mark.slow),
        (Arm("DAR", "shared_lora"), 5010),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_a_turn_starts_no_more_kernels_than_it_did(arm, most):
    found = launches(turn_of(arm))
    assert found["all"] <= most and found["draws"] <= 450


def test_the_parts_of_a_turn_are_timed_and_add_up():
    turn = turn_of(Arm("DAR"))
    losses = [phase.loss for phase in turn.phases]
    found = shares(turn, 1)
    parts = {"backward", "optimiser", "draws", "rest", "student, without gradient", "student, forward"}
    parts |= {"fake_score, forward", "fake_score, without gradient", "teacher, without gradient"}
    assert set(found) == parts and sum(found.values()) == pytest.approx(1) and min(found.values()) > 0
    assert [phase.loss for phase in turn.phases] == losses
