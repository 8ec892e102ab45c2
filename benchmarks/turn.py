"""What one turn of a distillation costs in time, launches and memory: python -m benchmarks.turn

A turn is `updates` updates of the fake score and one of the student. The nets are random SiT-S/2 and the net of
teachers/photos32, for plain residual additions and DAR, with weights of their own and over one frozen base, with
roll-outs that a turn shares and with fresh ones, eager and, of the nets named by `compiled`, compiled. On a CPU, times
are CPU time of one thread, interleaved in one process; memory is the peak of two turns in a fresh process.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks import peer
from benchmarks.memory import alone
from benchmarks.record import ratio, save, spread
from benchmarks.turn_cost import Turn, counted_calls, launches, peak, shares
from dmd_dar import config, flow
from dmd_dar.device import chosen_device
from dmd_dar.distillation.networks import Memory, Networks, build_networks
from dmd_dar.draws import Draws
from dmd_dar.errors import UserError
from dmd_dar.keys import key
from dmd_dar.methods.dmd import DMD
from dmd_dar.methods.rollout import rung_of
from dmd_dar.methods.turns import Turns
from dmd_dar.models.compiled import compile_network
from dmd_dar.models.denoiser import velocity_of
from dmd_dar.models.shared_lora import Weights
from dmd_dar.models.sit import SiT, SiTConfig, build_sit
from dmd_dar.routing.layout import RoutingConfig
from dmd_dar.routing.ops import chosen
from dmd_dar.routing.router import RouterBank
from dmd_dar.train.loop.ema import Ema
from dmd_dar.train.loop.loop import Phase, update
from dmd_dar.train.loop.optimise import Optimiser, OptimiserConfig
from dmd_dar.train.processes.runtime import LaunchConfig, Runtime
from eval.measure.provenance import git_state
from eval.samples.cost import WARM_UP, interleaved

RUNGS = flow.default_rungs(4)
Form = Literal["residual", "DAR"]
Inputs = Literal["shared", "fresh", "data"]  # roll-outs that a turn shares, one for every update, noised data
FORMS: dict[Form, RoutingConfig] = {"residual": RoutingConfig(), "DAR": RoutingConfig("timestep", chunk_size=4)}
NETWORKS = ("student", "teacher", "fake_score")
NETS = ("SiT-S/2", "demo net")
REFERENCE = "residual, full, shared"
SLOWER = "torch"  # the default backend of routing where there are no fused kernels


@dataclass(frozen=True)
class Arm:
    """One way to compute a turn."""

    form: Form
    weights: Weights = "full"
    inputs: Inputs = "shared"  # of the student
    backend: str | None = None  # of routing; None: the default
    compiled: bool = False

    @property
    def name(self) -> str:
        return ", ".join(
            filter(None, (self.form, self.weights, self.inputs, self.backend, self.compiled and "compiled"))
        )


ARMS = [Arm(form, weights) for weights in ("full", "shared_lora") for form in FORMS]
ARMS += [Arm(form, inputs="fresh") for form in FORMS]
ARMS += [Arm(form, compiled=True) for form in FORMS]
PEERS = [peer.PeerArm(simulated, fused) for simulated in (False, True) for fused in (False, True)]
# which of FastGen's turns has the same inputs as ours
BESIDE = {Arm("residual", inputs="data"): peer.PeerArm(), Arm("residual", inputs="fresh"): peer.PeerArm(simulated=True)}
BESIDE |= {Arm(form): peer.PeerArm(simulated=True) for form in FORMS}
BESIDE |= {Arm("residual", compiled=True): peer.PeerArm(simulated=True)}


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
    peer: str = key("", "a checkout of NVIDIA FastGen: on a CPU, its DMD2 is measured beside ours instead", path=True)

    @property
    def cuda(self) -> bool:
        return chosen_device(self.cpu).type == "cuda"

    @property
    def batch(self) -> int:
        return self.batch_size or (64 if self.cuda else 4)


def teacher_of(bench: TurnBenchmark, net: str) -> SiT:
    """A random teacher of the size of a net."""
    size = bench.size or (32 if bench.cuda else 16)
    if net == "demo net":
        return random_teacher(lambda: SiT(SiTConfig(num_classes=7)))
    return random_teacher(lambda: build_sit(net.removeprefix("SiT-"), input_size=size))


def random_teacher(build: Callable[[], SiT]) -> SiT:
    """A frozen network, the same each time, with noise on all its weights, zeros included."""
    torch.manual_seed(0)
    network = build()
    with torch.no_grad():
        for parameter in network.backbone_parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return network.requires_grad_(False)


def build(bench: TurnBenchmark, teacher: SiT, arm: Arm, runtime: Runtime) -> Turn:
    teacher = teacher.to(runtime.device)
    networks = build_networks(teacher, FORMS[arm.form], memory=Memory(arm.weights), rungs=len(RUNGS))
    for network in (networks.student, networks.fake_score):
        for bank in (module for module in network.modules() if isinstance(module, RouterBank)):
            bank.backend = arm.backend
    for name in NETWORKS if arm.compiled else ():
        compile_network(getattr(networks, name))
    method = method_of(bench, networks, arm.inputs)
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

    return Turn(
        run,
        {name: getattr(networks, name) for name in NETWORKS},
        [module for phase in phases if phase.ema for module in phase.ema.modules.values()],
        [phase.optimiser.adamw for phase in phases],
        [(phase.optimiser, part) for phase in phases for part in ("norm", "step")],
    )


def method_of(bench: TurnBenchmark, networks: Networks, inputs: Inputs) -> DMD:
    """The losses of a turn whose student gets these inputs."""
    velocities = {name: velocity_of(getattr(networks, name)) for name in NETWORKS}
    classes, shape = networks.teacher.num_conditions, networks.teacher.shape
    updates = {"fake_score": bench.updates, "student": 1}
    images = torch.randn(bench.batch, *shape)

    def data(draws: Draws) -> tuple[Tensor, Tensor]:
        return images.to(draws.samples.device), draws.integers("label", classes)

    return DMD(
        **velocities,
        rungs=RUNGS,
        renoise=flow.TimeLaw(low=0.02, high=0.98),
        num_classes=classes,
        shape=shape,
        data=data if inputs == "data" else None,
        turns=Turns(updates, velocities["student"], RUNGS, classes, shape) if inputs == "shared" else None,
    )


def peak_of(bench: TurnBenchmark, net: str, arm: Arm) -> dict[str, int]:
    """`peak` of an arm; for a process that has measured nothing else."""
    runtime = Runtime(LaunchConfig(cpu=not bench.cuda))
    return peak(lambda: build(bench, teacher_of(bench, net), arm, runtime), runtime.device)


def measured(bench: TurnBenchmark, net: str) -> dict[str, Any]:
    """Times, launches, shares and memory of a net's arms."""
    runtime = Runtime(LaunchConfig(cpu=not bench.cuda, threads=0 if bench.cuda else 1))
    arms = [arm for arm in ARMS if not arm.compiled or net in bench.compiled]
    if bench.cuda and chosen(None, "cuda") != SLOWER:
        arms.append(Arm("DAR", backend=SLOWER))
    memory = {arm.name: alone(peak_of, bench, net, arm) for arm in arms}
    turns = {arm.name: build(bench, teacher_of(bench, net), arm, runtime) for arm in arms}
    clock = time.perf_counter if bench.cuda else time.process_time
    calls = {name: turn.run for name, turn in turns.items()}
    times = interleaved(calls, runtime.device, bench.rounds, clock=clock)
    totals = {name: sum(parts.values()) for name, parts in memory.items()}
    return {
        "B": bench.batch,
        "T": teacher_of(bench, net).pos_embed.shape[1],
        "seconds": {name: spread(samples) for name, samples in times.items()},
        "ratio": {name: ratio(times, name, REFERENCE) for name in calls},
        "launches": {
            arm.name: launches(build(bench, teacher_of(bench, net), arm, runtime)) for arm in arms if not arm.compiled
        },
        "shares": {} if bench.cuda else {name: shares(turns[name]) for name in (REFERENCE, "DAR, full, shared")},
        "bytes": memory,
        "bytes_ratio": {name: total / totals[REFERENCE] for name, total in totals.items()},
    }


