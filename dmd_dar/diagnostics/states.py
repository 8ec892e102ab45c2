"""The states h_l of a network's forward pass and the loss's gradients in them, read by hooks that change no value.

B batch, T tokens, d width, L sublayers, or L blocks where the routers read whole blocks. h_l is what sublayer l reads,
h_{L+1} what the prediction head reads; z_k, the output of block k, is the state handed to block k + 1, or to the head.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dmd_dar import flow, losses
from dmd_dar.draws import Draws
from dmd_dar.errors import UserError
from dmd_dar.guidance import Velocity
from dmd_dar.models.sit import SiT
from dmd_dar.models.teachers import Denoiser
from dmd_dar.routing.consumers import SUBLAYERS, plan_of, stream_argument


@dataclass(frozen=True)
class Places:
    """`consumers`: the L + 1 modules whose first argument is h_1 .. h_{L+1}; `block_ends`: the l with z_k = h_l.

    `unit`: what L counts. A block adds h_l to its output by itself, and its router takes h_l off again.
    """

    consumers: tuple[nn.Module, ...]
    block_ends: tuple[int, ...]
    unit: Literal["sublayer", "block"] = "sublayer"


def places_of(network: Denoiser) -> Places:
    """Of a SiT both norms of every block, then the head's; of a diffusers transformer the modules that its routers act
    on, or would, along the image tokens: its blocks themselves where the routers read whole blocks.

    Raises UserError for routers of several lists of blocks, and ValueError for a transformer without sublayers to read.
    """
    if isinstance(network, SiT):
        norms = [block.get_submodule(name) for block in network.blocks for name in ("norm1", "norm2")]
        return _places([*norms, network.final_layer.norm_final], len(network.blocks))
    transformer = network.transformer
    plan = plan_of(transformer, "sublayer") if network.dar is None else network.dar.plan
    if plan.granularity == "block":
        if len(plan.streams) > 1:
            raise UserError(f"its routers read {len(plan.streams)} lists of blocks; the diagnostics read one")
        head = SUBLAYERS[type(transformer).__name__].head
        modules = [transformer.get_submodule(path) for path in (*plan.blocks, head)]
        return _places(modules, len(plan.blocks), "block")
    paths = {tap.router: tap.path for tap in reversed(plan.taps) if tap.stream != "text"}
    return _places([transformer.get_submodule(paths[router]) for router in sorted(paths)], len(plan.blocks))


def _places(consumers: Sequence[nn.Module], blocks: int, unit: Literal["sublayer", "block"] = "sublayer") -> Places:
    """`consumers` with the head's, of blocks of equally many sublayers."""
    each = (len(consumers) - 1) // blocks
    return Places(tuple(consumers), tuple(each * k + 1 for k in range(1, blocks + 1)), unit)


@dataclass(frozen=True)
class Inputs:
    """What a network is looked at on: x0 (N, C, S, S), cond (N,), the draws of their noise; `batch_size` at a time."""

    x0: Tensor
    cond: Tensor
    draws: Draws
    batch_size: int

    def batches(self) -> tuple[Tensor, ...]:
        """The rows of each batch."""
        return torch.arange(len(self.x0), device=self.x0.device).split(self.batch_size)


@dataclass(frozen=True)
class States:
    """h_l, (B, T, d), at index l - 1.

    `arrived`: the tensor itself, which in a residual network is the stream and flows on past the sublayer. `read`: an
    alias that the sublayer alone reads, so that a gradient in it takes no path around the sublayer.
    """

    arrived: list[Tensor] = field(default_factory=list)
    read: list[Tensor] = field(default_factory=list)


@contextmanager
def recording(consumers: Sequence[nn.Module]) -> Iterator[States]:
    """The States of the one forward pass that runs inside; its values stay bit for bit what they are."""
    states = States()

    def read(consumer: nn.Module, inputs: tuple, named: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        name = stream_argument(consumer)
        h = inputs[0] if inputs else named[name]
        states.arrived.append(h)
        states.read.append(h.view_as(h))
        return ((states.read[-1], *inputs[1:]), named) if inputs else (inputs, {**named, name: states.read[-1]})

    hooks = [consumer.register_forward_pre_hook(read, with_kwargs=True) for consumer in consumers]
    try:
        yield states
    finally:
        for hook in hooks:
            hook.remove()
    if len(states.read) != len(consumers):
        raise RuntimeError(f"{len(consumers)} states were expected in one forward pass, {len(states.read)} were seen")


@dataclass(frozen=True)
class Traced:
    """One forward and backward pass. Gradients are of every sample's own loss, so they do not depend on B."""

    states: list[Tensor]  # h_l at index l - 1, detached
    stream_gradients: list[Tensor]  # in h_l, all paths
    sublayer_gradients: list[Tensor]  # in h_l, through its sublayer alone
    loss: Tensor  # scalar, mean over the batch


def trace(velocity: Velocity, places: Places, x0: Tensor, eps: Tensor, time: float, cond: Tensor) -> Traced:
    """The velocity's mean squared error against eps - x0 at t = `time`, and its gradients in the states."""
    t = torch.full((len(x0),), time, dtype=x0.dtype, device=x0.device)
    x_t = flow.interpolate(x0, eps, t).requires_grad_()  # a frozen network still builds its graph
    with torch.enable_grad(), recording(places.consumers) as states:
        loss = losses.flow_matching_loss(velocity(x_t, t, cond), x0, eps)
    count, detached = len(states.arrived), [h.detach() for h in states.arrived]
    if places.unit == "block":  # what the router takes off is h_l as it arrived: only all paths together are v_l's
        gradients = torch.autograd.grad(loss * len(x0), states.arrived) * 2
    else:
        gradients = torch.autograd.grad(loss * len(x0), [*states.arrived, *states.read])
    return Traced(detached, list(gradients[:count]), list(gradients[count:]), loss.detach())
