"""The router as the equations say it. B batch, T tokens, d width, n sources; inputs are never modified.

All arithmetic is in promote_types(dtype, float32); the result is cast back once.
"""

import torch
from torch import Tensor

from dmd_dar.routing.layout import Scale

EPS = 1e-6


def _logits(sources: list[Tensor], query: Tensor, gain: Tensor) -> Tensor:
    """arXiv:2605.20708 Eq. 5: s_i = q . RMSNorm(v_i) / sqrt(d). -> (n, B, T). query: (d,), (B, 1, d) or (B, T, d)."""
    dtype = torch.promote_types(sources[0].dtype, torch.float32)
    folded = query.to(dtype) * gain.to(dtype)
    logits = []
    for v in sources:
        v = v.to(dtype)
        rms = (v.square().mean(dim=-1) + EPS).rsqrt()  # (B, T)
        logits.append((v * folded).sum(dim=-1) * rms)
    return torch.stack(logits) * sources[0].shape[-1] ** -0.5


def weights(sources: list[Tensor], query: Tensor, gain: Tensor) -> Tensor:
    """alpha (n, B, T): softmax of the logits over the sources, per token."""
    return _logits(sources, query, gain).softmax(dim=0)


def _deviation(sources: list[Tensor], query: Tensor, gain: Tensor) -> Tensor:
    """w_i = n alpha_i - 1 as (n p_i - Z) / Z with p = exp(s - max s): exactly 0 where all logits are equal."""
    logits = _logits(sources, query, gain)
    p = (logits - logits.amax(dim=0).detach()).exp()
    z = p.sum(dim=0)
    return (len(sources) * p - z) / z


def route(sources: list[Tensor], query: Tensor, gain: Tensor, *, scale: Scale, stream: Tensor | None = None) -> Tensor:
    """h_l (B, T, d) from its sources, each (B, T, d), arXiv:2605.20708 Eq. 5.

    `convex`: sum alpha_i v_i. `count`: n sum alpha_i v_i. `stream`: x + sum (n alpha_i - 1) v_i with `stream` x the
    network's own residual stream; equal logits return x bit for bit.
    """
    if scale == "stream":
        if stream is None:
            raise ValueError("scale 'stream' needs the residual stream x")
        w, start = _deviation(sources, query, gain), stream
    else:
        w = weights(sources, query, gain) * (len(sources) if scale == "count" else 1)
        start = torch.zeros_like(sources[0])
    total = start.to(w.dtype)
    for w_i, v in zip(w, sources, strict=True):
        total = total + w_i[..., None] * v.to(w.dtype)
    return total.to(sources[0].dtype)
