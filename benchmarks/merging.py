"""What merged weights would save in the calls without gradient of weights=shared_lora: python -m benchmarks.merging

A student's calls take its adapters by addmm. Merged, W + scale B A, they would cost what a plain network's do, after
one pass over the weights for each update of the student, and a copy of them. A turn has 5 updates of the fake score and
one of the student, with roll-outs that it shares. CPU time of one thread, interleaved.
"""

import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.record import ratio
from benchmarks.turn import NETS, Arm, TurnBenchmark, build, teacher_of
from dmd_dar import config
from dmd_dar.keys import key
from dmd_dar.models.footprint import nbytes
from dmd_dar.models.shared_lora import Lora, LoraDenoiser, merged
from dmd_dar.train.processes.runtime import LaunchConfig, Runtime
from eval.samples.cost import interleaved

UPDATES = 5


@dataclass(frozen=True)
class MergingBenchmark:
    """python -m benchmarks.merging"""

    rounds: int = key(5, "interleaved rounds", least=1)
    nets: tuple[str, ...] = key(NETS, "which nets, of SiT-S/2, SiT-XL/2 and demo net")
    batch_size: int = key(4, "B", least=1)


def measured(bench: MergingBenchmark, net: str) -> dict[str, Any]:
    """Medians in seconds, calls of a turn, bytes, and what part of a turn merging saves."""
    runtime = Runtime(LaunchConfig(cpu=True, threads=1))
    small = TurnBenchmark(updates=UPDATES, batch_size=bench.batch_size, cpu=True)
    turn = build(small, teacher_of(small, net), Arm("residual", "shared_lora"), runtime)
    student = turn.networks["student"]
    assert isinstance(student, LoraDenoiser)
    plain = merged(student)
    layers: list[Any] = [layer for layer in student.network.modules() if isinstance(getattr(layer, "lora", None), Lora)]
    kept = [torch.empty_like(layer.weight) for layer in layers]
    x, t, cond = (
        torch.randn(bench.batch_size, *student.shape),
        torch.rand(bench.batch_size),
        torch.arange(bench.batch_size),
    )

    @torch.no_grad()
    def merge() -> None:
        for layer, place in zip(layers, kept, strict=True):
            torch.addmm(layer.weight, layer.lora.B, layer.lora.A, alpha=layer.lora.scale, out=place)

    calls = {"adapters": lambda: call(student, x, t, cond), "merged": lambda: call(plain, x, t, cond), "merging": merge}
    times = interleaved({**calls, "turn": turn.run}, runs=bench.rounds, clock=time.process_time)
    found = {name: statistics.median(samples) for name, samples in times.items()}
    number = calls_of_a_turn(turn, student)
    saved = number * (found["adapters"] - found["merged"]) - found["merging"]
    return {
        **found,
        "adapters over merged": ratio(times, "adapters", "merged"),
        "calls": number,
        "bytes": nbytes(kept),
        "saved": saved / found["turn"],
    }


@torch.no_grad()
def call(network: nn.Module, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
    return network(x, t, cond)


def calls_of_a_turn(turn: Any, student: nn.Module, turns: int = 4) -> float:
    """The student's calls without gradient, mean over turns."""
    seen = []
    handle = student.register_forward_pre_hook(lambda module, given: seen.append(torch.is_grad_enabled()))
    for _ in range(turns):
        turn.run()
    handle.remove()
    return seen.count(False) / turns


def measure(bench: MergingBenchmark) -> None:
    for net in bench.nets:
        print(net, {name: round(value, 4) for name, value in measured(bench, net).items()}, flush=True)


if __name__ == "__main__":
    config.run_job(MergingBenchmark, measure, description=__doc__ or "")
