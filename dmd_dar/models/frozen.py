"""Where the weights of a frozen network's blocks lie, and in what type, while they are not in use."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Kept:
    """How the linear layers of a frozen network's blocks are kept; all the rest is float32, where it computes."""

    dtype: torch.dtype | None = None  # None: float32
    offload: bool = False  # in the CPU's memory


@dataclass(frozen=True)
class Parts:
    """How processes split weights among them: this one holds part `own` of `count`; gather((n,)) -> (count, n)."""

    own: int
    count: int
    gather: Callable[[Tensor], Tensor]

    def of(self, value: Tensor) -> Tensor:
        """(n,) of the numbers of `value`, a copy; the last part is filled up with zeros."""
        size = -(-value.numel() // self.count)
        part = value.new_zeros(size)
        own = value.flatten()[self.own * size : (self.own + 1) * size]
        part[: len(own)] = own
        return part

    def whole(self, part: Tensor, shape: torch.Size) -> Tensor:
        """The inverse of `of`: an exchange, which every process has to make."""
        return self.gather(part).flatten()[: shape.numel()].view(shape)


class Storage:
    """Brings one linear layer's stored weights to its input's device and to the computing type, for one call.

    The layer's parameters are replaced, not moved: what autograd keeps for the backward pass stays as it was used.
    Of weights that are split, each process stores its part; `shapes` are those of the whole ones.
    """

    def __init__(self, linear: nn.Linear):
        self.stored: dict[str, Any] = {}
        self.parts: Parts | None = None
        self.shapes: dict[str, torch.Size] = {}
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
            brought = value.detach().to(x.device, non_blocking=True)
            brought = brought if self.parts is None else self.parts.whole(brought, self.shapes[name])
            linear._parameters[name] = brought.to(dtype)  # type: ignore[assignment]

    def put_back(self, linear: nn.Module, args: tuple, output: Any) -> None:
        linear._parameters.update(self.stored)
        self.stored = {}

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


def block_layers(network: nn.Module) -> Iterator[nn.Linear]:
    """The linear layers of a transformer's blocks, which hold nearly all of its weights, each once."""
    lists = (blocks for blocks in network.modules() if isinstance(blocks, nn.ModuleList))  # diffusers nests them
    within = dict.fromkeys(layer for blocks in lists for layer in blocks.modules())
    yield from (layer for layer in within if isinstance(layer, nn.Linear))


def store(network: nn.Module, dtype: torch.dtype | None = None, offload: bool = False) -> None:
    """Keep the weights of the blocks' linear layers in `dtype` and, if `offload`, in the CPU's memory; in place.

    Each call of a layer then copies its weights: with `offload`, a forward moves all of them over the bus once. The
    network must be frozen. Layers that are stored already stay as they are.
    """
    if dtype is None and not offload:
        return
    for layer in [layer for layer in block_layers(network) if not is_stored(layer)]:
        for parameter in layer.parameters(recurse=False):
            parameter.data = _stored(parameter.data, dtype or parameter.dtype, offload)
        layer.storage = Storage(layer)  # type: ignore[assignment]


def is_stored(layer: nn.Module) -> bool:
    return isinstance(getattr(layer, "storage", None), Storage)


def computes_on(network: nn.Module) -> torch.device:
    """The device on which a network computes, wherever `store` keeps the weights of its blocks."""
    return next(
        parameter.device
        for module in network.modules()
        if not is_stored(module)
        for parameter in module.parameters(recurse=False)
    )


def _stored(value: Tensor, dtype: torch.dtype, offload: bool) -> Tensor:
    if not offload or value.is_meta:
        return value.to(dtype)
    stored = value.to("cpu", dtype)
    return stored.pin_memory() if value.is_cuda else stored


def split(parts: Parts, *networks: nn.Module) -> None:
    """Leave this process its part of the frozen weights of the blocks' linear layers, in place.

    The networks may share these. Every call of one of the layers is an exchange from now on.
    """
    shapes: dict[int, torch.Size] = {}
    for layer in dict.fromkeys(layer for network in networks for layer in block_layers(network)):
        if not is_stored(layer):
            layer.storage = Storage(layer)  # type: ignore[assignment]
        storage: Any = layer.storage
        for name, parameter in layer.named_parameters(recurse=False):
            if id(parameter) not in shapes:
                shapes[id(parameter)] = parameter.shape
                part = parts.of(parameter.data)
                parameter.data = part.pin_memory() if parameter.is_pinned() else part
            storage.shapes[name] = shapes[id(parameter)]
        storage.parts = parts


def is_split(network: nn.Module) -> bool:
    return any(is_stored(layer) and layer.storage.parts is not None for layer in block_layers(network))  # type: ignore[union-attr]


def unsplit(network: nn.Module, keep: bool) -> nn.Module:
    """A copy whose split weights are whole, on the CPU, where `keep` is set. An exchange: call it in every process."""
    twin = copy.deepcopy(network)
    for layer in block_layers(twin):
        storage: Any = layer.storage
        for name, shape in storage.shapes.items():
            whole = storage.parts.whole(layer._parameters[name].detach(), shape)  # type: ignore[union-attr]
            if keep:
                layer._parameters[name] = nn.Parameter(whole.cpu(), requires_grad=False)
    release(twin)
    return twin


def release(network: nn.Module) -> None:
    """Take the hooks of `store` off again, in place; the weights stay where and as they are stored."""
    for layer in network.modules():
        if is_stored(layer):
            layer.storage.remove()  # type: ignore[operator,union-attr]
            del layer.storage
