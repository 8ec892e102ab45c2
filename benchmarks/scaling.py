"""What a turn costs by batch, tokens and depth, one at a time: python -m benchmarks.scaling

Plain residual additions and DAR, with roll-outs that a turn shares, interleaved; CPU time of one thread. Each net
starts from its own depth, 64 tokens and a batch of 4.
"""

import math
import os
import time
from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks.record import ratio, save, spread
from benchmarks.turn import FORMS, Arm, TurnBenchmark, build, random_teacher, teacher_of
from dmd_dar import config
from dmd_dar.keys import key
from dmd_dar.models.sit import SiT
from dmd_dar.train.processes.runtime import LaunchConfig, Runtime
from eval.samples.cost import interleaved

BATCH, TOKENS = 4, 64


@dataclass(frozen=True)
class ScalingBenchmark:
    """python -m benchmarks.scaling"""

    rounds: int = key(3, "interleaved rounds", least=1)
    updates: int = key(5, "of the fake score for one of the student", least=1)
    nets: tuple[str, ...] = key(("demo net",), "which nets, of SiT-S/2, SiT-XL/2 and demo net")
    batches: tuple[int, ...] = key((1, 4, 16), "B", least=1)
    tokens: tuple[int, ...] = key((16, 64, 256), "T, squares", least=1)
    depths: tuple[int, ...] = key((6, 12, 24), "blocks", least=2)


@dataclass(frozen=True)
class Size:
    """Of a turn's batch and its networks."""

    batch: int
    tokens: int
    depth: int


def sizes(bench: ScalingBenchmark, depth: int) -> dict[str, list[Size]]:
    """By what is varied, from a net of `depth`."""
    base = Size(BATCH, TOKENS, depth)
    varied = {"batch": bench.batches, "tokens": bench.tokens, "depth": bench.depths}
    return {name: [replace(base, **{name: value}) for value in values] for name, values in varied.items()}


def measured(bench: ScalingBenchmark, net: str, size: Size) -> dict[str, Any]:
    """Seconds of both forms and DAR over residual."""
    turn, runtime = (
        TurnBenchmark(updates=bench.updates, batch_size=size.batch, cpu=True),
        LaunchConfig(cpu=True, threads=1),
    )
    shape = teacher_of(turn, net).config
    shape = replace(shape, input_size=math.isqrt(size.tokens) * shape.patch, depth=size.depth)
    turns = {form: build(turn, random_teacher(lambda: SiT(shape)), Arm(form), Runtime(runtime)) for form in FORMS}
    calls = {form: turn.run for form, turn in turns.items()}
    times = interleaved(calls, "cpu", bench.rounds, clock=time.process_time)
    seconds = {form: spread(samples) for form, samples in times.items()}
    return {"seconds": seconds, "DAR over residual": ratio(times, "DAR", "residual")}


def measure(bench: ScalingBenchmark) -> None:
    load, found = os.getloadavg()[0], {}
    for net in bench.nets:
        known: dict[Size, dict[str, Any]] = {}
        rows = []
        for name, varied in sizes(bench, teacher_of(TurnBenchmark(cpu=True), net).config.depth).items():
            for size in varied:
                if size not in known:
                    known[size] = measured(bench, net, size)
                rows.append({"varied": name, "B": size.batch, "T": size.tokens, "depth": size.depth, **known[size]})
                print(net, name, size, round(rows[-1]["DAR over residual"], 3))
        found[net] = rows
    loads = {"before": load, "after": os.getloadavg()[0]}
    result = {"updates": bench.updates, "nets": found, "load_average": loads}
    print(save("scaling_cpu", torch.device("cpu"), result))


if __name__ == "__main__":
    config.run_job(ScalingBenchmark, measure, description=__doc__ or "")
