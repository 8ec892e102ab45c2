"""From what was measured of all runs to the comparisons: the endpoint of each pair of arms, secondaries and costs."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from ..metrics.intervals import Interval, holm, max_t_band, sign_flip_p, student_t
from ..samples.sampling import LATENCY_BATCH
from .endpoint import LEAST_COVERAGE, differences, endpoint, image_spread, pilot_label
from .results import (
    AdjustedDifference,
    ArmComparison,
    Curve,
    NetworkRow,
    PairedDifference,
    SeedCurves,
    SeedDifference,
    StepsResult,
    StudyResult,
)
from .sampled import Study
from .wording import conclusion, conclusion_over_steps

SCHEMA_VERSION = 2
STEPS_SCHEMA_VERSION = 3  # of a file over several steps, each part of which has the other one


@dataclass(frozen=True)
class Quantity:
    """One number of a run, smaller being better."""

    title: str
    of: Callable[[NetworkRow], float]


def _log_distance(ratio: float) -> float:
    """How far a ratio is from 1, either way; infinite where it is not positive."""
    return abs(math.log(ratio)) if ratio > 0 else math.inf


def _distance(decibels: float | None) -> float:
    """From 0; NaN where it was not measured."""
    return math.nan if decibels is None else abs(decibels)


# What is tested beside the endpoint: how far a run is from the teacher in another way, 0 being best.
SECONDARIES = {
    "lsd": Quantity("log-spectral distance, dB", lambda row: row.against.lsd),
    "fd_wavelet": Quantity("fd_wavelet above its null", lambda row: row.against.fd_wavelet.excess),
    "hf_kurtosis_ratio": Quantity("|log kurtosis ratio|", lambda row: _log_distance(row.against.hf_kurtosis_ratio)),
    "flat_noise_db": Quantity("|flat noise|, dB", lambda row: _distance(row.against.flat_noise_db)),
    "diversity_ratio": Quantity("|log least class diversity|", lambda row: _log_distance(row.against.diversity_ratio)),
}
# What DAR is paid for with: shown beside the tests, and no part of their family.
COSTS = {
    "latency_ms": Quantity("ms per image", lambda row: row.cost.latency_ms_per_image),
    "peak_memory_mb": Quantity(f"peak MB of {LATENCY_BATCH} images", lambda row: row.cost.peak_memory_mb),
    "gflops": Quantity("GFLOPs per image", lambda row: row.cost.gflops_per_image),
    "training_step_seconds": Quantity("s per training step", lambda row: row.training_step_seconds),
    "parameters": Quantity("parameters", lambda row: row.network.parameters),
}


def compare_arms(study: Study, baseline: str, seed: int) -> ArmComparison:
    """The endpoint of the DAR arm against `baseline`, with its gain curves. seed: of resampling and simulation."""
    result = endpoint(study.arms(baseline, lambda one: one.hf), seed)
    seeds, arms = [row.seed for row in study.runs["dar"]], (baseline, "dar")
    return ArmComparison(
        baseline=baseline,
        seeds=seeds,
        pilot=result.pilot,
        per_seed=[
            SeedDifference(training_seed, dict(zip(arms, gains, strict=True)), difference)
            for training_seed, gains, difference in zip(seeds, result.gains.T.tolist(), result.per_seed, strict=True)
        ],
        gain_db=dict(zip(arms, result.gains.mean(1).tolist(), strict=True)),
        absolute_gain_db=dict(zip(arms, np.abs(result.gains).mean(1).tolist(), strict=True)),
        difference_db=result.difference,
        method=result.method,
        reason=result.reason,
        intervals={**result.intervals},
        coverage={**result.coverage},
        least_coverage=LEAST_COVERAGE,
        p=result.p,
        least_p=2 / 2 ** len(seeds),
        variance_db2=result.variance,
        power=result.power,
        curve=gain_curves(study, baseline, seed),
    )


def gain_curves(study: Study, baseline: str, seed: int) -> SeedCurves:
    """Gain over frequency of both arms, and |gain baseline| - |gain DAR|, with simultaneous 95 % bands over seeds."""
    arms = study.arms(baseline, lambda one: one.luma.per_image.numpy())
    gains, spread, images = arms.gains, image_spread(arms), len(arms.labels)
    shared, _ = spread.of_difference(gains)
    gains_and_variances = {
        baseline: (gains[0], np.maximum(spread.shared[0, 0], 0.0)),
        "dar": (gains[1], np.maximum(spread.shared[1, 1], 0.0)),
        "difference": (differences(gains), shared),
    }
    curves = {}
    for name, (values, variance) in gains_and_variances.items():
        band = max_t_band(values, np.random.default_rng([seed, 2]), variance / images)
        curves[name] = Curve(*(part.tolist() for part in band))
    return SeedCurves(study.teacher.luma.frequencies.tolist(), curves)


def residual_minus_dar(runs: dict[str, list[NetworkRow]], quantity: Quantity) -> PairedDifference:
    """A quantity of the runs in both arms, and its paired difference; see `paired`."""
    residual, dar = (np.array([quantity.of(row) for row in runs[arm]]) for arm in ("residual", "dar"))
    return paired(quantity.title, residual, dar)


def paired(title: str, residual: np.ndarray, dar: np.ndarray) -> PairedDifference:
    """Means of two arms (K,), the mean paired difference with its Student-t interval, and the exact p-value."""
    if not (np.isfinite(residual).all() and np.isfinite(dar).all()):
        return PairedDifference(title=title, skipped="undefined for a run")
    per_seed = residual - dar
    low, high = student_t(per_seed)
    return PairedDifference(
        title=title,
        residual=float(residual.mean()),
        dar=float(dar.mean()),
        difference=Interval(float(per_seed.mean()), float(low), float(high)),
        per_seed=per_seed.tolist(),
        p=sign_flip_p(per_seed),
    )


def secondary_tests(runs: dict[str, list[NetworkRow]]) -> dict[str, AdjustedDifference]:
    """The secondaries, a family of tests: p after Holm for each that is defined."""
    family = {name: residual_minus_dar(runs, quantity) for name, quantity in SECONDARIES.items()}
    adjusted = holm({name: one.p for name, one in family.items() if one.p is not None})
    return {name: AdjustedDifference(**vars(one), p_holm=adjusted.get(name)) for name, one in family.items()}


def control_tests(study: Study, seed: int) -> dict[str, ArmComparison]:
    """DAR against every control, a family of its own: is it adaptive routing that helps?"""
    names = [name for name in study.networks if name not in ("residual", "dar")]
    family = {name: compare_arms(study, name, seed) for name in names}
    adjusted = holm({name: one.p for name, one in family.items()})
    return {name: replace(one, p_holm=adjusted[name]) for name, one in family.items()}


def conclude(study: Study, images: int, seed: int) -> StudyResult:
    """All comparisons of what was measured on so many images, and the conclusion in words."""
    primary, runs = compare_arms(study, "residual", seed), study.runs
    result = StudyResult(
        schema_version=SCHEMA_VERSION,
        label=pilot_label(primary.pilot),
        images=images,
        primary=primary,
        controls=control_tests(study, seed),
        absent=study.absent,
        secondaries=secondary_tests(runs),
        costs={name: residual_minus_dar(runs, quantity) for name, quantity in COSTS.items()},
        runs=runs,
    )
    return replace(result, conclusion=conclusion(result))


def conclude_over_steps(results: dict[str, StudyResult]) -> StepsResult:
    """Several comparisons, each of its own steps: their primaries as one family of tests, the conclusions in words."""
    adjusted = holm({title: one.primary.p for title, one in results.items()})
    steps = {}
    for title, one in results.items():
        one = replace(one, primary=replace(one.primary, p_holm=adjusted[title]))
        steps[title] = replace(one, conclusion=conclusion(one))
    first = next(iter(steps.values()))
    return StepsResult(
        schema_version=STEPS_SCHEMA_VERSION,
        label=next((one.label for one in steps.values() if one.label), ""),
        images=first.images,
        steps=steps,
        conclusion=conclusion_over_steps(steps),
    )
