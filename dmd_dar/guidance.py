"""Classifier-free guidance as a closure over any velocity callable.

One convention: guided = uncond + g (cond - uncond); g = 1 is no guidance. `convert` turns others' numbers into g.
Guiding velocities is guiding x0 or eps: at one x_t and t they are affine in each other.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Velocity = Callable[[Tensor, Tensor, Tensor], Tensor]  # (x_t (B, ...), t (B,), cond (B,)) -> v (B, ...)

SAME, EXCESS = "g", "1 + w"
CONVENTIONS = {
    "ours": SAME,
    "imagen": SAME,  # arXiv:2205.11487 Eq. 2: w cond + (1 - w) uncond
    "glide": SAME,  # arXiv:2112.10741: uncond + s (cond - uncond)
    "diffusers": SAME,  # guidance_scale, Imagen's w
    "dit": SAME,  # cfg_scale; the public script guides the first 3 of 4 latent channels only, we guide all
    "sit": SAME,  # cfg_scale, as DiT
    "classifier_free": EXCESS,  # arXiv:2207.12598 Eq. 6: (1 + w) cond - w uncond
    "causvid": EXCESS,  # cond + w (cond - uncond); so do Self-Forcing and early FastVideo
    "self_forcing": EXCESS,
}


def convert(value: float, convention: str) -> float:
    """Our guidance_scale g for `value` in another convention. Raises ValueError for a convention without one."""
    if convention == "embedded":
        raise ValueError("an embedded guidance (FLUX.1-dev) is an input of the network, not a g: no g is equal to it")
    if convention not in CONVENTIONS:
        raise ValueError(f"unknown guidance convention {convention!r}: choose one of {', '.join(CONVENTIONS)}")
    return value + 1 if CONVENTIONS[convention] == EXCESS else value


def guided(velocity: Velocity, guidance_scale: float, uncond: int) -> Velocity:
    """The guided velocity; both branches in one batched call. At guidance_scale 1 the callable itself."""
    if guidance_scale == 1.0:
        return velocity

    def guided_velocity(x_t: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        both = velocity(torch.cat([x_t, x_t]), torch.cat([t, t]), torch.cat([cond, torch.full_like(cond, uncond)]))
        v_cond, v_uncond = both.chunk(2)
        return v_uncond + guidance_scale * (v_cond - v_uncond)

    return guided_velocity
