"""Tensors of several processes: what of them each holds, and the way to whole ones and back."""

import copy
from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dmd_dar.models.frozen import Parts
from dmd_dar.routing.tensor_files import Stored, pieces, tensors_in


def outline(network: nn.Module) -> nn.Module:
    """A copy whose parameters are shapes on the meta device; to be filled by load_state_dict(..., assign=True)."""
    empty = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
        for p in network.parameters()
    }
    return copy.deepcopy(network, empty)


def gathered(state: Any) -> Any:
    """Nested containers of tensors with the sharded ones whole, on the CPU: in the main process; empty in others.

    An exchange if any is sharded: call it in every process.
    Not torch.distributed.checkpoint.state_dict: that keys an optimiser's state by the names of one model's parameters
    and makes an optimiser step to find its form, while checkpoints number the parameters and must be read back exactly.
    """
    if isinstance(state, dict):
        return {name: gathered(value) for name, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(gathered(value) for value in state)
    if not is_part(state):
        return state
    whole = state.full_tensor()
    return whole.cpu() if dist.get_rank() == 0 else whole.new_empty(0)


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    return tensor.to_local() if is_part(tensor) else tensor  # type: ignore[operator]


def is_part(value: Any) -> bool:
    """Whether it is a sharded tensor, told by its name: importing the class costs seconds."""
    return type(value).__name__ == "DTensor"


def like(own: Tensor, whole: Any) -> Any:
    """A whole tensor sharded as `own` is, without an exchange; anything else as it is."""
    if not (is_part(own) and isinstance(whole, Tensor) and whole.shape == own.shape):
        return whole
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(own, DTensor)
    return distribute_tensor(whole.to(own.device), own.device_mesh, own.placements, src_data_rank=None)


def load_network(network: nn.Module, weights: dict[str, Tensor]) -> None:
    """load_state_dict of whole tensors into a network that may be sharded."""
    own = network.state_dict()
    network.load_state_dict({name: like(own[name], value) if name in own else value for name, value in weights.items()})


def load_optimiser(optimiser: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """load_state_dict of whole tensors into an optimiser whose parameters may be sharded."""
    own = chain.from_iterable(group["params"] for group in optimiser.param_groups)
    saved = chain.from_iterable(group["params"] for group in state["param_groups"])
    holders = dict(zip(saved, own, strict=True))
    moments = {
        index: {name: like(holders[index], value) for name, value in values.items()}
        for index, values in state["state"].items()
    }
    optimiser.load_state_dict({**state, "state": moments})


def parts_of(group: Any, device: torch.device) -> Parts:
    """How the processes of `group` split frozen weights among them, which are gathered on `device`."""
    count = dist.get_world_size(group)

    def gather(part: Tensor) -> Tensor:
        part = part.to(device)
        every = part.new_empty(count, len(part))
        dist.all_gather_into_tensor(every.flatten().view(torch.uint8), part.view(torch.uint8), group)
        return every

    return Parts(dist.get_rank(group), count, gather)


def sent_by_main(stored: Mapping[str, Stored], device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """A `Reader` of several processes, on `device`: the main one reads and sends. An exchange for each tensor."""
    names = [name for _, names in pieces(stored) for name in names]
    waiting = ((name, torch.empty(stored[name].shape, dtype=stored[name].dtype)) for name in names)
    for name, value in waiting if dist.get_rank() else tensors_in(stored):
        sent = value.to(device)
        dist.broadcast(sent.reshape(-1).view(torch.uint8), 0)
        yield name, sent
