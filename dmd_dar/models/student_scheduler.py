"""The sampler of a few-step student as a scheduler of diffusers, for the pipeline of the student's base.

This file also travels with students to where dmd_dar is not installed, so it imports nothing of the package.
B samples. Latents have the form of the pipeline, (B, C, H, W) or (B, tokens, channels).
"""

import hashlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.outputs import BaseOutput

FRAMES = 4  # how far above set_timesteps a pipeline's own call may stand
# Names of diffusers' pipelines, and what turns off those that a student's own `call` may not.
GUIDED = ("do_classifier_free_guidance", "do_true_cfg", "do_perturbed_attention_guidance")
OFF = {"do_true_cfg": "true_cfg_scale=1", "do_perturbed_attention_guidance": "pag_scale=0"}


def noise_after(first: torch.Tensor, name: str) -> torch.Tensor:
    """Standard normal noise of the shape of `first` (B, ...), float32 on the CPU.

    That of a sample depends on `name` and on the signs in its own `first`, which no precision and no device changes.
    """
    signs = np.packbits(torch.signbit(first.detach()).flatten(1).cpu().numpy(), axis=1)
    seeds = [int.from_bytes(hashlib.sha256(row.tobytes() + name.encode()).digest()[:8], "little") for row in signs]
    drawn = [torch.randn(first.shape[1:], generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(drawn)


@dataclass
class StudentStep(BaseOutput):
    """What `StudentScheduler.step` returns: the next latents, after the last rung x0, and x0 as estimated."""

    prev_sample: torch.Tensor
    pred_original_sample: torch.Tensor


class StudentScheduler(SchedulerMixin, ConfigMixin):
    """Asks at the rungs of a student and nowhere else, and re-noises as `dmd_dar.load_pipeline(...)(noise=...)` does.

    All that differs between networks is linear: at rung i, x0 = a x + b y of the latents x and the network's output y,
    `x0_from`[i] = (a, b), and x0 noised is c x0 + d eps, `noised`[i] = (c, d). `timesteps` are what the network is
    told. `sampler`: "stochastic" takes fresh noise between rungs, see `noise_after`, "deterministic" the ODE's own.
    `call`: the argument of a pipeline that leaves its guidance off; `embedded`: it is a strength that the network
    reads, and was trained at. `beta_schedule` and `time_shift_type` keep other schedulers from reading the file.
    """

    order = 1
    init_noise_sigma = 1.0

    @register_to_config
    def __init__(
        self,
        rungs: Sequence[float] = (1.0,),
        timesteps: Sequence[float] = (1000.0,),
        x0_from: Sequence[Sequence[float]] = ((1.0, -1.0),),
        noised: Sequence[Sequence[float]] = ((0.0, 1.0),),
        sampler: str = "stochastic",
        call: Mapping[str, float] | None = None,
        embedded: bool = False,
        num_train_timesteps: int = 1000,
        beta_schedule: str = "",
        time_shift_type: str = "",
    ):
        self._rungs, self._x0_from, self._noised_as = tuple(rungs), tuple(x0_from), tuple(noised)
        self._renoises, self._call, self._embedded = sampler == "stochastic", dict(call or {}), embedded
        self.timesteps = torch.tensor(timesteps, dtype=torch.float32)
        self.num_inference_steps = len(rungs)
        self._begin(None)

    def _begin(self, device: Any) -> None:
        self.timesteps, self._rung, self._first = self.timesteps.to(device), 0, None

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Raises ValueError for another rung than the first: a student starts from noise."""
        if begin_index:
            raise ValueError(f"begin_index = {begin_index}: a student starts from noise, at its first rung")

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Any = None,
        timesteps: Any = None,
        sigmas: Any = None,
        mu: float | None = None,
    ) -> None:
        """Start anew at the first rung. Of `timesteps` and `sigmas` their number alone counts, `mu` not at all.

        Raises ValueError for another number of steps than the student's, and for a pipeline whose guidance is on, as
        far as the variables of its call tell: those of modular pipelines do not.
        """
        given = [len(each) for each in (timesteps, sigmas) if each is not None]
        steps, rungs = num_inference_steps or next(iter(given), None), self._rungs
        if steps != len(rungs):
            told = ", ".join(f"{t:g}" for t in rungs)
            raise ValueError(
                f"num_inference_steps = {steps}: this student was trained for {len(rungs)}, at the rungs {told}, and"
                f" knows no others; call the pipeline with num_inference_steps={len(rungs)}"
            )
        self._refuse_guidance()
        self._begin(device)

    def _refuse_guidance(self) -> None:
        """A pipeline tells its scheduler nothing of guidance, so the variables of its call are looked at."""
        found, call = self._pipeline(), self._call
        if found is None or not call:
            return
        (pipeline, variables), (name, off) = found, next(iter(call.items()))
        told = {flag: variables.get(flag, getattr(pipeline, flag, None)) for flag in GUIDED}
        told = {flag: on for flag, on in told.items() if on is not None}
        value, fault = variables.get(name, off), ""
        if value is not None and value != off and (self._embedded or (not told and value > off)):
            fault = f"{name} = {value:g}"
        elif any(told.values()):
            fault = "guidance is on"
        if fault:
            own = f"{name}={off:g}"
            more = [OFF[flag] for flag, on in told.items() if on and OFF.get(flag, own) != own]
            raise ValueError(
                f"{fault}: this student has learned its teacher's guidance; call the pipeline with"
                f" {' and '.join([own, *more])}"
            )

    def _pipeline(self) -> tuple[Any, Mapping[str, Any]] | None:
        """The pipeline of this scheduler that is being called, and the variables of that call."""
        frame: Any = sys._getframe(3)
        for _ in range(FRAMES):
            if frame is None:
                return None
            owner = frame.f_locals.get("self")
            if owner is not self and getattr(owner, "scheduler", None) is self:
                return owner, frame.f_locals
            frame = frame.f_back
        return None

    def scale_model_input(self, sample: torch.Tensor, timestep: Any = None) -> torch.Tensor:
        """The latents as they are."""
        return sample

    def step(
        self, model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, return_dict: bool = True
    ) -> StudentStep | tuple[torch.Tensor, torch.Tensor]:
        """From the latents `sample` (B, ...) at the current rung and the network's output, those at the next one.

        Raises ValueError where `timestep` is not that of the rung whose turn it is.
        """
        rung, last = self._rung, len(self._rungs) - 1
        if rung > last or float(timestep) != float(self.timesteps[rung]):
            raise ValueError(f"timestep {float(timestep):g} is not the next of {self.timesteps.tolist()}")
        if rung == 0:
            self._first = sample
        wide = torch.float32 if sample.device.type == "mps" else torch.float64
        (a, b), x = self._x0_from[rung], sample.to(wide)
        x0 = a * x + b * model_output.to(wide)
        following = x0 if rung == last else self._noised(rung, x0, x)
        self._rung += 1
        made = following.to(sample.dtype), x0.to(sample.dtype)
        return StudentStep(*made) if return_dict else made

    def _noised(self, rung: int, x0: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """The latents at the rung after `rung`."""
        if self._renoises:
            assert self._first is not None
            eps = noise_after(self._first, f"renoise_{rung + 1}").to(x0)
        else:
            c, d = self._noised_as[rung]
            eps = (x - c * x0) / d
        c, d = self._noised_as[rung + 1]
        return c * x0 + d * eps
