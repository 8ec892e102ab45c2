"""What routing costs in time and memory: python -m benchmarks.routing

Rows: `chain` all routers of a network, one after the other, with a cheap sublayer between them; `router` one router
alone, `triton` against `naive`; `public` the published kernels for static queries; `step` one training step of a SiT.
Times are medians of interleaved rounds in one process, memory is the peak of a fresh process above the inputs.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from benchmarks.memory import SETTLED, alone
from benchmarks.record import ratio, save, spread
from dmd_dar import config
from dmd_dar.device import chosen_device
from dmd_dar.errors import UserError
from dmd_dar.flow import interpolate
from dmd_dar.keys import key
from dmd_dar.losses import flow_matching_loss
from dmd_dar.models.sit import build_sit
from dmd_dar.routing.history import History
from dmd_dar.routing.layout import RoutingConfig
from dmd_dar.routing.ops import chosen, naive
from dmd_dar.routing.router import RouterBank
from dmd_dar.routing.traffic import forward_passes
from eval.samples.cost import interleaved, peak_memory

Row = Literal["chain", "router", "public", "step"]
BY_SOURCE = "by source"
SUBLAYERS, TOKENS = 56, 256  # SiT-XL/2 at 256 px: 57 routers of at most 57 sources


@dataclass(frozen=True)
class RoutingBenchmark:
    """python -m benchmarks.routing"""

    rows: tuple[Row, ...] = key(get_args(Row), "what to measure")
    rounds: int = key(5, "interleaved rounds of each row", least=1)
    cpu: bool = key(False, "measure on the CPU although a GPU is there")
    chain_batch: int = key(0, "B of the chains; 0: 1 on a CPU, 8 on a GPU", least=0)
    step_batch: int = key(0, "B of the training steps; 0: 4 on a CPU, 32 on a GPU", least=0)
    router_batches: tuple[int, ...] = key((32, 256), "B of the single routers (GPU only)", least=1)

    @property
    def device(self) -> torch.device:
        return chosen_device(self.cpu)

    def batch(self, requested: int, cpu: int, gpu: int) -> int:
        return requested or (gpu if self.device.type == "cuda" else cpu)


@dataclass(frozen=True)
class Links:
    """A chain's shape: v_l = h_l f_l."""

    device: str
    width: int
    dtype: torch.dtype
    batch: int
    routing: RoutingConfig

    def build(self) -> tuple[RouterBank, Tensor, Tensor, Tensor]:
        rng = torch.Generator(self.device).manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=rng, device=self.device).to(self.dtype).requires_grad_()

        bank = RouterBank(self.routing, SUBLAYERS, self.width).to(self.device)
        with torch.no_grad():
            for parameter in bank.parameters():
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=rng, device=self.device))
        inputs = draw(self.batch, TOKENS, self.width), draw(self.batch, self.width), draw(SUBLAYERS, self.width)
        return (bank, *inputs)


def by_source(v: list[Tensor], query: Tensor, gain: Tensor, *, scale: str, stream: Tensor | None = None) -> Tensor:
    """The equations without a stacked copy of the sources: a second, leaner baseline."""
    wide = [one.to(torch.promote_types(one.dtype, torch.float32)) for one in v]
    folded, n = query * gain * v[0].shape[-1] ** -0.5, len(v)
    s = torch.stack([(one * folded).sum(dim=-1) * (one.square().mean(dim=-1) + naive.EPS).rsqrt() for one in wide])
    alpha = s.softmax(dim=0)
    w = n * alpha - 1 if scale == "stream" else alpha * (n if scale == "count" else 1)
    total = torch.zeros_like(wide[0]) if stream is None else stream.to(wide[0].dtype)
    for w_i, one in zip(w, wide, strict=True):
        total = total + w_i[..., None] * one
    return total.to(v[0].dtype if stream is None else stream.dtype)


def forward(bank: RouterBank, v_0: Tensor, t_embedding: Tensor, sublayers: Tensor, backend: str) -> Tensor:
    """h_{L+1} of a chain; `residual` adds instead of routing."""
    if backend == "residual":
        h = v_0
        for f in sublayers:
            h = h + h * f
        return h
    bank.backend = "naive" if backend == BY_SOURCE else backend
    history = History(bank, v_0, t_embedding)
    if backend == BY_SOURCE:
        history.reader.route_of = by_source  # type: ignore[union-attr]
    for f in sublayers:
        history.append(history.state() * f)
    return history.state()


