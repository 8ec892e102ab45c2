"""Roll-outs that a turn's updates share: who gets what, how often the student is called; nothing else moves."""

import itertools
from dataclasses import replace

import pytest
import torch

from dmd_dar import flow
from dmd_dar.draws import Draws, sample_range
from dmd_dar.methods.dmd import DMD
from dmd_dar.methods.rollout import Rollout, predict_x0, rung_of
from dmd_dar.methods.turns import PHASE, Turns

RUNGS = (1.0, 0.9, 0.75, 0.5)
SHAPE = (2, 4, 4)
UPDATES = {"fake_score": 5, "discriminator": 1, "student": 1}


class Student:
    """A curved velocity that can be moved, and counts its calls."""

    def __init__(self):
        self.weight, self.times = 1.0, []

    def __call__(self, x_t, t, cond):
        self.times.append(round(t[0].item(), 4))
        return torch.sin(self.weight * x_t + flow.expand_t(t * (1 + cond), x_t))


def turns_of(student, updates=None, sampler="stochastic") -> Turns:
    return Turns(updates or UPDATES, student, RUNGS, 7, SHAPE, sampler)


def steps_of(turn: int, updates=None) -> list[tuple[str, int]]:
    """(phase, its step) of a turn's updates, in order."""
    return [(name, turn * n + i) for name, n in (updates or UPDATES).items() for i in range(n)]


def draws_of(phase: str, step: int, start: int = 0, stop: int = 6, part: int = 0) -> Draws:
    return Draws(5, phase, step, sample_range(start, stop), part=part)


def test_every_sample_is_of_one_roll_out_and_none_serves_two_updates_before_the_students():
    turns, seen = turns_of(Student()), []
    for turn in range(6):
        places = [turns.place(draws_of(*step)) for step in steps_of(turn)]
        assert [place.rollout for place in places] == [2 * turn] * 4 + [2 * turn + 1] * 3
        seen += [(place.rollout, place.rung) for place in places[:-1]]
    assert len(set(seen)) == len(seen) == 6 * 6


def test_a_phase_that_starts_late_shares_the_roll_outs_of_the_students_turn():
    turns = turns_of(Student())
    late = replace(turns, starts={"fake_score": 3})
    for turn in range(3, 6):
        for i in range(UPDATES["fake_score"]):
            step = turn * UPDATES["fake_score"] + i
            assert late.place(draws_of("fake_score", step - 15)) == turns.place(draws_of("fake_score", step))
        assert late.place(draws_of("student", turn)) == turns.place(draws_of("student", turn))


def test_the_students_rung_is_its_own_whatever_the_others_took():
    turns, count = turns_of(Student()), 4000
    both = [[turns.place(draws_of(name, turn)).rung for name in ("discriminator", "student")] for turn in range(count)]
    assert [rung for _, rung in both] == [rung_of(draws_of("student", turn), RUNGS) for turn in range(count)]
    together = torch.bincount(torch.tensor([4 * other + own for other, own in both]), minlength=16) / count
    assert (together - 1 / 16).abs().max() < 4 * (15 / 256 / count) ** 0.5


@pytest.mark.parametrize("phase", UPDATES)
def test_a_phase_sees_every_rung_as_often(phase):
    turns, count = turns_of(Student()), 4000
    rungs = torch.tensor([turns.place(draws_of(phase, step)).rung for step in range(count)])
    share = torch.bincount(rungs, minlength=4) / count
    assert (share - 0.25).abs().max() < 4 * (0.25 * 0.75 / count) ** 0.5


def test_the_orders_of_rungs_are_all_permutations_as_often():
    turns, count = turns_of(Student()), 2400
    orders = [tuple(turns.order(number, draws_of("student", 0))) for number in range(count)]
    counts = [orders.count(order) for order in itertools.permutations(range(4))]
    assert sum(counts) == count and min(counts) > 50 and max(counts) < 150  # 100 each, 10 the standard deviation


