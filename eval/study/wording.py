"""A comparison over training seeds in words: every sentence is made from the numbers of compare.json.

A win, a loss and a null are told in the same form; a pilot is called one in the first word.
"""

from typing import Any, Literal

from ..metrics.verdict import KURTOSIS_RANGE
from .runs import ROUTER_USED_DB

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
TIMES = {
    "latency_ms_per_image": "time per image",
    "peak_memory_mb": "peak memory",
    "gflops_per_image": "FLOPs",
    "training_step_seconds": "time of a training step",
}
CONTROLS = {"matched": "a parameter-matched residual arm", "frozen": "an arm trained with static routers"}


def outcome(primary: dict[str, Any]) -> Outcome:
    """A win or a loss needs an interval off 0 and a sign-flip p of at most 0.05, for a control after Holm."""
    if primary["pilot"]:
        return "pilot"
    d = primary["difference_db"]
    if primary.get("p_holm", primary["p"]) > SIGNIFICANT or d["low"] <= 0 <= d["high"]:
        return "null"
    return "win" if d["low"] > 0 else "loss"


def conclusion(result: dict[str, Any]) -> str:
    """One paragraph, from compare.json's data without its conclusion."""
    primary = result["primary"]
    sentences = [
        headline(primary),
        signed_gains(primary),
        f"The interval is the {primary['method']}'s: {primary['reason']}.",
        resolution(primary["power"], result["images"], len(primary["seeds"])),
        *(control_sentence(control) for control in result["controls"].values()),
        absent_controls(result),
        secondary_sentence(result["secondaries"], primary),
        structure_sentence(result["runs"]),
        usage_sentence(result["runs"]["dar"]),
        cost_sentence(result["runs"]),
    ]
    return " ".join(sentence for sentence in sentences if sentence)


def headline(primary: dict[str, Any]) -> str:
    d, seeds = primary["difference_db"], len(primary["seeds"])
    nearer = sum(one["difference_db"]["value"] > 0 for one in primary["per_seed"])
    numbers = (
        f"D = |HF gain of residual| - |HF gain of DAR| = {interval(d)}, exact sign-flip p = {primary['p']:.3g},"
        f" DAR nearer to the teacher in {nearer} of {seeds} training seeds"
    )
    kind = outcome(primary)
    if kind == "pilot":
        return f"Pilot: {seeds} training seeds cannot decide (p is at least {primary['least_p']:.3g}); {numbers}."
    if kind == "win":
        return f"DAR keeps the high band nearer to the teacher than plain residuals do: {numbers}."
    if kind == "loss":
        return f"Against DAR: plain residuals keep the high band nearer to the teacher than DAR does: {numbers}."
    target = primary["power"]["target_db"]
    if -target < d["low"] and d["high"] < target:
        return f"No difference, and none of {target} dB either way: {numbers}."
    return f"No difference shown: {numbers}; this is no evidence that there is none."


def signed_gains(primary: dict[str, Any]) -> str:
    base = primary["baseline"]
    ours, theirs = primary["gain_db"][base], primary["gain_db"]["dar"]
    biased, other = primary["absolute_gain_db"][base], primary["absolute_gain_db"]["dar"]
    return (
        f"Signed gains, mean over seeds: residual {ours:+.2f} dB, DAR {theirs:+.2f} dB (absolute {biased:.2f} and"
        f" {other:.2f}, which noise raises near 0)."
    )


def resolution(power: dict[str, Any], images: int, seeds: int) -> str:
    """How many seeds and images would resolve the target."""
    target = f"{power['target_db']} dB"
    if power["seeds"] is None:
        return f"No number of seeds resolves {target} with {images} images: the images' own noise is too large."
    most = power["seeds_at_most"]
    upper = "far more" if most is None else f"up to {most}"
    return (
        f"To resolve {target} (80 % power, 5 % level) takes about {power['seeds']} seeds of {images} images ({upper} if"
        f" these {seeds} happen to agree too well), and for these networks alone about {power['images']} images."
    )


def control_sentence(control: dict[str, Any]) -> str:
    name, d = control["baseline"], control["difference_db"]
    pilot = "pilot, " if control["pilot"] else ""
    kind = outcome(control)
    word = {"win": "DAR is nearer", "loss": "DAR is farther", "null": "no difference shown", "pilot": "undecided"}[kind]
    return f"Against {NAMES[name]}: D = {interval(d)}, p = {control['p_holm']:.3g} ({pilot}{word})."


def absent_controls(result: dict[str, Any]) -> str:
    """What was not controlled for, or cannot be. A residual arm of DAR's size within 1 % is its own matched one."""
    impossible = " ".join(f"{name} was not made: {reason}." for name, reason in result["absent"].items())
    absent = [name for name in CONTROLS if name not in result["controls"]]
    if abs(ratio(result["runs"], "parameters") - 1) <= MATCHED_WITHIN:
        absent = [name for name in absent if name != "matched"]
    if not absent:
        return impossible
    given = f"Not given: {' and '.join(CONTROLS[name] for name in absent)}"
    return f"{impossible} {given}, so the cause of a difference is not isolated.".lstrip()