def both_ways(links: Links, backend: str):
    """A call that runs a chain forward and backward."""
    parts = links.build()

    def run() -> None:
        forward(*parts, backend).float().square().mean().backward()
        for leaf in (*parts[0].parameters(), *parts[1:]):
            leaf.grad = None

    return run


def timed_chain(links: Links, backends: tuple[str, ...], rounds: int) -> dict[str, Any]:
    """Seconds of forward and backward, and of a forward alone without gradients, for every backend."""
    device = torch.device(links.device)
    parts = links.build()

    def ahead(backend: str):
        def run() -> None:
            with torch.no_grad():
                forward(*parts, backend)

        return run

    training = interleaved({name: both_ways(links, name) for name in backends}, device, rounds)
    sampling = interleaved({name: ahead(name) for name in backends}, device, rounds)
    return {
        "training_s": {name: spread(samples) for name, samples in training.items()},
        "sampling_s": {name: spread(samples) for name, samples in sampling.items()},
        "training_ratio": {name: ratio(training, "naive", name) for name in backends},
        "training_ratio_by_source": {name: ratio(training, BY_SOURCE, name) for name in backends},
        "sampling_ratio": {name: ratio(sampling, "naive", name) for name in backends},
    }


def peak_of_chain(links: Links, backend: str) -> int:
    return peak_memory(both_ways(links, backend), links.device, gradients=True).peak_bytes


