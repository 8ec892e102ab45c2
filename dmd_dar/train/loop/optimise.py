"""Optimisers: AdamW groups, learning rates over steps, clipping."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dmd_dar.keys import key


@dataclass(frozen=True)
class OptimiserConfig:
    """AdamW with a linear warm-up and, if asked, a cosine decay to zero."""

    lr: float = key(1e-4, "learning rate", above=0)
    betas: tuple[float, float] = key((0.9, 0.999), "AdamW betas", least=0, below=1)
    weight_decay: float = key(0.0, "AdamW weight decay", least=0)
    warmup: int = key(0, "steps of linear warm-up", unit="steps", least=0)
    decay_start: int = key(0, "step at which the cosine decay to zero starts", unit="steps", least=0)
    decay_steps: int = key(0, "length of the decay; 0 keeps the rate constant", unit="steps", least=0)
    clip: float = key(1.0, "gradient norm above which this network's gradient is scaled down", above=0)

    def factor(self, step: int) -> float:
        """What multiplies every learning rate at optimiser step `step` (from 0)."""
        warm = min(1.0, (step + 1) / (self.warmup + 1))
        if not self.decay_steps:
            return warm
        done = min(1.0, max(0, step - self.decay_start) / self.decay_steps)
        return warm * 0.5 * (1 + math.cos(math.pi * done))


class Optimiser:
    """AdamW over one network. `others`, such as routers, are groups of their own: own rate, no weight decay."""

    def __init__(
        self,
        config: OptimiserConfig,
        backbone: Iterable[nn.Parameter],
        *others: tuple[Sequence[nn.Parameter], float],
    ):
        self.config = config
        groups = [{"params": list(backbone), "base_lr": config.lr, "weight_decay": config.weight_decay}]
        groups += [{"params": list(own), "base_lr": lr, "weight_decay": 0.0} for own, lr in others if own]
        self.adamw = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)
        self.parameters = [p for group in groups for p in group["params"]]

    def norm(self) -> Tensor:
        """The gradient norm over all parameters, of which a process may hold a part; a scalar on the device."""
        total = nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        return getattr(total, "full_tensor", lambda: total)()

    def step(self, step: int, norm: Tensor) -> None:
        """Clip the gradient, whose norm is `norm`, update, clear."""
        nn.utils.clip_grads_with_norm_(self.parameters, self.config.clip, norm)
        for group in self.adamw.param_groups:
            group["lr"] = group["base_lr"] * self.config.factor(step)
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)
