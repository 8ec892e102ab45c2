"""Few-step diffusion transformers by distribution matching distillation, with diffusion-adaptive routing."""

__version__ = "0.1.0"
