"""Distil a few-step student from a teacher: python distill.py config=FILE.yaml [key=value ...]"""

import functools
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from dmd_dar import config, losses, plan
from dmd_dar.data.latents import Latents
from dmd_dar.data.sources import Source, data_hash, open_data
from dmd_dar.distillation.config import DistillConfig, networks_of
from dmd_dar.errors import UserError
from dmd_dar.methods.dmd import DMD
from dmd_dar.methods.gan import GAN, Batch
from dmd_dar.methods.generate import Generator, decoded, few_step_generator, ode_generator
from dmd_dar.methods.rollout import Condition, rung_condition, same_condition
from dmd_dar.models.codecs import Codec
from dmd_dar.models.denoiser import Meaning, Prediction, velocity_of
from dmd_dar.models.discriminator import Heads, block_readers, chosen_layers, features_of, width_of
from dmd_dar.models.perceptual import lpips_loss
from dmd_dar.models.rungs import rung_parameters
from dmd_dar.models.saved import ModelCard
from dmd_dar.models.students import Networks
from dmd_dar.models.teachers import Denoiser, Teacher, codec_of, guided_velocity, load_teacher, origin_of
from dmd_dar.pairs import Recipe, RegressionConfig, StoredTrajectories, trajectories_for
from dmd_dar.train.disk.export import export
from dmd_dar.train.disk.folder import RunFolder
from dmd_dar.train.loop.ema import Ema
from dmd_dar.train.loop.job import Pictures, Results, begin, open_run, run_cycle
from dmd_dar.train.loop.loop import OpenRun, Phase, Watch
from dmd_dar.train.loop.optimise import Optimiser
from dmd_dar.train.processes import launch
from dmd_dar.train.processes.runtime import Runtime
from dmd_dar.train.watch.failure import Calls
from dmd_dar.train.watch.health import SOLVER_STEPS, Health
from dmd_dar.train.watch.preflight import preflight


def recipe_of(cfg: DistillConfig, teacher: Denoiser, digest: str) -> Recipe:
    """The trajectories this run needs; `digest` is the teacher's."""
    shape = (teacher.config.in_channels, teacher.config.input_size, teacher.config.input_size)
    return Recipe(
        teacher=digest,
        guidance_scale=cfg.guidance_scale,
        rungs=cfg.rungs,
        solver_steps=cfg.regression.solver_steps,
        seed=cfg.regression.seed,
        count=cfg.regression.count,
        num_classes=teacher.config.num_classes,
        shape=shape,
    )


def build_method(
    cfg: DistillConfig,
    recipe: Recipe,
    prediction: Prediction | Meaning,
    networks: Networks,
    runtime: Runtime,
    codec: Codec | None = None,
    calls: Calls | None = None,
    data: Source | None = None,
) -> DMD:
    """The method over three velocities, with the trajectories, the real data and the GAN that its losses want.

    `calls` remembers the networks' last calls, for what is left where one fails. `data` is cfg.data, if it is open.
    """
    calls = calls or Calls()
    teacher_velocity = guided_velocity(networks.teacher, prediction, cfg.guidance_scale)
    unguided = calls.watch("unguided_teacher", velocity_of(networks.teacher, prediction))
    real = real_batches(cfg, recipe, data or open_data(cfg.data, runtime.device)) if cfg.needs_data else None
    told = bool(rung_parameters(networks.fake_score))
    asked = rung_condition(cfg.rungs, recipe.num_classes) if told else same_condition
    gan = None
    if real is not None and cfg.gan.used:
        gan = build_gan(cfg, prediction, networks, real, runtime.device, asked)
    pairs = None
    if cfg.regression.used:
        with runtime.main_first():
            pairs = trajectories_for(cfg.regression, recipe, teacher_velocity, runtime.device)
    return DMD(
        student=calls.watch("student", velocity_of(networks.student, prediction)),
        teacher=calls.watch("teacher", teacher_velocity),
        fake_score=calls.watch("fake_score", velocity_of(networks.fake_score, prediction)),
        rungs=cfg.rungs,
        renoise=cfg.matching.time,
        num_classes=recipe.num_classes,
        shape=recipe.shape,
        sampler=cfg.sampler,
        data=real if cfg.student_input == "data" else None,
        matching_weight=cfg.matching.weight,
        unguided_teacher=unguided if cfg.matching.dm_form == "decoupled" else None,
        guidance_time=cfg.matching.guidance_time,
        regression_weight=cfg.regression,
        distance=distance_of(cfg.regression, runtime.device, codec),
        trajectories=pairs,
        gan=gan,
        x0_space=cfg.fake_score.space == "x0",
        fake_condition=asked,
    )


