"""A denoiser that is told which rung of a few-step student made the sample it is asked about.

B batch, k rungs, d width of a time embedding, N classes. A step has one rung, for its whole batch and all its calls.
"""

from typing import Any

import torch
from torch import Tensor, nn

from dmd_dar.errors import UserError
from dmd_dar.models.diffusers_denoiser import DiffusersDenoiser
from dmd_dar.models.sit import SiT


def condition_of(cond: Tensor, rung: int, num_classes: int) -> Tensor:
    """What such a denoiser is asked with: cond (B,) in 0 .. N, rung in 0 .. k - 1 -> rung (N + 1) + cond, (B,)."""
    return cond + rung * (num_classes + 1)


class Asked:
    """The rung (1,) that a network was last asked about; a backward pass may run parts of several such calls again."""

    rung: Tensor


class RungTable(nn.Module):
    """One learned vector (d,) for each rung, 0 at first, which is added to one time embedding."""

    def __init__(self, embedder: nn.Module, count: int, asked: Asked, device: torch.device | None = None):
        super().__init__()
        last = [layer for layer in embedder.modules() if isinstance(layer, nn.Linear)][-1]
        self.weight = nn.Parameter(torch.zeros(count, last.out_features, device=device or last.weight.device))
        self.asked = asked
        embedder.register_forward_hook(self.add)

    def add(self, embedder: nn.Module, inputs: tuple[Any, ...], embedding: Tensor) -> Tensor:
        """Forward hook of the embedder: (B, d) -> (B, d). A bound method, so that a deep copy's hook is its own."""
        return embedding + self.weight[self.asked.rung].to(embedding.dtype)


class Rungs(nn.Module):
    """The tables of a network's time embeddings, and what takes the rung out of its condition."""

    def __init__(self, network: SiT | DiffusersDenoiser, count: int, device: torch.device | None = None):
        super().__init__()
        self.rows, self.asked = network.config.num_classes + 1, Asked()
        named = [(name.rpartition(".")[2], module) for name, module in network.named_modules()]
        embedders = [module for name, module in named if name in ("t_embedder", "timestep_embedder")]
        if not embedders:
            raise UserError(
                f"fake_score.per_rung: no time embedding is known in a {type(network).__name__}, so it cannot be told"
                " the rung; set it to false"
            )
        self.tables = nn.ModuleList(RungTable(embedder, count, self.asked, device) for embedder in embedders)
        network.register_forward_pre_hook(self.take)

    def take(self, network: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """Forward pre-hook of the network, the inverse of `condition_of`."""
        x, t, cond, *more = inputs
        self.asked.rung = cond[:1] // self.rows  # of the step, so of every sample
        return (x, t, cond % self.rows, *more)


def tell_rungs_apart(network: SiT | DiffusersDenoiser, count: int, device: torch.device | None = None) -> None:
    """From now on its condition names one of `count` rungs as well, which at first makes no difference.

    `device` is the one it computes on; None: that of its weights, which may be stored elsewhere.
    """
    network.rungs = Rungs(network, count, device)


def rung_parameters(network: nn.Module) -> list[nn.Parameter]:
    """The vectors; empty for a network that is not told."""
    return [parameter for name, parameter in network.named_parameters() if "rungs" in name.split(".")]