def copy_bandwidth(device: torch.device, clock: Callable[[], float] = time.perf_counter) -> float:
    """Bytes per second that a large copy reads and writes."""
    source = torch.ones(2**28 if device.type == "cuda" else 2**26, device=device)
    target = torch.empty_like(source)
    times = interleaved({"copy": lambda: target.copy_(source)}, device, 7, clock=clock)["copy"]
    return 2 * source.numel() * source.element_size() / sorted(times)[len(times) // 2]


def chain(bench: RoutingBenchmark, backends: tuple[str, ...], bandwidth: float) -> list[dict[str, Any]]:
    """Dense and chunked chains; also with the allocator's page faults out of the way, on the CPU."""
    cuda = bench.device.type == "cuda"
    width, dtype = (1152, torch.bfloat16) if cuda else (384, torch.float32)
    rows = []
    for name, routing in (
        ("dense, convex", RoutingConfig("timestep", chunk_size=1, scale="convex")),
        ("chunks of 4, stream", RoutingConfig("timestep", chunk_size=4, scale="stream")),
    ):
        links = Links(str(bench.device), width, dtype, bench.batch(bench.chain_batch, 1, 8), routing)
        row = {"form": name, "shape": _shape(links), **timed_chain(links, backends, bench.rounds)}
        if not cuda:
            row["settled"] = alone(timed_chain, links, backends, bench.rounds, **SETTLED)
        plain = alone(peak_of_chain, links, "residual")
        row["extra_bytes"] = {backend: alone(peak_of_chain, links, backend) - plain for backend in backends}
        passes = forward_passes(SUBLAYERS, routing, (8,))
        counted = passes["dense, groups of 8"] if routing.chunk_size == 1 else passes["as configured"]
        row["sampling_passes"] = counted
        row["sampling_bytes"] = counted * links.batch * TOKENS * width * dtype.itemsize
        row["share_of_copy_bandwidth"] = row["sampling_bytes"] / row["sampling_s"]["torch"]["median"] / bandwidth
        rows.append(row)
        print(_line(row), flush=True)
    return rows


def _shape(links: Links) -> dict[str, Any]:
    shape = {"routers": SUBLAYERS + 1, "B": links.batch, "T": TOKENS, "d": links.width}
    return {**shape, "dtype": str(links.dtype).removeprefix("torch."), "routing": asdict(links.routing)}


def _line(row: dict[str, Any]) -> str:
    shares = ", ".join(f"{name} {value:.1f}x" for name, value in row["training_ratio"].items() if name != "naive")
    return f"{row['form']}: forward and backward against naive: {shares}"


def router_inputs(device: torch.device, batch: int, sources: int) -> tuple[list[Tensor], Tensor, Tensor]:
    """bf16 sources (B, T, 1152), a static query and its key gain."""
    rng = torch.Generator(device).manual_seed(0)
    v = [torch.randn(batch, TOKENS, 1152, generator=rng, device=device).bfloat16() for _ in range(sources)]
    query = 0.2 * torch.randn(1152, generator=rng, device=device)
    return [one.requires_grad_() for one in v], query.requires_grad_(), torch.ones(1152, device=device).requires_grad_()


Kernel = Callable[[list[Tensor], Tensor, Tensor], Tensor]


def kernels() -> dict[str, tuple[Kernel, bool]]:
    """The static routers that are installed, ours first; True for one that wants its sources stacked beforehand."""
    from dmd_dar.routing.ops import triton

    installed: dict[str, tuple[Kernel, bool]] = {
        "naive": (lambda v, query, gain: naive.route(v, query, gain, scale="convex"), False),
        "triton": (lambda v, query, gain: triton.route(v, query, gain, scale="convex"), False),
    }
    try:
        from fla.ops.attnres import fused_attnres  # type: ignore[import-not-found]

        installed["flash-linear-attention"] = (
            lambda v, query, gain: fused_attnres(query, v, gain, scale=1152**-0.5),
            False,
        )
    except ImportError:
        pass
    try:
        from liger_kernel.transformers.functional import liger_attn_res  # type: ignore[import-not-found]

        installed["liger-kernel"] = (lambda v, query, gain: liger_attn_res(v, query * 1152**-0.5, gain), True)
    except ImportError:
        pass
    return installed


def one_kernel(kernel: Kernel, stacked: bool, v: list[Tensor], query: Tensor, gain: Tensor, expected: Tensor):
    """Calls that run a kernel forward, and backward alone. Raises ValueError where its result is not the equations'."""
    sources: Any = torch.stack([one.detach() for one in v]).requires_grad_() if stacked else v
    leaves = [sources, query, gain] if stacked else [*v, query, gain]
    h = kernel(sources, query, gain)
    far = ((h.float() - expected).norm() / expected.norm()).item()
    if not far < 0.02:
        raise ValueError(f"its result is off by {far:.2g} of the equations'")
    dh = torch.randn(h.shape, generator=torch.Generator(h.device).manual_seed(1), device=h.device).to(h.dtype)
    torch.autograd.grad(h, leaves, dh, retain_graph=True)

    def ahead() -> None:
        with torch.no_grad():
            kernel(sources, query, gain)

    return ahead, lambda: torch.autograd.grad(h, leaves, dh, retain_graph=True)


def routers(
    device: torch.device, batch: int, sources: int, names: tuple[str, ...], rounds: int, bandwidth: float
) -> dict[str, Any]:
    """One router, forward and backward, of each kernel; a kernel that is missing, fails or is wrong says so."""
    known, inputs = kernels(), router_inputs(device, batch, sources)
    with torch.no_grad():
        expected = naive.route(*inputs, scale="convex").float()
    calls, failed = {}, {}
    for name in names:
        try:
            if name not in known:
                raise ImportError("not installed")
            calls[name] = one_kernel(*known[name], *inputs, expected)
        except Exception as error:  # a published kernel may not serve this many sources, naive may not fit
            failed[name] = f"{type(error).__name__}: {error}".splitlines()[0][:120]
    ahead = interleaved({name: pair[0] for name, pair in calls.items()}, device, rounds)
    back = interleaved({name: pair[1] for name, pair in calls.items()}, device, rounds)
    moved = (sources + 1) * expected.numel() * 2
    return {
        "sources": sources,
        "B": batch,
        "failed": failed,
        "forward_s": {name: spread(samples) for name, samples in ahead.items()},
        "backward_s": {name: spread(samples) for name, samples in back.items()},
        "forward_ratio": {name: ratio(ahead, name, "triton") for name in calls},
        "backward_ratio": {name: ratio(back, name, "triton") for name in calls},
        "forward_bytes": moved,
        "forward_share_of_copy_bandwidth": {
            name: moved / spread(samples)["median"] / bandwidth for name, samples in ahead.items()
        },
    }


def training_steps(
    preset: str, batch: int, device: torch.device, routing: RoutingConfig, backends: tuple[str, ...]
) -> dict[str, Callable[[], None]]:
    """For every backend a call that makes one training step of one model: velocity loss, backward, AdamW."""
    torch.manual_seed(0)
    model = build_sit(preset, routing=replace(routing, chunk_size=4)).to(device)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn_like(parameter))
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    x0, eps = torch.randn(2, batch, 4, 32, 32, device=device)
    t, labels = torch.rand(batch, device=device), torch.randint(1000, (batch,), device=device)

    def run(backend: str) -> None:
        for bank in (module for module in model.modules() if isinstance(module, RouterBank)):
            bank.backend = backend
        optimiser.zero_grad(set_to_none=True)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
            velocity = model(interpolate(x0, eps, t), t, labels)[:, :4]
        flow_matching_loss(velocity.float(), x0, eps).backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

    return {backend: partial(run, backend) for backend in backends}


