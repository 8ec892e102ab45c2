"""Classifier-free guidance as a closure over any velocity callable.

One convention: guided = uncond + g (cond - uncond); g = 1 is no guidance. `convert` turns others' numbers into g.
Guiding velocities is guiding x0 or eps: at one x_t and t they are affine in each other. `Rule` says what may come on
top: a norm to return to, and the t outside of which nothing is guided.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from dmd_dar.keys import key

Velocity = Callable[[Tensor, Tensor, Tensor], Tensor]  # (x_t (B, ...), t (B,), cond (B,)) -> v (B, ...)

SAME, EXCESS = "g", "1 + w"
CONVENTIONS = {
    "ours": SAME,
    "imagen": SAME,  # arXiv:2205.11487 Eq. 2: w cond + (1 - w) uncond
    "glide": SAME,  # arXiv:2112.10741: uncond + s (cond - uncond)
    "diffusers": SAME,  # guidance_scale, Imagen's w
    "dit": SAME,  # cfg_scale; the public script guides the first 3 of 4 latent channels only, we guide all
    "sit": SAME,  # cfg_scale, as DiT
    "qwen_image": SAME,  # true_cfg_scale; its pipeline then rescales, see Rule
    "flux2_klein": SAME,  # guidance_scale
    "classifier_free": EXCESS,  # arXiv:2207.12598 Eq. 6: (1 + w) cond - w uncond
    "causvid": EXCESS,  # cond + w (cond - uncond); so do Self-Forcing and early FastVideo
    "self_forcing": EXCESS,
    "z_image": EXCESS,  # guidance_scale of ZImagePipeline: cond + w (cond - uncond)
}
EMBEDDED = ("embedded", "flux", "flux2")  # guidance_scale of FLUX.1-dev and FLUX.2-dev


Form = Literal["plain", "rescaled"]


@dataclass(frozen=True)
class GuidanceConfig:
    """How `guidance_scale` is applied."""

    form: Literal["auto", "plain", "rescaled", "embedded"] = key(
        "auto",
        "auto: as the teacher's own pipeline; plain: uncond + g (cond - uncond); rescaled: the same, each token brought"
        " to the norm of cond; embedded: teacher.embedded_guidance alone, for guidance_scale=1",
    )
    interval: tuple[float, float] = key((0.0, 1.0), "t at which it acts, from and to; elsewhere cond", least=0, most=1)

    def __post_init__(self) -> None:
        if not self.interval[0] < self.interval[1]:
            raise ValueError(f"interval must rise, got {list(self.interval)}: write the lower t first")


@dataclass(frozen=True)
class Rule:
    """What is done with uncond + g (cond - uncond).

    `rescaled`: each token is brought to its norm in cond, as QwenImagePipeline does; a token is all channels of
    `cells` x `cells` latent cells. `interval`: guidance acts at t from and to (arXiv:2404.07724), elsewhere cond stays.
    """

    form: Form = "plain"
    cells: int = 1
    interval: tuple[float, float] = (0.0, 1.0)

    def facts(self) -> dict[str, Any]:
        """What differs from plain guidance at every t; for hashes, which name nothing else."""
        facts: dict[str, Any] = {} if self.form == "plain" else {"form": self.form, "cells": self.cells}
        return facts if self.interval == (0.0, 1.0) else {**facts, "interval": list(self.interval)}

    def apply(self, v_cond: Tensor, v_uncond: Tensor, t: Tensor, guidance_scale: float) -> Tensor:
        """The guided velocity (B, C, H, W) of both, at t (B,)."""
        v = v_uncond + guidance_scale * (v_cond - v_uncond)
        if self.form == "rescaled":
            v = v * (token_norm(v_cond, self.cells) / token_norm(v, self.cells))
        low, high = self.interval
        if (low, high) == (0.0, 1.0):
            return v
        return torch.where(((low <= t) & (t <= high)).reshape(-1, *[1] * (v.dim() - 1)), v, v_cond)


def token_norm(x: Tensor, cells: int) -> Tensor:
    """(B, 1, H, W): at each cell of x (B, C, H, W) the norm of its token, C channels of cells x cells cells."""
    squared = x.square().sum(dim=1, keepdim=True)
    if cells > 1:
        squared = torch.nn.functional.avg_pool2d(squared, cells, divisor_override=1)
        squared = squared.repeat_interleave(cells, dim=-2).repeat_interleave(cells, dim=-1)
    return squared.sqrt()


def convert(value: float, convention: str) -> float:
    """Our guidance_scale g for `value` in another convention. Raises ValueError for a convention without one."""
    if convention in EMBEDDED:
        raise ValueError("an embedded guidance (FLUX dev) is an input of the network, not a g: no g is equal to it")
    if convention not in CONVENTIONS:
        raise ValueError(f"unknown guidance convention {convention!r}: choose one of {', '.join(CONVENTIONS)}")
    return value + 1 if CONVENTIONS[convention] == EXCESS else value


def guided(velocity: Velocity, guidance_scale: float, uncond: int, rule: Rule | None = None) -> Velocity:
    """The guided velocity by `rule`, None for a plain one; both branches in one batched call.

    At guidance_scale 1 the callable itself: every rule then gives cond.
    """
    if guidance_scale == 1.0:
        return velocity
    rule = rule or Rule()

    def guided_velocity(x_t: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        both = velocity(torch.cat([x_t, x_t]), torch.cat([t, t]), torch.cat([cond, torch.full_like(cond, uncond)]))
        v_cond, v_uncond = both.chunk(2)
        return rule.apply(v_cond, v_uncond, t, guidance_scale)

    return guided_velocity
