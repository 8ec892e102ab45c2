"""A comparison over training seeds in words: every sentence is made from the numbers of its result.

A win, a loss and a null are told in the same form; a pilot is called one in the first word.
"""

import math
from collections.abc import Callable, Iterable
from typing import Literal

from ..metrics.intervals import Interval
from ..metrics.verdict import KURTOSIS_RANGE
from .endpoint import Power
from .results import AdjustedDifference, ArmComparison, NetworkRow, PairedDifference, SeedDifference, StudyResult
from .students import ROUTER_USED_DB

Rows = dict[str, list[NetworkRow]]  # by arm

Outcome = Literal["pilot", "win", "loss", "null"]
SIGNIFICANT = 0.05
MATCHED_WITHIN = 0.01  # of the parameters

NAMES = {
    "residual": "the residual students",
    "dar": "DAR",
    "matched": "the parameter-matched residual students",
    "frozen": "the students trained with static routers",
    "frozen_at_mean": "the same DAR students with routers held at their mean over t",
}
TIMES: dict[str, Callable[[NetworkRow], float]] = {
    "time per image": lambda row: row.cost.latency_ms_per_image,
    "peak memory": lambda row: row.cost.peak_memory_mb,
    "FLOPs": lambda row: row.cost.gflops_per_image,
    "time of a training step": lambda row: row.training_step_seconds,
}
CONTROLS = {"matched": "a parameter-matched residual arm", "frozen": "an arm trained with static routers"}


def outcome(comparison: ArmComparison) -> Outcome:
    """A win or a loss needs an interval off 0 and a sign-flip p of at most 0.05, after Holm where it is of a family."""
    if comparison.pilot:
        return "pilot"
    difference = comparison.difference_db
    p = comparison.p if comparison.p_holm is None else comparison.p_holm
    if p > SIGNIFICANT or difference.low <= 0 <= difference.high:
        return "null"
    return "win" if difference.low > 0 else "loss"


def conclusion(result: StudyResult) -> str:
    """One paragraph, from all but the result's own conclusion."""
    primary = result.primary
    sentences = [
        headline(primary),
        signed_gains(primary),
        f"The interval is the {primary.method}'s: {primary.reason}.",
        resolution(primary.power, result.images, len(primary.seeds)),
        *(control_sentence(control) for control in result.controls.values()),
        absent_controls(result),
        secondary_sentence(result.secondaries, primary.least_p),
        structure_sentence(result.runs),
        usage_sentence(result.runs["dar"]),
        cost_sentence(result.runs),
    ]
    return " ".join(sentence for sentence in sentences if sentence)


def conclusion_over_steps(steps: dict[str, StudyResult]) -> str:
    """What each comparison says of its own steps, in one paragraph."""
    primaries = {title: one.primary for title, one in steps.items()}
    least = min(one.least_p for one in primaries.values()) * len(primaries)
    sentences = [f"{title}: {headline(one)}" for title, one in primaries.items()]
    if least > SIGNIFICANT:
        sentences.append(f"With so few seeds none of {len(primaries)} tests can pass Holm's correction (p is at least")
        sentences[-1] += f" {min(least, 1.0):.3g}): train more seeds, or compare fewer steps."
    return " ".join(sentences)


def headline(primary: ArmComparison) -> str:
    """The endpoint with its test, and what it says: one form for a win, a loss and a null."""
    difference, seeds = primary.difference_db, len(primary.seeds)
    nearer = sum(one.difference_db.value > 0 for one in primary.per_seed)
    after = "" if primary.p_holm is None else f" ({primary.p_holm:.3g} after Holm's correction over the steps)"
    numbers = (
        f"D = |HF gain of residual| - |HF gain of DAR| = {interval(difference)}, exact sign-flip p = {primary.p:.3g}"
        f"{after}, DAR nearer to the teacher in {nearer} of {seeds} training seeds"
    )
    kind = outcome(primary)
    if kind == "pilot":
        return f"Pilot: {seeds} training seeds cannot decide (p is at least {primary.least_p:.3g}); {numbers}."
    if kind == "win":
        return f"DAR keeps the high band nearer to the teacher than plain residuals do: {numbers}."
    if kind == "loss":
        return f"Against DAR: plain residuals keep the high band nearer to the teacher than DAR does: {numbers}."
    target = primary.power.target_db
    if -target < difference.low and difference.high < target:
        return f"No difference, and none of {target} dB either way: {numbers}."
    return f"No difference shown: {numbers}; this is no evidence that there is none."