def secondary_sentence(secondaries: dict[str, Any], primary: dict[str, Any]) -> str:
    """Which secondaries survive Holm, and on which side."""
    least = primary["least_p"] * sum(one["p"] is not None for one in secondaries.values())
    if least > SIGNIFICANT:
        return f"With so few seeds no secondary can pass Holm's correction (p is at least {min(least, 1.0):.3g})."
    passed = [one for one in secondaries.values() if one["p_holm"] is not None and one["p_holm"] <= SIGNIFICANT]
    if not passed:
        return "No secondary difference passes Holm's correction."
    told = ", ".join(
        f"{one['title']} {'for' if one['difference']['value'] > 0 else 'against'} DAR (p = {one['p_holm']:.3g})"
        for one in passed
    )
    return f"After Holm's correction: {told}."


def structure_sentence(runs: dict[str, Any]) -> str:
    """A warning where the right energy need not be the right detail."""
    by_arm = {arm: [row["hf_kurtosis_ratio"] for row in runs[arm]] for arm in ("residual", "dar")}
    if any(ratio is None for ratios in by_arm.values() for ratio in ratios):
        return "The teacher's detail has no heavy tails, so structure is not judged."
    ratios = {arm: mean(values) for arm, values in by_arm.items()}
    low, high = KURTOSIS_RANGE
    if all(low <= ratio <= high for ratio in ratios.values()):
        return ""
    return (
        f"Energy is not structure: the kurtosis ratio is {ratios['residual']:.2f} for residual and {ratios['dar']:.2f}"
        f" for DAR, where {low} to {high} would pass."
    )


def usage_sentence(rows: list[dict[str, Any]]) -> str:
    """Whether the routers do anything."""
    shifts = [row["reset_shift_db"] for row in rows]
    unused = sum(abs(shift) < ROUTER_USED_DB for shift in shifts)
    label = f" (router unused in {unused} of {len(shifts)} runs)" if unused else ""
    return f"Resetting DAR's routers moves its HF gain by {min(shifts):+.2f} to {max(shifts):+.2f} dB{label}."


def cost_sentence(runs: dict[str, Any]) -> str:
    size = ratio(runs, "parameters")
    told = [f"{ratio(runs, name):.2f} times the {what}" for name, what in TIMES.items() if _given(runs, name)]
    matched = f" (matched within {100 * MATCHED_WITHIN:.0f} %)" if abs(size - 1) <= MATCHED_WITHIN else ""
    return f"DAR takes {', '.join(told)} and {100 * (size - 1):+.2f} % parameters{matched}."


def _given(runs: dict[str, Any], name: str) -> bool:
    return all(row.get(name) is not None for arm in ("residual", "dar") for row in runs[arm])


def ratio(runs: dict[str, Any], name: str) -> float:
    """DAR's mean over the residual students'."""
    return mean(row[name] for row in runs["dar"]) / mean(row[name] for row in runs["residual"])


def mean(values: Any) -> float:
    values = list(values)
    return sum(values) / len(values)


def interval(d: dict[str, Any], unit: str = " dB") -> str:
    """A value with its interval; an end that is None is infinite."""
    low, high = ("unbounded" if end is None else f"{end:+.2f}" for end in (d["low"], d["high"]))
    return f"{d['value']:+.2f}{unit} [{low}, {high}]"


def table(result: dict[str, Any]) -> str:
    """Per-seed gains and differences of every comparison, then the secondaries, for a terminal."""
    lines = [result["label"].upper()] if result["label"] else []
    for one in (result["primary"], *result["controls"].values()):
        base = one["baseline"]
        lines += ["", f"HF gain, dB{'':9}{base:>16}{'dar':>10}   |{base}| - |dar|, 95 % over images"]
        for seed in one["per_seed"]:
            lines.append(_gain_line(f"seed {seed['seed']}", seed, base))
        lines.append(_gain_line("all seeds", one, base))
        lines += [
            f"  {name:<22}{interval(each)}, covers {100 * one['coverage'][name]:.1f} % in simulation"
            for name, each in one["intervals"].items()
        ]
    lines += ["", f"{'secondary':<32}{'residual':>12}{'dar':>12}   difference (above 0 favours DAR), p, p after Holm"]
    for one in (*result["secondaries"].values(), *result["costs"].values()):
        if one["difference"] is None:
            lines.append(f"{one['title']:<32}{one['skipped']}")
            continue
        tested = f", {one['p']:.3g}, {one['p_holm']:.3g}" if "p_holm" in one else ""
        means = f"{one['residual']:>12.6g}{one['dar']:>12.6g}"
        lines.append(f"{one['title']:<32}{means}   {interval(one['difference'], '')}{tested}")
    return "\n".join(lines)


def _gain_line(title: str, one: dict[str, Any], base: str) -> str:
    gains = one["gain_db"]
    return f"{title:<20}{gains[base]:>+16.2f}{gains['dar']:>+10.2f}   {interval(one['difference_db'])}"