def step(bench: RoutingBenchmark) -> dict[str, Any]:
    """A SiT with the paper's aggregate and with the converted network's, S = 4, against the residual one.

    On a GPU with every fast backend, the default named after the form alone.
    """
    preset = "XL/2" if bench.device.type == "cuda" else "S/2"
    paper = RoutingConfig("timestep", chunk_size=4, summary="last", scale="convex")
    forms = {
        "residual": RoutingConfig(),
        "convex, last": paper,
        "stream, sum": replace(paper, summary="sum", scale="stream"),
    }
    batch = bench.batch(bench.step_batch, 4, 32)
    usual = chosen(None, bench.device.type)
    backends = tuple(dict.fromkeys((usual, "torch")))
    runs = {}
    for name, form in forms.items():
        ways = ("",) if form.query == "residual" else backends
        made = training_steps(preset, batch, bench.device, form, ways)
        runs |= {name if way in ("", usual) else f"{name}, {way}": run for way, run in made.items()}
    times = interleaved(runs, bench.device, bench.rounds)
    ratios = {name: ratio(times, name, "residual") for name in runs}
    print(f"SiT-{preset} training step against residual:", {n: round(r, 3) for n, r in ratios.items()}, flush=True)
    return {
        "model": f"SiT-{preset}",
        "B": batch,
        "backend": usual,
        "seconds": {name: spread(samples) for name, samples in times.items()},
        "ratio": ratios,
    }


def measure(bench: RoutingBenchmark) -> None:
    """The record is begun anew, and each part joins it as it is done: what a later one breaks, earlier ones outlast."""
    cuda = bench.device.type == "cuda"
    if "router" in bench.rows and cuda is False:
        print("no GPU: the rows router and public stay open")
    bandwidth = copy_bandwidth(bench.device)
    backends = ("torch", "triton", BY_SOURCE, "naive") if cuda else ("torch", BY_SOURCE, "naive")
    published, batch = ("triton", "flash-linear-attention", "liger-kernel"), bench.router_batches[0]

    def single(batch: int, sources: int, names: tuple[str, ...]) -> dict[str, Any]:
        return routers(bench.device, batch, sources, names, bench.rounds, bandwidth)

    parts: dict[Row, Callable[[], Any]] = {"chain": lambda: chain(bench, backends, bandwidth)}
    if cuda:
        parts["router"] = lambda: [single(one, 57, ("naive", "triton")) for one in bench.router_batches]
        parts["public"] = lambda: [single(batch, sources, published) for sources in (2, 5, 9, 57)]
    parts["step"] = lambda: step(bench)
    requested = [row for row in parts if row in bench.rows]
    if not requested:
        raise UserError(f"rows = {list(bench.rows)}: nothing of it is measured on {bench.device}; choose chain or step")
    result: dict[str, Any] = {"copy_bandwidth_bytes_per_s": bandwidth, "rounds": bench.rounds}
    for row in requested:
        result[row] = parts[row]()
        path = save(f"routing_{bench.device.type}", bench.device, result)
        print(f"{row}: {path}", flush=True)


if __name__ == "__main__":
    config.run_job(RoutingBenchmark, measure, description=__doc__ or "")
