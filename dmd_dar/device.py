"""Where a command of one process computes, and memory that is given back."""

import gc

import torch

from dmd_dar.errors import UserError


def chosen_device(cpu: bool) -> torch.device:
    """The GPU where there is one, unless `cpu` says otherwise; else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() and not cpu else "cpu")


def named_device(name: str) -> torch.device:
    """The device of that name. Raises UserError where it is none of this machine's."""
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = " ".join(str(error).split())[:80]
        raise UserError(f"device = {name}: it is none of this machine ({reason}); write cpu, cuda or cuda:1") from error


def free_memory() -> None:
    """Give back what nothing refers to any more, to Python and to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
