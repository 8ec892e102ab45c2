"""python -m tests.train.workers FOLDER PORT N: small distillations by N gloo processes, for test_runtime.py."""

import copy
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from torch import nn

from dmd_dar import flow
from dmd_dar.distillation.networks import Memory, build_networks
from dmd_dar.draws import Draws
from dmd_dar.losses import LossWeight
from dmd_dar.methods.dmd import DMD, Regression
from dmd_dar.methods.gan import GAN
from dmd_dar.methods.trajectories import Trajectories
from dmd_dar.models.denoiser import velocity_of
from dmd_dar.models.diffusers_denoiser import DiffusersDenoiser, routed_copy
from dmd_dar.models.discriminator import Heads, features_of, width_of
from dmd_dar.models.frozen import Kept, block_layers
from dmd_dar.models.shared_lora import LoraConfig, merged
from dmd_dar.models.sit import SiTConfig, with_routing
from dmd_dar.routing.layout import RoutingConfig
from dmd_dar.routing.tensor_files import Stored, contents
from dmd_dar.train.disk.checkpoint import CheckpointConfig
from dmd_dar.train.disk.log import RunLog
from dmd_dar.train.loop.ema import Ema
from dmd_dar.train.loop.loop import Course, Loop, OpenRun, Phase, gradients, update
from dmd_dar.train.loop.optimise import Optimiser, OptimiserConfig
from dmd_dar.train.processes.parts import gathered, local
from dmd_dar.train.processes.replicas import ReplicaError
from dmd_dar.train.processes.runtime import LaunchConfig, Runtime
from tests.models.tiny_pipelines import tiny_dit
from tests.tiny import ON_CPU, tiny_sit

SHAPE = SiTConfig(input_size=8, in_channels=2, patch=4, width=12, depth=2, heads=2, num_classes=3)
ROUTING = RoutingConfig(query="timestep", chunk_size=2)
BATCH, CYCLES = 20, {2: 6, 5: 1}  # cycles by k, the fake-score updates per student update


def sits(dtype: torch.dtype) -> list[nn.Module]:
    """Teacher, student and fake score."""
    teacher = tiny_sit(SHAPE).to(dtype)
    student, fake_score = with_routing(teacher, ROUTING), tiny_sit(SHAPE).to(dtype)
    for network in (teacher, student, fake_score):
        network.pos_embed.requires_grad_(False)
    return [teacher, student, fake_score]


def dits(dtype: torch.dtype) -> list[nn.Module]:
    """The same of a diffusers transformer."""
    teacher = DiffusersDenoiser(tiny_dit(in_channels=2, out_channels=2, num_layers=3, num_embeds_ada_norm=3)).to(dtype)
    return [teacher, routed_copy(teacher, ROUTING), copy.deepcopy(teacher)]


def loras(dtype: torch.dtype) -> list[nn.Module]:
    """The same over one frozen base."""
    torch.manual_seed(2)
    networks = build_networks(tiny_sit(SHAPE).to(dtype), ROUTING, memory=Memory("shared_lora", LoraConfig(rank=2)))
    return [networks.teacher, networks.student, networks.fake_score]


def over_a_half_base(dtype: torch.dtype) -> list[nn.Module]:
    """The same over one in bfloat16 that lies in the CPU's memory; what is trained is of `dtype`."""
    memory = Memory("shared_lora", LoraConfig(rank=2), Kept(torch.bfloat16, offload=True))
    networks = build_networks(tiny_sit(SHAPE).to(dtype), ROUTING, memory=memory)
    for network in (networks.student, networks.fake_score):
        for p in network.parameters():
            p.data = p.data.to(dtype)
    return [networks.teacher, networks.student, networks.fake_score]


