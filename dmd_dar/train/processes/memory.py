"""A device whose memory is full: how it is known, and how it is given back what nobody uses."""

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

FULL = ("CUBLAS_STATUS_ALLOC_FAILED", "CUDA error: out of memory")  # said by others than torch's allocator


def out_of_memory(error: Exception) -> bool:
    """Whether it says that a device's memory is full, by torch's allocator or by a library's own."""
    by_library = isinstance(error, RuntimeError) and any(text in str(error) for text in FULL)
    return by_library or isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)


def free_memory() -> None:
    """Give back what nothing refers to any more, to Python and to the device."""
    clear_device_cache(garbage_collection=True)
