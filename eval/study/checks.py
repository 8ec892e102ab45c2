"""What distillation made of each student: beside the undistilled teacher and beside its residual twin, in words."""

import math
from collections.abc import Sequence

from ..measure.results import Check, Comparison, SetRow
from .runs import Run
from .twins import routed, twins, unequal


def student_checks(rows: Sequence[SetRow]) -> list[Check]:
    """For every student: fd_wavelet above its null, HF gain and least class diversity, beside those of the better
    undistilled sampler at its own steps. Empty without students.
    """
    return [check(row, better_baseline(row, rows)) for row in rows if row.role == "student"]


def better_baseline(student: SetRow, rows: Sequence[SetRow]) -> SetRow:
    """The undistilled sampler of the student's rungs and guidance that is nearer to the teacher by fd_wavelet: the one
    that it has to beat.
    """
    ours = student.facts
    undistilled = [row for row in rows if row.role == "undistilled"]
    twins = [
        row for row in undistilled if (row.facts.rungs, row.facts.guidance_scale) == (ours.rungs, ours.guidance_scale)
    ]
    return min(twins, key=lambda row: against_teacher(row).distances["fd_wavelet"].value)


def against_teacher(row: SetRow) -> Comparison:
    """What it is against the teacher. ValueError of the teacher itself."""
    if row.against.teacher is None:
        raise ValueError(f"{row.name} is not compared with the teacher")
    return row.against.teacher


def excess_and_null(row: SetRow) -> tuple[float, float]:
    """fd_wavelet against the teacher above its null, and the null, which halves of the teacher's set always give."""
    distance = against_teacher(row).distances["fd_wavelet"]
    if distance.excess is None or distance.null is None:
        raise ValueError(f"fd_wavelet of {row.name} stands beside no null")
    return distance.excess, distance.null


def check(row: SetRow, baseline: SetRow) -> Check:
    """The student beside the undistilled sampler that it has to beat. ValueError without what its sampling costs."""
    ours, start, cost = against_teacher(row), against_teacher(baseline), row.facts.cost
    if cost is None:
        raise ValueError(f"what sampling {row.name} costs was not measured")
    excess, _ = excess_and_null(row)
    return Check(
        name=row.name,
        baseline=baseline.name,
        fd_excess=excess,
        fd_excess_share=share_of_excess(excess, *excess_and_null(baseline)),
        hf_gain_db=ours.gain_db["HF"].value,
        hf_gain_db_baseline=start.gain_db["HF"].value,
        least_class_diversity=ours.diversity_ratio["pixels"].least,
        routing=row.facts.routing,
        latency_ms_per_image=cost.latency_ms_per_image,
        peak_memory_mb=cost.peak_memory_mb,
    )


def share_of_excess(excess: float, of_baseline: float, null: float) -> float | None:
    """A distance above its null as a share of the baseline's, None where the baseline is no further above its null than
    the null is above 0.
    """
    return None if of_baseline <= null else excess / of_baseline


def conclusions(checks: Sequence[Check], runs: Sequence[Run]) -> list[str]:
    """A sentence for each student, then one for each routed run and its residual twin."""
    return [*map(check_sentence, checks), *routing_comparisons(checks, runs)]


def check_sentence(check: Check) -> str:
    """What a student's checks say, in words."""
    apart = f"{check.fd_excess:.2f}, where '{check.baseline}' is near its null already"
    if check.fd_excess_share is not None:
        apart = f"{check.fd_excess_share:.2f} of that of '{check.baseline}'"
    spread = "class diversity is not known, since no class has two images"
    if math.isfinite(check.least_class_diversity):
        spread = f"least diversity of a class {check.least_class_diversity:.2f} of the teacher's"
    sentence = (
        f"{check.name}: fd_wavelet above its null is {apart};"
        f" HF gain {check.hf_gain_db:+.2f} dB (there {check.hf_gain_db_baseline:+.2f}); {spread}"
    )
    if routing := check.routing:
        sentence += (
            f"; routers: mean |n alpha - 1| {routing.deviation:.3f},"
            f" range of n alpha over t {routing.change_over_t:.3f},"
            f" HF gain shifts by {routing.hf_gain_shift_db:+.2f} dB when they are reset"
            f" ({'used' if routing.used else 'router unused'})"
        )
    return sentence + "."


def routing_comparisons(checks: Sequence[Check], runs: Sequence[Run]) -> list[str]:
    """One sentence for each routed run and its residual twin, the run that differs from it in routing alone."""
    by_name = {check.name: check for check in checks}
    sentences = []
    for run in filter(routed, runs):
        plain = [other for other in runs if not routed(other)]
        same = twins(run, runs)
        if same:
            sentences.append(compare_pair(by_name[run.name], by_name[same[0].name]))
        elif plain:
            nearest = next((other for other in plain if other.few_steps == run.few_steps), plain[0])
            keys = ", ".join(unequal(run.cfg, nearest.cfg)) or "their updates"
            sentences.append(f"{run.name} and {nearest.name} differ in {keys} too: not a comparison of routing.")
    return sentences


def compare_pair(routed: Check, plain: Check) -> str:
    """HF gain, fd_wavelet above its null and cost of a routed run against its residual twin, as plain words."""

    def word(ours: float, theirs: float) -> str:
        ours, theirs = round(ours, 2), round(theirs, 2)
        return "equal" if ours == theirs else "better" if ours < theirs else "worse"

    gain = word(abs(routed.hf_gain_db), abs(plain.hf_gain_db))
    distance = word(routed.fd_excess, plain.fd_excess)
    return (
        f"{routed.name} against {plain.name}: HF gain {gain} ({routed.hf_gain_db:+.2f} dB, there"
        f" {plain.hf_gain_db:+.2f}); fd_wavelet above its null {distance} ({routed.fd_excess:.2f}, there"
        f" {plain.fd_excess:.2f}); {cost_words(routed, plain)}. One pair of training runs: no test of significance."
    )


def cost_words(routed: Check, plain: Check) -> str:
    """Time and peak memory as multiples of the twin's."""
    time = routed.latency_ms_per_image / plain.latency_ms_per_image
    return f"{time:.2f} times its time and {routed.peak_memory_mb / plain.peak_memory_mb:.2f} times its peak memory"
