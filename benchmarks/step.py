"""What one step of a distillation costs in time and memory: python -m benchmarks.step

A step is `updates` updates of the fake score and one of the student, of random SiT-S/2, for plain residual additions
and DAR, with weights of their own and over one frozen base. Times are of interleaved rounds in one process; memory is
the peak of two steps in a fresh process.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.memory import alone
from benchmarks.record import ratio, save, spread
from dmd_dar import config, flow
from dmd_dar.distillation.networks import Memory, build_networks
from dmd_dar.keys import key
from dmd_dar.methods.dmd import DMD
from dmd_dar.models.denoiser import velocity_of
from dmd_dar.models.footprint import nbytes, tensors
from dmd_dar.models.shared_lora import Weights
from dmd_dar.models.sit import build_sit
from dmd_dar.routing.layout import RoutingConfig
from dmd_dar.routing.ops import chosen
from dmd_dar.routing.router import RouterBank
from dmd_dar.train.loop.ema import Ema
from dmd_dar.train.loop.loop import Phase, update
from dmd_dar.train.loop.optimise import Optimiser, OptimiserConfig
from dmd_dar.train.processes.runtime import LaunchConfig, Runtime
from eval.samples.cost import interleaved, peak_memory

RUNGS = flow.default_rungs(4)
FORMS = {"residual": RoutingConfig(), "DAR": RoutingConfig("timestep", chunk_size=4)}
WEIGHTS: tuple[Weights, ...] = ("full", "shared_lora")
REFERENCE = "residual, full"
SLOWER = "torch"  # the default backend of routing where there are no fused kernels


@dataclass(frozen=True)
class StepBenchmark:
    """python -m benchmarks.step"""

    rounds: int = key(5, "interleaved rounds", least=1)
    updates: int = key(2, "of the fake score for one of the student", least=1)
    batch_size: int = key(0, "B; 0: 2 on a CPU, 64 on a GPU", least=0)
    size: int = key(0, "side of the latents; 0: 16 on a CPU, 32 on a GPU", unit="latent cells", least=0)
    cpu: bool = key(False, "measure on the CPU although a GPU is there")

    @property
    def cuda(self) -> bool:
        return torch.cuda.is_available() and not self.cpu

    def shape(self) -> tuple[int, int]:
        """B and the latents' side."""
        return self.batch_size or (64 if self.cuda else 2), self.size or (32 if self.cuda else 16)


def distillation(
    bench: StepBenchmark, form: str, weights: Weights, backend: str | None, runtime: Runtime
) -> tuple[Callable[[], None], list[Any]]:
    """A call that makes the next step, and the phases that it trains. backend: of routing; None: the default."""
    batch, size = bench.shape()
    torch.manual_seed(0)
    teacher = build_sit("S/2", input_size=size)
    with torch.no_grad():
        for parameter in teacher.backbone_parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    teacher.to(runtime.device).requires_grad_(False)
    networks = build_networks(teacher, FORMS[form], memory=Memory(weights), rungs=len(RUNGS))
    for network in (networks.student, networks.fake_score):
        for bank in (module for module in network.modules() if isinstance(module, RouterBank)):
            bank.backend = backend
    velocities = {name: velocity_of(getattr(networks, name)) for name in ("student", "teacher", "fake_score")}
    method = DMD(
        **velocities,
        rungs=RUNGS,
        renoise=flow.TimeLaw(low=0.02, high=0.98),
        num_classes=1000,
        shape=(4, size, size),
    )
    losses = {"fake_score": method.fake_score_loss, "student": method.student_loss}
    phases = []
    for name, loss in losses.items():
        network = getattr(networks, name)
        others = (network.router_parameters(), 1e-4), (network.rung_parameters(), 1e-4)
        optimiser = Optimiser(OptimiserConfig(lr=1e-5), network.backbone_parameters(), *others)
        phases.append(Phase(name, network, optimiser, loss, Ema(network, 0.99) if name == "student" else None))
    cycle = [phases[0]] * bench.updates + [phases[1]]

    def run() -> None:
        for phase in cycle:
            update(phase, 0, batch, runtime)

    return run, [networks.teacher, *phases]


def peak(bench: StepBenchmark, form: str, weights: Weights, backend: str | None) -> dict[str, int]:
    """Bytes of networks and averages, of optimisers, and what two steps need at the most beside both."""
    runtime = Runtime(LaunchConfig(cpu=not bench.cuda))
    made: list[Any] = []

    def build_and_run() -> None:  # together: what a first step frees, an allocator keeps for the second
        run, parts = distillation(bench, form, weights, backend, runtime)
        made.extend(parts)
        run()
        run()

    most = peak_memory(build_and_run, runtime.device, gradients=True).peak_bytes
    teacher, *phases = made
    held = {id(x): x for x in tensors(teacher)}
    for phase in phases:
        networks = [phase.network, *(phase.ema.modules.values() if phase.ema else ())]
        held |= {id(x): x for network in networks for x in tensors(network)}
    state = [x for phase in phases for entry in phase.optimiser.adamw.state.values() for x in entry.values()]
    stored, moments = nbytes(held.values()), nbytes(state)
    return {"networks": stored, "optimisers": moments, "step": most - stored - moments}


def measure(bench: StepBenchmark) -> None:
    runtime = Runtime(LaunchConfig(cpu=not bench.cuda))
    arms: dict[str, tuple[str, Weights, str | None]] = {}
    for weights in WEIGHTS:
        arms |= {f"{form}, {weights}": (form, weights, None) for form in FORMS}
    if chosen(None, runtime.device.type) != SLOWER:
        arms[f"DAR, full, {SLOWER}"] = "DAR", "full", SLOWER
    load = os.getloadavg()[0]
    memory = {name: alone(peak, bench, *arm) for name, arm in arms.items()}
    runs = {name: distillation(bench, *arm, runtime)[0] for name, arm in arms.items()}
    times = interleaved(runs, runtime.device, bench.rounds)
    batch, size = bench.shape()
    totals = {name: sum(parts.values()) for name, parts in memory.items()}
    result = {
        "model": "SiT-S/2",
        "B": batch,
        "T": (size // 2) ** 2,
        "updates": bench.updates,
        "load_average": {"before": load, "after": os.getloadavg()[0]},
        "seconds": {name: spread(samples) for name, samples in times.items()},
        "backend": chosen(None, runtime.device.type),
        "ratio": {name: ratio(times, name, REFERENCE) for name in arms},
        "bytes": memory,
        "bytes_ratio": {name: total / totals[REFERENCE] for name, total in totals.items()},
    }
    print({name: round(value, 3) for name, value in result["ratio"].items()})
    print(save(f"step_{runtime.device.type}", runtime.device, result))


if __name__ == "__main__":
    config.run_job(StepBenchmark, measure, description=__doc__ or "")
