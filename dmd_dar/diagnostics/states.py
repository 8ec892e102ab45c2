"""The states h_l of a network's forward pass and the loss's gradients in them, read by hooks that change no value.

B batch, T tokens, d width, L sublayers. h_l is what sublayer l reads, h_{L+1} what the prediction head reads; z_k, the
output of block k, is the state handed to block k + 1, or to the head.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from dmd_dar import flow, losses
from dmd_dar.errors import UserError
from dmd_dar.guidance import Velocity
from dmd_dar.models.sit import SiT
from dmd_dar.models.teachers import Denoiser
from dmd_dar.routing.consumers import plan_of


@dataclass(frozen=True)
class Places:
    """`consumers`: the L + 1 modules whose first argument is h_1 .. h_{L+1}; `block_ends`: the l with z_k = h_l."""

    consumers: tuple[nn.Module, ...]
    block_ends: tuple[int, ...]


def places_of(network: Denoiser) -> Places:
    """Of a SiT both norms of every block, then the head's; of a diffusers transformer the modules that its routers act
    on, or would, along the image tokens.

    Raises UserError for routers that read whole blocks, and ValueError for a transformer that has no sublayers to read.
    """
    if isinstance(network, SiT):
        norms = [norm for block in network.blocks for norm in (block.norm1, block.norm2)]
        return _places([*norms, network.final_layer.norm_final], len(network.blocks))
    plan = plan_of(network.transformer, "sublayer") if network.dar is None else network.dar.plan
    if plan.granularity != "sublayer":
        raise UserError("its routers read whole blocks; the diagnostics read sublayers: route them per sublayer")
    paths = {tap.router: tap.path for tap in reversed(plan.taps) if tap.stream != "text"}
    return _places([network.transformer.get_submodule(paths[router]) for router in sorted(paths)], len(plan.blocks))


def _places(consumers: Sequence[nn.Module], blocks: int) -> Places:
    """`consumers` with the head's, of blocks of equally many sublayers."""
    each = (len(consumers) - 1) // blocks
    return Places(tuple(consumers), tuple(each * k + 1 for k in range(1, blocks + 1)))


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

    def read(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        h, *others = inputs
        states.arrived.append(h)
        states.read.append(h.view_as(h))
        return (states.read[-1], *others)

    hooks = [consumer.register_forward_pre_hook(read) for consumer in consumers]
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
    gradients = torch.autograd.grad(loss * len(x0), [*states.arrived, *states.read])
    count = len(states.arrived)
    detached = [h.detach() for h in states.arrived]
    return Traced(detached, list(gradients[:count]), list(gradients[count:]), loss.detach())
