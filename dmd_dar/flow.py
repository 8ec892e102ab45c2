"""The forward process, the conversions between predictions, the laws for t and the rungs of a few-step student.

One convention: t in [0, 1], t = 0 is data and t = 1 is noise,
    x_t = (1 - t) x0 + t eps,   v = eps - x0,   x0 = x_t - t v.
Shapes: x0, eps, v, x_t are (B, ...); t is (B,) or a scalar.

Other networks' processes, x = alpha x0 + sigma eps, and predictions meet this one in x0: `prediction_to_x0`,
`x0_to_prediction`; a variance-preserving one is the same process at another scale and time (`Schedule`).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
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


def added(s: float, t: Times) -> Times:
    """b, the noise that is added on the way from s up to t: b^2 = t^2 - (s (1 - t) / (1 - s))^2. It is t for s = 0."""
    kept = s * (1 - t) / (1 - s)
    return ((t - kept) * (t + kept)).sqrt()


def noise_on(x_s: Batch, xi: Batch, s: float, t: Times) -> Batch:
    """x_t = (1 - t) / (1 - s) x_s + b xi, b = added(s, t).

    Where x_s is (1 - s) x0 and noise of standard deviation s, x_t is (1 - t) x0 and noise of standard deviation t.
    """
    return expand_t((1 - t) / (1 - s), x_s) * x_s + expand_t(added(s, t), x_s) * xi


def velocity(x0: Batch, eps: Batch) -> Batch:
    """v = eps - x0, the time derivative of x_t."""
    return eps - x0


def velocity_to_x0(v: Batch, x_t: Batch, t: Times) -> Batch:
    """x0 = x_t - t v."""
    return x_t - expand_t(t, x_t) * v


def x0_to_velocity(x0: Batch, x_t: Batch, t: Times) -> Batch:
    """v = (x_t - x0) / t, divided in float64. Raises ValueError at t = 0, where x_t says nothing about eps."""
    if (t <= 0).any():
        raise ValueError(f"x0_to_velocity needs t > 0, got t = {t.min().item():g}: at t = 0 the velocity is undefined")
    return ((x_t.double() - x0.double()) / expand_t(t, x_t).double()).to(x_t.dtype)


# What a network may predict, each a combination p x0 + q eps; "flow" is this package's v, "v" that of arXiv:2202.00512.
Predicted = Literal["x0", "eps", "v", "flow"]


def _mixture(predicted: Predicted, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """(p, q) of the prediction p x0 + q eps."""
    zero, one = torch.zeros_like(alpha), torch.ones_like(alpha)
    return {"x0": (one, zero), "eps": (zero, one), "v": (-sigma, alpha), "flow": (-one, one)}[predicted]


def prediction_to_x0(predicted: Predicted, y: Batch, x: Batch, alpha: Times, sigma: Times) -> Batch:
    """x0 from a network's prediction y at x = alpha x0 + sigma eps; computed in float64, returned in x's dtype.

    Raises ValueError for "eps" where alpha is 0: noise alone says nothing about x0.
    """
    if predicted == "x0":
        return y.to(x.dtype)
    if predicted == "eps" and (alpha == 0).any():
        raise ValueError("a predicted eps determines no x0 where alpha = 0 (pure noise)")
    alpha, sigma = expand_t(alpha, x).double(), expand_t(sigma, x).double()
    p, q = _mixture(predicted, alpha, sigma)
    return ((q * x.double() - sigma * y.double()) / (alpha * q - sigma * p)).to(x.dtype)


def x0_to_prediction(predicted: Predicted, x0: Batch, x: Batch, alpha: Times, sigma: Times) -> Batch:
    """The inverse of `prediction_to_x0`. Raises ValueError where sigma is 0, but for "x0": data says nothing of eps."""
    if predicted == "x0":
        return x0.to(x.dtype)
    if (sigma == 0).any():
        raise ValueError(f"x0 determines no {predicted} where sigma = 0 (data)")
    alpha, sigma = expand_t(alpha, x).double(), expand_t(sigma, x).double()
    p, q = _mixture(predicted, alpha, sigma)
    return ((q * x.double() - (alpha * q - sigma * p) * x0.double()) / sigma).to(x.dtype)


def x0_and_eps_to_velocity(x0: Batch, eps: Batch, x_t: Batch, t: Times) -> Batch:
    """v from estimates that fit x_t up to the ends of a schedule: from x0 where t >= 1/2, from eps below; no t fails.

    Where (1 - t) x0 + t eps = x_t both are eps - x0. At t = 1 the x0 that v gives back is the given one, exactly.
    """
    t = expand_t(t, x_t).to(x0.dtype)
    from_x0 = (x_t - x0) / t.clamp(min=0.5)
    from_eps = (eps - x_t) / (1 - t).clamp(min=0.5)
    return torch.where(t >= 0.5, from_x0, from_eps)


@dataclass(frozen=True)
class Schedule:
    """A variance-preserving chain of discrete steps: x = alpha x0 + sigma eps, alpha^2 = prod (1 - beta).

    Step i has the ratio alpha : sigma of this package's process at t_i = sigma / (alpha + sigma), its *level*, so that
    x = x_t / sqrt((1 - t)^2 + t^2). Between steps, timesteps are interpolated linearly in log(alpha / sigma).
    """

    betas: Literal["linear", "scaled_linear", "cosine"] = "linear"  # DiT and DDPM; Stable Diffusion; arXiv:2102.09672
    steps: int = 1000
    start: float = 1e-4
    end: float = 0.02

    def timestep(self, level: Times) -> Times:
        """Levels in [low, high] -> fractional timesteps in [0, steps - 1], float64; beyond, the nearest step's."""
        ratios = self._log_ratios().to(level.device)  # falls with the step
        ratio = torch.log1p(-level.double()) - level.double().log()
        ratio = ratio.clamp(ratios[-1], ratios[0])
        step = torch.searchsorted(-ratios, -ratio, right=True).clamp(1, self.steps - 1)
        above, below = ratios[step - 1], ratios[step]
        return step - 1 + (above - ratio) / (above - below)

    def level(self, timestep: Times) -> Times:
        """Fractional timesteps in [0, steps - 1] -> t, float64; the inverse of `timestep`."""
        ratios = self._log_ratios().to(timestep.device)
        step = timestep.double().floor().long().clamp(0, self.steps - 2)
        ratio = torch.lerp(ratios[step], ratios[step + 1], timestep.double() - step)
        return torch.sigmoid(-ratio)

    @property
    def bounds(self) -> tuple[float, float]:
        """The levels of the first and the last step; the chain says nothing beyond them."""
        ends = torch.sigmoid(-self._log_ratios()[[0, -1]])
        return ends[0].item(), ends[1].item()

    def _log_ratios(self) -> Tensor:
        return _log_ratios(self.betas, self.steps, self.start, self.end)


