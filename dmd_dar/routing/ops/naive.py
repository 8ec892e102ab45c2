"""The router as the equations say it. B batch, T tokens, d width, n sources; inputs are never modified.

All arithmetic is in promote_types(dtype, float32), autocast or not; the result is cast back once.
"""

import torch
from torch import Tensor

from dmd_dar.routing.layout import Scale

EPS = 1e-6


def _logits(v: Tensor, query: Tensor, gain: Tensor) -> Tensor:
    """arXiv:2605.20708 Eq. 5: s_i = q . RMSNorm(v_i) / sqrt(d), v (n, B, T, d) -> (n, B, T)."""
    k = v * (v.square().mean(dim=-1, keepdim=True) + EPS).rsqrt() * gain.to(v.dtype)
    return (k * query.to(v.dtype)).sum(dim=-1) * v.shape[-1] ** -0.5


def _stacked(sources: list[Tensor]) -> Tensor:
    return torch.stack([v.to(torch.promote_types(v.dtype, torch.float32)) for v in sources])


def weights(sources: list[Tensor], query: Tensor, gain: Tensor) -> Tensor:
    """alpha (n, B, T): softmax of the logits over the sources, per token. query: (d,), (B, 1, d) or (B, T, d)."""
    return _logits(_stacked(sources), query, gain).softmax(dim=0)


def route(sources: list[Tensor], query: Tensor, gain: Tensor, *, scale: Scale, stream: Tensor | None = None) -> Tensor:
    """h_l (B, T, d) from its sources, each (B, T, d), arXiv:2605.20708 Eq. 5.

    `convex`: sum alpha_i v_i. `count`: n sum alpha_i v_i. `stream`: x + sum (n alpha_i - 1) v_i with `stream` x the
    network's own residual stream; equal logits return x bit for bit. The result has the dtype of x, or else of v_1.
    Raises ValueError where `stream` is missing.
    """
    v, n = _stacked(sources), len(sources)
    logits = _logits(v, query, gain)  # (n, B, T)
    if scale == "stream":
        if stream is None:
            raise ValueError("scale 'stream' needs the residual stream x")
        p = (logits - logits.amax(dim=0).detach()).exp()
        z = p.sum(dim=0)
        w = (n * p - z) / z  # n alpha - 1, exactly 0 where all logits are equal
        return (stream + (w[..., None] * v).sum(dim=0)).to(stream.dtype)
    alpha = logits.softmax(dim=0)
    return ((n if scale == "count" else 1) * (alpha[..., None] * v).sum(dim=0)).to(sources[0].dtype)
