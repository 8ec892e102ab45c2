"""Few-step diffusion transformers by distribution matching distillation, with diffusion-adaptive routing."""

from dmd_dar import moved

__version__ = "0.1.0"

moved.install()


def __getattr__(name: str):
    """`load_pipeline`, fetched when it is asked for: the ground floor must not load all others."""
    if name != "load_pipeline":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from dmd_dar.pipeline import load_pipeline

    return load_pipeline