def real_batches(cfg: DistillConfig, recipe: Recipe, data: Source) -> Batch:
    """Real data for the GAN or the student's input; a ConfigError where it is not of the teacher's kind."""
    if (tuple(data.shape), data.num_classes) != (recipe.shape, recipe.num_classes):
        asking = "student_input = data" if cfg.student_input == "data" else f"gan.weight = {cfg.gan.weight:g}"
        raise config.ConfigError(
            f"{asking}: this needs real data like the teacher's, {list(recipe.shape)} in {recipe.num_classes} classes,"
            f" but data.name {cfg.data.name} gives {list(data.shape)} in {data.num_classes}; name other data"
        )
    return data.batch


def build_gan(
    cfg: DistillConfig,
    prediction: Prediction | Meaning,
    networks: Networks,
    real: Batch,
    device: torch.device,
    fake_condition: Condition = same_condition,
) -> GAN:
    """The game and its fresh heads, which are the same for every student of a seed."""
    network = networks.fake_score if cfg.gan.features == "fake_score" else networks.teacher
    try:
        depth = len(block_readers(network))
    except ValueError as error:
        raise config.ConfigError(f"gan.features = {cfg.gan.features}: {error}; set gan.weight=0") from error
    try:
        layers = chosen_layers(cfg.gan.layers, depth)
    except ValueError as error:
        raise config.ConfigError(f"gan.{error}") from error
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
        condition=fake_condition if cfg.gan.features == "fake_score" else same_condition,
        r1_weight=cfg.gan.r1_weight,
        r1_sigma=cfg.gan.r1_sigma,
    )


def distance_of(
    regression: RegressionConfig, device: torch.device, codec: Codec | None
) -> Callable[[Tensor, Tensor], Tensor]:
    """The regression loss's distance; LPIPS compares images, so latents are decoded for it."""
    if not regression.used or regression.metric != "lpips":
        plain = {"pseudo_huber": losses.pseudo_huber_loss, "spectrum": losses.spectrum_loss}
        return plain.get(regression.metric, losses.regression_loss)
    lpips = lpips_loss(device)
    return lpips if codec is None else lambda x, target: lpips(codec.decode(x), codec.decode(target))


def open_teacher(cfg: DistillConfig, device: torch.device) -> tuple[Teacher, Codec | None]:
    """The frozen teacher and the codec of its latents, None for pixels; a ConfigError where they do not fit.

    Its classes may be others than those of `data`, which stays closed.
    """
    try:
        teacher = load_teacher(cfg.teacher, device)
        codec = codec_of(teacher, device)
    except UserError as error:
        raise config.ConfigError(f"teacher.path = {cfg.teacher.path}: {error}") from error
    channels, size = teacher.network.config.in_channels, teacher.network.config.input_size
    made = f"teacher.path = {cfg.teacher.path}: it makes {channels} channels of {size} x {size}"
    if codec is None and channels != 3:
        raise config.ConfigError(f"{made}, not RGB: set teacher.codec to the VAE of its latents, a folder or a hub id")
    if codec is None and cfg.data.name != "latents" and size != cfg.data.size:
        raise config.ConfigError(f"{made}, not data.size {cfg.data.size}; set data.size, or name another teacher")
    if codec is not None and channels != codec.channels:
        raise config.ConfigError(f"{made}, but latents of teacher.codec {teacher.codec} have {codec.channels} channels")
    return teacher, codec


def open_source(cfg: DistillConfig, teacher: Teacher, codec: Codec | None, device: torch.device) -> Source | None:
    """The data, opened once, if this run looks at any; a ConfigError where they do not fit the teacher."""
    latents = cfg.data.name == "latents"
    if not (cfg.preflight or cfg.needs_data or latents):
        return None
    data, shape = open_data(cfg.data, device), teacher.network.config
    if cfg.needs_data and getattr(shape, "prompted", False) and not teacher.knows(data.label_names):
        raise config.ConfigError(
            f"data.name = {cfg.data.name}: its classes are no prompts: encode their names, in order, or one description"
            " each with teacher.prompts_are_classes=true; or set gan.weight=0 and student_input=simulate"
        )
    if isinstance(data, Latents):
        data.require(codec.digest() if codec else "", (shape.in_channels, shape.input_size, shape.input_size))
    return data


