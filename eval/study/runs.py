"""Finished runs, read from their folders, and the teacher that they share, sampled on the common noise."""

import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from dmd_dar import config
from dmd_dar.distillation.config import DistillConfig
from dmd_dar.distillation.identity import shapes_of
from dmd_dar.errors import UserError
from dmd_dar.guidance import GuidanceConfig, Velocity
from dmd_dar.methods.generate import few_step_generator, ode_generator
from dmd_dar.methods.rollout import Sampler
from dmd_dar.methods.solvers import Solver
from dmd_dar.models import teachers
from dmd_dar.models.codecs import Codec
from dmd_dar.models.guided import guided_velocity, rule_of
from dmd_dar.models.prompts import Prompts
from dmd_dar.models.saved import ModelCard, Saved, holds_network, read_card
from dmd_dar.models.teachers import Denoiser, TeacherConfig, load_teacher, open_teacher
from dmd_dar.train.disk import log

from ..samples.facts import NetworkFacts, SetFacts
from ..samples.parallel import Processes
from ..samples.real import REAL_NAMES
from ..samples.sampling import Bench
from ..samples.sets import ImageSet
from .few_steps import FewSteps, plain, titles
from .prompts import images_of

SAMPLERS: dict[str, Sampler] = {"Euler": "deterministic", "re-noised": "stochastic"}
SAMPLER_NAMES = {sampler: name for name, sampler in SAMPLERS.items()}
RESERVED = (*REAL_NAMES, "teacher")


@dataclass(frozen=True)
class Run:
    """One finished run, read from its folder, and one of its students: the last one, or another that it kept."""

    name: str
    folder: Path  # as it was named: the run's, or that of a student which it kept beside its last
    cfg: DistillConfig
    raw: dict[str, Any] = field(repr=False)
    saved: Saved = field(default=Saved(ModelCard(), "", {}), repr=False)  # the card of its student
    stamp: tuple[tuple[str, int, int], ...] = field(default=(), repr=False)  # of the student's files when it was read
    kept: bool = False  # whether `folder` is that of a student which it kept
    prompts: str = ""  # folder of those that it is sampled at, in the place of its own

    @property
    def home(self) -> Path:
        """The run's folder."""
        return self.folder.parent if self.kept else self.folder

    @property
    def place(self) -> Path:
        """The student's folder."""
        return self.folder if self.kept else self.folder / "student"

    @property
    def origin(self) -> dict[str, Any]:
        """What the card of its student says of its training: steps, teacher, data, ..."""
        return self.saved.card.origin

    @property
    def updates(self) -> int:
        """Student updates behind its student."""
        return self.origin.get("steps", self.cfg.steps)

    @property
    def few_steps(self) -> FewSteps:
        """What it shares with its undistilled twins."""
        return FewSteps(self.cfg.rungs, self.cfg.guidance_scale)

    @property
    def sampled_with(self) -> FewSteps:
        """The same with its own sampler, which a single step knows nothing of."""
        single = len(self.cfg.rungs) == 1
        return replace(self.few_steps, sampler=None if single else SAMPLER_NAMES[self.cfg.sampler])

    @property
    def teacher(self) -> TeacherConfig:
        """What it was distilled from, at the prompts that it is sampled at."""
        own = self.cfg.teacher
        return replace(own, prompts=self.prompts, prompts_are_classes=False) if self.prompts else own

    def student(self, device: torch.device | str = "cpu") -> teachers.Teacher:
        """Its network, read anew at every call: a ConfigError where its files have changed since the card was read."""
        if stamp_of(self.place) != self.stamp:
            raise config.ConfigError(f"runs: {self.place} has changed since this command began; give the command again")
        return load_teacher(TeacherConfig(str(self.place), prompts=self.prompts), device, self.saved)

    def step_seconds(self) -> float:
        """Mean time of a training step in the last process of the run, all that it did included; NaN without a log."""
        records = log.read(self.home / "log.jsonl")
        rates = [record["steps_per_second"] for record in records if record.get("steps_per_second")]
        return 1 / rates[-1] if rates else math.nan


