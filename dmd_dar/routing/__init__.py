"""Diffusion-Adaptive Routing (arXiv:2605.20708): residual additions become a learned mixture of earlier outputs."""
