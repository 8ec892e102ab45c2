"""Whether processes that should hold the same state do: a checksum of everything in it, compared among them."""

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from dmd_dar.errors import UserError
from dmd_dar.train.processes.parts import is_part, local
from dmd_dar.train.processes.runtime import Runtime

REMEDY = (
    "the same command continues from the last checkpoint, from before; if it comes again, suspect the machine or GPU of"
    " that process"
)
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class ReplicaError(UserError):
    """Processes that should hold the same numbers do not; the message names what differs first, and where."""


def leaves(state: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(path, value) of all that nested containers hold, in their order."""
    if isinstance(state, dict | list | tuple):
        for name, value in state.items() if isinstance(state, dict) else enumerate(state):
            yield from leaves(value, f"{path}/{name}".lstrip("/"))
    else:
        yield path, state


def checksum(value: Any) -> Tensor:
    """() int64 of a tensor's bits, each weighed by its place, modulo 2^64; of anything else, of its text."""
    if not isinstance(value, Tensor):
        digest = hashlib.sha256(repr(value).encode()).digest()
        return torch.tensor(int.from_bytes(digest[:8], "little", signed=True))
    flat = value.detach().contiguous().flatten()
    bits = flat.view(BITS[flat.element_size()]).long()
    return (bits * (2 * torch.arange(len(bits), device=bits.device) + 1)).sum()  # odd weights: no changed bit is lost


def check(runtime: Runtime, state: dict[str, Any], step: int) -> None:
    """Compare `state` (nested; tensors, numbers, texts) over all processes, whole tensors among all of them, parts of a
    sharded one among those that hold the same part. An exchange; raises ReplicaError in every process.
    """
    if runtime.processes == 1:
        return
    names, values = zip(*leaves(state), strict=True)
    sums = torch.stack([checksum(local(v) if isinstance(v, Tensor) else v).to(runtime.device) for v in values])
    shape = checksum(names)  # processes that do not hold the same things cannot compare them
    heads = runtime.of_all(torch.stack([shape.to(runtime.device), torch.tensor(runtime.part, device=runtime.device)]))
    if len(set(heads[:, 0].tolist())) > 1:
        raise ReplicaError(f"step {step}: the processes hold states of different forms; {REMEDY}")
    held, parts = runtime.of_all(sums), heads[:, 1].tolist()
    sharded = torch.tensor([isinstance(v, Tensor) and is_part(v) for v in values])
    for rank, part in enumerate(parts):
        first = parts.index(part)  # the first process of the same part; for whole tensors it is the main one
        differs = held[rank] != torch.where(sharded, held[first], held[0])
        if differs.any():
            index = int(differs.nonzero()[0])
            other = first if sharded[index] else 0
            raise ReplicaError(
                f"step {step}: process {rank} holds another {names[index]} than process {other}"
                f" ({int(differs.sum())} of {len(names)} entries differ); {REMEDY}"
            )
