"""Distillation from teachers whose score is known exactly; see benchmarks/analytic.py."""

import pytest
import torch

from benchmarks.analytic import (
    SIDE,
    Arm,
    Filter,
    Perceptron,
    Recipe,
    distilled,
    field_velocity,
    four_step_student_of_a_field,
    four_step_student_of_a_mixture,
    mixture_samples,
    mixture_velocity,
    mmd,
    modes_found,
    octaves,
    samples_of,
)
from dmd_dar import flow


@pytest.mark.slow
def test_a_one_step_student_of_a_mixture_finds_its_modes():
    torch.manual_seed(0)
    shape, truth = (2, 1, 1), mixture_samples()
    before = samples_of(mixture_velocity, (1.0,), shape).flatten(1)
    student = distilled(mixture_velocity, Perceptron(), shape, (1.0,), Recipe(500, 256, lr=5e-3, shift=0.5))
    after = samples_of(student, (1.0,), shape).flatten(1)
    assert modes_found(before) == 0 and modes_found(after) >= 7
    assert mmd(after, truth) <= 0.1 * mmd(before, truth)


@pytest.mark.slow
def test_a_one_step_student_of_a_field_has_its_spectrum():
    torch.manual_seed(0)
    shape = (1, SIDE, SIDE)
    assert octaves(samples_of(field_velocity, (1.0,), shape))[-1] < -100  # the mean alone
    student = distilled(field_velocity, Filter(), shape, (1.0,), Recipe(300, 48, lr=5e-3))
    after = octaves(samples_of(student, (1.0,), shape))
    assert after[-1].abs() <= 1 and after.abs().max() <= 2


def test_a_four_step_student_of_a_field_has_its_spectrum():
    assert octaves(samples_of(field_velocity, flow.default_rungs(4), (1, SIDE, SIDE)))[-1] < -6
    top = four_step_student_of_a_field(seed=0, per_rung=True)[:, -1]
    assert top.abs().max() <= 1


@pytest.mark.slow
def test_calls_without_gradients_in_bfloat16_leave_a_four_step_student_as_good():
    top = four_step_student_of_a_field(seed=0, arm=Arm(gradient_free="bfloat16"))[:, -1]
    assert top.abs().max() <= 1


@pytest.mark.slow
def test_rungs_matched_above_the_next_rung_alone_end_in_the_right_samples():
    """What an earlier rung leaves below the next rung's t is hidden there by the noise, and need not be right."""
    first, *_, last, _ = four_step_student_of_a_field(seed=0, arm=Arm(above_next_rung=True))
    assert last.abs().max() <= 1 and first.abs().max() > 1
    modes, distance = four_step_student_of_a_mixture(0, updates=2000, arm=Arm(above_next_rung=True))
    assert modes >= 7 and distance <= 0.1


@pytest.mark.slow
def test_rungs_that_are_not_told_apart_match_the_field_together_and_need_not_each():
    *rungs, pooled = four_step_student_of_a_field(2, per_rung=False)[:, -1].tolist()
    assert abs(pooled) <= 0.5 and max(rungs) > 1 and min(rungs) < -1


@pytest.mark.slow
def test_a_four_step_student_of_a_mixture_finds_its_modes():
    modes, distance = four_step_student_of_a_mixture(0, updates=2000)
    assert modes >= 7 and distance <= 0.1
