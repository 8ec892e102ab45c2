"""Few-step diffusion transformers by distribution matching distillation, with diffusion-adaptive routing."""

import os
from typing import TYPE_CHECKING, Any

from dmd_dar import moved

if TYPE_CHECKING:
    from dmd_dar.models.into_pipeline import load_student
    from dmd_dar.pipeline import load_pipeline

__all__ = ["load_pipeline", "load_student"]

__version__ = "0.1.0"

# Threads that wait for each other give their core away after some microseconds, as long as nobody has chosen otherwise
# and torch is not loaded: by default GNU's OpenMP spins for milliseconds, which stalls all where another process runs.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

moved.install()

ASKED_BY_DIFFUSERS = ("ModelMixin", "SchedulerMixin", "StudentScheduler", "BasePart")


def __getattr__(name: str) -> Any:
    """What is fetched when it is asked for, as the ground floor must not load all others.

    `load_pipeline` and `load_student`; and for diffusers, which looks the parts of a student's pipeline up here: the
    scheduler, the routed transformers, by the names of their classes there, and the classes that these are of.
    """
    if name == "load_pipeline":
        from dmd_dar.pipeline import load_pipeline

        return load_pipeline
    if name == "load_student":
        from dmd_dar.models.into_pipeline import load_student

        return load_student
    if name in ASKED_BY_DIFFUSERS or name.endswith("Transformer2DModel"):
        from dmd_dar.models.pipeline_classes import class_named

        return class_named(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
