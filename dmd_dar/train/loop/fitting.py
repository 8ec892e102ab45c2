"""How many samples a process computes at a time where `launch.microbatch` is auto: found here and nowhere else."""

import contextlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dmd_dar.device import free_memory
from dmd_dar.draws import Draws, sample_range
from dmd_dar.errors import UserError
from dmd_dar.messages import LOGGER
from dmd_dar.models.footprint import nbytes
from dmd_dar.train.disk.folder import RunFolder
from dmd_dar.train.loop.loop import Phase
from dmd_dar.train.processes.memory import out_of_memory
from dmd_dar.train.processes.runtime import Runtime

SPARE = 0.05  # of a GPU's memory that a rehearsal leaves alone: gaps between tensors, the libraries' work space
REMEDY = "launch.checkpointing=true or weights=shared_lora need less, and python -m dmd_dar.plan says how much"


@dataclass(frozen=True)
class Rehearsal:
    """Each network's loss and gradients on one micro-batch, for the memory that they take.

    Nothing is stepped or exchanged: weights, averages, optimisers and torch's random state are afterwards what they
    were. `forget` drops what the losses keep for the rest of a turn, `kept` bytes a sample of a step.
    """

    cycle: tuple[Phase, ...]
    seed: int
    turn: int = 0  # which turn's updates are made: one in which all losses are on
    forget: Callable[[], None] = lambda: None
    kept: int = 0
    at_most: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext  # steps take their most

    def fits(self, runtime: Runtime, size: int, parts: int) -> bool:
        """Whether `size` samples at a time, `parts` times a step, fit into this process's memory.

        An error of another kind counts as fitting: the run's own first step meets it, and explains it.
        """
        phases, fitted = {phase.name: phase for phase in self.cycle}.values(), True
        try:
            with torch.random.fork_rng([runtime.device] if runtime.device.type == "cuda" else []):
                beside = self._beside(runtime) + self.kept * size * (parts - 1)
                reserved = torch.empty(beside, dtype=torch.uint8, device=runtime.device)
                with self.at_most():
                    for phase in phases:
                        self._gradients(phase, runtime, size, parts)
                del reserved
        except Exception as error:
            fitted = not out_of_memory(error)
        for phase in phases:  # only here, where the exception no longer holds what it was raised among
            phase.network.zero_grad(set_to_none=True)
        self.forget()
        free_memory()
        return fitted

    def _gradients(self, phase: Phase, runtime: Runtime, size: int, parts: int) -> None:
        """Of a step's second micro-batch, which meets the gradients of the first; of its only one where it has one."""
        if parts > 1:
            for parameter in phase.optimiser.parameters:
                parameter.grad = torch.zeros_like(parameter)
        step = (self.turn - phase.start) * Counter(other.name for other in self.cycle)[phase.name]
        with runtime.autocast():
            loss, _ = phase.loss(Draws(self.seed, phase.name, step, sample_range(0, size, runtime.device)))
        loss.backward()
        phase.network.zero_grad(set_to_none=True)

    def _beside(self, runtime: Runtime) -> int:
        """Bytes that a step needs and a rehearsal does not: the moments that AdamW makes in its first step, gradients
        on their way to other processes, and SPARE."""
        parameters: dict[str, list[Tensor]] = {phase.name: [*phase.optimiser.parameters] for phase in self.cycle}
        started = {phase.name for phase in self.cycle if phase.optimiser.adamw.state}
        moments = 2 * sum(nbytes(held) for name, held in parameters.items() if name not in started)
        sent = max(map(nbytes, parameters.values())) if runtime.processes > 1 else 0
        return moments + sent + int(SPARE * memory_of(runtime.device))


def memory_of(device: torch.device) -> int:
    """Bytes of a GPU; 0 for other devices."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0


def says_when_full(device: torch.device) -> bool:
    """Whether too much memory is an error that can be caught: a CPU's process is slowed down, or killed."""
    return device.type == "cuda"


def fit_run(cfg: Any, runtime: Runtime, folder: RunFolder | None, rehearsal: Rehearsal) -> dict[str, int]:
    """Where `launch.microbatch` is auto, have the runtime compute as many samples at a time as fit in every process.

    What is found stands in the folder's configuration, and a run that is continued keeps to it while it divides a
    process's samples. Off CUDA all of these are computed at a time. Returns what the log is told: nothing where nothing
    was looked for. Raises UserError where one sample does not fit, or with fsdp2. Call it in every process, before the
    networks are compiled and before the folder's `begin`.
    """
    if cfg.launch.microbatch != "auto":
        return {}
    own = cfg.batch_size // runtime.processes
    if not says_when_full(runtime.device):
        if runtime.is_main:
            LOGGER.info(f"launch.microbatch = auto: all {own} samples of a process at a time, as always off CUDA")
        return {}
    before = runtime.of_main(held(folder))
    size = before if before and not own % before else largest(runtime, rehearsal, own)
    runtime.config = replace(runtime.config, microbatch=size)
    if folder is not None:
        folder.cfg["launch"]["microbatch"] = size
    return {} if size == before else {"microbatch": size}


def held(folder: RunFolder | None) -> int:
    """The micro-batch that the run in the folder has computed in so far; 0 where that is not known."""
    size = folder.before.get("launch", {}).get("microbatch") if folder is not None else None
    return size if isinstance(size, int) else 0


def largest(runtime: Runtime, rehearsal: Rehearsal, own: int) -> int:
    """The largest divisor of a process's `own` samples that fits in every process; they all take the same steps."""
    if runtime.sharded:
        raise UserError(
            "launch.microbatch = auto: with launch.sharding = fsdp2 every call is an exchange, and a process whose"
            " memory is full would leave the others waiting; give a number"
        )
    too_large = 0
    for size in (number for number in range(own, 0, -1) if own % number == 0):
        if not runtime.any(not rehearsal.fits(runtime, size, own // size)):
            break
        too_large = size
    else:
        raise UserError(f"launch.microbatch = auto: not even one sample at a time fits into the GPU's memory; {REMEDY}")
    if runtime.is_main:
        reason = f"; {too_large} did not fit" if too_large else ""
        LOGGER.info(f"launch.microbatch = auto: {size} of {own} samples of a process at a time{reason}")
    return size
