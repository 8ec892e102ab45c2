"""Sentences from numbers: the same endpoint reads as a win, a loss, a null or a pilot."""

import dataclasses
from math import inf
from typing import Any

import pytest

from eval.measure.results import SeedCurves, SeedDifference
from eval.metrics.intervals import Interval
from eval.study.endpoint import Power
from eval.study.results import AdjustedDifference, ArmComparison, PairedDifference, StudyResult
from eval.study.wording import conclusion, conclusion_over_steps, outcome, seed_table
from tests.eval.study.rows import UNKNOWN, network_row

LSD = {"title": "log-spectral distance, dB", "residual": 2.0, "dar": 1.5, "difference": Interval(0.5, 0.3, 0.7)}


def primary(
    value: float, half: float, p: float, seeds: int = 8, baseline: str = "residual", **changes: Any
) -> ArmComparison:
    """An endpoint as compare.json holds it."""
    interval = Interval(value, value - half, value + half)
    gains = {baseline: -2.0, "dar": value - 2.0}
    known = ArmComparison(
        baseline=baseline,
        seeds=list(range(seeds)),
        pilot=seeds < 6,
        per_seed=[SeedDifference(s, gains, interval) for s in range(seeds)],
        gain_db=gains,
        absolute_gain_db={baseline: 2.0, "dar": 2.0 - value},
        difference_db=interval,
        method="Student-t",
        reason="its simulated coverage is 95.0 %, where the two-level bootstrap covers 88.0 %",
        intervals={"Student-t": interval, "inverted sign-flip": Interval(value, -inf, inf)},
        coverage={"Student-t": 0.95, "inverted sign-flip": 1.0},
        least_coverage=0.92,
        p=p,
        least_p=2 / 2**seeds,
        variance_db2={},
        power=Power(0.5, 9, 20, 300),
        curve=SeedCurves([], {}),
    )
    return dataclasses.replace(known, **changes)


def rows(latency: float, parameters: int, kurtosis: float) -> list:
    return [
        network_row(latency=latency, parameters=parameters, kurtosis=kurtosis, reset_shift_db=shift)
        for shift in (-1.2, -0.05, 0.3)
    ]


def result(main: ArmComparison, **changes: Any) -> StudyResult:
    known = StudyResult(
        schema_version=2,
        label="pilot: fewer than 6 training seeds" if main.pilot else "",
        images=1024,
        primary=main,
        controls={},
        absent={},
        secondaries={"lsd": AdjustedDifference(**LSD, p=0.0078, p_holm=0.03)},
        costs={"latency_ms": PairedDifference(**{**LSD, "title": "ms per image", "residual": 5.0, "dar": 7.0})},
        runs={"residual": rows(5.0, 1000, 0.9), "dar": rows(7.0, 1200, 1.0)},
    )
    return dataclasses.replace(known, **changes)


WIN, LOSS = primary(0.8, 0.3, 0.0078), primary(-0.8, 0.3, 0.0078)
NULL, EQUAL = primary(0.2, 0.6, 0.4), primary(0.1, 0.2, 0.3)


@pytest.mark.parametrize(
    ("main", "kind", "begins"),
    [
        (WIN, "win", "DAR keeps the high band nearer to the teacher than plain residuals do: D ="),
        (LOSS, "loss", "Against DAR: plain residuals keep the high band nearer to the teacher than DAR does: D ="),
        (NULL, "null", "No difference shown: D ="),
        (EQUAL, "null", "No difference, and none of 0.5 dB either way: D ="),
        (primary(0.8, 0.3, 0.0625), "null", "No difference shown"),  # the exact test does not agree
        (primary(-0.8, 0.9, 0.03), "null", "No difference shown"),  # the interval does not agree
        (primary(0.8, 0.3, 0.0625, seeds=5), "pilot", "Pilot: 5 training seeds cannot decide (p is at least 0.0625)"),
        (primary(-0.8, 0.3, 0.25, seeds=3), "pilot", "Pilot: 3 training seeds cannot decide (p is at least 0.25)"),
    ],
)
def test_the_headline_follows_from_interval_and_test(main, kind, begins):
    text = conclusion(result(main))
    assert outcome(main) == kind and text.startswith(begins)
    assert "\n" not in text and text.count("..") == 0
    if kind == "pilot":
        assert "keeps" not in text and "better" not in text