def read_run(path: str) -> Run:
    """A finished run, or in its folder one of the other students that it kept: RUN/student_best.

    A ConfigError where it is none, or its student is not what its configuration asks for.
    """
    folder = Path(path)
    kept = not (folder / "config.yaml").is_file()
    home, place = (folder.parent, folder) if kept else (folder, folder / "student")
    if kept and not (folder.name.startswith("student_") and (home / "config.yaml").is_file()):
        raise config.ConfigError(f"runs: {path} holds no config.yaml; name run folders of distill.py")
    if not holds_network(place):
        raise config.ConfigError(f"runs: {path} has no student yet; let the run finish (the same command continues it)")
    raw = config.read_saved(home / "config.yaml")
    cfg = config.from_dict(DistillConfig, raw, where=str(home / "config.yaml"))
    stamp = stamp_of(place)
    try:
        saved = read_card(place)
        teachers.prompts_of(TeacherConfig(str(place)), saved.card.origin)  # fails here where they are gone
    except UserError as error:
        raise config.ConfigError(f"runs: {path}: {error}") from error
    steps = saved.card.origin.get("steps")
    if steps != cfg.steps and not kept:
        raise config.ConfigError(f"runs: {path} holds a student of {steps} of {cfg.steps} steps; let it finish")
    name = Path(os.path.abspath(home)).name + (f"_{folder.name.removeprefix('student_')}" if kept else "")
    if name in RESERVED:  # of runs=[.] too
        raise config.ConfigError(f"runs: {path} has a name that the report uses itself; rename the folder")
    return Run(name, folder, cfg, raw, saved, stamp, kept)


def stamp_of(folder: Path) -> tuple[tuple[str, int, int], ...]:
    """Names, sizes and times of the files in a folder: whether one was written since."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    states = [(file.relative_to(folder).as_posix(), file.stat()) for file in files]
    return tuple((name, state.st_size, state.st_mtime_ns) for name, state in states)


def own_prompts(run: Run) -> str:
    """No others than the run's own."""
    return ""


def read_runs(folders: tuple[str, ...], prompts: Callable[[Run], str] = own_prompts) -> list[Run]:
    """The finished runs; a ConfigError where they do not share teacher and data.

    prompts: the folder of those that all are sampled at, from the first run; "" for their own.
    """
    read = [read_run(folder) for folder in folders]
    named = prompts(read[0])
    read = [replace(run, prompts=named) for run in read]
    names = [run.name for run in read]
    if len(set(names)) < len(names):
        raise config.ConfigError(f"runs: several folders are called {names}; give each a name of its own")
    require_shared(read, "runs")
    return read


def require_shared(runs: Sequence[Run], key: str) -> None:
    """A ConfigError where they do not name one teacher, one form of its guidance and the same data.

    key: of the command, which named them.
    """
    for run in runs[1:]:
        for what in ("data", "teacher", "guidance"):
            ours, theirs = (one.teacher if what == "teacher" else getattr(one.cfg, what) for one in (runs[0], run))
            if ours != theirs:
                fault = f"{what} {theirs} in {run.name}, {ours} in {runs[0].name}"
                raise config.ConfigError(f"{key}: {fault}; compare equals")
        ours, theirs = (one.cfg.pixels[0] for one in (runs[0], run))
        if ours != theirs:
            sizes = [f"{h or 'own'} x {w or 'own'}" for h, w in (theirs, ours)]
            fault = f"the first height x width is {sizes[0]} in {run.name}, {sizes[1]} in {runs[0].name}"
            raise config.ConfigError(f"{key}: {fault}; compare equals")


def reference_guidance(runs: Sequence[Run], given: float | None) -> float:
    """The teacher's guidance in the reference: `given`, else the runs' own. A ConfigError where theirs differ."""
    if given is not None:
        return given
    first = runs[0]
    for run in runs[1:]:
        ours, theirs = first.cfg.guidance_scale, run.cfg.guidance_scale
        if ours != theirs:
            fault = f"guidance_scale is {ours} in {first.name}, {theirs} in {run.name}"
            raise config.ConfigError(f"{fault}; say which the reference has, guidance_scale={plain(ours)}")
    return first.cfg.guidance_scale


