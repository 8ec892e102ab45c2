"""What a network's output means. The rest of the code sees only velocities of flow.py's convention.

Time direction, sign, time unit, schedule and learned sigma of public checkpoints are decided here and nowhere else.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from dmd_dar import flow
from dmd_dar.models.prompts import Prompts
from dmd_dar.models.rungs import indices
from dmd_dar.routing.layout import RoutingConfig

# (x (B, C, ...), its own time (B,), cond (B,), for some the index of a rung) -> (B, at least C, ...)
Network = Callable[..., Tensor]
EDGE = 1e-3  # how near to an end of t an x0, eps or v network on the linear flow is asked


class ConditionalNetwork(Protocol):
    """What a network says of itself: SiT, DiffusersDenoiser and LoraDenoiser answer it, whatever they are made of.

    Call it as (x (B, C, H, W), its own time (B,), cond (B,), rung) -> (B, C or 2 C, H, W); `rung` only matters to one
    that tells rungs apart. cond is in 0 .. num_conditions, where the last is the unconditional one.
    """

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of its input where no other size is asked for."""
        ...

    @property
    def num_conditions(self) -> int: ...

    @property
    def prompts(self) -> Prompts | None:
        """The table whose rows are its conditions; None where they are labels."""
        ...

    @property
    def routing(self) -> RoutingConfig: ...

    def block_readers(self) -> list[nn.Module]:
        """For each block what reads its output: the next block's first norm, or the head's."""
        ...


class NetworkVelocity(Protocol):
    """A network as a velocity, a guidance.Velocity; `rung` is the index of a rung, for one that is told it."""

    def __call__(self, x_t: Tensor, t: Tensor, cond: Tensor, *rung: int) -> Tensor: ...


@dataclass(frozen=True)
class Meaning:
    """How a raw network is asked and what it answers. Channels beyond the input's (learned sigma) are dropped."""

    predicts: flow.Predicted = "flow"
    schedule: flow.Schedule | None = None  # its own chain, with timesteps 0 .. steps - 1; None: the linear flow
    time_scale: float = 1.0  # on the linear flow, the network's time is time_scale * t
    reversed: bool = False  # on the linear flow, its time runs from noise (0) to data (1), and it predicts x0 - eps

    def __post_init__(self) -> None:
        if self.schedule is not None and (self.reversed or self.time_scale != 1):
            raise ValueError("time_scale and reversed belong to the linear flow; a schedule has timesteps of its own")
        if self.reversed and self.predicts != "flow":
            raise ValueError(f"reversed networks predict flow, got {self.predicts!r}")


Prediction = Literal["flow", "sit", "dit"]  # the meanings that have a name, as a saved card holds them
MEANINGS: dict[str, Meaning] = {
    "flow": Meaning(),  # ours
    "sit": Meaning(reversed=True),  # public SiT weights
    "dit": Meaning("eps", flow.Schedule()),  # public DiT weights: linear betas from 1e-4 to 0.02, 1000 steps
}


def meaning_of(prediction: Prediction | Meaning) -> Meaning:
    """What a name stands for; a Meaning as it is."""
    return MEANINGS[prediction] if isinstance(prediction, str) else prediction


def meaning_from_dict(values: dict[str, Any]) -> Meaning:
    """The inverse of dataclasses.asdict(meaning)."""
    schedule = values["schedule"]
    return Meaning(**{**values, "schedule": None if schedule is None else flow.Schedule(**schedule)})


def network_time(meaning: Prediction | Meaning, t: Tensor) -> Tensor:
    """The time (B,) that a network of that meaning is given for t (B,) of our flow, in float64 where t is clamped.

    A t outside of what the network knows is asked at the nearest t that it knows.
    """
    meaning = meaning_of(meaning)
    if meaning.predicts == "flow" and meaning.schedule is None:
        return (1 - t if meaning.reversed else t) * meaning.time_scale
    known = _known(meaning, t)
    return known * meaning.time_scale if meaning.schedule is None else meaning.schedule.timestep(known)


def _known(meaning: Meaning, t: Tensor) -> Tensor:
    return t.double().clamp(*((EDGE, 1 - EDGE) if meaning.schedule is None else meaning.schedule.bounds))


def velocity_of(network: Network, meaning: Prediction | Meaning = "flow") -> NetworkVelocity:
    """The velocity v = eps - x0 at t (t = 1 noise) of a network of that meaning."""
    meaning = meaning_of(meaning)
    if meaning.predicts == "flow" and meaning.schedule is None:
        return _on_linear_flow(network, meaning)
    return _through_x0(network, meaning)


def _on_linear_flow(network: Network, meaning: Meaning) -> NetworkVelocity:
    def forward_time(x_t: Tensor, t: Tensor, cond: Tensor, *rung: int) -> Tensor:
        return network(x_t, network_time(meaning, t), cond, *indices(rung, x_t.device))[:, : x_t.shape[1]]

    def reversed_time(x_t: Tensor, t: Tensor, cond: Tensor, *rung: int) -> Tensor:
        return -forward_time(x_t, t, cond, *rung)

    return reversed_time if meaning.reversed else forward_time


def _through_x0(network: Network, meaning: Meaning) -> NetworkVelocity:
    """A change of time and scale, then x0 as the hub, in float64.

    A t outside of what the network knows is asked at the nearest t that it knows, on an input of unchanged variance.
    """

    def velocity(x_t: Tensor, t: Tensor, cond: Tensor, *rung: int) -> Tensor:
        known, x = _known(meaning, t), x_t.double()
        alpha, sigma = 1 - known, known
        if meaning.schedule is not None:
            x = x / flow.expand_t(torch.hypot(1 - t.double(), t.double()), x)
            norm = torch.hypot(alpha, sigma)
            alpha, sigma = alpha / norm, sigma / norm
        asked = x.to(x_t.dtype), network_time(meaning, t).to(t.dtype), cond, *indices(rung, x_t.device)
        y = network(*asked)[:, : x_t.shape[1]]
        x0 = flow.prediction_to_x0(meaning.predicts, y, x, alpha, sigma)
        eps = flow.x0_to_prediction("eps", x0, x, alpha, sigma)
        return flow.x0_and_eps_to_velocity(x0, eps, x_t.double(), t).to(x_t.dtype)

    return velocity
