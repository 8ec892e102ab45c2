"""Checkpointing of a routed model: what is computed again starts from the history that the first computation found."""

from collections.abc import Callable
from typing import Any, Generic, Protocol, Self, TypeVar

import torch


class Snapshots(Protocol):
    """What the hooks know of a forward pass."""

    observe: Any

    def snapshot(self) -> Self: ...


P = TypeVar("P", bound=Snapshots)


class Passing(Protocol[P]):
    """Whose `current` is the pass that runs in this thread; None outside of one."""

    current: P | None


class Checkpointed(Generic[P]):
    """A checkpointing function whose recomputations find the history as the first computation found it."""

    def __init__(self, bank: Passing[P], inner: Callable):
        self.bank, self.inner = bank, inner

    def __call__(self, module: Callable, *args: Any, **kwargs: Any) -> Any:
        start = self.bank.current
        region = module if start is None else Region(self.bank, module, start.snapshot())
        return self.inner(region, *args, **kwargs)


class Region(Generic[P]):
    """A module under checkpointing: its second call, in the backward pass, starts from the history of its first."""

    def __init__(self, bank: Passing[P], module: Callable, start: P):
        self.bank, self.module, self.start, self.fresh = bank, module, start, True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.fresh:
            self.fresh = False
            if not torch.is_grad_enabled():
                raise RuntimeError("routing needs checkpointing with use_reentrant=False: the history is no argument")
            return self.module(*args, **kwargs)
        outer, again = self.bank.current, self.start.snapshot()
        self.bank.current, again.observe = again, None
        try:
            return self.module(*args, **kwargs)
        finally:
            self.bank.current = outer
