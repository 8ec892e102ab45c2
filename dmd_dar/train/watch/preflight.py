"""Before training: does the teacher denoise its own data, as its meaning says? And is there any data to learn from?

The teacher's error |x0 - x0_teacher(x_t, t)|^2 is compared at a few t with that of two estimators that know nothing:
a constant for each channel, and the best affine function a + b x_t of each value. Where the estimate is badly
calibrated or worse than these, other meanings of the output and other scales of the data are tried, and the one that
fits is named.

Legend: x0 (B, C, H, W) in the teacher's space; errors and slopes are lists over TIMES.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dmd_dar import flow
from dmd_dar.data.sources import Source
from dmd_dar.draws import Draws, sample_range
from dmd_dar.errors import UserError
from dmd_dar.messages import LOGGER
from dmd_dar.models.codecs import Codec
from dmd_dar.models.denoiser import MEANINGS, Meaning, meaning_of, velocity_of
from dmd_dar.models.teachers import Teacher
from dmd_dar.train.processes.runtime import Runtime

TIMES = (0.25, 0.5, 0.75)
SAMPLES = 16
CALIBRATED = 0.2  # how far the slope of x0 on the estimate may be from 1; an eps read as a flow has 1 / (1 - t)
BETTER = 0.7  # another reading must have at most this share of the error, at every t
SCALES = (0.13025, 0.18215, 0.3611)  # scaling factors of the VAEs of SDXL, Stable Diffusion and FLUX
UNKNOWN = "no other reading fits: is data.* what it was trained on, are latents scaled, and is it trained at all"


class PreflightError(UserError):
    """The teacher and its data do not fit each other; the message says by which numbers and what would fit."""


@dataclass(frozen=True)
class Fit:
    """How well one reading of the teacher denoises."""

    to_constant: list[float]  # its error over that of a constant
    to_affine: list[float]  # over that of a + b x_t
    slopes: list[float]  # of x0 on the estimate; 1 where it is calibrated

    @property
    def unsuspicious(self) -> bool:
        """Whether it is calibrated and better than knowing nothing at every t, so that no other reading is tried."""
        calibrated = all(abs(slope - 1) <= CALIBRATED for slope in self.slopes)
        return calibrated and max(self.to_affine) < 1 and max(self.to_constant) < 1

    def beats(self, other: "Fit") -> bool:
        """Whether its error is far smaller at every t."""
        return all(a <= BETTER * b for a, b in zip(self.to_affine, other.to_affine, strict=True))


def check_data(x0: Tensor) -> None:
    """Raises PreflightError where samples (B, C, H, W) of the data are all alike or not finite."""
    if not torch.isfinite(x0).all():
        raise PreflightError(f"data: {len(x0)} samples hold numbers that are not finite; make the data anew")
    if x0.std(correction=0) == 0:
        raise PreflightError(
            f"data: all values of {len(x0)} samples are {x0.flatten()[0].item():g}: there is nothing to learn;"
            " look at the files that data.* names"
        )
    if len(x0) > 1 and (x0 == x0[:1]).all():
        raise PreflightError(f"data: {len(x0)} samples are all alike: there is nothing to learn; give more images")


def first_batch(data: Source, seed: int) -> tuple[Tensor, Tensor]:
    """x0 and labels of the same SAMPLES samples in every run of this seed."""
    return data.batch(Draws(seed, "preflight", 0, sample_range(0, SAMPLES, data.device)))


def preflight(
    runtime: Runtime,
    teacher: Teacher,
    data: Source,
    codec: Codec | None,
    seed: int,
    shape: tuple[int, ...] | None = None,
) -> None:
    """Says on the screen how well the teacher denoises; raises PreflightError where it does not, see check_teacher."""
    with runtime.autocast():
        message = check_teacher(teacher, data, codec, seed, shape)
    if runtime.is_main:
        LOGGER.info(message)


@torch.no_grad()
def check_teacher(
    teacher: Teacher,
    data: Source,
    codec: Codec | None = None,
    seed: int = 0,
    shape: tuple[int, ...] | None = None,
) -> str:
    """One line that says how well the teacher denoises, or why that was not looked at; deterministic.

    shape: (C, H, W) of what the run makes, None for the teacher's own.

    Raises PreflightError where it is worse than a constant at any t, or another meaning of its output, or another
    scale of the data, has a far smaller error at every t.
    """
    network, meaning = teacher.network, meaning_of(teacher.prediction)
    x0, labels = first_batch(data, seed)
    check_data(x0)
    shape = shape or network.shape
    pixels = None if codec is None else (3, shape[1] * codec.factor, shape[2] * codec.factor)
    if codec is not None and tuple(x0.shape[1:]) == pixels:
        x0, _ = codec.encode(x0)
    if tuple(x0.shape[1:]) != shape:
        return f"preflight left out: data is {tuple(x0.shape[1:])}, and the teacher makes {shape}"
    if data.num_classes != network.num_conditions:
        classes = f"{data.num_classes} classes, and the teacher's have {network.num_conditions}"
        return f"preflight left out: data has {classes}: it is not what the teacher was trained on"
    if not teacher.knows(data.label_names):
        return "preflight left out: the data's classes are not the teacher's prompts"
    eps = Draws(seed, "preflight", 0, sample_range(0, SAMPLES, x0.device)).normal("eps", *shape)
    fit = fit_of(network, meaning, x0, labels, eps)
    if not fit.unsuspicious:
        _refuse(fit, dict(_readings(network, meaning, x0, labels, eps)))
    return f"preflight: the teacher's error is {_listed(fit.to_constant)} of a constant's at t = {_listed(TIMES)}"


def fit_of(network: torch.nn.Module, meaning: Meaning, x0: Tensor, labels: Tensor, eps: Tensor) -> Fit:
    """The errors of the network's x0 under one meaning; one forward for each t."""
    velocity, x0 = velocity_of(network, meaning), x0.float()
    constant, affine, slopes = [], [], []
    for t in TIMES:
        times = torch.full((len(x0),), t, device=x0.device)
        x_t = flow.interpolate(x0, eps, times)
        estimate = flow.velocity_to_x0(velocity(x_t, times, labels).float(), x_t, times)
        error = (estimate - x0).double().square().mean().item()
        slope, left = _regression(x_t, x0)
        spread = _centred(x0).square().mean().item()
        constant.append(error / spread)
        affine.append(error / left)
        slopes.append(_regression(estimate, x0)[0])
    return Fit(constant, affine, slopes)


