"""How the work of an evaluation is shared out, among processes and among threads.

Each process makes or reads its share of the images, and the rows are joined:

    torchrun --nproc_per_node=2 -m eval.report ...
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from dmd_dar.device import chosen_device
from dmd_dar.errors import UserError
from dmd_dar.train.processes.runtime import LaunchConfig, Runtime
from dmd_dar.train.processes.world import MEETING, launched

from .images import UnfitError

T = TypeVar("T")
Rows = dict[str, Tensor]  # each (n, ...), of the same n images


def grouped(groups: dict[str, Rows]) -> Rows:
    """{a: {b: rows}} -> {"a.b": rows}."""
    return {f"{group}.{name}": part for group, rows in groups.items() for name, part in rows.items()}


def ungrouped(rows: Rows) -> dict[str, Rows]:
    """The other way, groups in their order."""
    groups: dict[str, Rows] = {}
    for key, part in rows.items():
        group, _, name = key.partition(".")
        groups.setdefault(group, {})[name] = part
    return groups


@dataclass(frozen=True)
class Processes:
    """The processes of this evaluation, or, without a runtime, this one alone."""

    runtime: Runtime | None = None

    @staticmethod
    def of(cpu: bool) -> "Processes":
        """Those that a launcher started, as WORLD_SIZE says."""
        world = launched(*MEETING)
        if world is None or world.processes == 1:
            return Processes()
        return Processes(Runtime(LaunchConfig(precision="no", cpu=cpu)))

    @property
    def main(self) -> bool:
        """Whether this process is the one that compares, writes and prints."""
        return self.runtime is None or self.runtime.is_main

    def device(self, cpu: bool) -> torch.device:
        if self.runtime is not None:
            return self.runtime.device
        return chosen_device(cpu)

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        return flag if self.runtime is None else self.runtime.any(flag)

    def joined(self, count: int, make: Callable[[int, int], Rows]) -> Rows:
        """The rows of all `count` images in their order, from make(rank, world), the rows
        count * rank // world .. count * (rank + 1) // world - 1. An error in one process ends all of them.
        """
        if self.runtime is None or count < self.runtime.processes:
            return make(0, 1)
        rows, fault, own = {}, "", None
        try:
            rows = make(self.runtime.rank, self.runtime.processes)
        except Exception as error:  # the others, who wait for these rows, hear of it first
            own, fault = error, str(error) if isinstance(error, UserError) else repr(error)
        faults = self.runtime.gather_rows(torch.tensor([*fault.encode()], dtype=torch.uint8))
        if own is not None and not isinstance(own, UserError):
            raise own
        if len(faults):
            raise UnfitError(fault or bytes(faults.tolist()).decode())
        return {name: self.runtime.gather_rows(part) for name, part in rows.items()}


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
