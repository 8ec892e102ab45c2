"""What another busy process costs training on all cores, by how long threads spin for each other:

    python -m benchmarks.busy

A step is a forward and backward pass of the teacher in teachers/photos32. Each rate is of a process of its own; the
busy neighbour is one thread that computes all the time.
"""

import multiprocessing
import os
import time
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.memory import alone
from benchmarks.record import save, spread
from dmd_dar import config
from dmd_dar.keys import key
from dmd_dar.models.teachers import TeacherConfig, load_teacher

# dmd_dar/__init__.py says 1000 where nothing is set; libgomp's own default spins for milliseconds
SPINS = {"GNU's default": "300000", "dmd_dar's": "1000", "none": "0"}


@dataclass(frozen=True)
class BusyBenchmark:
    """python -m benchmarks.busy"""

    rounds: int = key(3, "interleaved rounds", least=1)
    seconds: float = key(6.0, "of each measurement", unit="seconds", above=0)
    batch_size: int = key(8, "images of a step", least=1)


def rate(bench: BusyBenchmark) -> float:
    """Steps per second."""
    torch.set_num_threads(os.cpu_count() or 1)
    network = load_teacher(TeacherConfig("teachers/photos32")).network.train().requires_grad_(True)
    x, t, cond = torch.randn(bench.batch_size, *network.shape), torch.rand(bench.batch_size), torch.zeros(1).long()
    cond = cond.expand(bench.batch_size)
    network(x, t, cond).square().mean().backward()
    start, steps = time.perf_counter(), 0
    while (passed := time.perf_counter() - start) < bench.seconds:
        network(x, t, cond).square().mean().backward()
        steps += 1
    return steps / passed


def compute_all_the_time() -> None:
    while True:
        sum(i * i for i in range(10_000))


def measure(bench: BusyBenchmark) -> None:
    rates: dict[str, dict[str, list[float]]] = {}
    load = os.getloadavg()[0]
    for neighbour in ("idle", "busy"):
        other = multiprocessing.get_context("spawn").Process(target=compute_all_the_time, daemon=True)
        if neighbour == "busy":
            other.start()
        rates[neighbour] = {name: [] for name in SPINS}
        for turn in range(bench.rounds):
            for name, count in list(SPINS.items())[:: 1 if turn % 2 == 0 else -1]:
                rates[neighbour][name].append(alone(rate, bench, GOMP_SPINCOUNT=count))
        if other.is_alive():
            other.kill()
    result: dict[str, Any] = {"load_average": {"before": load, "after": os.getloadavg()[0]}, "B": bench.batch_size}
    result["steps_per_second"] = {
        neighbour: {name: spread(values) for name, values in by_name.items()} for neighbour, by_name in rates.items()
    }
    print(
        {key: {name: round(x["median"], 2) for name, x in by.items()} for key, by in result["steps_per_second"].items()}
    )
    print(save("busy_cpu", torch.device("cpu"), result))


if __name__ == "__main__":
    config.run_job(BusyBenchmark, measure, description=__doc__ or "")
