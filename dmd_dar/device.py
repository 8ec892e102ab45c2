"""Where a command of one process computes."""

import torch


def chosen_device(cpu: bool) -> torch.device:
    """The GPU where there is one, unless `cpu` says otherwise; else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() and not cpu else "cpu")
