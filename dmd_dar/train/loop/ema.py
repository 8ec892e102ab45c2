"""Networks that follow another one's weights: its exponential moving averages, and a fake score its student."""

import copy
from dataclasses import dataclass
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
        current: list[Tensor] = [*module.parameters()]
        for decay, average in self.modules.items():
            weight = 1 - min(float(decay), (1 + updates) / (10 + updates))
            averaged: list[Tensor] = [*average.parameters()]
            torch._foreach_lerp_(averaged, current, weight)  # pyright: ignore[reportPrivateImportUsage]

    def state_dict(self) -> dict[str, Any]:
        """The weights by decay."""
        return {decay: module.state_dict() for decay, module in self.modules.items()}


@dataclass(frozen=True)
class Follower:
    """A network in training that moves by `share` towards another one's weights after each of that one's updates.

    Implicit distribution alignment (SenseFlow, arXiv:2506.00523): the fake score follows its student, which it has to
    keep up with. Weights that only one of the two has, such as those of routers, stay as they are.
    """

    network: nn.Module
    share: float

    @torch.no_grad()
    def follow(self, leader: nn.Module) -> None:
        """Move after an update of `leader`."""
        mine, theirs = dict(self.network.named_parameters()), dict(leader.named_parameters())
        shared = [name for name in mine if name in theirs]
        following: list[Tensor] = [mine[name] for name in shared]
        led_by: list[Tensor] = [theirs[name] for name in shared]
        torch._foreach_lerp_(following, led_by, self.share)  # pyright: ignore[reportPrivateImportUsage]
