"""What a distillation needs in memory, without weights: python -m dmd_dar.plan config=FILE.yaml [key=value ...]

It takes the keys of distill.py. launch.processes counts as 1 where it is 0, launch.precision auto as bf16 unless
launch.cpu is set.
"""

import copy
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from dmd_dar import config
from dmd_dar.distillation.config import DistillConfig
from dmd_dar.distillation.networks import Networks, networks_of
from dmd_dar.errors import UserError
from dmd_dar.models.codecs import planned_factor, vae_of
from dmd_dar.models.diffusers_denoiser import planned_transformer
from dmd_dar.models.families.form import FixedInputs
from dmd_dar.models.footprint import Footprint, emptied, nbytes, tensors, trace, without_data
from dmd_dar.models.frozen import block_layers
from dmd_dar.models.hub import configurations, is_hub_id, read_json
from dmd_dar.models.saved import holds_network
from dmd_dar.models.shared_lora import LoraDenoiser, Plain
from dmd_dar.models.sit import build_sit
from dmd_dar.models.sizes import shape_at
from dmd_dar.models.teachers import TeacherConfig, load_teacher, prompts_of
from dmd_dar.models.text import encoder_sizes

CARDS = (24, 40, 80, 141)  # GB of memory
FEW = 64  # samples up to which a call is followed; of more, on the line through two smaller numbers
TRACED = (8, 16)
USABLE = 0.9  # of it; the rest is the driver's, the allocator's and the kernels' work space
PUBLIC = re.compile(r"(?:sit|dit)[-_](s|b|l|xl)[-_](2|4|8)(?:[-_](\d+))?", re.IGNORECASE)


@dataclass(frozen=True)
class Plan:
    """Bytes of one process. `activations` include the routing history; `cpu` is what offload keeps off the device."""

    batch: int  # samples of a micro-batch
    parameters: dict[str, int]
    trained: dict[str, int]
    stored: dict[str, int]  # a shared tensor counts for the first network that has it
    gradients: int
    optimiser: int
    activations: int
    history: int | None  # None where the fake score is routed, too
    backward: int
    cpu: int
    parts: int  # processes among which weights, gradients and optimiser state are split
    divided: int  # of the weights, how much is split among them
    encoders: dict[str, int]  # parameters of the text encoders, which no run holds

    @property
    def weights(self) -> int:
        return sum(self.stored.values()) - self.divided + self.divided // self.parts - self.cpu

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimiser + self.activations + self.backward


def plan_of(cfg: DistillConfig) -> Plan:
    """The plan of a run. Raises UserError where nothing says what the teacher is, or the batch is uneven."""
    launch = cfg.launch
    processes = max(1, launch.processes)
    batch = launch.samples_at_a_time(cfg.batch_size, processes)
    parts = (launch.shard_among or processes) if launch.sharding == "fsdp2" else 1
    bf16 = launch.precision == "bf16" or (launch.precision == "auto" and not launch.cpu)
    teacher = outline(cfg.teacher)
    shape = largest_of(cfg, teacher)
    networks = networks_of(cfg, teacher)
    averages = [copy.deepcopy(networks.student).requires_grad_(False) for _ in cfg.student.decays]
    with without_data():
        traced = [networks.student, networks.fake_score]
        emptied(networks.teacher, *traced, *averages)
        student, fake = (footprint(network, batch, bf16, shape) for network in traced)
    return replace(_added_up(cfg, networks, averages, (student, fake), batch, parts), encoders=apart(cfg.teacher))


def largest_of(cfg: DistillConfig, teacher: Plain) -> tuple[int, ...]:
    """(C, H, W) of the run's largest images. Raises UserError for a size that cannot be, as the run does."""
    if not cfg.sized:
        return teacher.shape
    place, revision = cfg.teacher.codec, cfg.teacher.codec_revision
    if not place and (folder := described(cfg.teacher)) is not None:
        place, revision = vae_of(folder), ""
    factor = planned_factor(place, revision) if place else 1
    return max((shape_at(teacher, factor, *size) for size in cfg.pixels), key=math.prod)


