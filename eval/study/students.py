"""A run's student as it is sampled: its images on the common noise, with its routers as trained, frozen or reset."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from dmd_dar.data.images import to_model_range
from dmd_dar.diagnostics.usage import RoutingUsage, routing_usage
from dmd_dar.draws import Draws, sample_range
from dmd_dar.guidance import Velocity
from dmd_dar.methods.generate import Generator, few_step_generator
from dmd_dar.models import teachers
from dmd_dar.models.denoiser import velocity_of
from dmd_dar.models.teachers import Denoiser
from dmd_dar.routing.history import Observer

from ..metrics.spectrum import hf_gain_db, spectrum_of
from ..samples.facts import NetworkFacts, RouterUse, SetFacts
from ..samples.sampling import Bench
from ..samples.sets import ImageSet
from .controls import with_routers_reset
from .runs import Run

USAGE_IMAGES = 56
ROUTER_USED_DB = 0.1  # HF gain that resetting the routers must move


@dataclass(frozen=True)
class Student:
    """The student of a run, loaded, or a variant of it. `routers`: what was done to them; empty: as trained."""

    run: Run
    network: Denoiser
    saved: teachers.Teacher
    routers: str = ""

    @staticmethod
    def of(run: Run, device: torch.device) -> "Student":
        """Load it; a ConfigError where its files have changed since the run was read."""
        saved = run.student(device)
        return Student(run, saved.network, saved)

    @property
    def identity(self) -> dict[str, Any]:
        """What its images depend on beside the bench: their name in the cache."""
        made = {"student": self.saved.digest, "rungs": self.saved.rungs, "sampler": self.saved.sampler}
        return made | ({"routers": self.routers} if self.routers else {})

    @property
    def generator(self) -> Generator:
        velocity = velocity_of(self.network, self.saved.prediction)
        return few_step_generator(velocity, self.saved.rungs, self.saved.sampler)

    @property
    def facts(self) -> NetworkFacts:
        return NetworkFacts.of(self.network, len(self.saved.rungs), self.saved.digest)

    def sampled(self, bench: Bench, name: str) -> ImageSet:
        """Its images on the bench's noise, as a set of that name."""
        made = bench.cached(self.identity, self.generator, name)
        return made.as_set(name, "student", True)

    def without_routers(self) -> "Student":
        """The same network with its routers reset: what it makes otherwise, they do."""
        return replace(self, network=with_routers_reset(self.network), routers="reset")


def student_set(run: Run, bench: Bench, teacher: ImageSet) -> ImageSet:
    """The student's images, with what its routers do and what made them."""
    student = Student.of(run, bench.device)
    images = student.sampled(bench, run.name)
    facts = SetFacts(
        network=student.facts,
        updates=student.saved.origin["steps"],
        seed=run.cfg.seed,
        routing=None if student.network.dar is None else router_use(student, images, bench, teacher),
    )
    return replace(images, facts=facts, generator=student.generator)


def router_use(student: Student, images: ImageSet, bench: Bench, teacher: ImageSet) -> RouterUse:
    """What its routers do at its rungs, and by how much its HF gain moves when they are reset."""
    reset = student.without_routers().sampled(bench, f"{images.name}, routers reset")
    shift = hf_gain_db(*(spectrum_of(one.batches()) for one in (reset, images)))
    usage = usage_of(student, bench, teacher)
    return RouterUse(usage, hf_gain_shift_db=shift, used=abs(shift) >= ROUTER_USED_DB)


def usage_of(student: Student, bench: Bench, teacher: ImageSet) -> RoutingUsage:
    """`routing_usage` at the student's own rungs, on what the teacher makes."""
    draws = Draws(bench.seed, "usage", 0, sample_range(0, min(USAGE_IMAGES, teacher.count), bench.device))
    rows = slice(len(draws.samples))
    x0 = to_model_range(teacher.first(USAGE_IMAGES)) if teacher.latents is None else teacher.latents[rows]

    def observed(observe: Observer) -> Velocity:
        return velocity_of(partial(student.network, observe=observe), student.saved.prediction)

    cond = teacher.labels[rows].to(bench.device)  # type: ignore[index]
    return routing_usage(observed, x0.to(bench.device), cond, student.saved.rungs, draws)
