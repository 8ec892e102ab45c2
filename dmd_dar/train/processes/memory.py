"""A device whose memory is full: how it is known, and how it is given back what nobody uses."""

import gc

import torch

# Said by libraries, whose errors are plain RuntimeErrors; torch's own allocators raise OutOfMemoryError.
FULL = (
    "out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_NOT_SUPPORTED",  # said by cuDNN where its work space does not fit
    "can't allocate memory",
)


def out_of_memory(error: Exception) -> bool:
    """Whether it says that a device's memory is full, by torch's allocator or by a library's own."""
    by_library = isinstance(error, RuntimeError) and any(text in str(error) for text in FULL)
    return by_library or isinstance(error, torch.OutOfMemoryError)


def free_memory() -> None:
    """Give back what nothing refers to any more, to Python and to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
