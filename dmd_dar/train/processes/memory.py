"""A device whose memory is full: how it is known."""

import torch

from dmd_dar import moved

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


moved.keep_names(__name__)
