"""Signals that say whether a distillation is well, every so many steps: what the loss curves do not tell.

The averaged student draws the same few samples each time (`Samples`: noise and labels keyed by the run's seed); the
teacher's, from the same noise by its ODE, are what they are held against. `signals` turns two sets of samples into
numbers, `Health` adds those of the steps since the last record, warns, and scores checkpoints.

Legend: x0 (N, C, H, W) samples in the networks' space, cond (N,) their labels; images (N, 3, H, W) in [-1, 1], the
decoded samples, which are x0 itself for pixels.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dmd_dar import colour, spectrum
from dmd_dar.data.images import levels
from dmd_dar.data.kept import Kept
from dmd_dar.draws import Draws, sample_range
from dmd_dar.messages import LOGGER
from dmd_dar.methods.generate import Generator
from dmd_dar.models.compiled import eagerly
from dmd_dar.train.loop.optimise import Optimiser
from dmd_dar.train.processes.runtime import Runtime
from dmd_dar.train.watch.advice import Advice
from dmd_dar.train.watch.stopping import Stopping

CLASSES = 8  # at most, so that several samples share a condition
CHUNK = 32  # samples at a time


@dataclass(frozen=True)
class Samples:
    """What is measured of one set of samples; all on the CPU in float64."""

    mean: Tensor  # (C,) of x0
    std: Tensor  # (C,)
    diversity: float  # mean distance of two samples of one condition, root mean square over values
    saturation: float  # share of the images' values beyond [-1, 1]
    frequencies: Tensor | None  # (F,) cycles per pixel; None for images too small for a spectrum
    power: Tensor | None  # (F,)
    hf: float  # energy of the band HF
    lines: Tensor | None  # (2, 4) heights of a pixel grid's lines, dB
    colours: Tensor | None = None  # (6,) means of Y, Cb, Cr, contrast, saturation and speckle, see dmd_dar.colour

    def tensors(self) -> dict[str, Tensor]:
        """The fields that it has, by name, float64."""
        held = {name: value for name, value in vars(self).items() if value is not None}
        return {name: torch.as_tensor(value, dtype=torch.float64) for name, value in held.items()}

    @staticmethod
    def of_tensors(held: dict[str, Tensor]) -> "Samples":
        """From `tensors`."""
        numbers = {name: held[name].item() for name in ("diversity", "saturation", "hf")}
        absent = dict.fromkeys(("frequencies", "power", "lines", "colours"))
        return Samples(**{**absent, **held, **numbers})  # type: ignore[arg-type]


def samples_of(x0: Tensor, cond: Tensor, images: Tensor) -> Samples:
    """Measures one set."""
    x0, images = x0.detach().double().cpu(), images.detach().float().cpu()
    values = x0.transpose(0, 1).flatten(1)
    frequencies = power = lines = colours = None
    hf = math.nan
    if min(images.shape[-2:]) >= spectrum.MIN_SIZE:
        shown = levels(images) / 255
        frequencies, _ = spectrum.radial_frequencies(*shown.shape[-2:])
        powers = spectrum.compared_powers(shown)
        power, hf = powers.radial.mean(0), powers.bands.mean(0)[-1].item()
        lines = spectrum.line_heights(spectrum.grid_lines(shown))
        colours = mean_colours(shown)
    saturation = (images.abs() > 1).double().mean().item()
    mean, std = values.mean(1), values.std(1, correction=0)
    return Samples(mean, std, diversity(x0, cond.cpu()), saturation, frequencies, power, hf, lines, colours)


def mean_colours(shown: Tensor) -> Tensor:
    """`Samples.colours` of images in [0, 1]."""
    read = colour.colours(shown)
    of_image = torch.stack([read.contrast, read.saturation, colour.speckle_of(shown)], dim=1)
    return torch.cat([read.mean, of_image], dim=1).mean(0)


def diversity(x0: Tensor, cond: Tensor) -> float:
    """Root mean square distance of two samples of one condition, mean over conditions; NaN where none has two."""
    distances = []
    for label in cond.unique():
        of_label = x0[cond == label].flatten(1)
        if len(of_label) > 1:
            distances.append(torch.pdist(of_label).mean() / math.sqrt(of_label.shape[1]))
    return torch.stack(distances).mean().item() if distances else math.nan


def signals(student: Samples, teacher: Samples) -> dict[str, float]:
    """The student held against the teacher; a signal that cannot be measured is left out.

    mean_drift: the channel whose mean is farthest off, in the teacher's standard deviations; std_ratio: of the channel
    farthest from 1; diversity: ratio; saturation: share of values beyond [-1, 1], beside the teacher's; hf_gain: energy
    of the band HF in dB; log_spectral_distance in dB; grid_peak: the line of a pixel grid that stands out most beside
    the teacher's, dB; score: |hf_gain| + log_spectral_distance, less is better. Of colour, as a report measures it:
    drift_y, drift_cb, drift_cr in levels of 255, contrast_ratio, saturation_ratio, speckle_db.
    """
    drift = (student.mean - teacher.mean) / teacher.std
    ratio = student.std / teacher.std
    measured = {
        "mean_drift": drift[drift.abs().argmax()].item(),
        "std_ratio": ratio[ratio.log().abs().argmax()].item(),
        "saturation": student.saturation,
        "teacher_saturation": teacher.saturation,
    }
    if teacher.diversity:
        measured["diversity"] = student.diversity / teacher.diversity
    if student.power is not None and teacher.power is not None and student.frequencies is not None:
        measured["hf_gain"] = 10 * math.log10(student.hf / teacher.hf)
        distance, _ = spectrum.log_spectral_distance(student.frequencies, student.power, teacher.power)
        measured["log_spectral_distance"] = distance.item()
        measured["score"] = abs(measured["hf_gain"]) + measured["log_spectral_distance"]
    if student.colours is not None and teacher.colours is not None:
        measured |= colour_signals(student.colours, teacher.colours)
    if student.lines is not None and teacher.lines is not None:
        held = ~teacher.lines.isnan()  # this size has not every line
        measured["grid_peak"] = torch.where(held, student.lines - teacher.lines, -math.inf).max().item()
    return {name: value for name, value in measured.items() if math.isfinite(value)}


def colour_signals(ours: Tensor, theirs: Tensor) -> dict[str, float]:
    """From `Samples.colours` of both."""
    ratio = colour.saturation_ratio(ours[4], theirs[4])
    drifts = (ours[:3] - theirs[:3]).tolist()
    return {
        **dict(zip(("drift_y", "drift_cb", "drift_cr"), drifts, strict=True)),
        "contrast_ratio": colour.contrast_ratio(ours[3], theirs[3]).item(),
        "saturation_ratio": ratio.item(),
        "speckle_db": colour.speckle_db(ours[5], theirs[5], ratio).item(),
    }


@dataclass(frozen=True)
class Panel:
    """The same few samples at every look: noise and labels keyed by `seed`, of at most CLASSES classes in turn."""

    count: int
    seed: int
    shape: tuple[int, ...]
    num_classes: int
    decode: Callable[[Tensor], Tensor] | None  # images of samples; None where they are images


@torch.no_grad()
def draw(generator: Generator, panel: Panel, device: torch.device) -> Samples:
    """What is measured of the samples that the generator makes for the panel."""
    classes = min(panel.num_classes, CLASSES)
    chosen = torch.arange(classes, device=device) * panel.num_classes // classes
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    for start in range(0, panel.count, CHUNK):
        draws = Draws(panel.seed, "health", 0, sample_range(start, min(start + CHUNK, panel.count), device))
        cond = chosen[draws.samples % classes]
        x0 = generator(cond, draws, draws.normal("noise", *panel.shape))
        parts.append((x0, cond, x0 if panel.decode is None else panel.decode(x0)))
    return samples_of(*(torch.cat(part) for part in zip(*parts, strict=True)))


@dataclass
class Tally:
    """The steps since the last record: how many, and sums of what is recorded of them."""

    steps: int = 0
    sums: dict[str, Tensor] = field(default_factory=dict)

    def add(self, name: str, value: Tensor) -> None:
        self.sums[name] = self.sums.get(name, 0) + value.detach()

    def means(self) -> dict[str, float]:
        return {name: (total / self.steps).item() for name, total in self.sums.items()}


@dataclass
class Health:
    """Called after every step; every `every` steps and with every checkpoint it measures, records and warns.

    `student` and `teacher` make the panel's samples from noise. `gap` and the terms' gradients are those
    of the student phase's own metrics, mean over the steps since the last record; so is the share of clipped steps,
    for which `optimisers` are given by the phase's name.
    """

    every: int  # 0: never
    panel: Panel
    student: Generator
    teacher: Generator
    runtime: Runtime
    optimisers: dict[str, Optimiser]
    kept: Kept | None = None  # what is measured of the teacher's samples, where it is found again; None: nowhere
    advice: Advice = field(default_factory=Advice)
    stopping: Stopping = field(default_factory=Stopping)
    reference: Samples | None = None  # of the teacher, measured when it is first wanted
    tally: Tally = field(default_factory=Tally)
    best: tuple[float, int] | None = None  # (score, step) of the best checkpoint

    def __call__(self, step: int, metrics: dict[str, Tensor], scored: bool) -> dict[str, Any]:
        """What to log of this step, {} for most; `scored` says that a checkpoint is made of it. An exchange."""
        if not self.every:
            return {}
        self._add(metrics)
        if step % self.every and not scored:
            return {}
        measured = self.runtime.average(self.tally.means())
        self.tally = Tally()
        if self.runtime.is_main or self.runtime.sharded:
            measured |= self.measure()
        if scored and "score" in measured and (self.best is None or measured["score"] < self.best[0]):
            self.best = measured["score"], step
        warnings = self.advice.on(measured, self.best)
        if self.runtime.is_main:
            for line in warnings.due:
                LOGGER.warning(f"warning, step {step}: {line}")
        record: dict[str, Any] = {f"health/{name}": value for name, value in measured.items()}
        if self.best is not None:
            record |= {"health/best_score": self.best[0], "health/best_step": self.best[1]}
        if self.stopping.rules:
            why = self.stopping.on(step, measured, self.best)
            if self.runtime.any(bool(why) and self.runtime.is_main):
                self.stopping.stopped = why or "log.stop_when"  # the main process alone measures, as a rule
                record["health/stopped"] = self.stopping.stopped
        return record | ({"health/warnings": "; ".join(warnings.all)} if warnings.all else {})

    def measure(self) -> dict[str, float]:
        """The signals of the samples now."""
        first, began, found = self.reference is None, time.monotonic(), False
        with self.runtime.autocast(), eagerly():  # batches of other sizes than training's
            if self.reference is None:
                self.reference, found = self._reference()
            drawn = time.monotonic()
            measured = signals(draw(self.student, self.panel, self.runtime.device), self.reference)
        if first and self.runtime.is_main:
            took = f"took {drawn - began:.1f} s, once" if not found else f"are those of {self.kept and self.kept.path}"
            record = f"a record takes {time.monotonic() - drawn:.1f} s, every {self.every} steps"
            LOGGER.info(f"health: {self.panel.count} samples of the teacher {took}; {record}")
        return measured

    def _reference(self) -> tuple[Samples, bool]:
        """What is measured of the teacher's samples, and whether it was found. Of a sharded teacher an exchange, which
        all processes take part in or none.
        """
        held = self.kept.find() if self.kept else None
        missing = self.runtime.any(held is None) if self.runtime.sharded else held is None
        if held is not None and not missing:
            return Samples.of_tensors(held), True
        made = draw(self.teacher, self.panel, self.runtime.device)
        if self.kept and self.runtime.is_main:
            self.kept.keep(made.tensors())
        return made, False

    def _add(self, metrics: dict[str, Tensor]) -> None:
        for name, value in metrics.items():
            phase, _, metric = name.partition("/")
            if metric == "gradient_norm":
                self.tally.add(f"clipped_{phase}", (value > self.optimisers[phase].config.clip).double())
            elif phase == "student" and (metric.endswith("_gradient") or metric == "fake_to_teacher_rms"):
                self.tally.add({"fake_to_teacher_rms": "gap"}.get(metric, metric), value.double())
        self.tally.steps += 1

    def state(self) -> dict[str, Any]:
        """For the checkpoint: a resumed run records what an uninterrupted one does."""
        sums = {name: total.item() for name, total in self.tally.sums.items()}
        return {
            "sums": sums,
            "steps": self.tally.steps,
            "best": self.best and list(self.best),
            "stopping": self.stopping.state(),
            **self.advice.state(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        sums = {name: torch.tensor(total, dtype=torch.float64) for name, total in state["sums"].items()}
        self.tally, best = Tally(state["steps"], sums), state["best"]
        self.best = (best[0], int(best[1])) if best else None
        self.advice.restore(state)
        if "stopping" in state:  # checkpoints of before have none
            self.stopping.restore(state["stopping"])
