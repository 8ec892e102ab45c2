"""How many threads a metric gets."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_thread(alone: bool = True) -> Iterator[None]:
    """Within it torch computes in one thread, unless not `alone`.

    The metrics without networks are many small operations, whose threads wait for each other longer than they gain.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1 if alone else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
