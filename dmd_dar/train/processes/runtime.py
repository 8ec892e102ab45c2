"""Processes, devices, precision and sharding. The only importer of accelerate and, with parts.py, torch.distributed."""

import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar, cast, runtime_checkable

import torch
import torch.distributed as dist
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.tracking import TensorBoardTracker, WandBTracker
from torch import Tensor, nn

from dmd_dar.draws import sample_range
from dmd_dar.errors import UserError
from dmd_dar.keys import key
from dmd_dar.models.denoiser import NetworkVelocity
from dmd_dar.models.frozen import Parts, is_split, split, unsplit
from dmd_dar.models.shared_lora import LoraDenoiser
from dmd_dar.routing.tensor_files import Stored, tensors_in
from dmd_dar.train.processes.parts import gathered, is_part, outline, parts_of, sent_by_main
from dmd_dar.train.processes.world import MEETING, World, alone, launched

T = TypeVar("T")

GradientFree = Literal["auto", "float32", "rollouts", "bfloat16"]
BUCKET = 25 * 2**20  # bytes of gradients in one exchange: large enough for a full rate, small enough to overlap


@dataclass(frozen=True)
class LaunchConfig:
    """Where and how a run computes; nothing here changes what is computed, up to rounding."""

    precision: Literal["auto", "no", "bf16"] = key(
        "auto", "network precision; auto: bf16 on a GPU that computes in it, float32 elsewhere"
    )
    gradient_free: GradientFree = key(
        "auto", "calls without gradients that are in bfloat16: none, roll-outs, or scores too; auto: as precision"
    )
    cpu: bool = key(False, "compute on the CPU although a GPU is there")
    threads: int = key(0, "CPU threads of each process; 0 leaves torch's choice, shared out among processes", least=0)
    accumulation: int = key(1, "micro-batches per optimiser step", least=1)
    microbatch: int | Literal["auto"] = key(
        0, "samples of a process at a time, in accumulation's place; auto: as many as fit on a GPU; 0: unset", least=0
    )
    processes: int = key(
        0, "processes to start on this machine; 0: one for each GPU, one without; none where WORLD_SIZE is set", least=0
    )
    sharding: Literal["none", "fsdp2"] = key(
        "none", "none: every process holds all weights; fsdp2: its part of weights, gradients and optimiser state"
    )
    shard_among: int = key(0, "fsdp2: processes that share one copy, such as those of a node; 0: all", least=0)
    check_every: int = key(100, "interval at which processes compare the state they share", unit="steps", least=1)
    timeout: int = key(30, "how long a process waits for the others in an exchange", unit="minutes", least=1)
    checkpointing: bool = key(False, "keep each block's input only and compute its activations again: less memory")
    offload: bool = key(False, "keep frozen weights in CPU memory; every layer's are copied over when it computes")
    compile: Literal["auto", "on", "off"] = key(
        "off", "compile the networks by torch.compile; auto: where a run is long enough to win by it"
    )

    def __post_init__(self) -> None:
        if self.microbatch and self.accumulation > 1:
            raise ValueError(
                f"microbatch {self.microbatch} and accumulation {self.accumulation} both say how a step is split: leave"
                " one out"
            )

    def samples_at_a_time(self, batch_size: int, processes: int) -> int:
        """Of each process; `auto` counts as all that it has. Raises UserError where they do not divide evenly."""
        given = 0 if self.microbatch == "auto" else self.microbatch
        name, number = ("microbatch", given) if given else ("accumulation", self.accumulation)
        parts = processes * number
        if batch_size % parts:
            raise UserError(
                f"batch_size {batch_size} does not divide evenly among {processes} processes with launch.{name}"
                f" {number}: make it a multiple of {parts}, or set launch.processes"
            )
        return given or batch_size // parts


@runtime_checkable
class Shardable(Protocol):
    """A network that says which of its modules are gathered by themselves."""

    def shards(self) -> list[nn.Module]: ...


