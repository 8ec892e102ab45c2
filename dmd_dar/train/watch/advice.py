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
class Told:
    """`all` the warnings of a record, and those `due` to be said on the screen now."""

    all: list[str]
    due: list[str]


@dataclass
class Advice:
    """Remembers what was said: a warning is said when it appears, not while it stays or comes and goes."""

    said: dict[str, int] = field(default_factory=dict)  # records without it, of the warnings that are no news

    def on(self, found: dict[str, float], best: tuple[float, int] | None) -> Told:
        lines = warnings_of(found, best)
        due = [line for name, line in lines.items() if name not in self.said]
        away = {name: count + 1 for name, count in self.said.items() if name not in lines and count + 1 < CALM}
        self.said = {**away, **dict.fromkeys(lines, 0)}
        return Told(list(lines.values()), due)

    def state(self) -> dict[str, Any]:
        return {"said": self.said}

    def restore(self, state: dict[str, Any]) -> None:
        self.said = dict(state["said"])


def warnings_of(found: dict[str, float], best: tuple[float, int] | None = None) -> dict[str, str]:
    """The warnings by name that the signals of `health.signals` and of the steps give; `best` is (score, step)."""
    lines: dict[str, str] = {}
    beyond = found.get("saturation", 0.0) - found.get("teacher_saturation", 0.0)
    if beyond > SATURATED:
        lines["saturation"] = (
            f"saturation {found['saturation']:.0%} of values (teacher {found['teacher_saturation']:.0%}):"
            " guidance_scale or student.lr too high; a larger regression.weight holds it"
        )
    if found.get("diversity", 1.0) < COLLAPSED:
        lines["diversity"] = (
            f"diversity within a condition {found['diversity']:.2f} of the teacher's: modes are being dropped;"
            " raise fake_score.updates or fake_score.lr, or regression.weight, or lower student.lr"
        )
    drift = found.get("mean_drift", 0.0)
    if abs(drift) > DRIFTED:
        lines["mean_drift"] = (
            f"a channel's mean is {drift:+.2f} standard deviations off the teacher's:"
            " lower student.lr, or raise regression.weight, which anchors it"
        )
    if not FLAT < found.get("std_ratio", 1.0) < STEEP:
        lines["std_ratio"] = (
            f"a channel's standard deviation is {found['std_ratio']:.2f} of the teacher's: contrast is"
            f" {'lost' if found['std_ratio'] < 1 else 'overdone'}; lower student.lr or guidance_scale"
        )
    if found.get("hf_gain", 0.0) > LOUD:
        lines["hf_gain"] = (
            f"high band {found['hf_gain']:+.1f} dB against the teacher: noise or over-sharpening;"
            " lower student.lr or gan.weight, or raise fake_score.updates"
        )
    if found.get("grid_peak", 0.0) > GRIDDED:
        lines["grid_peak"] = (
            f"a line of the pixel grid stands {found['grid_peak']:.1f} dB above the teacher's: seams of patches;"
            " lower student.lr, or raise fake_score.updates; a higher student.ema smooths it"
        )
    if best is not None and found.get("score", best[0]) > best[0] + PASSED:
        lines["score"] = (
            f"score {found['score']:.1f} dB, {found['score'] - best[0]:.1f} above that of step {best[1]}, whose"
            " checkpoint is kept: the run is past its best; stop it, or lower student.lr"
        )
    return lines | _of_gradients(found)


def _of_gradients(found: dict[str, float]) -> dict[str, str]:
    lines = {}
    for name, share in found.items():
        if name.startswith("clipped_") and share > CLIPPED:
            phase = name.removeprefix("clipped_")
            section = {"discriminator": "gan"}.get(phase, phase)
            lines[name] = (
                f"{share:.0%} of the {phase}'s steps are clipped: {section}.clip sets its pace;"
                f" raise it, or lower {section}.lr if the loss jumps"
            )
    gan, dm = found.get("gan_gradient", 0.0), found.get("dm_gradient", 0.0)
    if dm and gan > OUTWEIGHED * dm:
        lines["gan_gradient"] = f"the GAN's gradient at x is {gan / dm:.0f} times that of matching: lower gan.weight"
    return lines
