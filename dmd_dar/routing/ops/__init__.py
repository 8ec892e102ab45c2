"""The routing operation; the choice among implementations is made here and nowhere else."""

from torch import Tensor, dtype

from dmd_dar.routing.ops.listed import ListedReader
from dmd_dar.routing.ops.naive import route, weights

__all__ = ["reader", "route", "weights"]


def reader(bank, v_0: Tensor, t_embedding: Tensor | None, dtype: dtype):
    return ListedReader(bank, t_embedding, route)