def _added_up(
    cfg: DistillConfig,
    networks: Networks,
    averages: Sequence[nn.Module],
    footprints: tuple[Footprint, Footprint],
    batch: int,
    parts: int,
) -> Plan:
    student, fake = footprints
    every: dict[str, nn.Module] = {"teacher": networks.teacher, "student": networks.student}
    every |= {"fake_score": networks.fake_score}
    every |= {
        f"student average {decay:g}": network for decay, network in zip(cfg.student.decays, averages, strict=True)
    }
    updated = ["student", "fake_score"] if cfg.trains_fake_score else ["student"]
    grown = {name: [p for p in every[name].parameters() if p.requires_grad] for name in updated}
    seen: set[int] = set()
    stored = {}
    for name, network in every.items():
        own = [tensor for tensor in (*network.parameters(), *network.buffers()) if id(tensor) not in seen]
        seen |= {id(tensor) for tensor in own}
        stored[name] = nbytes(own)
    offloaded = [p for layer in block_layers(networks.teacher) for p in layer.parameters(recurse=False)]
    calls = (cfg.matching.weight > 0 or cfg.gan.used) + cfg.regression.used  # whose graphs stand at the same time
    of_student = calls * student.kept + cfg.gan.used * fake.kept
    games = 2 + bool(cfg.gan.r1_weight)  # real, made and, for R1, perturbed samples
    of_fake = fake.kept * (1 + games * bool(cfg.gan.used and cfg.gan.feature_weight))
    routed_too = bool(networks.fake_score.router_parameters())
    history = None if routed_too else max(0, student.kept - fake.kept) * calls
    largest = max(nbytes(parameters) for parameters in grown.values())
    shared = cfg.weights == "shared_lora"  # of which fsdp2 splits the base alone
    divided = nbytes(offloaded) if shared else sum(stored.values())
    each = 1 if shared else parts
    return Plan(
        batch=batch,
        parameters={name: sum(p.numel() for p in network.parameters()) for name, network in every.items()},
        trained={name: sum(p.numel() for p in parameters) for name, parameters in grown.items()},
        stored=stored,
        gradients=largest // each,
        optimiser=2 * sum(nbytes(parameters) for parameters in grown.values()) // each,
        activations=max(of_student, of_fake if cfg.trains_fake_score else 0),
        history=history,
        backward=max(0, student.peak - student.kept - nbytes(grown["student"])),
        cpu=nbytes(offloaded) // (parts if shared else 1) if cfg.launch.offload else 0,
        parts=parts,
        divided=divided,
        encoders={},
    )


def footprint(network: Plain | LoraDenoiser, batch: int, bf16: bool, shape: tuple[int, ...] | None = None) -> Footprint:
    """Of one call of the network with gradient, on `batch` samples of `shape` (C, H, W), None for its own.

    More than FEW are not traced, since the routing works through a large batch in many pieces.
    """
    shape = shape or network.shape
    if batch <= FEW:
        return _traced(network, batch, bf16, shape)
    few, more = TRACED
    low, high = (_traced(network, samples, bf16, shape) for samples in TRACED)
    further = (batch - more) / (more - few)
    kept, peak = (round(b + further * (b - a)) for a, b in ((low.kept, high.kept), (low.peak, high.peak)))
    return Footprint(kept, peak)


def _traced(network: Plain | LoraDenoiser, batch: int, bf16: bool, shape: tuple[int, ...]) -> Footprint:
    x = torch.zeros(batch, *shape)
    t, cond = torch.zeros(batch), torch.zeros(batch, dtype=torch.long)

    def call() -> Tensor:
        return network(x, t, cond, 0)

    return trace(call, tensors(network), bf16)


