"""Diffusion-Adaptive Routing (arXiv:2605.20708): residual additions become a learned mixture of earlier outputs."""

from dmd_dar.routing.attach import attach, detach, load_routed
from dmd_dar.routing.average import RoutedModel

__all__ = ["RoutedModel", "attach", "detach", "load_routed"]
