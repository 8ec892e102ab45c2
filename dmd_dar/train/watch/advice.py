"""What a health record warns of: one line each, with the likely cause and the keys that mend it."""

from dataclasses import dataclass, field
from typing import Any

CALM = 10  # records without a warning after which it is news again

SATURATED = 0.03  # share of values beyond [-1, 1], above the teacher's
COLLAPSED = 0.7  # diversity, of the teacher's
DRIFTED = 0.25  # standard deviations of the teacher's channel
FLAT, STEEP = 0.8, 1.25  # ratio of a channel's standard deviation
LOUD = 1.5  # dB of the band HF above the teacher's
GRIDDED = 3.0  # dB of a pixel grid's line above the teacher's
CLIPPED = 0.95  # share of steps
PASSED = 2.0  # dB of the score above the best
OUTWEIGHED = 5.0  # the GAN's gradient at x, in those of distribution matching


@dataclass(frozen=True)
class Warnings:
    """`all` the warnings of a record, and those `due` to be shown now."""

    all: list[str]
    due: list[str]


@dataclass
class Advice:
    """Remembers what was said: a warning is said when it appears, not while it stays or comes and goes."""

    known: dict[str, int] = field(default_factory=dict)  # records without it, of the warnings that are no news

    def on(self, measured: dict[str, float], best: tuple[float, int] | None) -> Warnings:
        lines = warnings_of(measured, best)
        due = [line for name, line in lines.items() if name not in self.known]
        away = {name: count + 1 for name, count in self.known.items() if name not in lines and count + 1 < CALM}
        self.known = {**away, **dict.fromkeys(lines, 0)}
        return Warnings(list(lines.values()), due)

    def state(self) -> dict[str, Any]:
        return {"said": self.known}

    def restore(self, state: dict[str, Any]) -> None:
        self.known = dict(state["said"])


def warnings_of(measured: dict[str, float], best: tuple[float, int] | None = None) -> dict[str, str]:
    """The warnings by name that the signals of `health.signals` and of the steps give; `best` is (score, step)."""
    lines: dict[str, str] = {}
    beyond = measured.get("saturation", 0.0) - measured.get("teacher_saturation", 0.0)
    if beyond > SATURATED:
        lines["saturation"] = (
            f"saturation {measured['saturation']:.0%} of values (teacher {measured['teacher_saturation']:.0%}):"
            " guidance_scale or student.lr too high; a larger regression.weight holds it"
        )
    if measured.get("diversity", 1.0) < COLLAPSED:
        lines["diversity"] = (
            f"diversity within a condition {measured['diversity']:.2f} of the teacher's: modes are being dropped;"
            " raise fake_score.updates or fake_score.lr, or regression.weight, or lower student.lr"
        )
    drift = measured.get("mean_drift", 0.0)
    if abs(drift) > DRIFTED:
        lines["mean_drift"] = (
            f"a channel's mean is {drift:+.2f} standard deviations off the teacher's:"
            " lower student.lr, or raise regression.weight, which anchors it"
        )
    if not FLAT < measured.get("std_ratio", 1.0) < STEEP:
        lines["std_ratio"] = (
            f"a channel's standard deviation is {measured['std_ratio']:.2f} of the teacher's: contrast is"
            f" {'lost' if measured['std_ratio'] < 1 else 'overdone'}; lower student.lr or guidance_scale"
        )
    if measured.get("hf_gain", 0.0) > LOUD:
        lines["hf_gain"] = (
            f"high band {measured['hf_gain']:+.1f} dB against the teacher: noise or over-sharpening;"
            " lower student.lr or gan.weight, or raise fake_score.updates"
        )
    if measured.get("grid_peak", 0.0) > GRIDDED:
        lines["grid_peak"] = (
            f"a line of the pixel grid stands {measured['grid_peak']:.1f} dB above the teacher's: seams of patches;"
            " lower student.lr, or raise fake_score.updates; a higher student.ema smooths it"
        )
    if best is not None and measured.get("score", best[0]) > best[0] + PASSED:
        lines["score"] = (
            f"score {measured['score']:.1f} dB, {measured['score'] - best[0]:.1f} above that of step {best[1]}, whose"
            " checkpoint is kept: the run is past its best; stop it, or lower student.lr"
        )
    return lines | _of_gradients(measured)


def _of_gradients(measured: dict[str, float]) -> dict[str, str]:
    lines = {}
    for name, share in measured.items():
        if name.startswith("clipped_") and share > CLIPPED:
            phase = name.removeprefix("clipped_")
            section = {"discriminator": "gan"}.get(phase, phase)
            lines[name] = (
                f"{share:.0%} of the {phase}'s steps are clipped: {section}.clip sets its pace;"
                f" raise it, or lower {section}.lr if the loss jumps"
            )
    gan, dm = measured.get("gan_gradient", 0.0), measured.get("dm_gradient", 0.0)
    if dm and gan > OUTWEIGHED * dm:
        lines["gan_gradient"] = f"the GAN's gradient at x is {gan / dm:.0f} times that of matching: lower gan.weight"
    return lines
