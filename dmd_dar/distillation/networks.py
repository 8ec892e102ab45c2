"""The three networks of a distillation: the frozen teacher, and the student and fake score that start as it."""

import copy
from dataclasses import dataclass, field

import torch

from dmd_dar.distillation.config import DistillConfig
from dmd_dar.errors import UserError
from dmd_dar.models.diffusers_denoiser import routed_copy
from dmd_dar.models.frozen import Kept, computes_on, store
from dmd_dar.models.shared_lora import LoraConfig, LoraDenoiser, Plain, Weights, shared_copy
from dmd_dar.models.sit import SiT, with_routing
from dmd_dar.routing.layout import RoutingConfig


@dataclass(frozen=True)
class Networks:
    """The three networks of a distillation, each a `denoiser.ConditionalNetwork`."""

    teacher: Plain
    student: Plain | LoraDenoiser
    fake_score: Plain | LoraDenoiser


@dataclass(frozen=True)
class Memory:
    """What is kept of the networks, in which form."""

    weights: Weights = "full"
    lora: LoraConfig = field(default_factory=LoraConfig)
    kept: Kept = field(default_factory=Kept)
    checkpointing: bool = False


def networks_of(cfg: DistillConfig, teacher: Plain) -> Networks:
    """The three networks in the form that the configuration says; `teacher` may be stored otherwise afterwards."""
    memory = Memory(cfg.weights, cfg.lora, kept_of(cfg), cfg.launch.checkpointing)
    rungs = len(cfg.rungs) if cfg.fake_score.per_rung else 1
    routing = cfg.student.routing
    return build_networks(teacher, routing.form(), routing.allow_change, memory, rungs, cfg.seed)


def kept_of(cfg: DistillConfig) -> Kept:
    """How the frozen network is kept while the run trains."""
    return Kept(torch.bfloat16 if cfg.frozen_dtype == "bfloat16" else None, cfg.launch.offload)


def kept_at_once(cfg: DistillConfig) -> Kept:
    """How the teacher is kept from when it is read: a full student and fake score start from it in float32."""
    return kept_of(cfg) if cfg.weights == "shared_lora" else Kept()


def build_networks(
    teacher: Plain,
    routing: RoutingConfig,
    allow_change: bool = False,
    memory: Memory | None = None,
    rungs: int = 1,
    seed: int = 0,
) -> Networks:
    """Student, under `routing`, and fake score, both starting as the teacher's function.

    `full`: weights of their own. `shared_lora`: the teacher's weights and adapters of their own, whose start is keyed
    by `seed`. With several `rungs`, the fake score is told them apart (models/rungs.py).
    Raises UserError where the routing would change that function and `allow_change` is not set.
    """
    memory = memory or Memory()
    shared = memory.weights == "shared_lora"
    device = computes_on(teacher)
    if shared:
        store(teacher, memory.kept.dtype, memory.kept.offload)
    copied = shared_copy if shared else copy.deepcopy
    routed = with_routing if isinstance(teacher, SiT) else routed_copy
    try:
        student = routed(teacher, routing, allow_change, copied)  # type: ignore[arg-type]
    except ValueError as error:
        raise UserError(f"student.{error}") from error
    fake_score = copied(teacher)
    if rungs > 1:
        fake_score.tell_rungs_apart(rungs, device)
    pair = {"student": student, "fake_score": fake_score}
    if shared:
        student, fake_score = (
            LoraDenoiser(network, memory.lora, device, seed, role).train() for role, network in pair.items()
        )
    else:
        student, fake_score = (_trainable(network) for network in pair.values())
        store(teacher, memory.kept.dtype, memory.kept.offload)
    if memory.checkpointing:
        student.checkpoint_activations()
        fake_score.checkpoint_activations()
    return Networks(teacher, student, fake_score)


def _trainable(network: Plain) -> Plain:
    """All weights but the fixed position table."""
    network.train().requires_grad_(True)
    if isinstance(network, SiT):
        network.pos_embed.requires_grad_(False)
    return network
