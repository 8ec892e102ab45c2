"""The routing operation; the choice among implementations is made here and nowhere else."""

from dmd_dar.routing.ops.naive import route, weights

__all__ = ["route", "weights"]