def _centred(x: Tensor) -> Tensor:
    """float64, without each channel's mean."""
    x = x.double()
    return x - x.mean((0, 2, 3), keepdim=True)


def _regression(x: Tensor, target: Tensor) -> tuple[float, float]:
    """Slope of `target` on x, both centred, and the mean squared error that it leaves."""
    x, target = _centred(x), _centred(target)
    slope = (x * target).mean() / x.square().mean().clamp(min=1e-30)
    return slope.item(), (target - slope * x).square().mean().item()


def _readings(
    network: torch.nn.Module, meaning: Meaning, x0: Tensor, labels: Tensor, eps: Tensor
) -> Iterator[tuple[str, Fit]]:
    """What else the teacher's output or the data's scale might be, with the remedy, and how well it fits each."""
    chain = meaning.schedule or flow.Schedule()
    remedy = "say so in teacher.prediction or in the file that states it"
    others = {
        "a flow on [0, 1], teacher.prediction=flow": MEANINGS["flow"],
        "a flow of reversed time, teacher.prediction=sit": MEANINGS["sit"],
        "an eps of DiT's chain, teacher.prediction=dit": MEANINGS["dit"],
        "an eps of the linear flow": Meaning("eps"),
        "an eps of Stable Diffusion's chain": Meaning("eps", flow.Schedule("scaled_linear", 1000, 0.00085, 0.012)),
        "a v of its chain": Meaning("v", chain),
        "an x0 of its chain": Meaning("x0", chain),
        "a flow whose timesteps run to 1000": Meaning("flow", time_scale=1000.0),
    }
    for name, other in others.items():
        if other != meaning:
            yield f"read as {name}, it fits: {remedy}", fit_of(network, other, x0, labels, eps)
    spread = x0.std(correction=0).item()
    for factor in (1 / spread, *SCALES, *(1 / scale for scale in SCALES)):
        fit = fit_of(network, meaning, factor * x0, labels, eps)
        yield f"on data times {factor:.3g} it fits: a latent scale is missing, or applied twice", fit
    yield "on data in [0, 1] it fits: rescale the data", fit_of(network, meaning, (x0 + 1) / 2, labels, eps)


def _refuse(fit: Fit, readings: dict[str, Fit]) -> None:
    """Raise where the fit is bad by itself, or beside that of another reading."""
    name, best = min(readings.items(), key=lambda entry: sum(entry[1].to_affine))
    useful = best.beats(fit) and max(best.to_constant) < 1
    if max(fit.to_constant) < 1 and not useful:
        return
    likely = f"{name} (then {_listed(best.to_constant)})" if useful else UNKNOWN
    raise PreflightError(
        f"teacher.path: the teacher does not denoise its own data: its error is {_listed(fit.to_constant)} of a"
        f" constant's at t = {_listed(TIMES)}; {likely}; preflight=false trains all the same"
    )


def _listed(numbers: tuple[float, ...] | list[float]) -> str:
    return ", ".join(f"{number:.2g}" for number in numbers)
