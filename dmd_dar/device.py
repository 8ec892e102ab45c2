"""Where a command of one process computes, and memory that is given back."""

import gc

import torch


def chosen_device(cpu: bool) -> torch.device:
    """The GPU where there is one, unless `cpu` says otherwise; else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() and not cpu else "cpu")


def free_memory() -> None:
    """Give back what nothing refers to any more, to Python and to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
