"""The few-step student, one definition for training, sampling and evaluation.

Shapes: x_t (B, ...); cond (B,); rungs descend from 1 (pure noise), see flow.check_rungs.
"""

from typing import Protocol

import torch
from torch import Tensor

from dmd_dar import flow, moved
from dmd_dar.draws import Draws
from dmd_dar.flow import Sampler
from dmd_dar.guidance import Velocity


def predict_x0(velocity: Velocity, x_t: Tensor, t: float, cond: Tensor) -> Tensor:
    """One network call: the estimate of x0 from x_t at a single t."""
    times = torch.full((len(x_t),), t, device=x_t.device, dtype=torch.promote_types(x_t.dtype, torch.float32))
    return flow.velocity_to_x0(velocity(x_t, times, cond), x_t, times)


def renoise(x: Tensor, law: flow.TimeLaw, name: str, draws: Draws, s: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """x (B, ...), samples at time s, noised on to a t > s by the law: x_t, its t (B,) and eps (B, ...).

    The draws are of this name. With s > 0 (samples that still hold noise, arXiv:2510.27684) eps is t / b times what is
    added, see `flow.noise_on`: E[eps | x_t] is then that of all noise in x_t, and it spreads the more, the nearer t is
    to s.
    """
    xi = draws.normal(f"{name}_eps", *x.shape[1:], dtype=torch.promote_types(x.dtype, torch.float32))
    t = law.quantile(draws.uniform(f"{name}_t")).to(xi.dtype)
    if not s:
        return flow.interpolate(x, xi, t), t, xi
    return flow.noise_on(x, xi, s, t), t, flow.expand_t(t / flow.added(s, t), xi) * xi


def rung_of(draws: Draws, rungs: tuple[float, ...]) -> int:
    """The index of the rung of a training step, one for the whole batch."""
    return draws.shared_integer("rung", len(rungs))


def next_state(x0: Tensor, x_t: Tensor, t: float, t_next: float, eps: Tensor | None) -> Tensor:
    """The state at t_next: fresh noise added to x0, or where eps is None the ODE's own noise (an Euler step)."""
    if eps is None:
        eps = (x_t - (1 - t) * x0) / t
    return (1 - t_next) * x0 + t_next * eps


def x0_towards(x_t: Tensor, x_next: Tensor, t: float, t_next: float) -> Tensor:
    """The x0 for which the ODE's step from x_t at t ends in x_next at t_next < t: the inverse of `next_state`."""
    return (t * x_next - t_next * x_t) / (t - t_next)


class Normal(Protocol):
    """What a rollout draws with: Draws, or what is keyed otherwise."""

    def normal(self, name: str, *shape: int) -> Tensor:
        """(B, *shape) standard normal, float32; the same for the same name."""
        ...


class Rollout:
    """A student's way from pure noise down its rungs: its input and its output at each, computed when first asked for.

    noise (B, ...), cond (B,); the draws give the noise that is added again. Wrap in no_grad for training.
    """

    def __init__(
        self,
        student: Velocity,
        cond: Tensor,
        rungs: tuple[float, ...],
        draws: Normal,
        noise: Tensor,
        sampler: Sampler = "stochastic",
    ):
        self.student, self.cond, self.rungs, self.draws, self.sampler = student, cond, rungs, draws, sampler
        self.states, self.outputs = [noise], list[Tensor]()

    def state(self, rung: int) -> Tensor:
        """x_t (B, ...) at rungs[rung], simulated by the student itself (DMD2, arXiv:2405.14867 4.5)."""
        for j in range(len(self.states) - 1, rung):
            x0, x_t = self.output(j), self.states[j]
            again = self.sampler == "stochastic"
            eps = self.draws.normal(f"renoise_{j + 1}", *x_t.shape[1:]) if again else None
            self.states.append(next_state(x0, x_t, self.rungs[j], self.rungs[j + 1], eps))
        return self.states[rung]

    def output(self, rung: int) -> Tensor:
        """x0 (B, ...) from the state at rungs[rung]."""
        for j in range(len(self.outputs), rung + 1):
            self.outputs.append(predict_x0(self.student, self.state(j), self.rungs[j], self.cond))
        return self.outputs[rung]

    def end(self) -> Tensor:
        """x0 (B, ...) after all rungs: the student's sample."""
        return self.output(len(self.rungs) - 1)


moved.keep_names(__name__)
