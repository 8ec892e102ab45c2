"""Distil a few-step student from a teacher: python distill.py config=FILE.yaml [key=value ...]"""

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

from torch import nn

from dmd_dar import config, plan
from dmd_dar.data.kept import Kept
from dmd_dar.distillation.config import DistillConfig
from dmd_dar.distillation.identity import Inputs, card_of, identity_of, open_inputs, shapes_of
from dmd_dar.distillation.method import build_method
from dmd_dar.distillation.networks import Networks, networks_of
from dmd_dar.errors import UserError
from dmd_dar.methods.dmd import DMD
from dmd_dar.methods.generate import Generator, decoded, few_step_generator, ode_generator
from dmd_dar.methods.solvers import Solver
from dmd_dar.models.denoiser import velocity_of
from dmd_dar.models.guided import guided_velocity, rule_of
from dmd_dar.train.disk.export import export
from dmd_dar.train.disk.folder import RunFolder
from dmd_dar.train.loop.ema import Ema, Follower
from dmd_dar.train.loop.fitting import Rehearsal, fit_run
from dmd_dar.train.loop.job import Pictures, Results, begin, open_run, run_cycle
from dmd_dar.train.loop.loop import OpenRun, Phase, Watch
from dmd_dar.train.loop.optimise import Optimiser
from dmd_dar.train.processes import launch
from dmd_dar.train.processes.compiling import FirstTurn, compile_run
from dmd_dar.train.processes.runtime import Runtime
from dmd_dar.train.watch.failure import Calls
from dmd_dar.train.watch.health import Health, Panel
from dmd_dar.train.watch.preflight import preflight
from dmd_dar.train.watch.stopping import Stopping


@dataclass(frozen=True)
class Assembled:
    """A distillation that is ready to train, in one process."""

    cfg: DistillConfig
    runtime: Runtime
    inputs: Inputs
    networks: Networks
    method: DMD
    identity: dict[str, str]  # see identity_of
    calls: Calls  # of the networks of `method` and of the averaged student
    averages: Ema  # of the student
    cycle: tuple[Phase, ...]  # the student's last


def distill(cfg: DistillConfig) -> None:
    """Run, or continue, the job. The averaged student lands in out_dir/student, averages of other decays beside it."""
    runtime = Runtime(cfg.launch)
    with open_run(cfg, runtime) as folder:
        assembled = assemble(cfg, runtime, checked_inputs(cfg, runtime))
        found = fit_run(cfg, runtime, folder, rehearsal_of(assembled))
        turns = compile_run(cfg, runtime, folder, vars(assembled.networks))
        begin(runtime, folder)
        train(assembled, folder, turns, found)


def checked_inputs(cfg: DistillConfig, runtime: Runtime) -> Inputs:
    """Teacher, codec and data; a UserError where they do not fit, or where the teacher does not denoise the data."""
    inputs = open_inputs(cfg, runtime.device, runtime.one_reads)
    if cfg.preflight and inputs.data is not None:
        shape = shapes_of(cfg, inputs.teacher, inputs.codec)[0]
        preflight(runtime, inputs.teacher, inputs.data, inputs.codec, cfg.seed, shape)
    return inputs


def assemble(cfg: DistillConfig, runtime: Runtime, inputs: Inputs) -> Assembled:
    """Networks, method and phases over the inputs; the networks are sharded where the runtime does that."""
    networks, calls = networks_of(cfg, inputs.teacher.network), Calls()
    method = build_method(cfg, inputs, networks, runtime, calls)
    averages = Ema(networks.student, *cfg.student.decays)
    runtime.shard(networks.teacher, networks.student, networks.fake_score, *averages.modules.values())
    cycle = phases_of(cfg, networks, method, averages)
    return Assembled(cfg, runtime, inputs, networks, method, identity_of(cfg, inputs, method), calls, averages, cycle)


def phases_of(cfg: DistillConfig, networks: Networks, method: DMD, averages: Ema) -> tuple[Phase, ...]:
    """One step of the run: the fake score's updates, the heads', the student's."""
    student, fake_score = networks.student, networks.fake_score
    router_lr = cfg.student.routing.lr
    optimiser = Optimiser(cfg.student, student.backbone_parameters(), (student.router_parameters(), router_lr))
    follower = Follower(fake_score, cfg.fake_score.follow) if cfg.fake_score.follow else None
    student_phase = Phase("student", student, optimiser, method.student_loss, averages, follower)
    optimiser = Optimiser(
        cfg.fake_score,
        fake_score.backbone_parameters(),
        (fake_score.router_parameters(), router_lr),
        (fake_score.rung_parameters(), cfg.fake_score.rung_lr),
    )
    fake_phase = Phase("fake_score", fake_score, optimiser, method.fake_score_loss, start=cfg.fake_score_start)
    cycle = [fake_phase] * cfg.updates["fake_score"]
    if method.gan is not None:
        heads = cast(nn.Module, method.gan.heads)  # which the method only calls
        optimiser = Optimiser(cfg.gan, heads.parameters())
        cycle += [Phase("discriminator", heads, optimiser, method.discriminator_loss)] * cfg.updates["discriminator"]
    return (*cycle, student_phase)


