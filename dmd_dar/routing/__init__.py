"""Diffusion-Adaptive Routing (arXiv:2605.20708): residual additions become a learned mixture of earlier outputs."""

from dmd_dar.routing.attach import attach, detach, load_routed

__all__ = ["attach", "detach", "load_routed"]
