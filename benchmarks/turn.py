"""What one turn of a distillation costs in time, launches and memory: python -m benchmarks.turn

A turn is `updates` updates of the fake score and one of the student. The nets are random SiT-S/2 and the net of
teachers/photos32, for plain residual additions and DAR, with weights of their own and over one frozen base, with
roll-outs that a turn shares and with fresh ones, eager and, of the nets named by `compiled`, compiled. On a CPU, times
are CPU time of one thread, interleaved in one process; memory is the peak of two turns in a fresh process.
"""

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.memory import alone
from benchmarks.record import ratio, save, spread
from dmd_dar import config, flow
from dmd_dar.distillation.networks import Memory, build_networks
from dmd_dar.draws import Draws
from dmd_dar.keys import key
from dmd_dar.methods.dmd import DMD
from dmd_dar.methods.turns import Turns
from dmd_dar.models.compiled import compile_network
from dmd_dar.models.denoiser import velocity_of
from dmd_dar.models.footprint import nbytes, tensors
from dmd_dar.models.shared_lora import Weights
from dmd_dar.models.sit import SiT, SiTConfig, build_sit
from dmd_dar.routing.layout import RoutingConfig
from dmd_dar.routing.ops import chosen
from dmd_dar.routing.router import RouterBank
from dmd_dar.train.loop.ema import Ema
from dmd_dar.train.loop.loop import Phase, update
from dmd_dar.train.loop.optimise import Optimiser, OptimiserConfig
from dmd_dar.train.processes.runtime import LaunchConfig, Runtime
from eval.samples.cost import interleaved, peak_memory

RUNGS = flow.default_rungs(4)
Form = Literal["residual", "DAR"]
Rollouts = Literal["shared", "fresh"]
FORMS: dict[Form, RoutingConfig] = {"residual": RoutingConfig(), "DAR": RoutingConfig("timestep", chunk_size=4)}
NETS = ("SiT-S/2", "demo net")
REFERENCE = "residual, full, shared"
SLOWER = "torch"  # the default backend of routing where there are no fused kernels
# Operations that start no kernel: they make views or allocate.
FREE = (
    "view",
    "_unsafe_view",
    "t",
    "transpose",
    "permute",
    "expand",
    "slice",
    "select",
    "unsqueeze",
    "squeeze",
    "split",
)
FREE += ("unbind", "as_strided", "detach", "alias", "empty", "empty_like", "new_empty", "split_with_sizes", "chunk")
FREE += ("empty_strided", "new_empty_strided", "lift_fresh", "unfold", "_reshape_alias", "is_same_size", "unflatten")


@dataclass(frozen=True)
class Arm:
    """One way to compute a turn."""

    form: Form
    weights: Weights = "full"
    rollouts: Rollouts = "shared"
    backend: str | None = None  # of routing; None: the default
    compiled: bool = False

    @property
    def name(self) -> str:
        return ", ".join(
            filter(None, (self.form, self.weights, self.rollouts, self.backend, self.compiled and "compiled"))
        )


ARMS = [Arm(form, weights) for weights in ("full", "shared_lora") for form in FORMS]
ARMS += [Arm(form, rollouts="fresh") for form in FORMS]
ARMS += [Arm(form, compiled=True) for form in FORMS]


@dataclass(frozen=True)
class TurnBenchmark:
    """python -m benchmarks.turn"""

    rounds: int = key(5, "interleaved rounds", least=1)
    updates: int = key(5, "of the fake score for one of the student", least=1)
    batch_size: int = key(0, "B; 0: 4 on a CPU, 64 on a GPU", least=0)
    size: int = key(0, "side of a SiT's latents; 0: 16 on a CPU, 32 on a GPU", unit="latent cells", least=0)
    nets: tuple[str, ...] = key(NETS, "which nets, of SiT-S/2, SiT-XL/2 and demo net")
    compiled: tuple[str, ...] = key(("demo net",), "nets that are measured compiled too; the first turn takes minutes")
    cpu: bool = key(False, "measure on the CPU although a GPU is there")

    @property
    def cuda(self) -> bool:
        return torch.cuda.is_available() and not self.cpu

    @property
    def batch(self) -> int:
        return self.batch_size or (64 if self.cuda else 4)


