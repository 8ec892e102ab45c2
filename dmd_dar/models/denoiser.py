"""What a network's output means. The rest of the code sees only velocities of flow.py's convention."""

from collections.abc import Callable
from typing import Literal

from torch import Tensor

from dmd_dar.guidance import Velocity

Prediction = Literal["flow", "sit"]


def velocity_of(network: Callable[..., Tensor], prediction: Prediction = "flow") -> Velocity:
    """The velocity v = eps - x0 at t (t = 1 noise) of a network that maps (x, t, labels) to at least C channels.

    `flow`: ours. `sit`: public SiT weights, whose time runs from noise (0) to data (1) and which predict x0 - eps.
    Channels beyond the input's (learned sigma) are dropped.
    """

    def flow_velocity(x_t: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        return network(x_t, t, cond)[:, : x_t.shape[1]]

    def sit_velocity(x_t: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        return -network(x_t, 1 - t, cond)[:, : x_t.shape[1]]

    return {"flow": flow_velocity, "sit": sit_velocity}[prediction]