def cycle_of(
    runtime: Runtime,
    k: int,
    dtype: torch.dtype = torch.float64,
    made: Callable[..., list[nn.Module]] = sits,
    checkpointing: bool = False,
) -> tuple[Phase, ...]:
    """k fake-score phases, the heads' and the student's, with all losses: two student forwards in one backward."""
    teacher, student, fake_score = networks = made(dtype)
    teacher.requires_grad_(False)
    ema, rungs = Ema(student, 0.9), (1.0, 0.6)
    getattr(fake_score, "network", fake_score).tell_rungs_apart(len(rungs))
    for p in fake_score.parameters():
        p.data = p.data.to(dtype)
    if checkpointing:
        student.checkpoint_activations()  # type: ignore[operator]
        fake_score.checkpoint_activations()  # type: ignore[operator]
    runtime.shard(*networks, *ema.modules.values())

    def velocity(network: nn.Module):
        v = velocity_of(network)
        return lambda x, t, cond, *rung: v(x.to(dtype), t.to(dtype), cond, *rung)

    torch.manual_seed(1)
    heads, law = Heads(width_of(fake_score), 2, hidden=4).to(dtype), flow.TimeLaw()
    for p in heads.parameters():
        nn.init.normal_(p, std=0.3)
    gan = GAN(
        features=features_of(fake_score, velocity(fake_score), (1, 2)),
        heads=heads,
        real=lambda draws: (draws.normal("image", 2, 8, 8), draws.integers("label", 3)),
        time=law,
        weight=LossWeight(0.5),
        feature_weight=0.5,
        r1_weight=0.1,
    )
    pairs = Trajectories(torch.randn(4, 2, 2, 8, 8), torch.randn(4, 2, 8, 8), torch.arange(4) % 3)
    method = DMD(
        *map(velocity, (student, teacher, fake_score)),
        rungs=rungs,
        renoise=law,
        num_classes=3,
        shape=(2, 8, 8),
        regression=Regression(pairs, LossWeight(0.5)),
        gan=gan,
    )
    config = OptimiserConfig(lr=1e-3, weight_decay=0.1, clip=0.5)
    optimiser = Optimiser(config, student.backbone_parameters(), (student.router_parameters(), 1e-2))
    phase = Phase("student", student, optimiser, method.student_loss, ema)
    optimiser = Optimiser(config, fake_score.backbone_parameters(), (fake_score.rung_parameters(), 1e-2))
    fakes = [Phase("fake_score", fake_score, optimiser, method.fake_score_loss)] * k
    judge = Phase("discriminator", heads, Optimiser(config, heads.parameters()), method.discriminator_loss)
    return (*fakes, judge, phase)


def trained(config: LaunchConfig, k: int, cycles: int = 0, resume: Path | None = None, **more: Any) -> dict[str, Any]:
    """The phases' states after `cycles` more cycles, from those in the file `resume` where it is given."""
    runtime = Runtime(config)
    cycle = cycle_of(runtime, k, **more)
    if resume is not None:
        states = torch.load(resume, weights_only=True)
        for phase in cycle[-3:]:
            phase.restore(states[phase.name])
    for _ in range(cycles or CYCLES[k]):
        for phase in cycle:
            update(phase, 0, BATCH, runtime)
    return {phase.name: phase.state() for phase in cycle}


def single_gradients(config: LaunchConfig) -> dict[str, Any]:
    """float32 gradients of one student update, by name."""
    AcceleratorState._reset_state()  # it holds one precision for a process's life
    runtime = Runtime(config)
    phase = cycle_of(runtime, 1, torch.float32)[-1]
    gradients(phase, 0, BATCH, runtime)
    AcceleratorState._reset_state()
    return gathered({name: p.grad for name, p in phase.network.named_parameters() if p.grad is not None})


def config(sharding: str, accumulation: int = 1, **more: Any) -> LaunchConfig:
    return LaunchConfig(cpu=bool(ON_CPU), sharding=sharding, accumulation=accumulation, **more)  # type: ignore[arg-type]


def divergence(sharding: str, harm: Callable[[Phase], None] | None, **more: Any) -> str:
    """What a run says that compares every two steps, if `harm` comes over one phase of rank 1 in step 3."""
    runtime = Runtime(config(sharding, check_every=2, **more))
    cycle = cycle_of(runtime, 1)
    inner = cycle[-1].loss

    def loss(draws: Draws):
        if harm is not None and runtime.rank == 1 and draws.step == 2:
            harm(cycle[-1])
        return inner(draws)

    cycle[-1].loss = loss
    course = Course(0, 6, BATCH, CheckpointConfig(every=100), 100, 100)
    loop = Loop(cycle, course, OpenRun(runtime, None, {"teacher": "a"}), lambda step: None)
    try:
        loop.run(0, RunLog(None))
    except ReplicaError as error:
        return str(error)
    return f"{cycle[-1].steps} steps"


@torch.no_grad()
def nudge(phase: Phase) -> None:
    local(phase.ema.module.blocks[1].mlp.fc1.weight)[0, 0] += 1e-12  # type: ignore[union-attr]