def identity_of(cfg: DistillConfig, teacher: Teacher, codec: Codec | None, data: Source | None) -> dict[str, str]:
    """Hashes of what the configuration names by path."""
    held = {"teacher": teacher.digest, "data": data_hash(cfg.data) if data is None else data.hash}
    return held if codec is None else {**held, "codec": codec.digest()}


def build_health(
    cfg: DistillConfig, runtime: Runtime, method: DMD, codec: Codec | None, student: Generator, cycle: tuple[Phase, ...]
) -> Health:
    """The averaged student's samples are held against the guided teacher's, by its ODE."""
    return Health(
        every=cfg.log.health_every,
        count=cfg.log.health_samples,
        seed=cfg.seed,
        student=student,
        teacher=ode_generator(method.teacher, SOLVER_STEPS),
        decode=codec and codec.decode,
        shape=method.shape,
        num_classes=method.num_classes,
        runtime=runtime,
        optimisers={phase.name: phase.optimiser for phase in cycle},
    )


def distill(cfg: DistillConfig) -> None:
    """Run, or continue, the job. The averaged student lands in out_dir/student, averages of other decays beside it."""
    runtime = Runtime(cfg.launch)
    with open_run(cfg, runtime) as folder:
        train(cfg, runtime, folder)


def train(cfg: DistillConfig, runtime: Runtime, folder: RunFolder | None) -> None:
    """The job in its folder, which is None in all processes but the main one."""
    teacher, codec = open_teacher(cfg, runtime.device)
    data = open_source(cfg, teacher, codec, runtime.device)
    if cfg.preflight and data is not None:
        preflight(runtime, teacher, data, codec, cfg.seed)
    identity = identity_of(cfg, teacher, codec, data)
    networks = networks_of(cfg, teacher.network)
    student, fake_score = networks.student, networks.fake_score
    recipe = recipe_of(cfg, teacher.network, teacher.digest)
    calls = Calls()
    method = build_method(cfg, recipe, teacher.prediction, networks, runtime, codec, calls, data)
    ema = Ema(student, *cfg.student.decays)
    runtime.shard(teacher.network, student, fake_score, *ema.modules.values())
    routers = student.router_parameters(), cfg.student.routing.lr
    optimiser = Optimiser(cfg.student, student.backbone_parameters(), routers)
    student_phase = Phase("student", student, optimiser, method.student_loss, ema)
    routers = fake_score.router_parameters(), cfg.student.routing.lr
    rungs = rung_parameters(fake_score), cfg.fake_score.rung_lr
    optimiser = Optimiser(cfg.fake_score, fake_score.backbone_parameters(), routers, rungs)
    fake_phase = Phase("fake_score", fake_score, optimiser, method.fake_score_loss)
    cycle = [fake_phase] * (cfg.fake_score.updates if cfg.trains_fake_score else 0)
    if method.gan is not None:
        optimiser = Optimiser(cfg.gan, method.gan.heads.parameters())
        cycle += [Phase("discriminator", method.gan.heads, optimiser, method.discriminator_loss)] * cfg.gan.updates
    if isinstance(method.trajectories, StoredTrajectories):
        identity["pairs"] = method.trajectories.shards.hash
    origin = {**identity, "guidance_scale": cfg.guidance_scale, **origin_of(teacher, codec)}
    card = ModelCard(teacher.prediction, cfg.rungs, teacher.label_names, origin, cfg.sampler)
    velocity = calls.watch("averaged_student", velocity_of(ema.module, teacher.prediction))
    averaged = few_step_generator(velocity, cfg.rungs, cfg.sampler)
    cycle = (*cycle, student_phase)
    others = {f"student_ema_{decay}": other for decay, other in ema.modules.items() if other is not ema.module}
    begin(runtime, folder)
    run_cycle(
        cfg,
        OpenRun(runtime, folder, identity, Path(cfg.out_dir)),
        cycle,
        watch=Watch(calls, build_health(cfg, runtime, method, codec, averaged, cycle)),
        pictures=Pictures(decoded(averaged, codec and codec.decode), recipe.shape, recipe.num_classes),
        results=Results(
            {"student": ema.module, **others},
            lambda place, network, step: export(place, network, card.at(step), codec),
        ),
    )


def planned(cfg: DistillConfig) -> str:
    """What the run needs in memory, or why that is not known."""
    try:
        return plan.table(plan.plan_of(cfg))
    except UserError as error:
        return f"no plan: {error}"


def main(argv: list[str] | None = None) -> None:
    config.run_job(
        DistillConfig,
        functools.partial(launch.run, distill),
        sys.argv[1:] if argv is None else argv,
        description=__doc__,
        plan=planned,
    )
