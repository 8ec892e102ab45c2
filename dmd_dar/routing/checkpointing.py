"""Checkpointing of a routed model: what is computed again starts from the history that the first computation found."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from dmd_dar.routing.hooks import DarBank, Pass


class Checkpointed:
    """A checkpointing function whose recomputations find the history as the first computation found it."""

    def __init__(self, bank: "DarBank", inner: Callable):
        self.bank, self.inner = bank, inner

    def __call__(self, module: Callable, *args: Any, **kwargs: Any) -> Any:
        start = self.bank._pass
        region = module if start is None else Region(self.bank, module, start.snapshot())
        return self.inner(region, *args, **kwargs)


class Region:
    """A module under checkpointing: its second call, in the backward pass, starts from the history of its first."""

    def __init__(self, bank: "DarBank", module: Callable, start: "Pass"):
        self.bank, self.module, self.start, self.fresh = bank, module, start, True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.fresh:
            self.fresh = False
            if not torch.is_grad_enabled():
                raise RuntimeError("routing needs checkpointing with use_reentrant=False: the history is no argument")
            return self.module(*args, **kwargs)
        outer, again = self.bank._pass, self.start.snapshot()
        self.bank._pass, again.observe = again, None
        try:
            return self.module(*args, **kwargs)
        finally:
            self.bank._pass = outer
