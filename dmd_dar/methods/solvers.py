"""The ODE of the teacher, dx/dt = v(x, t), solved from noise at t = 1 to data at t = 0.

Shapes: x (B, ...); cond (B,); a grid of times descends.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from dmd_dar import flow
from dmd_dar.guidance import Velocity
from dmd_dar.keys import key
from dmd_dar.methods.rollout import predict_x0

SolverName = Literal["dpm", "heun"]
States = list[Tensor]  # the state at every time of a grid, the first being the noise


def heun(velocity: Velocity, cond: Tensor, grid: list[float], noise: Tensor) -> States:
    """Heun's method: 2 evaluations a step, order 2; the same callable may be the guided teacher."""
    x, states = noise, [noise]
    for t, t_next in pairwise(grid):
        times = torch.full((len(x),), t, device=x.device, dtype=x.dtype)
        v = velocity(x, times, cond)
        euler = x + (t_next - t) * v
        corrected = velocity(euler, torch.full_like(times, t_next), cond)
        x = x + (t_next - t) * (v + corrected) / 2
        states.append(x)
    return states


def dpm(velocity: Velocity, cond: Tensor, grid: list[float], noise: Tensor) -> States:
    """DPM-Solver++(2M), arXiv:2211.01095 Algorithm 2: 1 evaluation a step, order 2.

    With h = log((1 - t') / t') - log((1 - t) / t) for a step from t to t' and its x0 extrapolated by the step before,
    D = x0 + h / (2 h_before) (x0 - x0_before), the step is exact for a D that does not change:
    x' = t'/t x + ((1 - t') - t'/t (1 - t)) D. The first two steps from t = 1, where h_before
    is infinite or there is none, and the last one to t = 0 take x0 itself.
    """
    x, states = noise, [noise]
    before, last = noise, math.inf  # x0 and h of the step before
    for t, t_next in pairwise(grid):
        x0 = predict_x0(velocity, x, t, cond)
        step = _log_ratio(t_next) - _log_ratio(t)
        ahead = step / (2 * last) if math.isfinite(step) else 0.0
        x = t_next / t * x + ((1 - t_next) - t_next / t * (1 - t)) * (x0 + ahead * (x0 - before))
        before, last = x0, step
        states.append(x)
    return states


def _log_ratio(t: float) -> float:
    """log((1 - t) / t), infinite at both ends."""
    if t in (0.0, 1.0):
        return math.inf if t == 0 else -math.inf
    return math.log((1 - t) / t)


METHODS: dict[SolverName, Callable[[Velocity, Tensor, list[float], Tensor], States]] = {"dpm": dpm, "heun": heun}
EVALUATIONS: dict[SolverName, int] = {"dpm": 1, "heun": 2}  # of the velocity, for one step


@dataclass(frozen=True)
class Solver:
    """How the teacher's ODE is solved; also the keys of a configuration that says so."""

    solver: SolverName = key("dpm", "DPM-Solver++(2M), one evaluation a step, or Heun's method, two")
    solver_steps: int = key(30, "of the teacher's ODE", unit="steps", least=1)
    solver_grid: flow.SolverGrid = key("cosine", "how the steps are spread: even in t, in sqrt(t), or as a cosine")

    @property
    def ode(self) -> "Solver":
        """The solver alone, of a configuration that has its keys among others."""
        return Solver(self.solver, self.solver_steps, self.solver_grid)

    @property
    def evaluations(self) -> int:
        """Of the velocity, for one sample."""
        return EVALUATIONS[self.solver] * self.solver_steps

    def path(
        self, velocity: Velocity, cond: Tensor, noise: Tensor, rungs: tuple[float, ...] = (1.0,)
    ) -> tuple[States, list[int]]:
        """The states along the grid, which passes through every rung, and the place of each rung among them."""
        grid, positions = flow.time_grid(rungs, self.solver_steps, self.solver_grid)
        return METHODS[self.solver](velocity, cond, grid, noise), positions