def signed_gains(primary: ArmComparison) -> str:
    base = primary.baseline
    ours, theirs = primary.gain_db[base], primary.gain_db["dar"]
    biased, other = primary.absolute_gain_db[base], primary.absolute_gain_db["dar"]
    return (
        f"Signed gains, mean over seeds: residual {ours:+.2f} dB, DAR {theirs:+.2f} dB (absolute {biased:.2f} and"
        f" {other:.2f}, which noise raises near 0)."
    )


def resolution(power: Power, images: int, seeds: int) -> str:
    """How many seeds and images would resolve the target."""
    target = f"{power.target_db} dB"
    if power.seeds is None:
        return f"No number of seeds resolves {target} with {images} images: the images' own noise is too large."
    most = power.seeds_at_most
    upper = "far more" if most is None else f"up to {most}"
    return (
        f"To resolve {target} (80 % power, 5 % level) takes about {power.seeds} seeds of {images} images ({upper} if"
        f" these {seeds} happen to agree too well), and for these networks alone about {power.images} images."
    )


def control_sentence(control: ArmComparison) -> str:
    pilot, kind = "pilot, " if control.pilot else "", outcome(control)
    word = {"win": "DAR is nearer", "loss": "DAR is farther", "null": "no difference shown", "pilot": "undecided"}[kind]
    numbers = f"D = {interval(control.difference_db)}, p = {control.p_holm:.3g}"
    return f"Against {NAMES[control.baseline]}: {numbers} ({pilot}{word})."


def absent_controls(result: StudyResult) -> str:
    """What was not controlled for, or cannot be. A residual arm of DAR's size within 1 % is its own matched one."""
    impossible = " ".join(f"{name} was not made: {reason}." for name, reason in result.absent.items())
    absent = [name for name in CONTROLS if name not in result.controls]
    if abs(size_ratio(result.runs) - 1) <= MATCHED_WITHIN:
        absent = [name for name in absent if name != "matched"]
    if not absent:
        return impossible
    missing = f"Not given: {' and '.join(CONTROLS[name] for name in absent)}"
    return f"{impossible} {missing}, so the cause of a difference is not isolated.".lstrip()


def secondary_sentence(secondaries: dict[str, AdjustedDifference], least_p: float) -> str:
    """Which secondaries survive Holm, and on which side. least_p: that so many seeds can reach in one test."""
    least = least_p * sum(one.p is not None for one in secondaries.values())
    if least > SIGNIFICANT:
        return f"With so few seeds no secondary can pass Holm's correction (p is at least {min(least, 1.0):.3g})."
    words = [
        f"{one.title} {'for' if one.difference.value > 0 else 'against'} DAR (p = {one.p_holm:.3g})"
        for one in secondaries.values()
        if one.difference is not None and one.p_holm is not None and one.p_holm <= SIGNIFICANT
    ]
    if not words:
        return "No secondary difference passes Holm's correction."
    return f"After Holm's correction: {', '.join(words)}."


def structure_sentence(runs: Rows) -> str:
    """A warning where the right energy need not be the right detail."""
    by_arm = {arm: [row.against.hf_kurtosis_ratio for row in runs[arm]] for arm in ("residual", "dar")}
    if any(not math.isfinite(ratio) for ratios in by_arm.values() for ratio in ratios):
        return "The teacher's detail has no heavy tails, so structure is not judged."
    ratios = {arm: mean(values) for arm, values in by_arm.items()}
    low, high = KURTOSIS_RANGE
    if all(low <= ratio <= high for ratio in ratios.values()):
        return ""
    return (
        f"Energy is not structure: the kurtosis ratio is {ratios['residual']:.2f} for residual and {ratios['dar']:.2f}"
        f" for DAR, where {low} to {high} would pass."
    )


