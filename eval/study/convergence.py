"""The discretisation error of a report's reference."""

from dataclasses import replace

from dmd_dar.methods.solvers import Solver

from ..measure.pair import Compared, measure
from ..metrics.convergence import Discretisation
from ..samples.sampling import Bench
from ..samples.sets import ImageSet
from .runs import GuidedTeacher

IMAGES = 128  # at most: they are paired by noise, so that a quarter of a decibel shows


def twice_as_fine(teacher: GuidedTeacher, bench: Bench, solver: Solver) -> ImageSet:
    """The teacher's first images from the same noise by twice as many steps."""
    few = replace(bench, count=min(bench.count, IMAGES))
    return replace(teacher.sample_set(few, replace(solver, solver_steps=2 * solver.solver_steps)), name="twice")


def discretisation(reference: ImageSet, twice: ImageSet, seed: int) -> Discretisation:
    """The reference's first images against those of `twice`, which have the same noise."""
    labels = None if reference.labels is None else reference.labels[: twice.count]
    first = replace(reference, images=reference.first(twice.count), labels=labels, latents=None, name="once")
    row = measure(Compared([first], twice), seed).row(first.name)
    against, ours, theirs = row.against.teacher, reference.facts.network, twice.facts.network
    assert against is not None and ours is not None and theirs is not None
    distance = against.distances["fd_wavelet"]
    return Discretisation(
        evaluations=ours.evaluations,
        evaluations_twice=theirs.evaluations,
        images=twice.count,
        hf_gain_db=against.gain_db["HF"],
        hf_kurtosis_ratio=against.hf_kurtosis_ratio,
        flat_noise_db=against.flat_noise_db,
        fd_wavelet=distance.value,
        fd_wavelet_null=distance.null,
    )
