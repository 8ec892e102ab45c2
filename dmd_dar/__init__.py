"""Few-step diffusion transformers by distribution matching distillation, with diffusion-adaptive routing."""

import os

from dmd_dar import moved

__version__ = "0.1.0"

# Threads that wait for each other give their core away after some microseconds, as long as nobody has chosen otherwise
# and torch is not loaded: by default GNU's OpenMP spins for milliseconds, which stalls all where another process runs.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

moved.install()


def __getattr__(name: str):
    """`load_pipeline`, fetched when it is asked for: the ground floor must not load all others."""
    if name != "load_pipeline":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from dmd_dar.pipeline import load_pipeline

    return load_pipeline
