"""Calls in a process of their own, whose memory nothing else has touched."""

import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any, TypeVar

import torch

T = TypeVar("T")
# glibc then keeps what it is given back: no page is faulted in twice
SETTLED = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40), "MALLOC_TOP_PAD_": str(2**28)}


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