def teacher_of(bench: TurnBenchmark, net: str) -> SiT:
    """A random teacher of the size of a net."""
    torch.manual_seed(0)
    size = bench.size or (32 if bench.cuda else 16)
    demo = net == "demo net"
    teacher = SiT(SiTConfig(num_classes=7)) if demo else build_sit(net.removeprefix("SiT-"), input_size=size)
    with torch.no_grad():
        for parameter in teacher.backbone_parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return teacher.requires_grad_(False)


@dataclass(frozen=True)
class Turn:
    """A call that makes the next turn, and what it trains."""

    run: Callable[[], None]
    method: DMD
    phases: tuple[Phase, ...]
    teacher: torch.nn.Module


def build(bench: TurnBenchmark, net: str, arm: Arm, runtime: Runtime) -> Turn:
    teacher = teacher_of(bench, net).to(runtime.device)
    networks = build_networks(teacher, FORMS[arm.form], memory=Memory(arm.weights), rungs=len(RUNGS))
    for network in (networks.student, networks.fake_score):
        for bank in (module for module in network.modules() if isinstance(module, RouterBank)):
            bank.backend = arm.backend
    for network in (networks.student, networks.teacher, networks.fake_score) if arm.compiled else ():
        compile_network(network)
    velocities = {name: velocity_of(getattr(networks, name)) for name in ("student", "teacher", "fake_score")}
    counts = {"fake_score": bench.updates, "student": 1}
    classes = networks.teacher.num_conditions
    turns = Turns(counts, velocities["student"], RUNGS, classes, teacher.shape) if arm.rollouts == "shared" else None
    method = DMD(
        **velocities,
        rungs=RUNGS,
        renoise=flow.TimeLaw(low=0.02, high=0.98),
        num_classes=classes,
        shape=teacher.shape,
        turns=turns,
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
            update(phase, 0, bench.batch, runtime)

    return Turn(run, method, tuple(phases), networks.teacher)


class Launches(TorchDispatchMode):
    """Counts the operations that start a kernel, by their names."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name not in FREE:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


def launches(turn: Turn, turns: int = 2) -> dict[str, float]:
    """Operations of a turn without views and allocations, mean over `turns`: all, and those of the draws."""
    turn.run()  # the draws of the next are foreseen
    drawn: Counter[str] = Counter()

    def counted(original: Callable[..., Any], *given: Any, **named: Any) -> Any:
        with Launches() as mode:  # inside the other, which counts them too
            made = original(*given, **named)
        drawn.update(mode.counts)
        return made

    with Launches() as whole, patch.object(Draws, "uniform", _method(counted, Draws.uniform)):
        for _ in range(turns):
            turn.run()
    return {"all": whole.counts.total() / turns, "draws": drawn.total() / turns}


def _method(around: Callable[..., Any], original: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, *given, **named: around(original, self, *given, **named)


@contextmanager
def timed_parts(turn: Turn, clock: Callable[[], float]) -> Iterator[dict[str, float]]:
    """Seconds by part of what runs within, on a CPU; `rest` is left to the caller."""
    spent: dict[str, float] = Counter()  # type: ignore[assignment]

    def timed(part: str, original: Callable[..., Any], *given: Any, **named: Any) -> Any:
        start = clock()
        try:
            return original(*given, **named)
        finally:
            spent[part] += clock() - start

    def network(name: str, original: Callable[..., Any], *given: Any, **named: Any) -> Any:
        part = f"{name}, forward" if torch.is_grad_enabled() else f"{name}, without gradient"
        return timed(part, original, *given, **named)

    method = replace(
        turn.method,
        **{name: partial(network, name, getattr(turn.method, name)) for name in ("student", "teacher", "fake_score")},
    )
    if method.turns is not None:
        method = replace(method, turns=replace(method.turns, student=method.student))
    before = [phase.loss for phase in turn.phases]
    for phase, loss in zip(turn.phases, (method.fake_score_loss, method.student_loss), strict=True):
        phase.loss = loss
    with (
        patch.object(torch.Tensor, "backward", _method(partial(timed, "backward"), torch.Tensor.backward)),
        patch.object(Optimiser, "step", _method(partial(timed, "optimiser"), Optimiser.step)),
        patch.object(Draws, "uniform", _method(partial(timed, "draws"), Draws.uniform)),
    ):
        yield spent
    for phase, loss in zip(turn.phases, before, strict=True):
        phase.loss = loss


def shares(turn: Turn, turns: int = 3) -> dict[str, float]:
    """What part of a turn's CPU time each part takes."""
    turn.run()
    with timed_parts(turn, time.process_time) as spent:
        start = time.process_time()
        for _ in range(turns):
            turn.run()
        whole = time.process_time() - start
    found = {part: seconds / whole for part, seconds in sorted(spent.items(), key=lambda pair: -pair[1])}
    return {**found, "rest": 1 - sum(found.values())}


def peak(bench: TurnBenchmark, net: str, arm: Arm) -> dict[str, int]:
    """Bytes of networks and averages, of optimisers, and what two turns need at the most beside both."""
    runtime = Runtime(LaunchConfig(cpu=not bench.cuda))
    made: list[Turn] = []

    def build_and_run() -> None:  # together: what a first turn frees, an allocator keeps for the second
        made.append(build(bench, net, arm, runtime))
        made[0].run()
        made[0].run()

    most = peak_memory(build_and_run, runtime.device, gradients=True).peak_bytes
    turn = made[0]
    held = {id(x): x for x in tensors(turn.teacher)}
    for phase in turn.phases:
        networks = [phase.network, *(phase.ema.modules.values() if phase.ema else ())]
        held |= {id(x): x for network in networks for x in tensors(network)}
    state = [x for phase in turn.phases for entry in phase.optimiser.adamw.state.values() for x in entry.values()]
    stored, moments = nbytes(held.values()), nbytes(state)
    return {"networks": stored, "optimisers": moments, "step": most - stored - moments}


def measured(bench: TurnBenchmark, net: str) -> dict[str, Any]:
    """Times, launches, shares and memory of a net's arms."""
    runtime = Runtime(LaunchConfig(cpu=not bench.cuda, threads=0 if bench.cuda else 1))
    arms = [arm for arm in ARMS if not arm.compiled or net in bench.compiled]
    if bench.cuda and chosen(None, "cuda") != SLOWER:
        arms.append(Arm("DAR", backend=SLOWER))
    memory = {arm.name: alone(peak, bench, net, arm) for arm in arms}
    turns = {arm.name: build(bench, net, arm, runtime) for arm in arms}
    clock = time.perf_counter if bench.cuda else time.process_time
    calls = {name: turn.run for name, turn in turns.items()}
    times = interleaved(calls, runtime.device, bench.rounds, clock=clock)
    totals = {name: sum(parts.values()) for name, parts in memory.items()}
    tokens = turns[REFERENCE].phases[0].network.pos_embed.shape[1]  # type: ignore[union-attr,index]
    return {
        "B": bench.batch,
        "T": tokens,
        "seconds": {name: spread(samples) for name, samples in times.items()},
        "ratio": {name: ratio(times, name, REFERENCE) for name in calls},
        "launches": {arm.name: launches(build(bench, net, arm, runtime)) for arm in arms if not arm.compiled},
        "shares": {} if bench.cuda else {name: shares(turns[name]) for name in (REFERENCE, "DAR, full, shared")},
        "bytes": memory,
        "bytes_ratio": {name: total / totals[REFERENCE] for name, total in totals.items()},
    }


def measure(bench: TurnBenchmark) -> None:
    device = torch.device("cuda" if bench.cuda else "cpu")
    load = os.getloadavg()[0]
    nets = {net: measured(bench, net) for net in bench.nets}
    result = {
        "updates": bench.updates,
        "backend": chosen(None, device.type),
        "nets": nets,
        "load_average": {"before": load, "after": os.getloadavg()[0]},
    }
    for net, found in nets.items():
        print(net, {name: round(value, 3) for name, value in found["ratio"].items()})
    print(save(f"turn_{device.type}", device, result))


if __name__ == "__main__":
    config.run_job(TurnBenchmark, measure, description=__doc__ or "")