@cache
def _log_ratios(kind: str, steps: int, start: float, end: float) -> Tensor:
    """log(alpha / sigma) at each step, float64 on the CPU."""
    if kind == "cosine":
        angle = (torch.arange(steps + 1, dtype=torch.float64) / steps + 0.008) / 1.008 * math.pi / 2
        product = angle.cos().square()
        betas = (1 - product[1:] / product[:-1]).clamp(max=0.999)
    elif kind == "scaled_linear":
        betas = torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64).square()
    else:
        betas = torch.linspace(start, end, steps, dtype=torch.float64)
    log_square = torch.log1p(-betas).cumsum(0)  # log alpha^2
    return 0.5 * (log_square - torch.log(-torch.expm1(log_square)))


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


Sampler = Literal["stochastic", "deterministic"]  # between rungs: fresh noise, or the ODE's own


def default_rungs(k: int, shift: float = 3.0) -> tuple[float, ...]:
    """k rungs from t = 1 downwards, evenly spaced before the shift: (1, .9, .75, .5) for k = 4."""
    return tuple(round(shift_time(torch.tensor(1 - j / k, dtype=torch.float64), shift).item(), 6) for j in range(k))


def meeting_time(power: float) -> float:
    """The t at which a signal meets the noise, (1 - t) a = t: a^2 = `power`, that of the noise being 1."""
    amplitude = math.sqrt(power)
    return amplitude / (1 + amplitude)


