"""Classifier-free guidance as a closure over any velocity callable.

One convention: guided = uncond + g (cond - uncond); g = 1 is no guidance (arXiv:2207.12598 writes w = g - 1).
"""

from collections.abc import Callable

import torch
from torch import Tensor

Velocity = Callable[[Tensor, Tensor, Tensor], Tensor]  # (x_t (B, ...), t (B,), cond (B,)) -> v (B, ...)


def guided(velocity: Velocity, guidance_scale: float, uncond: int) -> Velocity:
    """The guided velocity; both branches in one batched call. At guidance_scale 1 the callable itself."""
    if guidance_scale == 1.0:
        return velocity

    def guided_velocity(x_t: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        both = velocity(torch.cat([x_t, x_t]), torch.cat([t, t]), torch.cat([cond, torch.full_like(cond, uncond)]))
        v_cond, v_uncond = both.chunk(2)
        return v_uncond + guidance_scale * (v_cond - v_uncond)

    return guided_velocity
