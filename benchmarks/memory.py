"""Peak memory of one call, and calls in a process of their own."""

import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch

T = TypeVar("T")
# glibc then keeps what it is given back: no page is faulted in twice
SETTLED = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40), "MALLOC_TOP_PAD_": str(2**28)}


def peak_above(run: Callable[[], Any], device: torch.device) -> int:
    """Bytes that a call needs above what stood before: the CUDA allocator's, or the process's resident pages."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts at what is resident now
    before = _resident("VmRSS")
    run()
    return _resident("VmHWM") - before


def _resident(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {name}: peak memory of a CPU run is read from it, on Linux")


def alone(function: Callable[..., T], *arguments: Any, **variables: str) -> T:
    """`function(*arguments)` in a fresh process, with environment variables set from its start.

    It finds the GPU without the memory that this process holds in reserve.
    """
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            return pool.submit(function, *arguments).result()
    finally:
        os.environ.clear()
        os.environ.update(before)