@pytest.mark.parametrize("sampler", ["stochastic", "deterministic"])
def test_samples_and_states_are_those_of_a_roll_out_of_ones_own(sampler):
    student = Student()
    turns = turns_of(student, sampler=sampler)
    for phase, step in steps_of(3):
        here = draws_of(phase, step)
        place = turns.place(here)
        there = Draws(5, PHASE, place.rollout, here.samples)
        cond, noise = there.integers("label", 7), there.normal("noise", *SHAPE)
        x_t = Rollout(student, cond, RUNGS, there, noise, sampler).state(place.rung)
        for made, expected in (
            (turns.state(place.rung, here), x_t),
            (turns.sample(place.rung, here), predict_x0(student, x_t, RUNGS[place.rung], cond)),
        ):
            assert torch.equal(made[0], expected) and torch.equal(made[1], cond) and not made[0].requires_grad
        assert torch.equal(turns.sample(place.rung, here)[2], x_t)


def test_a_turn_calls_the_student_once_at_each_rung_of_a_roll_out_at_most():
    student = Student()
    turns = turns_of(student, updates := {"fake_score": 5, "discriminator": 0, "student": 1})
    counts = []
    for turn in range(50):
        student.times.clear()
        for phase, step in steps_of(turn, updates):
            here = draws_of(phase, step)
            (turns.state if phase == "student" else turns.sample)(turns.place(here).rung, here)
        assert len(student.times) <= 8 and all(student.times.count(t) <= 2 for t in set(student.times))
        assert set(RUNGS) <= set(student.times)  # the first four updates take one roll-out through all rungs
        counts.append(len(student.times))
    assert abs(sum(counts) / 50 - (4 + 2.75)) < 0.5  # expected: max(fake's rung + 1, student's rung), 2.75


def test_a_new_turn_samples_the_student_that_has_moved_since():
    student = Student()
    turns = turns_of(student)
    before = turns.sample(3, draws_of("fake_score", 0))[0]
    assert turns.sample(3, draws_of("fake_score", 0))[0] is before
    student.weight = 2.0
    turns.sample(3, draws_of("fake_score", 5))
    assert not torch.allclose(turns.sample(3, draws_of("fake_score", 0))[0], before)


def test_a_roll_out_that_no_update_will_ask_for_is_not_kept():
    turns = turns_of(Student())
    for phase, step in steps_of(0):
        for part in range(3):
            turns.state(3, draws_of(phase, step, 2 * part, 2 * part + 2, part))
        assert len(turns.rollouts) == 3


def test_micro_batches_make_the_samples_of_the_whole():
    whole, split = turns_of(Student()), turns_of(Student())
    for phase, step in steps_of(1):
        rung = whole.place(draws_of(phase, step)).rung
        parts = [split.sample(rung, draws_of(phase, step, 2 * i, 2 * i + 2, part=i))[0] for i in range(3)]
        assert torch.allclose(torch.cat(parts), whole.sample(rung, draws_of(phase, step))[0], rtol=0, atol=1e-6)


def test_the_losses_take_rung_samples_and_inputs_from_the_turns():
    student, rungs = Student(), []
    turns = turns_of(student, {"fake_score": 2, "discriminator": 0, "student": 1})

    def fake_score(x_t, t, cond, rung):
        rungs.append(rung)
        return torch.zeros_like(x_t)

    method = DMD(
        student=student,
        teacher=lambda x_t, t, cond: torch.zeros_like(x_t),
        fake_score=fake_score,
        rungs=RUNGS,
        renoise=flow.TimeLaw(low=0.02, high=0.98),
        num_classes=7,
        shape=SHAPE,
        turns=turns,
    )
    for turn in range(4):
        places = []
        for phase, step in steps_of(turn, turns.updates):
            here = draws_of(phase, step)
            places.append(turns.place(here).rung)
            x0, _, _ = method.samples(places[-1], here)
            (method.student_loss if phase == "student" else method.fake_score_loss)(here)
            assert torch.equal(method.generate(places[-1], here)[0], x0)
        assert rungs == places and places[0] != places[1]
        rungs.clear()