def test_numbers_are_told_with_their_sign_method_and_power():
    text = conclusion(result(WIN))
    assert "= +0.80 dB [+0.50, +1.10], exact sign-flip p = 0.0078, DAR nearer to the teacher in 8 of 8" in text
    assert "residual -2.00 dB, DAR -1.20 dB (absolute 2.00 and 1.20" in text
    assert "The interval is the Student-t's: its simulated coverage is 95.0 %," in text
    assert "about 9 seeds of 1024 images (up to 20 if" in text and "alone about 300 images" in text
    loss = conclusion(result(LOSS))
    assert "= -0.80 dB [-1.10, -0.50]" in loss and "in 0 of 8 training seeds" in loss
    hopeless = Power(0.5, None, None, 9000)
    assert "No number of seeds resolves 0.5 dB" in conclusion(result(primary(0.2, 0.6, 0.4, power=hopeless)))


def test_costs_structure_and_missing_controls_stand_beside_a_win():
    text = conclusion(result(WIN))
    assert "1.40 times the time per image and +20.00 % parameters." in text
    assert "Not given: a parameter-matched residual arm and an arm trained with static routers" in text
    assert "Energy is not structure" not in text and "was not made" not in text
    lacking = conclusion(result(WIN, absent={"frozen_at_mean": "it is made of SiT students only"}))
    assert "frozen_at_mean was not made: it is made of SiT students only. Not given: a param" in lacking
    assert "moves its HF gain by -1.20 to +0.30 dB (router unused in 1 of 3 runs)" in text
    poor = dict.fromkeys(("residual", "dar"), rows(5.0, 1000, 0.4))
    text = conclusion(result(WIN, runs=poor))
    assert "Energy is not structure: the kurtosis ratio is 0.40 for residual and 0.40 for DAR" in text
    undefined = {"residual": rows(5.0, 1000, UNKNOWN), "dar": rows(7.0, 1200, 0.4)}
    assert "structure is not judged" in conclusion(result(WIN, runs=undefined))
    assert "matched within 1 %" in text and "parameter-matched" not in text


def test_controls_and_secondaries_are_told_with_their_side():
    held = primary(-0.4, 0.2, 0.0078, baseline="frozen_at_mean", p_holm=0.0156)
    assert outcome(held) == "loss" and outcome(dataclasses.replace(held, p_holm=0.08)) == "null"
    static = primary(0.1, 0.4, 0.5, baseline="frozen", p_holm=0.5)
    text = conclusion(result(WIN, controls={"frozen_at_mean": held, "frozen": static}))
    assert "held at their mean over t: D = -0.40 dB [-0.60, -0.20], p = 0.0156 (DAR is farther)." in text
    assert "static routers: D = +0.10 dB [-0.30, +0.50], p = 0.5 (no difference shown)." in text
    assert "After Holm's correction: log-spectral distance, dB for DAR (p = 0.03)." in text
    against = AdjustedDifference(**{**LSD, "difference": Interval(-0.5, -0.7, -0.3)}, p=0.0078, p_holm=0.03)
    weak = dataclasses.replace(against, p_holm=0.2)
    assert "log-spectral distance, dB against DAR" in conclusion(result(WIN, secondaries={"lsd": against}))
    assert "No secondary difference passes" in conclusion(result(WIN, secondaries={"lsd": weak}))
    assert "no secondary can pass Holm's correction (p is at least 0.25)" in conclusion(
        result(primary(0.8, 0.3, 0.25, 3))
    )


def test_the_table_shows_every_seed_and_says_what_is_unbounded_or_skipped():
    skipped = {"kurtosis": AdjustedDifference(title="|log kurtosis ratio|", skipped="undefined for a run")}
    lines = seed_table(result(primary(0.8, 0.3, 0.25, seeds=3), secondaries=skipped)).splitlines()
    assert lines[0].startswith("PILOT") and sum(line.startswith("seed ") for line in lines) == 3
    assert any("[unbounded, unbounded]" in line for line in lines)
    assert lines[-2].startswith("|log kurtosis ratio|") and lines[-2].endswith("undefined for a run")
    assert lines[-1].startswith("ms per image") and lines[-1].endswith("+0.50 [+0.30, +0.70]")


def test_over_several_steps_each_is_told_by_its_own_test_after_holm():
    told = conclusion_over_steps({"1 step": result(primary(0.8, 0.3, 0.0078, p_holm=0.0156)), "2 steps": result(LOSS)})
    assert told.startswith("1 step: DAR keeps the high band nearer")
    assert "p = 0.0078 (0.0156 after Holm's correction over the steps)," in told
    assert "2 steps: Against DAR: plain residuals keep" in told and "can pass" not in told
    lost = result(primary(0.8, 0.3, 0.0312, p_holm=0.0936, seeds=6))
    told = conclusion_over_steps(dict.fromkeys(("1 step", "2 steps", "4 steps"), lost))
    assert told.count("No difference shown") == 3
    assert told.endswith(
        "With so few seeds none of 3 tests can pass Holm's correction (p is at least 0.0938): train more seeds, or"
        " compare fewer steps."
    )
