"""How much memory a network's forward and backward pass take, found by tracing them without computing or storing."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dmd_dar.routing.hooks import DarBank

SAMPLED = 16  # the peak is looked for after every so many operations


@dataclass(frozen=True)
class Footprint:
    """Bytes beside the parameters: `kept` from forward to backward, `peak` at the most, gradients included."""

    kept: int
    peak: int


class Live(TorchDispatchMode):
    """Counts the bytes of the tensors that operations made and somebody still holds; `weights` are left out."""

    def __init__(self, weights: Iterable[Tensor]):
        super().__init__()
        self.weights = {weight.untyped_storage()._cdata for weight in weights}
        self.held: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak, self.calls = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for value in tree_leaves(output):
            if isinstance(value, Tensor) and value.untyped_storage()._cdata not in self.weights:
                reference = StorageWeakRef(value.untyped_storage())
                self.held[reference.cdata] = (reference, value.untyped_storage().nbytes())
        self.calls += 1
        if self.calls % SAMPLED == 0:
            self.peak = max(self.peak, self.bytes())
        return output

    def bytes(self) -> int:
        for place in [place for place, (reference, _) in self.held.items() if reference.expired()]:
            del self.held[place]
        return sum(count for _, count in self.held.values())


def without_data() -> contextlib.AbstractContextManager[Any]:
    """Tensors made within have shape and type and no memory; real parameters that come along are read as such."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def tensors(network: nn.Module) -> Iterator[Tensor]:
    """All parameters and buffers, also those that a view shares and does not call its own."""
    for module in network.modules():
        yield from (x for held in (module._parameters, module._buffers) for x in held.values() if x is not None)


def emptied(*networks: nn.Module) -> None:
    """Replace all tensors of networks on the meta device by tensors of `without_data`; what they share stays shared."""
    made: dict[int, Tensor] = {}
    for module in dict.fromkeys(module for network in networks for module in network.modules()):
        for held in (module._parameters, module._buffers):
            for name, old in held.items():
                if old is None:
                    continue
                if id(old) not in made:
                    new = torch.empty(old.shape, dtype=old.dtype)
                    made[id(old)] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
                    made[id(made[id(old)])] = made[id(old)]
                held[name] = made[id(old)]  # type: ignore[assignment]
        if isinstance(module, DarBank):
            module.proof = None  # nothing is computed, so nothing can be compared


def trace(call: Callable[[], Tensor], weights: Iterable[Tensor], bf16: bool) -> Footprint:
    """The footprint of `call`, a forward whose output is then differentiated; within `without_data`.

    `bf16`: under autocast, as in training. Whatever `call` makes for its inputs is counted; `weights` are not.
    """
    live = Live(weights)
    with live:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            output = call()
        kept = live.bytes()
        output.float().square().mean().backward()
        del output
    return Footprint(kept, live.peak)


def nbytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of these tensors, of each storage once."""
    return sum({id(tensor): tensor.numel() * tensor.element_size() for tensor in tensors}.values())
