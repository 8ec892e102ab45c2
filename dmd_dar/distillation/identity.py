"""What a distillation is made from: its teacher, codec and data, what they are known by, and what its card says."""

from dataclasses import dataclass

import torch

from dmd_dar.data.latents import Latents
from dmd_dar.data.sources import Source, data_hash, open_data
from dmd_dar.distillation.config import DistillConfig
from dmd_dar.distillation.networks import kept_at_once
from dmd_dar.errors import UserError
from dmd_dar.methods.dmd import DMD
from dmd_dar.models.codecs import Codec
from dmd_dar.models.diffusers_denoiser import Reading
from dmd_dar.models.guided import rule_of
from dmd_dar.models.saved import ModelCard
from dmd_dar.models.sizes import pixels_of, shape_at
from dmd_dar.models.teachers import Teacher, open_teacher, origin_of
from dmd_dar.pairs import Recipe, StoredTrajectories
from dmd_dar.routing.tensor_files import Reader, tensors_in


@dataclass(frozen=True)
class Inputs:
    """What the configuration names by path, opened once. `codec` is None for pixels, `data` where none is looked at."""

    teacher: Teacher
    codec: Codec | None = None
    data: Source | None = None


def open_inputs(cfg: DistillConfig, device: torch.device, reader: Reader = tensors_in) -> Inputs:
    """Teacher, codec and data; a UserError where they do not fit each other. `reader` reads the teacher's weights."""
    teacher, codec = open_teacher(cfg.teacher, cfg.data, device, cfg.sized, Reading(kept_at_once(cfg), reader))
    shapes_of(cfg, teacher, codec)
    return Inputs(teacher, codec, open_source(cfg, teacher, codec, device))


def open_source(cfg: DistillConfig, teacher: Teacher, codec: Codec | None, device: torch.device) -> Source | None:
    """The data, opened once, if this run looks at any; a UserError where they do not fit the teacher."""
    latents = cfg.data.name == "latents"
    if not (cfg.preflight or cfg.needs_data or latents):
        return None
    data, network = open_data(cfg.data, device), teacher.network
    if cfg.needs_data and network.prompts is not None and not teacher.knows(data.label_names):
        raise UserError(
            f"data.name = {cfg.data.name}: its classes are no prompts: encode their names, in order, or one description"
            " each with teacher.prompts_are_classes=true; or set gan.weight=0 and student_input=simulate"
        )
    if isinstance(data, Latents):
        data.require(codec.digest() if codec else "", shapes_of(cfg, teacher, codec)[0])
    return data


def shapes_of(cfg: DistillConfig, teacher: Teacher, codec: Codec | None) -> tuple[tuple[int, int, int], ...]:
    """(C, H, W) of each size of the run. A UserError for one that teacher or VAE cannot make."""
    factor, shapes = 1 if codec is None else codec.factor, []
    for height, width in cfg.pixels:
        try:
            shapes.append(shape_at(teacher.network, factor, height, width))
        except UserError as error:
            raise UserError(f"sizes: {error}" if cfg.sizes else str(error)) from error
    return tuple(shapes)


def recipe_of(cfg: DistillConfig, teacher: Teacher, shape: tuple[int, ...]) -> Recipe:
    """The trajectories of the teacher that this run needs, of that shape."""
    return Recipe(
        teacher=teacher.digest,
        guidance_scale=cfg.guidance_scale,
        rungs=cfg.rungs,
        solver=cfg.regression.ode,
        seed=cfg.regression.seed,
        count=cfg.regression.count,
        num_classes=teacher.network.num_conditions,
        shape=shape,
        guidance=rule_of(teacher.network, cfg.guidance_scale, cfg.guidance).facts(),
    )


def identity_of(cfg: DistillConfig, inputs: Inputs, method: DMD) -> dict[str, str]:
    """Hashes of what the configuration names by path: "teacher", "data" and, where there are any, "codec", "pairs"."""
    hashes = {
        "teacher": inputs.teacher.digest,
        "data": data_hash(cfg.data) if inputs.data is None else inputs.data.hash,
    }
    if inputs.codec is not None:
        hashes["codec"] = inputs.codec.digest()
    if method.regression is not None and isinstance(method.regression.trajectories, StoredTrajectories):
        hashes["pairs"] = method.regression.trajectories.shards.hash
    return hashes


def card_of(cfg: DistillConfig, inputs: Inputs, identity: dict[str, str]) -> ModelCard:
    """The card of the students: how to use them, and where they come from."""
    teacher = inputs.teacher
    rule = rule_of(teacher.network, cfg.guidance_scale, cfg.guidance).facts()
    origin = {**identity, "guidance_scale": cfg.guidance_scale, **({"guidance": rule} if rule else {})}
    origin |= origin_of(teacher, inputs.codec)
    if cfg.sized:
        factor = 1 if inputs.codec is None else inputs.codec.factor
        shapes = shapes_of(cfg, teacher, inputs.codec)
        origin["sizes"] = [list(pixels_of(shape, factor)) for shape in shapes]  # the first is sampled by default
    return ModelCard(teacher.prediction, cfg.rungs, teacher.label_names, origin, cfg.sampler)
