"""How many threads a computation gets on a CPU."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

T = TypeVar("T")


@contextmanager
def one_thread(alone: bool = True) -> Iterator[None]:
    """Within it torch computes in one thread, unless not `alone`.

    The metrics without networks are many small operations, whose threads wait for each other longer than they gain.
    """
    with torch_threads(1 if alone else torch.get_num_threads()):
        yield


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Within it torch computes in `count` threads, those of `side_by_side` included."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def side_by_side(calls: Sequence[Callable[[], T]], workers: int, each: int) -> Iterator[T]:
    """The results in the order of the calls, of which `workers` run at a time, with `each` torch threads.

    Small operations gain more so than from threads of their own. Gradients are on in the calls where they are on here;
    autocast is not carried over.
    An error is raised in its turn; calls that have not begun are then left out.
    """
    if min(workers, len(calls)) < 2:
        yield from (call() for call in calls)
        return
    gradients = torch.is_grad_enabled()

    def run(call: Callable[[], T]) -> T:
        torch.set_num_threads(each)  # of this thread
        with torch.set_grad_enabled(gradients):
            return call()

    with torch_threads(each), ThreadPoolExecutor(workers) as pool:
        waiting = deque(pool.submit(run, call) for call in calls)
        try:
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