@dataclass(frozen=True)
class GuidedTeacher:
    """The teacher of all runs, guided as the reference is."""

    network: Denoiser
    velocity: Velocity
    weights: str
    guidance_scale: float
    loaded: teachers.Teacher
    codec: Codec | None = None
    guidance: GuidanceConfig = field(default_factory=GuidanceConfig)

    @property
    def label_names(self) -> tuple[str, ...]:
        return self.loaded.label_names

    @property
    def prompts(self) -> Prompts | None:
        """Those that it reads; None of one that reads labels."""
        return self.network.prompts

    @staticmethod
    def of(run: Run, device: torch.device, guidance_scale: float | None = None) -> "GuidedTeacher":
        """With that guidance, the run's where it is None. A ConfigError where it is not the one that the run was
        distilled from.
        """
        teacher, codec = open_teacher(run.teacher, run.cfg.data, device, run.cfg.sized)
        require_teacher([run], teacher)
        scale = run.cfg.guidance_scale if guidance_scale is None else guidance_scale
        velocity = guided_velocity(teacher.network, teacher.prediction, scale, run.cfg.guidance)
        return GuidedTeacher(teacher.network, velocity, teacher.digest, scale, teacher, codec, run.cfg.guidance)

    def bench(self, keys: Any, device: torch.device, processes: Processes, run: Run) -> Bench:
        """Where the run's networks are sampled: at its first size."""
        shape = shapes_of(run.cfg, self.loaded, self.codec)[0]
        bench = Bench.of(keys, self.network, device, self.codec, processes, shape)
        return replace(bench, count=images_of(keys, bench.num_classes))

    def sample_set(self, bench: Bench, solver: Solver) -> ImageSet:
        """The reference."""
        generator = ode_generator(self.velocity, solver)
        identity = {"teacher": self.weights, **self._guided(self.guidance_scale), "solver": asdict(solver)}
        made = bench.cached(identity, generator, "teacher")
        facts = SetFacts(network=NetworkFacts.of(self.network, solver.evaluations, self.weights))
        return made.as_set("teacher", "teacher", True, facts=facts, generator=generator)

    def undistilled_sets(self, bench: Bench, several: Iterable[FewSteps]) -> list[ImageSet]:
        """The teacher itself with each of the students' few steps: what distillation has to beat.

        Along the ODE and re-noised. Beside others a single step, which knows no difference, stands once; and names and
        facts say which steps a set has.
        """
        sets, named = [], titles(several)
        guided = len({few.guidance_scale for few in named}) > 1
        for few, title in named.items():
            twice = len(few.rungs) > 1 or len(named) == 1
            for sampler in SAMPLERS if twice else ("",):
                facts = SetFacts(network=NetworkFacts.of(self.network, len(few.rungs), self.weights))
                if title:
                    guidance = f"guidance {plain(few.guidance_scale)}" if guided else ""
                    kind = ", ".join(filter(None, ["undistilled", guidance, sampler]))
                    facts = replace(facts, **vars(replace(few, sampler=sampler or None)), kind=kind)
                name = ", ".join(filter(None, ["undistilled", title, sampler]))
                sets.append(self._undistilled(bench, few, SAMPLERS[sampler or "Euler"], name, facts))
        return sets

    def _guided(self, guidance_scale: float) -> dict[str, Any]:
        """What decides the guidance, for a hash that names no plain rule."""
        rule = rule_of(self.network, guidance_scale, self.guidance).facts()
        return {"guidance": guidance_scale, **({"rule": rule} if rule else {})}

    def _undistilled(self, bench: Bench, few: FewSteps, sampler: Sampler, name: str, facts: SetFacts) -> ImageSet:
        velocity = guided_velocity(self.network, self.loaded.prediction, few.guidance_scale, self.guidance)
        generator = few_step_generator(velocity, few.rungs, sampler)
        guided = self._guided(few.guidance_scale)
        identity = {"teacher": self.weights, **guided, "rungs": few.rungs, "sampler": sampler}
        made = bench.cached(identity, generator, name)
        return made.as_set(name, "undistilled", True, facts=facts, generator=generator)


def require_teacher(runs: Iterable[Run], teacher: teachers.Teacher) -> None:
    """A ConfigError naming a run that was distilled from another teacher, whatever prompts both are sampled at."""
    for run in runs:
        digest = teacher.digest_with(run.origin.get("prompts_hash", "")) if run.prompts else teacher.digest
        if run.origin.get("teacher") != digest:
            raise config.ConfigError(
                f"runs: {run.folder} was distilled from another teacher than {run.cfg.teacher.path} holds now"
            )
