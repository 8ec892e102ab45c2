"""What sampling costs: latency, peak memory and operations of any callable."""

import contextlib
import math
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode, flop_registry, sdpa_flop_count

from dmd_dar.routing.ops import preferring

RUNS = 7
FEWEST_RUNS = 3
LONGEST_S = 2.0  # of all runs of one call, but for the fewest
WARM_UP = 1  # rounds that do not count
STDERR = 2
PROFILER_LINE = re.compile(rb"[A-Z]+:\d{4}-\d\d-\d\d \d\d:\d\d:\d\d \d+:\d+ \w+\.cpp:\d+\]")  # as kineto writes them

# attention on a CPU, which torch 2.11 leaves out
UNCOUNTED = {
    operation: lambda query, key, value, *more, **named: sdpa_flop_count(query, key, value)
    for operation in (torch.ops.aten._scaled_dot_product_flash_attention_for_cpu,)
    if operation not in flop_registry
}


@dataclass(frozen=True)
class Latency:
    """Milliseconds of one call: median, least and most over `runs`."""

    median_ms: float
    least_ms: float
    most_ms: float
    runs: int


@dataclass(frozen=True)
class Memory:
    """Bytes by which one call raised the memory in use at its peak, and how that was measured."""

    peak_bytes: int
    method: str


@dataclass(frozen=True)
class SamplingCost:
    """What sampling and decoding costs: time and memory of `cost_batch` images at once, operations of one image."""

    latency_ms_per_image: float  # median of `latency_runs` calls
    latency_ms_range: tuple[float, float]  # least and most
    latency_runs: int
    cost_batch: int
    peak_memory_mb: float  # above what was in use before, as `peak_memory_method` says
    peak_memory_method: str
    gflops_per_image: float


def latencies(
    calls: Mapping[str, Callable[[], Any]],
    device: torch.device | str = "cpu",
    runs: int = RUNS,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Latency]:
    """Of each call without gradients, `interleaved`; of a call that takes long, fewer runs than `runs`."""
    with torch.no_grad():
        times = interleaved(calls, device, runs, LONGEST_S, clock)
    milliseconds = {name: [1000 * second for second in spent] for name, spent in times.items()}
    return {name: Latency(float(np.median(t)), min(t), max(t), len(t)) for name, t in milliseconds.items()}


def interleaved(
    calls: Mapping[str, Callable[[], Any]],
    device: torch.device | str = "cpu",
    runs: int = RUNS,
    longest: float = math.inf,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each call in each of `runs` rounds, after one round that does not count.

    The calls take turns, in alternating order: a machine that slows down slows all of them. A call whose rounds would
    take more than `longest` seconds in all has fewer, FEWEST_RUNS at least. `clock` gives seconds.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    wanted = dict.fromkeys(calls, runs)
    for turn in range(WARM_UP + runs):
        names = [name for name in calls if turn < WARM_UP + wanted[name]]
        for name in names if turn % 2 == 0 else reversed(names):
            spent = seconds(calls[name], device, clock)
            if turn >= WARM_UP:
                times[name].append(spent)
            if turn == WARM_UP and longest < math.inf:  # the calls before may hold work that is done once
                wanted[name] = min(runs, max(FEWEST_RUNS, int(longest / max(spent, 1e-9))))
    return times


def seconds(
    call: Callable[[], Any], device: torch.device | str = "cpu", clock: Callable[[], float] = time.perf_counter
) -> float:
    """Wall time of one call, the device's queue included."""
    device = torch.device(device)
    _wait(device)
    began = clock()
    call()
    _wait(device)
    return clock() - began


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextlib.contextmanager
def without_profiler_lines() -> Iterator[None]:
    """Keeps the lines that torch's profiler prints to stderr, from below Python, off it; others come afterwards."""
    sys.stderr.flush()
    before = os.dup(STDERR)
    with tempfile.TemporaryFile() as caught:
        os.dup2(caught.fileno(), STDERR)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(before, STDERR)
            os.close(before)
            caught.seek(0)
            os.write(STDERR, b"".join(line for line in caught if not PROFILER_LINE.match(line)))


def peak_memory(call: Callable[[], Any], device: torch.device | str = "cpu", gradients: bool = False) -> Memory:
    """Of one call, above what was in use before: what the call holds, not the weights. gradients: whether they are on.

    On CUDA the allocator's own peak; elsewhere the peak of the tensors that torch allocated on the CPU, from its
    profiler, which leaves out what the libraries below torch allocate for themselves.
    """
    device = torch.device(device)
    if device.type == "cuda":
        _wait(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        with torch.set_grad_enabled(gradients):
            call()
        _wait(device)
        return Memory(torch.cuda.max_memory_allocated(device) - before, "CUDA allocator, peak above the start")
    activities = [torch.profiler.ProfilerActivity.CPU]
    with without_profiler_lines(), torch.set_grad_enabled(gradients):
        with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
            call()
        recorded: Any = profile.profiler  # its own types leave out what a recorded event holds
        events = [event for event in recorded.kineto_results.events() if event.name() == "[memory]"]
    steps = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return Memory(int(max(np.cumsum([0, *steps]))), "tensors allocated by torch on the CPU, peak above the start")


def flops(call: Callable[[], Any]) -> int:
    """Floating-point operations of one call without gradients, a multiplication and its addition counting as two.

    Those of torch's matrix products, convolutions and attention; what a kernel of another library does is not seen.
    Routers are computed by torch for it, on every device.
    """
    with torch.no_grad(), preferring("torch"), FlopCounterMode(display=False, custom_mapping=UNCOUNTED) as counter:
        call()
    return int(counter.get_total_flops())
