"""Exponential moving average of a network's weights."""

import copy

import torch
from torch import nn


class Ema:
    """A frozen copy of `module` that follows it. The decay warms up as (1 + n) / (10 + n) after n updates."""

    def __init__(self, module: nn.Module, decay: float):
        self.module = copy.deepcopy(module).eval().requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, module: nn.Module, updates: int) -> None:
        """Move toward `module`, whose optimiser has made `updates` steps."""
        decay = min(self.decay, (1 + updates) / (10 + updates))
        mine, theirs = list(self.module.parameters()), list(module.parameters())
        torch._foreach_lerp_(mine, theirs, 1 - decay)
