"""The forward process, the conversions between predictions, the laws for t and the rungs of a few-step student.

One convention: t in [0, 1], t = 0 is data and t = 1 is noise,
    x_t = (1 - t) x0 + t eps,   v = eps - x0,   x0 = x_t - t v.
Shapes: x0, eps, v, x_t are (B, ...); t is (B,) or a scalar.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from dmd_dar.keys import key

Batch = Float[Tensor, "b *rest"]
Times = Float[Tensor, "*b"]  # one t for each sample, or a single one


def expand_t(t: Times, x: Batch) -> Tensor:
    """t (B,) or () -> (B, 1, ..., 1), to broadcast against x (B, ...)."""
    return t.reshape(-1, *[1] * (x.dim() - 1))


def interpolate(x0: Batch, eps: Batch, t: Times) -> Batch:
    """x_t = (1 - t) x0 + t eps. Exactly x0 at t = 0 and eps at t = 1."""
    t = expand_t(t, x0)
    return (1 - t) * x0 + t * eps


def velocity(x0: Batch, eps: Batch) -> Batch:
    """v = eps - x0, the time derivative of x_t."""
    return eps - x0


def velocity_to_x0(v: Batch, x_t: Batch, t: Times) -> Batch:
    """x0 = x_t - t v."""
    return x_t - expand_t(t, x_t) * v


def velocity_to_eps(v: Batch, x_t: Batch, t: Times) -> Batch:
    """eps = x_t + (1 - t) v."""
    return x_t + (1 - expand_t(t, x_t)) * v


def x0_to_velocity(x0: Batch, x_t: Batch, t: Times) -> Batch:
    """v = (x_t - x0) / t, divided in float64. Raises ValueError at t = 0, where x_t says nothing about eps."""
    if (t <= 0).any():
        raise ValueError(f"x0_to_velocity needs t > 0, got t = {t.min().item():g}: at t = 0 the velocity is undefined")
    return ((x_t.double() - x0.double()) / expand_t(t, x_t).double()).to(x_t.dtype)


def shift_time(t: Tensor, shift: float) -> Tensor:
    """t' = s t / (1 + (s - 1) t): s > 1 moves mass toward noise; s = 1 is the identity (arXiv:2403.03206 Eq. 23)."""
    return shift * t / (1 + (shift - 1) * t)


@dataclass(frozen=True)
class TimeLaw:
    """The distribution that t is drawn from."""

    law: Literal["uniform", "logit_normal"] = key("uniform", "distribution of t before shift and bounds")
    mean: float = key(0.0, "mean of logit(t), logit_normal only")
    std: float = key(1.0, "standard deviation of logit(t), logit_normal only", above=0)
    shift: float = key(1.0, "t' = s t / (1 + (s - 1) t); above 1 moves mass toward noise", above=0)
    low: float = key(0.0, "t is mapped linearly into [low, high]", least=0, most=1)
    high: float = key(1.0, "t is mapped linearly into [low, high]", least=0, most=1)

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise ValueError(f"low must be below high, got low={self.low} and high={self.high}")

    def quantile(self, u: Tensor) -> Tensor:
        """t at cumulative probability u in (0, 1), same shape and dtype (give float64)."""
        t = u
        if self.law == "logit_normal":
            t = torch.sigmoid(self.mean + self.std * torch.special.ndtri(u))
        return self.low + (self.high - self.low) * shift_time(t, self.shift)


def default_rungs(k: int, shift: float = 3.0) -> tuple[float, ...]:
    """k rungs from t = 1 downwards, evenly spaced before the shift: (1, .9, .75, .5) for k = 4."""
    return tuple(round(shift_time(torch.tensor(1 - j / k, dtype=torch.float64), shift).item(), 6) for j in range(k))


def check_rungs(rungs: tuple[float, ...]) -> None:
    """Rungs start at exactly 1 and fall strictly to a last value above 0; raises ValueError otherwise."""
    if not rungs or rungs[0] != 1.0:
        raise ValueError(f"rungs must start at 1.0 (pure noise), got {list(rungs)}")
    if not (all(a > b for a, b in pairwise(rungs)) and rungs[-1] > 0):  # NaN fails both
        raise ValueError(f"rungs must fall strictly and stay above 0, got {list(rungs)}")


def time_grid(rungs: tuple[float, ...], steps: int) -> tuple[list[float], list[int]]:
    """A grid from 1 to 0 in `steps` intervals that passes through every rung, and where in it each rung stands.

    Each interval between rungs (the last one ends at 0) is cut evenly; later intervals, where detail forms, take the
    remainder. Raises ValueError if there are fewer steps than rungs.
    """
    if steps < len(rungs):
        raise ValueError(f"{steps} solver steps cannot pass through {len(rungs)} rungs: take at least as many steps")
    ends = [*rungs[1:], 0.0]
    base, extra = divmod(steps, len(rungs))
    grid, positions = [rungs[0]], []
    for j, (start, end) in enumerate(zip(rungs, ends, strict=True)):
        positions.append(len(grid) - 1)
        count = base + (1 if j >= len(rungs) - extra else 0)
        grid += [start + (end - start) * i / count for i in range(1, count)] + [end]
    return grid, positions