def check_rungs(rungs: tuple[float, ...], solver_steps: int | None = None) -> None:
    """Rungs start at exactly 1, fall strictly to a last value above 0, and are no more than the steps of a solver that
    passes through them; raises ValueError otherwise.
    """
    if not rungs or rungs[0] != 1.0:
        raise ValueError(f"rungs must start at 1.0 (pure noise), got {list(rungs)}")
    if not (all(a > b for a, b in pairwise(rungs)) and rungs[-1] > 0):  # NaN fails both
        raise ValueError(f"rungs must fall strictly and stay above 0, got {list(rungs)}")
    if solver_steps is not None and solver_steps < len(rungs):
        raise ValueError(
            f"solver_steps must be at least {len(rungs)}, to pass through as many rungs, got {solver_steps}"
        )


# How a solver's steps are spread over t, each by what they are even in; "even" is t itself.
SolverGrid = Literal["even", "sqrt", "cosine"]
_TIME_AT: dict[SolverGrid, Callable[[float], float]] = {
    "even": lambda u: u,
    "sqrt": lambda u: u * u,
    "cosine": lambda u: math.sin(u * math.pi / 2) ** 2,
}
_PLACE_OF: dict[SolverGrid, Callable[[float], float]] = {
    "even": lambda t: t,
    "sqrt": math.sqrt,
    "cosine": lambda t: math.asin(math.sqrt(t)) * 2 / math.pi,
}


def time_grid(rungs: tuple[float, ...], steps: int, law: SolverGrid) -> tuple[list[float], list[int]]:
    """A grid from 1 to 0 in `steps` intervals that passes through every rung, and where in it each rung stands.

    Each interval between rungs (the last one ends at 0) is cut at even places u, with t = u ("even"), u^2 ("sqrt") or
    sin^2(pi u / 2) ("cosine"). The latter two take small steps near data, where fine detail forms and even ones leave
    noise; "cosine" does so near noise too, where the way begins to bend. "even" gives every interval as many steps,
    later ones the remainder; the others share them out by length in u, one at least. Raises ValueError if there are
    fewer steps than rungs.
    """
    if steps < len(rungs):
        raise ValueError(f"{steps} solver steps cannot pass through {len(rungs)} rungs: take at least as many steps")
    ends = [*rungs[1:], 0.0]
    counts = _even_counts(len(rungs), steps) if law == "even" else _counts(rungs, ends, steps, _PLACE_OF[law])
    grid, positions = [rungs[0]], []
    for start, end, count in zip(rungs, ends, counts, strict=True):
        positions.append(len(grid) - 1)
        begin, stop = _PLACE_OF[law](start), _PLACE_OF[law](end)
        grid += [_TIME_AT[law](begin + (stop - begin) * i / count) for i in range(1, count)] + [end]
    return grid, positions


def _even_counts(intervals: int, steps: int) -> list[int]:
    base, extra = divmod(steps, intervals)
    return [base + (1 if j >= intervals - extra else 0) for j in range(intervals)]


def _counts(starts: Sequence[float], ends: Sequence[float], steps: int, place: Callable[[float], float]) -> list[int]:
    """One step for each interval, and each further one where the steps are the longest in u."""
    lengths = [place(start) - place(end) for start, end in zip(starts, ends, strict=True)]
    counts = [1] * len(lengths)
    for _ in range(steps - len(lengths)):
        longest = max(range(len(lengths)), key=lambda j: (lengths[j] / counts[j], j))
        counts[longest] += 1
    return counts
