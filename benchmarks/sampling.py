"""How long a student takes to sample: python -m benchmarks.sampling

Latency of a batch and images a second, at 1, 2 and 4 calls and batches of any sizes, for plain residual additions and
DAR: the nets of benchmarks/turn.py, interleaved rounds in one process. On a CPU, times are CPU time of one thread.
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from benchmarks.record import ratio, save, spread
from benchmarks.turn import FORMS, Form, TurnBenchmark, teacher_of
from dmd_dar import config, flow
from dmd_dar.device import chosen_device
from dmd_dar.draws import Draws, sample_range
from dmd_dar.keys import key
from dmd_dar.methods.generate import few_step_generator
from dmd_dar.models.denoiser import velocity_of
from dmd_dar.models.sit import with_routing
from dmd_dar.routing.ops import chosen
from dmd_dar.train.processes.runtime import LaunchConfig, Runtime
from eval.samples.cost import interleaved

CALLS = (1, 2, 4)


@dataclass(frozen=True)
class SamplingBenchmark:
    """python -m benchmarks.sampling"""

    rounds: int = key(5, "interleaved rounds", least=1)
    batches: tuple[int, ...] = key((1, 64), "images at a time", least=1)
    nets: tuple[str, ...] = key(("demo net", "SiT-S/2"), "which nets, of SiT-S/2, SiT-XL/2 and demo net")
    precision: str = key("auto", "auto: bf16 on a GPU, float32 on a CPU; no; bf16")
    cpu: bool = key(False, "measure on the CPU although a GPU is there")

    @property
    def cuda(self) -> bool:
        return chosen_device(self.cpu).type == "cuda"


def sampler(bench: SamplingBenchmark, net: str, form: Form, runtime: Runtime) -> Callable[[int, int], None]:
    """A call (batch, calls) that samples; the routers' queries are random, so that they have a choice."""
    student = with_routing(teacher_of(TurnBenchmark(cpu=bench.cpu), net), FORMS[form]).eval().requires_grad_(False)
    for parameter in student.router_parameters():
        parameter.add_(0.02 * torch.randn_like(parameter))
    student.to(runtime.device)
    velocity = velocity_of(student)

    @torch.no_grad()
    def sample(batch: int, calls: int) -> None:
        draws = Draws(0, "sample", 0, sample_range(0, batch, runtime.device))
        cond, noise = draws.integers("label", student.num_conditions), draws.normal("noise", *student.shape)
        with runtime.autocast():
            few_step_generator(velocity, flow.default_rungs(calls))(cond, draws, noise)

    return sample


def measure(bench: SamplingBenchmark) -> None:
    threads = 0 if bench.cuda else 1
    runtime = Runtime(LaunchConfig(precision=bench.precision, cpu=not bench.cuda, threads=threads))  # type: ignore[arg-type]
    clock = time.perf_counter if bench.cuda else time.process_time
    load, rows = os.getloadavg()[0], []
    for net in bench.nets:
        samplers = {form: sampler(bench, net, form, runtime) for form in FORMS}
        for batch in bench.batches:
            for calls in CALLS:
                runs = {form: partial(sample, batch, calls) for form, sample in samplers.items()}
                times = interleaved(runs, runtime.device, bench.rounds, clock=clock)
                seconds = {form: spread(samples) for form, samples in times.items()}
                over = ratio(times, "DAR", "residual")
                rows.append({"net": net, "B": batch, "calls": calls, "seconds": seconds, "DAR over residual": over})
                print(net, batch, calls, round(over, 3))
    result = {
        "backend": chosen(None, runtime.device.type),
        "load_average": {"before": load, "after": os.getloadavg()[0]},
        "rows": rows,
    }
    print(save(f"sampling_{runtime.device.type}", runtime.device, result))


if __name__ == "__main__":
    config.run_job(SamplingBenchmark, measure, description=__doc__ or "")
