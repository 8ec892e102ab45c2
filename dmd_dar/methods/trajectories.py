"""Teacher trajectories: the ODE's states at a student's rungs and its end, from keyed noise.

The regression loss needs a deterministic map, and the ODE gives one from every rung: its state there -> its end. The
states have the marginals that the student's own re-noised inputs aim at.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dmd_dar.guidance import Velocity
from dmd_dar.methods.solvers import Solver


class Pairs(Protocol):
    """What the regression loss draws from: in memory (`Trajectories`) or on the disk."""

    @property
    def count(self) -> int: ...

    def at(self, rung: int, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """States at rungs[rung], ends and labels of the trajectories `index` (B,)."""
        ...


@dataclass(frozen=True)
class Trajectories:
    """states (N, k, C, H, W) at the k rungs, ends (N, C, H, W), cond (N,); all on one device."""

    states: Tensor
    ends: Tensor
    cond: Tensor

    @property
    def count(self) -> int:
        return len(self.ends)

    def at(self, rung: int, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """States at rungs[rung], ends and labels of the trajectories `index` (B,)."""
        return self.states[index, rung], self.ends[index], self.cond[index]


@torch.no_grad()
def solve_trajectories(
    teacher: Velocity, cond: Tensor, rungs: tuple[float, ...], solver: Solver, noise: Tensor
) -> Trajectories:
    """From `noise` (B, C, H, W), through every rung, to t = 0."""
    path, positions = solver.path(teacher, cond, noise, rungs)
    return Trajectories(torch.stack([path[i] for i in positions], dim=1), path[-1], cond)
