"""What routing adds to a call, by kind of work: python -m benchmarks.routing_share

The operations of a call of DAR and of the same call with plain additions, from torch's profiler: their own time summed
by group, DAR minus residual, beside what the bytes that routing has to move take at the machine's copy bandwidth. On a
CPU, one thread. A call is profiled `rounds` times; each of its operations counts with the least of its times, because
the profiler's clock goes on while another process has the core. What is left of the call's CPU time without a profiler
is views, autograd, Python, and what operations take longer than at their best.
"""

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, cast
from unittest.mock import patch

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.record import ratio, save, spread
from benchmarks.routing import copy_bandwidth
from benchmarks.turn import FORMS, Form, TurnBenchmark, teacher_of
from benchmarks.turn_cost import FREE
from dmd_dar import config
from dmd_dar.keys import key
from dmd_dar.models.sit import SiT, with_routing
from dmd_dar.routing.ops.forward import ForwardReader
from dmd_dar.routing.ops.torch import TorchReader
from dmd_dar.routing.traffic import forward_passes
from dmd_dar.train.loop.optimise import Optimiser, OptimiserConfig
from dmd_dar.train.processes.runtime import LaunchConfig, Runtime
from eval.samples.cost import interleaved, without_profiler_lines

Kind = Literal["sampling", "training"]
CALL, OPTIMISER = "call", "optimiser"
LINEAR, ATTENTION, NORMS, GELU = "linear layers", "attention", "layer norms", "activations"
ELEMENTWISE, COPIES = "modulate, gates, sums", "copies and allocation"
REST = "rest: views, autograd, Python"
LOGITS, SOFTMAX, SUMS, BACK = "router: norms and logits", "router: softmax", "router: weighted sums", "router: backward"
ROUTER_COPIES = "router: copies and allocation"
GROUPS = (LINEAR, ATTENTION, NORMS, GELU, ELEMENTWISE, COPIES, OPTIMISER)
GROUPS += (LOGITS, SOFTMAX, SUMS, BACK, ROUTER_COPIES, REST)

# autograd's names of what a router does; passes without gradients get the same ones
STAGES = ("Begin", "Source", "Route")
LABELS = {OPTIMISER, *STAGES, *(f"{stage}Backward" for stage in STAGES)}
PRODUCTS = {"bmm", "baddbmm", "baddbmm_", "addcmul", "addcmul_"}
COPYING = {"copy_", "clone", "contiguous", "fill_", "zero_", "zeros", "cat", "stack"}
BY_NAME = {
    LINEAR: {"addmm", "mm", "mkldnn_convolution", "convolution", "_convolution"},
    NORMS: {"native_layer_norm", "native_layer_norm_backward"},
    GELU: {"gelu", "gelu_backward", "silu", "silu_backward"},
    ELEMENTWISE: {"add", "add_", "mul", "mul_", "sum", "sub", "neg", "pow", "mean", "div", "square"},
    COPIES: COPYING,
}


@dataclass(frozen=True)
class ShareBenchmark:
    """python -m benchmarks.routing_share"""

    rounds: int = key(9, "interleaved rounds", least=1)
    nets: tuple[str, ...] = key(("SiT-S/2", "demo net"), "which nets, of SiT-S/2, SiT-XL/2 and demo net")
    sampling: tuple[int, ...] = key((1, 16), "images of a call without gradients", least=1)
    training: tuple[int, ...] = key((4,), "images of a forward, backward and update", least=1)

    def cases(self) -> list[tuple[str, Kind, int]]:
        kinds: dict[Kind, tuple[int, ...]] = {"sampling": self.sampling, "training": self.training}
        return [(net, kind, batch) for net in self.nets for kind, sizes in kinds.items() for batch in sizes]


@dataclass(frozen=True)
class Operation:
    """One of a call: its name, its group, and the microseconds that it spent in itself."""

    name: str
    group: str
    own: float


def group_of(name: str, label: str | None) -> str:
    """The group of an operation inside the innermost `label`, one of LABELS, or in none of them."""
    if label == OPTIMISER:
        return OPTIMISER
    routing, short = label is not None, name.removeprefix("aten::")
    if not name.startswith("aten::") or short in FREE:
        return REST
    if "scaled_dot_product" in name:
        return ATTENTION
    if short in COPYING or short.startswith("empty"):
        return ROUTER_COPIES if routing else COPIES
    if label is not None:
        stage = SUMS if short in PRODUCTS else SOFTMAX
        return BACK if label.endswith("Backward") else stage if label == "Route" else LOGITS
    return next((group for group, names in BY_NAME.items() if short in names), REST)


def operations(call: Callable[[], Any]) -> list[Operation]:
    """Every operation of one call, in order."""
    with without_profiler_lines(), profile(activities=[ProfilerActivity.CPU]) as recorded, record_function(CALL):
        call()
    found: list[Operation] = []
    for event in cast(Any, recorded.events()):
        inside: Any = event
        while inside is not None and inside.name not in LABELS:
            inside = inside.cpu_parent
        label = None if inside is None else inside.name
        found.append(Operation(event.name, group_of(event.name, label), event.self_cpu_time_total))
    return found


