"""A discriminator on what a denoiser computes: its blocks' outputs, read by hooks that change no value, and heads.

B batch, T tokens, d width, n logits.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from dmd_dar.models.compiled import eagerly
from dmd_dar.models.denoiser import ConditionalNetwork, NetworkVelocity

Pool = Literal["mean", "tokens"]


def width_of(network: ConditionalNetwork) -> int:
    """d of what the blocks hand on."""
    norms = (module for module in network.block_readers()[-1].modules() if isinstance(module, nn.LayerNorm))
    return next(norms).normalized_shape[-1]


def chosen_layers(layers: tuple[int, ...], depth: int) -> tuple[int, ...]:
    """Numbers of blocks, from 1; empty: the ends of the network's thirds. ValueError for one that is not there."""
    chosen = layers or tuple(dict.fromkeys(max(1, round(depth * i / 3)) for i in (1, 2, 3)))
    if not all(1 <= layer <= depth for layer in chosen) or list(chosen) != sorted(set(chosen)):
        raise ValueError(f"layers must rise within 1 to {depth}, the network's blocks, got {list(chosen)}")
    return chosen


def features_of(
    network: ConditionalNetwork, velocity: NetworkVelocity, layers: tuple[int, ...]
) -> Callable[..., list[Tensor]]:
    """(x_t, t, cond, rung) -> these blocks' outputs (B, T, d) while `velocity`, which asks `network`, is evaluated.

    In a routed network an output is the mixture that the next block reads.
    """
    readers = network.block_readers()

    def features(x_t: Tensor, t: Tensor, cond: Tensor, *rung: int) -> list[Tensor]:
        seen: dict[int, Tensor] = {}

        def keep(layer: int, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            seen[layer] = inputs[0]

        hooks = [readers[layer - 1].register_forward_pre_hook(partial(keep, layer)) for layer in layers]
        try:
            with eagerly():  # what is compiled sees no new hooks
                velocity(x_t, t, cond, *rung)
        finally:
            for hook in hooks:
                hook.remove()
        return [seen[layer] for layer in layers]

    return features


class Heads(nn.Module):
    """One head for each layer: features, each (B, T, d) -> logits (B, n), n the layers, times T for pool "tokens".

    Time and condition are in the features already. The logits start at exactly 0, so that the student's gradient does.
    """

    def __init__(self, width: int, layers: int, pool: Pool = "mean", hidden: int = 256):
        super().__init__()
        self.pool: Pool = pool
        self.heads = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(width, elementwise_affine=False), nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, 1)
            )
            for _ in range(layers)
        )
        for head in self.heads:
            nn.init.zeros_(head[-1].weight)  # type: ignore[index]
            nn.init.zeros_(head[-1].bias)  # type: ignore[index]

    def forward(self, features: list[Tensor]) -> Tensor:
        logits = []
        for head, h in zip(self.heads, features, strict=True):
            h = h.to(torch.promote_types(h.dtype, torch.float32))
            logits.append(head(h.mean(dim=1, keepdim=True) if self.pool == "mean" else h).squeeze(-1))
        return torch.cat(logits, dim=1)
