"""Exponential moving averages of a network's weights."""

import copy
from typing import Any

import torch
from torch import Tensor, nn


class Ema:
    """Frozen copies of `module` that follow it, one for each decay, which warms up as (1 + n) / (10 + n).

    `modules` holds them by decay, written as text; `module` is the first, the one that is sampled.
    """

    def __init__(self, module: nn.Module, *decays: float):
        self.modules = {str(decay): copy.deepcopy(module).eval().requires_grad_(False) for decay in decays}
        self.module = self.modules[str(decays[0])]

    @torch.no_grad()
    def update(self, module: nn.Module, updates: int) -> None:
        """Move toward `module`, whose optimiser has made `updates` steps."""
        theirs: list[Tensor] = [*module.parameters()]
        for decay, mine in self.modules.items():
            weight = 1 - min(float(decay), (1 + updates) / (10 + updates))
            averaged: list[Tensor] = [*mine.parameters()]
            torch._foreach_lerp_(averaged, theirs, weight)  # pyright: ignore[reportPrivateImportUsage]

    def state_dict(self) -> dict[str, Any]:
        """The weights by decay."""
        return {decay: module.state_dict() for decay, module in self.modules.items()}
