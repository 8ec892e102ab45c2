"""A denoiser that is told which rung of a few-step student made the sample it is asked about.

B batch, k rungs, d width of a time embedding. A step has one rung, for its whole batch and all its calls.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dmd_dar.errors import UserError

Rung = int | Tensor  # its index, as a tensor () int64 on the network's device


class RungTable(nn.Module):
    """One learned vector (d,) for each rung, 0 at first."""

    def __init__(self, embedder: nn.Module, count: int, device: torch.device | None = None):
        super().__init__()
        last = [layer for layer in embedder.modules() if isinstance(layer, nn.Linear)][-1]
        self.weight = nn.Parameter(torch.zeros(count, last.out_features, device=device or last.weight.device))

    def forward(self, embedding: Tensor, rung: Rung | None) -> Tensor:
        """The time embedding (B, d) with the rung's vector added. Raises ValueError without a rung in 0 .. k - 1.

        A tensor's value is left to torch's own bounds: to look at it would be to wait for the device.
        """
        if rung is None or (isinstance(rung, int) and not 0 <= rung < len(self.weight)):
            raise ValueError(f"rung {rung}: this network tells {len(self.weight)} rungs apart, name one of them")
        index = torch.as_tensor(rung, device=embedding.device)
        return embedding + F.embedding(index, self.weight).to(embedding.dtype)


def indices(rung: tuple[int, ...], device: torch.device) -> tuple[Tensor, ...]:
    """The rung that a call names, if any, as a tensor (): a graph compiled for one then serves all."""
    return tuple(torch.full((), index, dtype=torch.int64, device=device) for index in rung)  # a copy would wait for it


class Rungs(nn.Module):
    """The tables of a network's time embeddings, in the order of `embedders`.

    `device` is the one it computes on; None: that of the embedders' weights, which may be stored elsewhere. Raises
    UserError where there is no embedder.
    """

    def __init__(self, embedders: list[nn.Module], count: int, device: torch.device | None = None):
        super().__init__()
        self.tables = nn.ModuleList(RungTable(embedder, count, device) for embedder in embedders)
        if not self.tables:
            raise UserError(
                "fake_score.per_rung: no time embedding is known in this network, so it cannot be told the rung; set it"
                " to false"
            )


class HookedRungs(Rungs):
    """The same where another library calls the embedders: hooks on them add the rung that was set before the call."""

    rung: Rung | None = None  # of the last call; a backward pass may run parts of several calls of one step again

    def __init__(self, embedders: list[nn.Module], count: int, device: torch.device | None = None):
        super().__init__(embedders, count, device)
        for embedder, table in zip(embedders, self.tables, strict=True):
            embedder.register_forward_hook(partial(self.add, table))

    def add(self, table: nn.Module, embedder: nn.Module, inputs: tuple[Any, ...], embedding: Tensor) -> Tensor:
        """Forward hook of an embedder: (B, d) -> (B, d). A bound method, so that a deep copy's hook is its own."""
        return table(embedding, self.rung)
