"""The method that a configuration describes: three velocities, and the trajectories, data and heads of its losses."""

from collections.abc import Callable

import torch
from torch import Tensor

from dmd_dar import losses
from dmd_dar.data.sources import Source, open_data
from dmd_dar.distillation.config import DistillConfig
from dmd_dar.distillation.identity import Inputs, recipe_of, shapes_of
from dmd_dar.distillation.networks import Networks
from dmd_dar.errors import UserError
from dmd_dar.guidance import Velocity
from dmd_dar.methods.dmd import DMD, Guidance, Regression
from dmd_dar.methods.gan import GAN, Batch
from dmd_dar.methods.sizes import Sizes
from dmd_dar.methods.turns import Turns
from dmd_dar.models.codecs import Codec
from dmd_dar.models.denoiser import Meaning, Prediction, velocity_of
from dmd_dar.models.discriminator import Heads, chosen_layers, features_of, width_of
from dmd_dar.models.guided import guided_velocity
from dmd_dar.models.perceptual import lpips_loss
from dmd_dar.pairs import Recipe, RegressionConfig, trajectories_for
from dmd_dar.train.processes.runtime import Runtime
from dmd_dar.train.watch.failure import Calls


def build_method(
    cfg: DistillConfig, inputs: Inputs, networks: Networks, runtime: Runtime, calls: Calls | None = None
) -> DMD:
    """The method over the three networks' velocities; `calls` remembers their last calls, for where one fails."""
    calls, prediction = calls or Calls(), inputs.teacher.prediction
    shapes = shapes_of(cfg, inputs.teacher, inputs.codec)
    recipes = [recipe_of(cfg, inputs.teacher, shape) for shape in shapes]
    recipe, sizes = recipes[0], Sizes(shapes)
    guided = guided_velocity(networks.teacher, prediction, cfg.guidance_scale, cfg.guidance)
    real = real_batches(cfg, recipe, inputs.data or open_data(cfg.data, runtime.device)) if cfg.needs_data else None
    guidance = gan = None
    if cfg.matching.dm_form == "decoupled":
        unguided = calls.watch("unguided_teacher", velocity_of(networks.teacher, prediction))
        guidance = Guidance(runtime.without_gradients(unguided, "score"), cfg.matching.guidance_time)
    if real is not None and cfg.gan.used:
        gan = build_gan(cfg, prediction, networks, real, runtime.device)
    student = runtime.without_gradients(calls.watch("student", velocity_of(networks.student, prediction)), "rollout")
    fake_score = calls.watch("fake_score", velocity_of(networks.fake_score, prediction))
    turns = None
    if cfg.rollouts == "shared" and cfg.student_input == "simulate":
        starts = {"fake_score": cfg.fake_score_start}
        turns = Turns(cfg.updates, student, cfg.rungs, recipe.num_classes, recipe.shape, cfg.sampler, starts, sizes)
        prompts = inputs.teacher.network.prompts
        turns.ahead = None if prompts is None or prompts.small else prompts.ahead
    return DMD(
        student=student,
        teacher=runtime.without_gradients(calls.watch("teacher", guided), "score"),
        fake_score=runtime.without_gradients(fake_score, "score"),
        rungs=cfg.rungs,
        renoise=cfg.matching.time,
        num_classes=recipe.num_classes,
        shape=recipe.shape,
        sampler=cfg.sampler,
        data=real if cfg.student_input == "data" else None,
        matching_weight=cfg.matching.weight,
        matching_start=cfg.matching.start,
        x0_space=cfg.fake_score.space == "x0",
        guidance=guidance,
        regression=build_regression(cfg.regression, recipes, guided, runtime, inputs.codec, sizes),
        gan=gan,
        turns=turns,
        above_next_rung=cfg.matching.above_next_rung,
        sizes=sizes,
    )


def real_batches(cfg: DistillConfig, recipe: Recipe, data: Source) -> Batch:
    """Real data for the GAN or the student's input; a UserError where it is not of the teacher's kind."""
    if (tuple(data.shape), data.num_classes) != (recipe.shape, recipe.num_classes):
        purpose = "student_input = data" if cfg.student_input == "data" else f"gan.weight = {cfg.gan.weight:g}"
        raise UserError(
            f"{purpose}: this needs real data like the teacher's, {list(recipe.shape)} in {recipe.num_classes} classes,"
            f" but data.name {cfg.data.name} gives {list(data.shape)} in {data.num_classes}; name other data"
        )
    return data.batch


def build_gan(
    cfg: DistillConfig, prediction: Prediction | Meaning, networks: Networks, real: Batch, device: torch.device
) -> GAN:
    """The game and its fresh heads, which are the same for every student of a seed."""
    network = networks.fake_score if cfg.gan.features == "fake_score" else networks.teacher
    try:
        layers = chosen_layers(cfg.gan.layers, len(network.block_readers()))
    except ValueError as error:
        raise UserError(f"gan.{error}") from error
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cfg.seed)
        heads = Heads(width_of(network), len(layers), cfg.gan.pool, cfg.gan.hidden).to(device)
    return GAN(
        features=features_of(network, velocity_of(network, prediction), layers),
        heads=heads,
        real=real,
        time=cfg.gan.time,
        weight=cfg.gan,
        feature_weight=cfg.gan.feature_weight,
        r1_weight=cfg.gan.r1_weight,
        r1_sigma=cfg.gan.r1_sigma,
    )


def build_regression(
    cfg: RegressionConfig,
    recipes: list[Recipe],
    teacher: Velocity,
    runtime: Runtime,
    codec: Codec | None,
    sizes: Sizes | None = None,
) -> Regression | None:
    """The term with its trajectories of each size, which the main process makes if nobody has; None where it is off."""
    if not cfg.used:
        return None
    with runtime.main_first():
        first, *others = (trajectories_for(cfg, recipe, teacher, runtime.device) for recipe in recipes)
    distance = distance_of(cfg, runtime.device, codec)
    return Regression(first, cfg, distance, cfg.by_rung, tuple(others), sizes, cfg.target)


def distance_of(cfg: RegressionConfig, device: torch.device, codec: Codec | None) -> Callable[[Tensor, Tensor], Tensor]:
    """The term's distance; LPIPS compares images, so latents are decoded for it."""
    if cfg.metric != "lpips":
        plain = {"pseudo_huber": losses.pseudo_huber_loss, "spectrum": losses.spectrum_loss}
        return plain.get(cfg.metric, losses.regression_loss)
    lpips = lpips_loss(device)
    return lpips if codec is None else lambda x, target: lpips(codec.decode(x), codec.decode(target))