class Runtime:
    """One process of a run. Under fsdp2 a call of a network is an exchange: every process has to make it.

    Raises UserError where the environment tells of other processes, but not how to find them, or none is found.
    """

    def __init__(self, config: LaunchConfig):
        self.accelerator = _accelerator(config, launched(*MEETING))
        self.config, self.check_every = config, config.check_every
        self.device = torch.device("cpu") if self.accelerator.device.type == "cpu" else self.accelerator.device
        self.rank, self.processes = self.accelerator.process_index, self.accelerator.num_processes
        self.is_main = self.accelerator.is_main_process
        self.sharded = config.sharding == "fsdp2" and self.processes > 1
        self.mesh = self._mesh(config.shard_among or self.processes) if self.sharded else None
        self.outlines: dict[nn.Module, nn.Module] = {}

    def _mesh(self, parts: int) -> Any:
        from torch.distributed.device_mesh import init_device_mesh

        if self.processes % parts:
            raise UserError(f"launch.shard_among {parts} does not divide {self.processes} processes: use a divisor")
        if parts == self.processes:
            return init_device_mesh(self.device.type, (parts,), mesh_dim_names=("shard",))
        return init_device_mesh(
            self.device.type, (self.processes // parts, parts), mesh_dim_names=("replicate", "shard")
        )

    @property
    def precision(self) -> str:
        """In which networks compute: "no" for float32, or "bf16"."""
        return self.accelerator.mixed_precision

    def autocast(self) -> Any:
        return self.accelerator.autocast()

    def without_gradients(self, velocity: Callable[..., Tensor], part: Literal["rollout", "score"]) -> NetworkVelocity:
        """The same velocity; its calls without gradients compute as `launch.gradient_free` says of such a part.

        What becomes of their outputs (estimates of x0, differences, losses) is in float32 whatever this says.
        """
        narrow, wanted = self.accelerator.mixed_precision == "bf16", self.config.gradient_free
        bf16 = narrow if wanted == "auto" else wanted == "bfloat16" or (wanted, part) == ("rollouts", "rollout")
        if bf16 == narrow:
            return velocity
        if self.sharded and narrow:
            raise UserError(
                f"launch.gradient_free = {wanted}: under launch.sharding = fsdp2 and bf16, weights travel in bfloat16;"
                " set it to auto, or launch.precision=no"
            )

        def call(x_t: Tensor, t: Tensor, cond: Tensor, *rung: int) -> Tensor:
            if torch.is_grad_enabled():
                return velocity(x_t, t, cond, *rung)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
                return velocity(x_t, t, cond, *rung)

        return call

    def one_reads(self, stored: Mapping[str, Stored]) -> Iterator[tuple[str, Tensor]]:
        """A `Reader`: the main process reads the files and sends each tensor to the others. An exchange."""
        return tensors_in(stored) if self.processes == 1 else sent_by_main(stored, self.device)

    def main_first(self) -> Any:
        """A context that the main process leaves before the others enter it."""
        return self.accelerator.main_process_first()

    def micro_batches(self, batch_size: int) -> list[Tensor]:
        """The global sample indices of this process, one tensor per micro-batch. Raises UserError if uneven."""
        size, own = self.config.samples_at_a_time(batch_size, self.processes), batch_size // self.processes
        start = self.rank * own
        return [sample_range(first, first + size, self.device) for first in range(start, start + own, size)]

    def shard(self, *networks: nn.Module) -> None:
        """Under fsdp2, leave each process its part of every network, in place; before optimisers are made.

        Of networks over one frozen base, its part of that: they share its tensors, which fully_shard would part once
        for each of them. Their adapters and routers stay whole, with gradients as without sharding.
        The modules that a network's `shards()` names are gathered by themselves; the rest, routers included, is
        gathered for the whole forward. Called on torch, since accelerate's `prepare` takes one model and one optimiser.
        Raises UserError for a network that is not Shardable.
        """
        if not self.sharded:
            return
        if any(isinstance(network, LoraDenoiser) for network in networks):
            split(self._parts(), *networks)
            return
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard  # takes as long to import as torch itself

        bf16 = self.accelerator.mixed_precision == "bf16"
        # Autocast decides who computes in bf16, as without sharding; the blocks' weights only travel in it.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # nobody writes into an output
        halved = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
        exact = MixedPrecisionPolicy(cast_forward_inputs=False)
        for network in networks:
            if not isinstance(network, Shardable):
                raise UserError(
                    f"launch.sharding = fsdp2: a {type(network).__name__} cannot be sharded; use launch.sharding=none"
                )
            self.outlines[network] = outline(network)
            for module in network.shards():
                fully_shard(module, mesh=self.mesh, mp_policy=halved if bf16 else exact, reshard_after_forward=True)
            # The rest stays gathered until its gradients are made: they may come of features alone, without the output
            # whose gradient would gather it again.
            fully_shard(network, mesh=self.mesh, mp_policy=exact, reshard_after_forward=False)

    def _parts(self) -> Parts:
        assert self.mesh is not None
        return parts_of(self.mesh.get_group("shard"), self.device)

    def settle(self, *networks: nn.Module) -> None:
        """Before weights are changed: drop what is still gathered of them, so that the next forward sees the change."""
        for network in networks:
            if hasattr(network, "reshard"):  # fsdp2 gives it
                network.reshard()  # type: ignore[operator]

    def whole(self, network: nn.Module) -> nn.Module:
        """The network with all its weights: itself, or if sharded a copy on the CPU, filled in the main process alone.

        Call it in every process.
        """
        if is_split(network):
            return unsplit(network, self.is_main)
        if network not in self.outlines:
            return network
        weights, copied = gathered(network.state_dict()), self.outlines[network]
        if self.is_main:
            copied.load_state_dict(weights, assign=True)
        return copied

    @contextmanager
    def averaging(self, parameters: list[nn.Parameter], last: bool = True) -> Iterator[None]:
        """Around a backward pass: where it is the `last` of the step, gradients become their means over processes.

        They are exchanged while the backward pass goes on. A parameter without gradient counts as zero. Sharded ones
        are left to fsdp2, which averages in every backward pass, so that no process ever holds whole gradients.
        """
        held = [p for p in parameters if not is_part(p)]
        if self.processes == 1 or not last or not held:
            yield
            return
        mean = GradientMean(held, self.processes)
        try:
            yield
        finally:
            mean.release()
        mean.finish()

    def average(self, metrics: dict[str, float]) -> dict[str, float]:
        """Mean over processes of each metric; all processes hold the same names."""
        if self.processes == 1:
            return metrics
        values = torch.tensor([metrics[name] for name in metrics], dtype=torch.float64, device=self.device)
        return dict(zip(metrics, self._reduced(values, "mean").tolist(), strict=True))

    def gather_rows(self, part: Tensor) -> Tensor:
        """The rows (n, ...) of every process joined in the order of ranks, (sum n, ...), in each of them."""
        if self.processes == 1:
            return part
        counts = self._joined(torch.tensor([len(part)], device=self.device)).tolist()
        most = max(counts)
        if not most:
            return part
        padded = torch.zeros(most, *part.shape[1:], dtype=part.dtype, device=self.device)
        padded[: len(part)] = part
        rows = self._joined(padded).split(most)
        return torch.cat([one[:count] for one, count in zip(rows, counts, strict=True)]).to(part.device)

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        if self.processes == 1:
            return flag
        return bool(self._reduced(torch.tensor(float(flag), device=self.device), "sum").item())

    def of_main(self, value: int) -> int:
        """The main process's value."""
        if self.processes == 1:
            return value
        held = torch.tensor(float(value if self.is_main else 0), dtype=torch.float64, device=self.device)
        return int(self._reduced(held, "sum").item())

    def together(self, work: Callable[[], T]) -> T:
        """work(), which exchanges nothing, in every process; all wait for the last.

        Where it raises in any, all end: that one with its error, the others with exit code 2.
        """
        try:
            result = work()
        except Exception:
            self.any(True)
            raise
        if self.any(False):
            raise SystemExit(2)
        return result

    def of_all(self, values: Tensor) -> Tensor:
        """(N,) -> (processes, N), on the CPU; N is the same everywhere."""
        if self.processes == 1:
            return values[None].cpu()
        return self._joined(values.to(self.device)[None]).cpu()

    def _reduced(self, values: Tensor, how: Literal["mean", "sum"]) -> Tensor:
        return cast(Tensor, self.accelerator.reduce(values, how))  # accelerate's own type is any container's

    def _joined(self, rows: Tensor) -> Tensor:
        """Rows (n, ...) of every process joined, (n * processes, ...); n is the same everywhere."""
        return cast(Tensor, self.accelerator.gather(rows))

    @property
    def part(self) -> int:
        """Which part of a sharded tensor this process holds; processes of the same part hold the same."""
        return 0 if self.mesh is None else self.mesh.get_local_rank("shard")

    def close(self) -> None:
        self.accelerator.end_training()


def _accelerator(config: LaunchConfig, world: World | None) -> Accelerator:
    """Of this process alone, or joined with the others of `world`: on GPUs, or on CPUs where there are none."""
    threads = config.threads or torch.get_num_threads()
    precision = usual_precision(config) if config.precision == "auto" else config.precision
    patience = InitProcessGroupKwargs(timeout=timedelta(minutes=config.timeout))
    processes = 1 if world is None else world.processes
    cpu = config.cpu or (processes > 1 and not _exchanging_device())
    with alone() if processes == 1 else nullcontext(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "OMP_NUM_THREADS")
        try:
            made = Accelerator(cpu=cpu, mixed_precision=precision, kwargs_handlers=[patience])
        except dist.DistError as error:
            place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            reason = " ".join(str(error).split())
            raise UserError(f"no process was found at MASTER_ADDR:MASTER_PORT {place}: {reason}; mend them") from error
    torch.set_num_threads(threads)  # on CPUs, accelerate has just set another number
    if processes > 1 and made.num_processes != processes:
        raise UserError(f"{processes} processes cannot exchange on {made.device.type}: set launch.cpu=true")
    return made


def usual_precision(config: LaunchConfig) -> Literal["no", "bf16"]:
    """What `launch.precision=auto` stands for here. GPUs before compute capability 8.0 only emulate bfloat16."""
    gpu = torch.cuda.is_available() and not config.cpu
    return "bf16" if gpu and torch.cuda.is_bf16_supported(including_emulation=False) else "no"


def _exchanging_device() -> bool:
    """Whether processes can exchange on what torch computes on here: not on a Mac's."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return device is not None and device.type != "mps"


class GradientMean:
    """Gradients summed over processes in buckets, each sent as soon as the backward pass has filled it.

    Not DDP: its wrapper renames parameters, has to see every forward pass, and takes a parameter that the last of
    several forward passes left out for unused. The hooks here fire once a backward pass, when a gradient is complete.
    """

    def __init__(self, parameters: list[nn.Parameter], processes: int):
        self.processes, self.buckets = processes, buckets(parameters)
        self.waiting = [len(bucket) for bucket in self.buckets]
        self.sent: list[tuple[Tensor, Any]] = []
        self.hooks = [
            p.register_post_accumulate_grad_hook(lambda _, index=index: self._ready(index))
            for index, bucket in enumerate(self.buckets)
            for p in bucket
            if p.requires_grad
        ]

    def _ready(self, index: int) -> None:
        self.waiting[index] -= 1
        while len(self.sent) < len(self.buckets) and not self.waiting[len(self.sent)]:
            self._send()

    def _send(self) -> None:
        """The next bucket: all processes send them in one order, whichever is full first."""
        bucket = self.buckets[len(self.sent)]
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in bucket])
        self.sent.append((flat, dist.all_reduce(flat, async_op=True)))

    def release(self) -> None:
        for hook in self.hooks:
            hook.remove()

    def finish(self) -> None:
        while len(self.sent) < len(self.buckets):
            self._send()
        for bucket, (flat, work) in zip(self.buckets, self.sent, strict=True):
            work.wait()
            flat /= self.processes
            for p, mean in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
                p.grad = mean.view_as(p)


def buckets(parameters: list[nn.Parameter]) -> list[list[nn.Parameter]]:
    """The parameters from the last to the first, as gradients come, in lists of one dtype and about BUCKET bytes."""
    filled: list[list[nn.Parameter]] = []
    size = 0
    for p in reversed(parameters):
        if not filled or size >= BUCKET or p.dtype != filled[-1][0].dtype:
            filled.append([])
            size = 0
        filled[-1].append(p)
        size += p.numel() * p.element_size()
    return filled


def wandb_tracker(project: str, **settings: Any) -> WandBTracker:
    """accelerate's tracker of a started wandb run; `settings` are those of wandb.init. Raises what that does."""
    tracker = WandBTracker(project, **settings)
    tracker.start()
    return tracker


def tensorboard_tracker(folder: Path, **settings: Any) -> TensorBoardTracker:
    """accelerate's tracker that writes events into `folder`; `settings` are those of SummaryWriter.

    Raises ImportError where neither tensorboard nor tensorboardX is installed.
    """
    tracker = TensorBoardTracker(folder.name, folder.parent, **settings)
    tracker.start()
    return tracker
