"""Rungs from the teacher's own spectrum: python -m dmd_dar.rungs teacher.path=teachers/photos32 calls=4

A band of frequencies meets the noise at the t where (1 - t) times its amplitude is t; above, noise hides it. A call at
that t decides what the band looks like, so calls are spread over the t of coarse to fine detail.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dmd_dar import config, flow
from dmd_dar.device import chosen_device
from dmd_dar.errors import UserError
from dmd_dar.guidance import GuidanceConfig
from dmd_dar.keys import key
from dmd_dar.methods.generate import SampleRange, generate, ode_generator
from dmd_dar.methods.solvers import Solver
from dmd_dar.models.guided import guided_velocity
from dmd_dar.models.teachers import TeacherConfig, load_teacher
from dmd_dar.spectrum import BAND_EDGES, radial_psd

EDGES = BAND_EDGES[:4]  # cycles per pixel or latent cell: the lower edges of B1 to B4
LEAST_SIDE = math.ceil(2 / EDGES[0])  # of samples whose spectrum reaches down to B1
LEAST_RATIO = 1.25  # of (1 - t) / t from one rung to the next


@dataclass(frozen=True)
class RungsConfig(Solver):
    """python -m dmd_dar.rungs"""

    calls: int = key(4, "rungs, of which the first is 1, pure noise", least=1)
    n: int = key(64, "samples of the teacher, classes in turn", least=1)
    seed: int = key(0, "of the noise", least=0)
    batch_size: int = key(64, "samples at a time; changes none of them beyond rounding", least=1)
    guidance_scale: float = key(1.0, "of the teacher: uncond + g (cond - uncond); 1 is none", least=0)
    guidance: GuidanceConfig = key(factory=GuidanceConfig)
    cpu: bool = key(False, "compute on the CPU although a GPU is there")
    teacher: TeacherConfig = key(factory=TeacherConfig)


@dataclass(frozen=True)
class Meeting:
    """Where a frequency, in cycles per pixel or latent cell, meets the noise."""

    frequency: float
    t: float


def meetings(frequencies: Tensor, power: Tensor) -> list[Meeting]:
    """At B1's lower edge and at those of B2, B3 and B4; powers are interpolated between bins, both in logarithms.

    frequencies (F,) ascending; power (F,) in the network's own units, in which fresh noise has a power of 1.
    """
    f, p = (values.log().double().cpu().numpy() for values in (frequencies, power))
    return [
        Meeting(edge, flow.meeting_time(math.exp(log_power)))
        for edge, log_power in zip(EDGES, np.interp(np.log(EDGES), f, p), strict=True)
    ]


def spread_rungs(coarse: float, fine: float, calls: int) -> tuple[float, ...]:
    """1, and `calls` - 1 times from `coarse` down to `fine`, even in log((1 - t) / t); of two calls, their middle.

    Raises ValueError where these times lie too close to each other to be told apart.
    """
    ends = [math.log((1 - t) / t) for t in (coarse, fine)]
    places = [(ends[0] + ends[1]) / 2] if calls == 2 else np.linspace(ends[0], ends[1], calls - 1).tolist()
    if calls > 2 and ends[1] - ends[0] < (calls - 2) * math.log(LEAST_RATIO):
        raise ValueError(
            f"coarse and fine detail meet the noise at t = {coarse:.2f} and {fine:.2f}, too close for {calls - 1} rungs"
        )
    return (1.0, *(round(1 / (1 + math.exp(place)), 3) for place in places))


def teacher_power(cfg: RungsConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    """Frequencies and powers of the teacher's samples, over all its channels, in its own units."""
    teacher = load_teacher(cfg.teacher, device)
    side = min(teacher.network.shape[1:])
    if side < LEAST_SIDE:
        raise UserError(
            f"teacher.path = {cfg.teacher.path}: its samples have {side} pixels or latent cells a side, and a spectrum"
            f" down to {EDGES[0]:g} cycles each takes {LEAST_SIDE}; choose rungs by hand"
        )
    velocity = guided_velocity(teacher.network, teacher.prediction, cfg.guidance_scale, cfg.guidance)
    samples, _ = generate(
        ode_generator(velocity, cfg.ode),
        SampleRange(cfg.n, cfg.seed, "rungs"),
        shape=teacher.network.shape,
        num_classes=teacher.network.num_conditions,
        batch_size=cfg.batch_size,
        device=device,
    )
    return radial_psd(samples, channel="all")


def choose(cfg: RungsConfig) -> None:
    """Print where bands meet the noise, and the rungs. Raises UserError for a teacher whose spectrum tells none."""
    frequencies, power = teacher_power(cfg, chosen_device(cfg.cpu))
    if not (power.isfinite().all() and (power > 0).all()):
        raise UserError(f"teacher.path = {cfg.teacher.path}: its samples have no spectrum; look at them first")
    met = meetings(frequencies, power)
    try:
        rungs = spread_rungs(met[0].t, met[-1].t, cfg.calls)
    except ValueError as error:
        raise UserError(f"calls = {cfg.calls}: {error}; choose fewer calls, or rungs by hand") from error
    print(f"{cfg.n} samples of {cfg.teacher.path}; a frequency is in cycles per pixel or latent cell")
    for one in met:
        print(f"  {one.frequency:<7g} meets the noise at t = {one.t:.3f}")
    print(f"rungs: [{', '.join(f'{t:g}' for t in rungs)}]")


def main(argv: Sequence[str] | None = None) -> None:
    config.run_job(RungsConfig, choose, argv, description=__doc__ or "")


if __name__ == "__main__":
    main()
