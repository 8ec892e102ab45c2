"""Diffusion-Adaptive Routing (arXiv:2605.20708): residual additions as a learned mixture of earlier sublayer outputs."""
