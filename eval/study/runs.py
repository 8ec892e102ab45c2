"""Finished runs, read from their folders, and the teacher that they share, sampled on the common noise."""

import math
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from dmd_dar import config, moved
from dmd_dar.distillation.config import DistillConfig
from dmd_dar.errors import UserError
from dmd_dar.guidance import Velocity
from dmd_dar.methods.generate import few_step_generator, ode_generator
from dmd_dar.methods.rollout import Sampler
from dmd_dar.methods.solvers import Solver
from dmd_dar.models import teachers
from dmd_dar.models.codecs import Codec
from dmd_dar.models.prompts import Prompts
from dmd_dar.models.saved import ModelCard, Saved, holds_network, read_card
from dmd_dar.models.teachers import Denoiser, TeacherConfig, load_teacher, open_teacher
from dmd_dar.train.disk import log

from ..samples.facts import NetworkFacts, SetFacts
from ..samples.real import REAL_NAMES
from ..samples.sampling import Bench
from ..samples.sets import ImageSet

SAMPLERS: dict[str, Sampler] = {"Euler": "deterministic", "re-noised": "stochastic"}
RESERVED = (*REAL_NAMES, "teacher")


@dataclass(frozen=True)
class Run:
    """One finished run, read from its folder."""

    name: str
    folder: Path
    cfg: DistillConfig
    raw: dict[str, Any] = field(repr=False)
    saved: Saved = field(default=Saved(ModelCard(), "", {}), repr=False)  # the card of its student
    stamp: tuple[tuple[str, int, int], ...] = field(default=(), repr=False)  # of the student's files when it was read

    @property
    def origin(self) -> dict[str, Any]:
        """What the card of its student says of its training: steps, teacher, data, ..."""
        return self.saved.card.origin

    def student(self, device: torch.device | str = "cpu") -> teachers.Teacher:
        """Its network, read anew at every call: a ConfigError where its files have changed since the card was read."""
        place = self.folder / "student"
        if stamp_of(place) != self.stamp:
            raise config.ConfigError(f"runs: {place} has changed since this command began; give the command again")
        return load_teacher(TeacherConfig(str(place)), device, self.saved)

    def step_seconds(self) -> float:
        """Mean time of a training step in the last process of the run, all that it did included; NaN without a log."""
        records = log.read(self.folder / "log.jsonl")
        rates = [record["steps_per_second"] for record in records if record.get("steps_per_second")]
        return 1 / rates[-1] if rates else math.nan


def read_run(path: str) -> Run:
    """A finished run; a ConfigError where it is none, or its student is not what its configuration asks for."""
    folder = Path(path)
    if not (folder / "config.yaml").is_file():
        raise config.ConfigError(f"runs: {path} holds no config.yaml; name run folders of distill.py")
    if not holds_network(folder / "student"):
        raise config.ConfigError(f"runs: {path} has no student yet; let the run finish (the same command continues it)")
    raw = config.read_saved(folder / "config.yaml")
    cfg, place = config.from_dict(DistillConfig, raw, where=str(folder / "config.yaml")), folder / "student"
    stamp = stamp_of(place)
    try:
        saved = read_card(place)
        teachers.prompts_of(TeacherConfig(str(place)), saved.card.origin)  # fails here where they are gone
    except UserError as error:
        raise config.ConfigError(f"runs: {path}: {error}") from error
    steps = saved.card.origin.get("steps")
    if steps != cfg.steps:
        raise config.ConfigError(f"runs: {path} holds a student of {steps} of {cfg.steps} steps; let it finish")
    name = Path(os.path.abspath(folder)).name  # of runs=[.] too
    if name in RESERVED:
        raise config.ConfigError(f"runs: {path} has a name that the report uses itself; rename the folder")
    return Run(name, folder, cfg, raw, saved, stamp)


