"""Processes, devices and precision. The only importer of accelerate and torch.distributed."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from dmd_dar.draws import sample_range
from dmd_dar.errors import UserError
from dmd_dar.keys import key

T = TypeVar("T")


@dataclass(frozen=True)
class LaunchConfig:
    """Where and how a run computes; nothing here changes what is computed, up to rounding."""

    precision: Literal["auto", "no", "bf16"] = key("auto", "network precision; auto: bf16 on a GPU, float32 on a CPU")
    cpu: bool = key(False, "compute on the CPU although a GPU is there")
    threads: int = key(0, "CPU threads of this process; 0 leaves torch's choice", least=0)
    accumulation: int = key(1, "micro-batches per optimiser step", least=1)


class Runtime:
    """One process of a run."""

    def __init__(self, config: LaunchConfig):
        if config.threads:
            torch.set_num_threads(config.threads)
        gpu = torch.cuda.is_available() and not config.cpu
        precision = ("bf16" if gpu else "no") if config.precision == "auto" else config.precision
        self.accelerator = Accelerator(cpu=config.cpu, mixed_precision=precision)
        self.accumulation = config.accumulation
        self.device = torch.device("cpu") if self.accelerator.device.type == "cpu" else self.accelerator.device
        self.rank, self.processes = self.accelerator.process_index, self.accelerator.num_processes
        self.is_main = self.accelerator.is_main_process

    def autocast(self) -> Any:
        return self.accelerator.autocast()

    def main_first(self) -> Any:
        """A context that the main process leaves before the others enter it."""
        return self.accelerator.main_process_first()

    def micro_batches(self, batch_size: int) -> list[Tensor]:
        """The global sample indices of this process, one tensor per micro-batch. Raises UserError if uneven."""
        parts = self.processes * self.accumulation
        if batch_size % parts:
            raise UserError(
                f"batch_size {batch_size} does not divide evenly among {self.processes} processes with"
                f" launch.accumulation {self.accumulation}: make it a multiple of {parts}"
            )
        size = batch_size // parts
        start = self.rank * self.accumulation * size
        return [sample_range(start + i * size, start + (i + 1) * size, self.device) for i in range(self.accumulation)]

    def average_gradients(self, parameters: list[nn.Parameter]) -> None:
        """Mean over processes, in one flat exchange; a parameter without gradient counts as zero."""
        if self.processes == 1:
            return
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
        flat = self.accelerator.reduce(torch.cat([g.flatten() for g in gradients]), "mean")
        for p, part in zip(parameters, flat.split([g.numel() for g in gradients]), strict=True):
            p.grad = part.view_as(p)

    def average(self, metrics: dict[str, float]) -> dict[str, float]:
        """Mean over processes of each metric; all processes hold the same names."""
        if self.processes == 1:
            return metrics
        values = torch.tensor([metrics[name] for name in metrics], dtype=torch.float64, device=self.device)
        return dict(zip(metrics, self.accelerator.reduce(values, "mean").tolist(), strict=True))

    def gather_rows(self, part: Tensor) -> Tensor:
        """The rows (n, ...) of every process joined in the order of ranks, (sum n, ...), in each of them."""
        if self.processes == 1:
            return part
        counts = self.accelerator.gather(torch.tensor([len(part)], device=self.device)).tolist()
        most = max(counts)
        if not most:
            return part
        padded = torch.zeros(most, *part.shape[1:], dtype=part.dtype, device=self.device)
        padded[: len(part)] = part
        rows = self.accelerator.gather(padded).split(most)
        return torch.cat([one[:count] for one, count in zip(rows, counts, strict=True)]).to(part.device)

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        if self.processes == 1:
            return flag
        return bool(self.accelerator.reduce(torch.tensor(float(flag), device=self.device), "sum").item())

    def of_main(self, value: int) -> int:
        """The main process's value."""
        if self.processes == 1:
            return value
        held = torch.tensor(float(value if self.is_main else 0), dtype=torch.float64, device=self.device)
        return int(self.accelerator.reduce(held, "sum").item())

    def together(self, work: Callable[[], T]) -> T:
        """work(), which exchanges nothing, in every process; all wait for the last.

        Where it raises in any, all end: that one with its error, the others with exit code 2.
        """
        result, fault = None, None
        try:
            result = work()
        except Exception as error:
            fault = error
        if self.any(fault is not None):
            raise fault or SystemExit(2)
        return result  # type: ignore[return-value]

    def close(self) -> None:
        self.accelerator.end_training()