def usage_sentence(rows: list[NetworkRow]) -> str:
    """Whether the routers do anything; the rows are DAR's."""
    shifts = [row.reset_shift_db for row in rows if row.reset_shift_db is not None]
    unused = sum(abs(shift) < ROUTER_USED_DB for shift in shifts)
    label = f" (router unused in {unused} of {len(shifts)} runs)" if unused else ""
    return f"Resetting DAR's routers moves its HF gain by {min(shifts):+.2f} to {max(shifts):+.2f} dB{label}."


def cost_sentence(runs: Rows) -> str:
    """What DAR takes of time, memory and operations, those that are known of all runs, and its parameters."""
    size, ratios = size_ratio(runs), {what: ratio(runs, of) for what, of in TIMES.items()}
    words = [f"{times:.2f} times the {what}" for what, times in ratios.items() if math.isfinite(times)]
    matched = f" (matched within {100 * MATCHED_WITHIN:.0f} %)" if abs(size - 1) <= MATCHED_WITHIN else ""
    return f"DAR takes {', '.join(words)} and {100 * (size - 1):+.2f} % parameters{matched}."


def ratio(runs: Rows, of: Callable[[NetworkRow], float]) -> float:
    """DAR's mean of a quantity over the residual students'; NaN where one of them is not known."""
    return mean(map(of, runs["dar"])) / mean(map(of, runs["residual"]))


def size_ratio(runs: Rows) -> float:
    """DAR's parameters over the residual students'."""
    return ratio(runs, lambda row: row.network.parameters)


def mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)


def interval(one: Interval, unit: str = " dB") -> str:
    """A value with its interval; an end that is infinite is unbounded."""
    low, high = (f"{end:+.2f}" if math.isfinite(end) else "unbounded" for end in (one.low, one.high))
    return f"{one.value:+.2f}{unit} [{low}, {high}]"


def seed_table(result: StudyResult) -> str:
    """Per-seed gains and differences of every comparison, then secondaries and costs, for a terminal."""
    lines = [result.label.upper()] if result.label else []
    for one in (result.primary, *result.controls.values()):
        base = one.baseline
        lines += ["", f"HF gain, dB{'':9}{base:>16}{'dar':>10}   |{base}| - |dar|, 95 % over images"]
        lines += [_gain_line(f"seed {seed.seed}", seed, base) for seed in one.per_seed]
        lines.append(_gain_line("all seeds", one, base))
        lines += [
            f"  {method:<22}{interval(ends)}, covers {100 * one.coverage[method]:.1f} % in simulation"
            for method, ends in one.intervals.items()
        ]
    lines += ["", f"{'secondary':<32}{'residual':>12}{'dar':>12}   difference (above 0 favours DAR), p, p after Holm"]
    lines += [_paired_line(one) for one in (*result.secondaries.values(), *result.costs.values())]
    return "\n".join(lines)


def _gain_line(title: str, one: ArmComparison | SeedDifference, base: str) -> str:
    ours, theirs = one.gain_db[base], one.gain_db["dar"]
    return f"{title:<20}{ours:>+16.2f}{theirs:>+10.2f}   {interval(one.difference_db)}"


def _paired_line(one: PairedDifference) -> str:
    if one.difference is None:
        return f"{one.title:<32}{one.skipped}"
    tested = f", {one.p:.3g}, {one.p_holm:.3g}" if isinstance(one, AdjustedDifference) else ""
    return f"{one.title:<32}{one.residual:>12.6g}{one.dar:>12.6g}   {interval(one.difference, '')}{tested}"