def peer_work(bench: TurnBenchmark) -> peer.Work:
    """What our turn with fresh roll-outs does, down to each update's rung."""
    none = torch.arange(0)

    def rungs() -> Iterator[int]:
        for turn in count():
            for update_ in range(bench.updates):
                yield rung_of(Draws(0, "fake_score", turn * bench.updates + update_, none), RUNGS)
            yield rung_of(Draws(0, "student", turn, none), RUNGS)

    return peer.Work(bench.updates, bench.batch, RUNGS, rungs())


def build_peer(bench: TurnBenchmark, net: str, arm: peer.PeerArm) -> Turn:
    return peer.build(peer.FastGen.of(Path(bench.peer)), teacher_of(bench, net), arm, peer_work(bench))


def peak_of_peer(bench: TurnBenchmark, net: str, arm: peer.PeerArm) -> dict[str, int]:
    return peak(lambda: build_peer(bench, net, arm), torch.device("cpu"))


def beside(bench: TurnBenchmark, net: str) -> dict[Arm, peer.PeerArm]:
    return {arm: other for arm, other in BESIDE.items() if not arm.compiled or net in bench.compiled}


def peaks_beside(bench: TurnBenchmark, net: str) -> dict[str, dict[str, int]]:
    """Memory of our turns and of FastGen's, each in a process of its own."""
    ours = {arm.name: alone(peak_of, bench, net, arm) for arm in beside(bench, net)}
    return ours | {arm.name: alone(peak_of_peer, bench, net, arm) for arm in PEERS if not arm.fused}