def rehearsal_of(assembled: Assembled) -> Rehearsal:
    """What `fit_run` measures a micro-batch by."""
    cfg, turns, sizes = assembled.cfg, assembled.method.turns, assembled.method.sizes
    if turns is None:
        return Rehearsal(assembled.cycle, cfg.seed, fullest_turn(cfg), at_most=partial(at_most, assembled))
    latents = 2 * len(cfg.rungs) * math.prod(assembled.method.shape if sizes is None else sizes.largest)
    kept = latents * (4 + 4)  # float32, and about as many bytes of random bits that a roll-out has not drawn yet
    return Rehearsal(assembled.cycle, cfg.seed, fullest_turn(cfg), turns.forget, kept, partial(at_most, assembled))


@contextlib.contextmanager
def at_most(assembled: Assembled) -> Iterator[None]:
    """Within it every step computes at the run's largest size, with prompts as long as they may be."""
    sizes, prompts = assembled.method.sizes, assembled.inputs.teacher.network.prompts
    with contextlib.ExitStack() as stack:
        if sizes is not None:
            stack.enter_context(sizes.at_largest())
        if prompts is not None:
            stack.enter_context(prompts.padded_whole())
        yield


def fullest_turn(cfg: DistillConfig) -> int:
    """A turn in which as many of the student's losses have a weight above 0 as in any."""
    ramped, first = (cfg.regression, cfg.gan), cfg.fake_score_start  # before it, not all networks are trained
    ends = (turn for weight in ramped for turn in (weight.ramp_start, weight.ramp_start + weight.ramp_steps))
    turns = {first, *([cfg.matching.start] if cfg.matching.weight else [])}
    turns |= {near for end in ends for near in (end - 1, end, end + 1) if first <= near < cfg.steps}
    return max(sorted(turns), key=lambda turn: sum(weight.at(turn) > 0 for weight in (cfg.matching, *ramped)))


def train(
    assembled: Assembled,
    folder: RunFolder | None,
    turns: FirstTurn | None = None,
    found: dict[str, int] | None = None,
) -> None:
    """Train and save the students in the folder, which is None in all processes but the main one."""
    cfg, averages, method, codec = assembled.cfg, assembled.averages, assembled.method, assembled.inputs.codec
    card = card_of(cfg, assembled.inputs, assembled.identity)
    velocity = assembled.calls.watch("averaged_student", velocity_of(averages.module, card.prediction))
    student = few_step_generator(velocity, cfg.rungs, cfg.sampler)

    def save(place: Path, network: Any, step: int) -> None:
        export(place, network, card.at(step), codec, cfg.export)

    others = {
        f"student_ema_{decay}": other for decay, other in averages.modules.items() if other is not averages.module
    }
    run_cycle(
        cfg,
        OpenRun(assembled.runtime, folder, assembled.identity, Path(cfg.out_dir)),
        assembled.cycle,
        watch=Watch(assembled.calls, build_health(assembled, student), turns, found or {}),
        pictures=Pictures(decoded(student, codec and codec.decode), method.shape, method.num_classes),
        results=Results({"student": averages.module, **others}, save),
    )


def build_health(assembled: Assembled, student: Generator) -> Health:
    """The averaged student's samples are held against the guided teacher's, by its ODE."""
    cfg, method, codec = assembled.cfg, assembled.method, assembled.inputs.codec
    teacher = assembled.networks.teacher
    guided = guided_velocity(teacher, assembled.inputs.teacher.prediction, cfg.guidance_scale, cfg.guidance)
    return Health(
        every=cfg.log.health_every,
        panel=Panel(cfg.log.health_samples, cfg.seed, method.shape, method.num_classes, codec and codec.decode),
        student=student,
        teacher=ode_generator(assembled.calls.watch("teacher", guided), Solver()),  # in the student's own precision
        runtime=assembled.runtime,
        optimisers={phase.name: phase.optimiser for phase in assembled.cycle},
        kept=kept_reference(assembled),
        stopping=Stopping(cfg.log.stop_when, cfg.log.stop_patience, cfg.log.stop_after),
    )


def kept_reference(assembled: Assembled) -> Kept:
    """Where the runs of one teacher share what is measured of its samples, under all that decides these."""
    cfg, method, runtime, inputs = assembled.cfg, assembled.method, assembled.runtime, assembled.inputs
    facts = {
        "what": "health samples of the teacher",
        "teacher": inputs.teacher.digest,
        "guidance": cfg.guidance_scale,
        "solver": asdict(Solver()),
        "count": cfg.log.health_samples,
        "seed": cfg.seed,
        "classes": method.num_classes,
        "shape": method.shape,
        "codec": inputs.codec.digest() if inputs.codec else "",
        "precision": runtime.precision,
        "frozen_dtype": cfg.frozen_dtype,
    }
    facts |= {"decode": cfg.teacher.codec_decode} if cfg.teacher.codec_decode == "tiles" else {}
    rule = rule_of(inputs.teacher.network, cfg.guidance_scale, cfg.guidance).facts()
    facts |= {"rule": rule} if rule else {}
    return Kept.of(cfg.regression.cache, runtime.device, facts)


def planned(cfg: DistillConfig) -> str:
    """What the run needs in memory, or why that is not known."""
    try:
        return plan.table(plan.plan_of(cfg))
    except UserError as error:
        return f"no plan: {error}"


def main(argv: Sequence[str] | None = None) -> None:
    config.run_job(
        DistillConfig,
        partial(launch.run, distill),
        argv,
        description=__doc__ or "",
        plan=planned,
    )