def stamp_of(folder: Path) -> tuple[tuple[str, int, int], ...]:
    """Names, sizes and times of the files in a folder: whether one was written since."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    states = [(file.relative_to(folder).as_posix(), file.stat()) for file in files]
    return tuple((name, state.st_size, state.st_mtime_ns) for name, state in states)


def read_runs(folders: tuple[str, ...]) -> list[Run]:
    """The finished runs; a ConfigError where they do not share teacher, data, rungs and guidance."""
    read = [read_run(folder) for folder in folders]
    names = [run.name for run in read]
    if len(set(names)) < len(names):
        raise config.ConfigError(f"runs: several folders are called {names}; give each a name of its own")
    for run in read[1:]:
        for what in ("rungs", "guidance_scale", "data", "teacher"):
            ours, theirs = getattr(read[0].cfg, what), getattr(run.cfg, what)
            if ours != theirs:
                fault = f"{what} {theirs} in {run.name}, {ours} in {read[0].name}"
                raise config.ConfigError(f"runs: {fault}; compare equals")
    return read


@dataclass(frozen=True)
class GuidedTeacher:
    """The teacher of all runs, guided as they were."""

    network: Denoiser
    velocity: Velocity
    weights: str
    rungs: tuple[float, ...]
    guidance_scale: float
    loaded: teachers.Teacher
    codec: Codec | None = None

    @property
    def label_names(self) -> tuple[str, ...]:
        return self.loaded.label_names

    @property
    def prompts(self) -> Prompts | None:
        """Those that it reads; None of one that reads labels."""
        return self.network.prompts

    @staticmethod
    def of(run: Run, device: torch.device) -> "GuidedTeacher":
        """A ConfigError where it is not the one that the run was distilled from."""
        cfg = run.cfg
        teacher, codec = open_teacher(cfg.teacher, cfg.data, device)
        require_teacher([run], teacher.digest)
        velocity = teachers.guided_velocity(teacher.network, teacher.prediction, cfg.guidance_scale)
        more = cfg.rungs, cfg.guidance_scale, teacher, codec
        return GuidedTeacher(teacher.network, velocity, teacher.digest, *more)

    def sample_set(self, bench: Bench, solver: Solver) -> ImageSet:
        """The reference."""
        generator = ode_generator(self.velocity, solver)
        identity = {"teacher": self.weights, "guidance": self.guidance_scale, "solver": asdict(solver)}
        made = bench.cached(identity, generator, "teacher")
        facts = SetFacts(network=NetworkFacts.of(self.network, solver.evaluations, self.weights))
        return made.as_set("teacher", "teacher", True, facts=facts, generator=generator)

    def undistilled_sets(self, bench: Bench) -> list[ImageSet]:
        """The teacher itself at the students' rungs, along the ODE and re-noised: what distillation has to beat."""
        sets, identity = [], {"teacher": self.weights, "guidance": self.guidance_scale, "rungs": self.rungs}
        facts = SetFacts(network=NetworkFacts.of(self.network, len(self.rungs), self.weights))
        for name, sampler in SAMPLERS.items():
            generator = few_step_generator(self.velocity, self.rungs, sampler)
            made = bench.cached({**identity, "sampler": sampler}, generator, f"undistilled, {name}")
            sets.append(made.as_set(f"undistilled, {name}", "undistilled", True, facts=facts, generator=generator))
        return sets


def require_teacher(runs: Iterable[Run], digest: str) -> None:
    """A ConfigError naming a run that was distilled from another teacher."""
    for run in runs:
        if run.origin.get("teacher") != digest:
            raise config.ConfigError(
                f"runs: {run.folder} was distilled from another teacher than {run.cfg.teacher.path} holds now"
            )


def __getattr__(name: str) -> object:
    """Names of before: an arm is all runs of one kind of routing."""
    names = {"Arm": "Run", "read_arm": "read_run", "read_arms": "read_runs", "Teacher": "GuidedTeacher"}
    return moved.renamed(__name__, names, name)