def by_group(rounds: list[list[Operation]], whole: float) -> dict[str, float]:
    """Seconds by group, each operation with its least over the rounds; REST is what is left of `whole`.

    RuntimeError where the rounds differ in their operations: the least would be of different ones.
    """
    names = [[operation.name for operation in one] for one in rounds]
    if any(one != names[0] for one in names):
        raise RuntimeError(f"the rounds of a call differ in their operations: {sorted(map(len, names))} of them")
    spent: Counter[str] = Counter()
    for same in zip(*rounds, strict=True):
        spent[same[0].group] += 1e-6 * min(operation.own for operation in same)  # type: ignore[assignment]
    spent[REST] = whole - (spent.total() - spent[REST])  # type: ignore[assignment]
    return {group: spent[group] for group in GROUPS}


@contextmanager
def labelled() -> Iterator[None]:
    """Names the stages of routers where autograd does not: in passes without gradients, and when they begin."""
    places = [
        (ForwardReader, "__init__", "Begin"),
        (ForwardReader, "_store", "Source"),
        (ForwardReader, "route", "Route"),
    ]
    with ExitStack() as stack:
        for owner, method, label in [*places, (TorchReader, "__init__", "Begin")]:
            stack.enter_context(patch.object(owner, method, _named(label, getattr(owner, method))))
        yield


def _named(label: str, original: Callable[..., Any]) -> Callable[..., Any]:
    def call(*given: Any, **named: Any) -> Any:
        with record_function(label):
            return original(*given, **named)

    return call


def call_of(network: SiT, kind: Kind, batch: int) -> Callable[[], None]:
    """One call of a network without gradients, or a forward, a backward and an update."""
    rng = torch.Generator().manual_seed(0)
    x, t = torch.randn(batch, *network.shape, generator=rng), torch.rand(batch, generator=rng)
    labels = torch.randint(network.num_conditions, (batch,), generator=rng)

    @torch.no_grad()
    def sample() -> None:
        network(x, t, labels)

    if kind == "sampling":
        return sample
    network.requires_grad_(True)
    network.pos_embed.requires_grad_(False)
    optimiser = Optimiser(OptimiserConfig(lr=1e-9), network.backbone_parameters(), (network.router_parameters(), 1e-9))

    def train() -> None:
        network(x, t, labels).square().mean().backward()
        with record_function(OPTIMISER):
            optimiser.step(0, optimiser.norm())

    return train


def routed(net: str, form: Form) -> SiT:
    """A frozen net whose routers have a choice."""
    network = with_routing(teacher_of(TurnBenchmark(cpu=True), net), FORMS[form]).requires_grad_(False)
    torch.manual_seed(1)
    for parameter in network.router_parameters():
        parameter.add_(0.02 * torch.randn_like(parameter))
    return network


def share(bench: ShareBenchmark, net: str, kind: Kind, batch: int, bandwidth: float) -> dict[str, Any]:
    """One case: CPU time, the groups' time, and what the bytes take that routing has to move."""
    networks = {form: routed(net, form) for form in FORMS}
    calls = {form: call_of(network, kind, batch) for form, network in networks.items()}
    times = interleaved(calls, "cpu", bench.rounds, clock=time.process_time)
    with labelled():
        rounds = [{form: operations(call) for form, call in calls.items()} for _ in range(bench.rounds)]
    seconds = {form: spread(samples) for form, samples in times.items()}
    groups = {form: by_group([one[form] for one in rounds], seconds[form]["median"]) for form in FORMS}
    network = networks["DAR"]
    passes = forward_passes(2 * network.config.depth, network.routing, ())
    more = (passes["as configured"] - passes["plain residual"]) * (2 if kind == "training" else 1)
    nbytes = more * batch * network.pos_embed.numel() * network.pos_embed.element_size()
    return {
        "net": net,
        "kind": kind,
        "B": batch,
        "seconds": seconds,
        "DAR over residual": ratio(times, "DAR", "residual"),
        "groups_s": groups,
        "operations": {form: len(found) for form, found in rounds[0].items()},  # with views and autograd's own
        "passes": more,
        "bytes": nbytes,
        "bytes_s": nbytes / bandwidth,
    }


def measure(bench: ShareBenchmark) -> None:
    Runtime(LaunchConfig(cpu=True, threads=1))
    load, bandwidth, rows = os.getloadavg()[0], copy_bandwidth(torch.device("cpu"), time.process_time), []
    for net, kind, batch in bench.cases():
        rows.append(row := share(bench, net, kind, batch, bandwidth))
        plain, dar = row["groups_s"].values()
        print(f"{net}, {kind}, B {batch}: {row['DAR over residual']:.3f}x; bytes {1000 * row['bytes_s']:.2f} ms")
        print(
            *(f"  {group:<32} {1000 * (dar[group] - plain[group]):+8.2f} ms" for group in GROUPS), sep="\n", flush=True
        )
    result = {"copy_bandwidth_bytes_per_s": bandwidth, "rounds": bench.rounds, "rows": rows}
    result["load_average"] = {"before": load, "after": os.getloadavg()[0]}
    print(save("routing_share_cpu", torch.device("cpu"), result))


if __name__ == "__main__":
    config.run_job(ShareBenchmark, measure, description=__doc__ or "")
