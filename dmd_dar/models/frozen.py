"""Where the weights of a frozen network's blocks lie, and in what type, while they are not in use."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


class Storage:
    """Brings one linear layer's stored weights to its input's device and to the computing type, for one call.

    The layer's parameters are replaced, not moved: what autograd keeps for the backward pass stays as it was used.
    """

    def __init__(self, linear: nn.Linear):
        self.stored: dict[str, Any] = {}
        self.handles = (
            linear.register_forward_pre_hook(self.bring),
            linear.register_forward_hook(self.put_back, always_call=True),
        )

    def bring(self, linear: nn.Module, args: tuple) -> None:
        x = args[0]
        kind = x.device.type
        autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        dtype = torch.get_autocast_dtype(kind) if autocast else x.dtype
        self.stored = {name: value for name, value in linear._parameters.items() if value is not None}
        for name, value in self.stored.items():
            linear._parameters[name] = value.detach().to(x.device, dtype, non_blocking=True)  # type: ignore[assignment]

    def put_back(self, linear: nn.Module, args: tuple, output: Any) -> None:
        linear._parameters.update(self.stored)
        self.stored = {}

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


def block_layers(network: nn.Module) -> Iterator[nn.Linear]:
    """The linear layers of a transformer's blocks, which hold nearly all of its weights."""
    for blocks in network.modules():
        if isinstance(blocks, nn.ModuleList):
            yield from (layer for layer in blocks.modules() if isinstance(layer, nn.Linear))


def store(network: nn.Module, dtype: torch.dtype | None = None, offload: bool = False) -> None:
    """Keep the weights of the blocks' linear layers in `dtype` and, if `offload`, in the CPU's memory; in place.

    Each call of a layer then copies its weights: with `offload`, a forward moves all of them over the bus once. The
    network must be frozen.
    """
    if dtype is None and not offload:
        return
    for layer in dict.fromkeys(block_layers(network)):
        for parameter in layer.parameters(recurse=False):
            parameter.data = _stored(parameter.data, dtype or parameter.dtype, offload)
        layer.storage = Storage(layer)  # type: ignore[assignment]


def _stored(value: Tensor, dtype: torch.dtype, offload: bool) -> Tensor:
    if not offload or value.is_meta:
        return value.to(dtype)
    stored = value.to("cpu", dtype)
    return stored.pin_memory() if value.is_cuda else stored


def release(network: nn.Module) -> None:
    """Take the hooks of `store` off again, in place; the weights stay where and as they are stored."""
    for layer in network.modules():
        if isinstance(storage := getattr(layer, "storage", None), Storage):
            storage.remove()
            del layer.storage