def compared(bench: TurnBenchmark, net: str, memory: dict[str, dict[str, int]]) -> dict[str, Any]:
    """Our turns beside FastGen's of the same inputs, as it comes and with fused AdamW: times, calls, shares."""
    runtime = Runtime(LaunchConfig(cpu=True, threads=1))
    pairs = beside(bench, net)
    turns = {arm.name: build(bench, teacher_of(bench, net), arm, runtime) for arm in pairs}
    theirs = {arm.name: build_peer(bench, net, arm) for arm in PEERS}
    for turn in theirs.values():
        peer.check_same(turn, teacher_of(bench, net))
    turns |= theirs
    with ExitStack() as stack:  # a compiled network counts by itself: a hook would change what is compiled
        calls = {
            name: stack.enter_context(counted_calls(turn)) for name, turn in turns.items() if "compiled" not in name
        }
        times = interleaved(
            {name: turn.run for name, turn in turns.items()}, "cpu", bench.rounds, clock=time.process_time
        )
    return {
        "B": bench.batch,
        "T": teacher_of(bench, net).pos_embed.shape[1],
        "seconds": {name: spread(samples) for name, samples in times.items()},
        "calls": {
            name: {call: n / (bench.rounds + WARM_UP) for call, n in found.items()} for name, found in calls.items()
        },
        "rows": [
            {
                "ours": arm.name,
                "theirs": other.name,
                "ratio": ratio(times, arm.name, other.name),
                "ratio to fused AdamW": ratio(times, arm.name, replace(other, fused=True).name),
                "bytes_ratio": memory[arm.name]["step"] / memory[other.name]["step"],
            }
            for arm, other in pairs.items()
        ],
        "bytes": memory,
        "shares": {name: shares(turn, 1) for name, turn in turns.items() if name in calls and "fused" not in name},
    }


def measure(bench: TurnBenchmark) -> None:
    device = torch.device("cuda" if bench.cuda else "cpu")
    if bench.peer and bench.cuda:
        raise UserError(f"peer = '{bench.peer}': FastGen is compared on a CPU only; add cpu=true")
    load = os.getloadavg()[0]
    if bench.peer:
        peer.FastGen.of(Path(bench.peer))  # what cannot be measured is said at once
        memory = {net: peaks_beside(bench, net) for net in bench.nets}  # before anything is timed
        print(
            {net: {name: parts["step"] for name, parts in found.items()} for net, found in memory.items()}, flush=True
        )
        nets = {net: compared(bench, net, memory[net]) for net in bench.nets}
    else:
        nets = {net: measured(bench, net) for net in bench.nets}
    result = {
        "updates": bench.updates,
        "backend": chosen(None, device.type),
        "nets": nets,
        "load_average": {"before": load, "after": os.getloadavg()[0]},
    }
    if bench.peer:
        result["peer_commit"] = git_state(Path(bench.peer))
    for net, found in nets.items():
        if bench.peer:
            print(net, *(f"{row['ours']} / {row['theirs']}: {row['ratio']:.3f}" for row in found["rows"]), sep="\n  ")
            print(*(f"  calls of {name}: {calls}" for name, calls in found["calls"].items()), sep="\n")
        else:
            print(net, {name: round(value, 3) for name, value in found["ratio"].items()})
    print(save(f"turn_{'peer_' if bench.peer else ''}{device.type}", device, result))


if __name__ == "__main__":
    config.run_job(TurnBenchmark, measure, description=__doc__ or "")