def outline(teacher: TeacherConfig) -> Plain:
    """The teacher from its files or, where these are not here, by the name of a public one; on the meta device."""
    if (place := described(teacher)) is not None:
        return _by_configuration(place, teacher)
    named = PUBLIC.search(Path(teacher.path).name)
    if named is None:
        raise UserError(
            f"teacher.path = {teacher.path}: no such file or folder, no hub id, and no name of a public SiT or DiT,"
            " such as SiT-XL-2-256x256.pt, that says what it is"
        )
    size, patch, pixels = named.groups()
    with torch.device("meta"):
        return build_sit(f"{size.upper()}/{patch}", input_size=int(pixels or 256) // 8).requires_grad_(False)


def described(teacher: TeacherConfig) -> Path | None:
    """The teacher's folder or file or, of a hub id, its configurations; None for one that is known by name at most."""
    place = Path(teacher.path)
    here = place.exists() or (PUBLIC.search(place.name) is None and is_hub_id(teacher.path))
    return configurations(teacher.path, teacher.revision) if here else None


def _by_configuration(place: Path, teacher: TeacherConfig) -> Plain:
    """Of diffusers' own folders by config.json alone; of others, which are small, from their weights."""
    folder = place / "transformer" if (place / "transformer").is_dir() else place
    if holds_network(place) or not (folder / "config.json").is_file():
        network = load_teacher(teacher).network
        if (prompts := network.prompts) is not None:
            prompts.blank()
        return network.to("meta")
    index = place / "model_index.json"
    pipeline = str(read_json(index).get("_class_name")) if index.is_file() else ""
    fixed = FixedInputs(teacher.input_size, teacher.embedded_guidance)
    return planned_transformer(folder, prompts_of(teacher), fixed, pipeline)


def apart(teacher: TeacherConfig) -> dict[str, int]:
    """Parameters of the text encoders of the teacher's pipeline: they lie in memory while prompts are encoded only."""
    folder = described(teacher)
    return {} if folder is None else encoder_sizes(folder)


def table(plan: Plan) -> str:
    """The plan as it is printed."""
    lines = [f"{'network':22}{'parameters':>14}{'trained':>14}{'stored, MB':>14}"]
    for name, count in plan.parameters.items():
        row = (f"{count:,}", f"{plan.trained.get(name, 0):,}", _mb(plan.stored[name]))
        lines.append(f"{name:22}" + "".join(f"{cell:>14}" for cell in row))
    split = f", its part of {plan.parts}" if plan.parts > 1 else ""
    lines += ["", f"one process, {plan.batch} samples at a time{split}:"]
    parts = {
        "weights": plan.weights,
        "gradients": plan.gradients,
        "optimiser state": plan.optimiser,
        "activations": plan.activations,
        "  of these, routing": plan.history,
        "backward pass": plan.backward,
        "total": plan.total,
    }
    lines += [f"{name:22}{_mb(count):>14} MB" for name, count in parts.items() if count is not None]
    for name, count in plan.encoders.items():
        lines.append(f"apart, while prompts are encoded: {name}, {count:,} parameters, {_mb(2 * count)} MB in bfloat16")
    if plan.cpu:
        lines.append(f"{'in CPU memory':22}{_mb(plan.cpu):>14} MB")
    fits = [f"{card} GB {'yes' if plan.total <= USABLE * card * 1e9 else 'no'}" for card in CARDS]
    lines += ["", f"fits, with {1 - USABLE:.0%} left free: " + ", ".join(fits)]
    lines.append(
        "not counted: codec, LPIPS, the GAN's heads, prompts (2 GB at most), what the libraries themselves take"
    )
    return "\n".join(lines)


def _mb(count: int) -> str:
    return f"{count / 1e6:,.1f}"


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    words = argv if any(argument.startswith("out_dir=") for argument in argv) else [*argv, "out_dir=unused"]
    config.run_job(DistillConfig, lambda cfg: print(table(plan_of(cfg))), words, description=__doc__ or "")


if __name__ == "__main__":
    main()