def hurry(phase: Phase) -> None:
    phase.optimiser.adamw.param_groups[1]["base_lr"] *= 1.001


def kept_threads() -> list[int]:
    """What is left of 7 threads that the launcher chose, and of 5 that the configuration asks for."""
    del os.environ["OMP_NUM_THREADS"]
    torch.set_num_threads(7)
    left = []
    for asked in (0, 5):
        AcceleratorState._reset_state(reset_partial_state=True)
        Runtime(config("none", threads=asked))
        left.append(torch.get_num_threads())
    torch.set_num_threads(1)
    return left


def by_two(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {"threads": kept_threads()}
    for sharding in ("none", "fsdp2"):
        found[f"{sharding} whole"] = trained(config(sharding, 5), 5)
        found[f"{sharding} halfway"] = trained(config(sharding), 2, CYCLES[2] // 2)
        halfway = folder / "halfway.pt"
        found[f"{sharding} resumed"] = trained(config(sharding, 2), 2, CYCLES[2] // 2, halfway, checkpointing=True)
        found[f"{sharding} gradients"] = single_gradients(config(sharding))
    found["dit"] = trained(config("fsdp2"), 1, 2, made=dits, checkpointing=True)
    found["loras"] = trained(config("none", 2), 2, 3, made=loras, checkpointing=True)
    found["bf16"] = single_gradients(config("fsdp2", precision="bf16"))
    found["replicas"] = [
        divergence("none", nudge),
        divergence("fsdp2", nudge, shard_among=1),
        divergence("fsdp2", hurry),
        divergence("fsdp2", None, shard_among=1),
    ]
    return found


def is_whole_again(runtime: Runtime, networks: list[nn.Module]) -> bool:
    """Whether the student is handed out as it was before its base was split."""
    before = merged(networks[1]).state_dict()  # type: ignore[arg-type]
    runtime.shard(*networks)
    whole = runtime.whole(networks[1])
    after = merged(whole).state_dict() if runtime.is_main else before  # type: ignore[arg-type]
    return before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def over_one_base(folder: Path, rank: int) -> dict[str, Any]:
    """Runs over a frozen base in parts, what a process holds of it, and reads of a file that rank 0 alone has."""
    found: dict[str, Any] = {
        "offload": trained(config("fsdp2", 2), 2, 2, made=over_a_half_base, checkpointing=True),
        "plain": trained(config("fsdp2"), 2, 2, made=loras),
    }
    runtime, networks = Runtime(config("fsdp2")), over_a_half_base(torch.float64)
    found["merged"] = is_whole_again(runtime, networks)
    found["held"] = sum(p.numel() for layer in block_layers(networks[1]) for p in layer.parameters(recurse=False))
    theirs = build_networks(dits(torch.float32)[0], ROUTING, memory=Memory("shared_lora", LoraConfig(rank=2)))  # type: ignore[arg-type]
    found["merged dit"] = is_whole_again(runtime, [theirs.teacher, theirs.student, theirs.fake_score])
    stored = contents([folder / "weights.safetensors"])
    if rank:
        stored = {name: Stored(folder / "absent", one.dtype, one.shape) for name, one in stored.items()}
    return found | {"read": {name: value.clone() for name, value in runtime.one_reads(stored)}}


def by_two_six_times() -> dict[str, Any]:
    """Six whole cycles: with five fake-score updates, and in one go with two."""
    return {str(k): trained(config("none", 2), k, 6) for k in CYCLES}


def by_four() -> dict[str, Any]:
    """Two copies of two parts each."""
    shared = {"shard_among": 2}
    found: dict[str, Any] = {"whole": trained(config("fsdp2", 5, **shared), 5)}
    return found | {"replicas": [divergence("fsdp2", nudge, **shared), divergence("fsdp2", None, **shared)]}


def work(rank: int, folder: str, port: int, processes: int, form: str) -> None:
    torch.set_num_threads(1)
    places = {"RANK": rank, "WORLD_SIZE": processes, "LOCAL_RANK": rank, "MASTER_PORT": port}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in places.items()}}
    if form == "base":
        made = over_one_base(Path(folder), rank)
    else:
        made = by_four() if processes == 4 else by_two_six_times() if form == "long" else by_two(Path(folder))
    torch.save(made, Path(folder) / f"found{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    given = (sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), " ".join(sys.argv[4:]))
    torch.multiprocessing.start_processes(work, given, nprocs=given[2], start_method="fork")
