"""The discretisation error of a teacher whose ODE is known: it multiplies its noise, whatever that is."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dmd_dar.data.images import to_pixels
from dmd_dar.methods.solvers import Solver
from eval.metrics.convergence import Discretisation
from eval.metrics.intervals import Interval
from eval.samples.facts import NetworkFacts, SetFacts
from eval.samples.sets import ImageSet
from eval.study.convergence import discretisation

SIDE, COUNT = 32, 96
GRAIN = 0.15  # standard deviation of every pixel, in [-1, 1]


def velocity(x_t: Tensor, t: Tensor, cond: Tensor) -> Tensor:
    """Of x0 ~ N(0, GRAIN^2) in every pixel: E[eps - x0 | x_t]."""
    t = t.reshape(-1, *[1] * (x_t.dim() - 1))
    return x_t * (t - (1 - t) * GRAIN**2) / ((1 - t).square() * GRAIN**2 + t.square())


def scale(solver: Solver) -> float:
    """By what the solver multiplies the noise; the ODE itself by GRAIN."""
    path, _ = solver.path(velocity, torch.zeros(1), torch.ones(1, 1, dtype=torch.float64))
    return float(path[-1])


def solved(solver: Solver, count: int) -> ImageSet:
    uniform = torch.rand(COUNT, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(0)) - 0.5
    noise = -uniform.sign() * (1 - 2 * uniform.abs()).log() / math.sqrt(2)  # Laplace: of a kurtosis, as images have one
    noise = noise[:count].expand(-1, 3, -1, -1)
    images = to_pixels(scale(solver) * noise)
    facts = SetFacts(network=NetworkFacts(solver.evaluations, 0, 0, ""))
    return ImageSet("teacher", images, torch.arange(count) % 4, "teacher", True, facts=facts)


def measured(solver: Solver) -> Discretisation:
    return discretisation(solved(solver, COUNT), solved(twice(solver), 64), seed=0)


def twice(solver: Solver) -> Solver:
    return replace(solver, solver_steps=2 * solver.solver_steps)


@pytest.mark.parametrize("solver", [Solver("heun", 4, "even"), Solver("heun", 15, "even"), Solver("dpm", 5, "cosine")])
def test_the_error_of_a_solver_on_a_known_ode(solver):
    expected = 20 * math.log10(scale(solver) / scale(twice(solver)))
    error = measured(solver)
    assert (error.evaluations, error.evaluations_twice) == (solver.evaluations, 2 * solver.evaluations)
    assert error.images == 64
    assert error.hf_gain_db.value == pytest.approx(expected, abs=0.03)
    assert error.flat_noise_db.value == pytest.approx(expected, abs=0.15)
    assert error.hf_kurtosis_ratio.value == pytest.approx(1, abs=0.05)
    assert ("HF gain" in error.exceeded) == (abs(expected) > 0.5) and error.converged == (abs(expected) < 0.5)


def test_the_default_solver_is_converged_on_a_field():
    assert 20 * math.log10(scale(Solver()) / GRAIN) == pytest.approx(0.339, abs=0.001)  # of the ODE itself
    error = measured(Solver())
    assert error.converged and error.exceeded == [] and error.sentence.endswith("converged.")
    assert error.hf_gain_db.value == pytest.approx(0.262, abs=0.01) and error.fd_wavelet < error.fd_wavelet_null


def test_whatever_is_beyond_a_margin_is_named():
    inside = Interval(1.0, 1.0, 1.0)
    fine = Discretisation(
        evaluations=30,
        evaluations_twice=60,
        images=256,
        hf_gain_db=Interval(0.4, 0.3, 0.6),
        hf_kurtosis_ratio=inside,
        flat_noise_db=Interval(-0.4, -0.6, -0.3),
        fd_wavelet=0.2,
        fd_wavelet_null=0.3,
    )
    assert fine.converged
    changes = {
        "HF gain": {"hf_gain_db": Interval(-0.51, -1, 0)},
        "kurtosis": {"hf_kurtosis_ratio": Interval(0.79, 0.5, 1)},
        "flat noise": {"flat_noise_db": Interval(0.51, 0, 1)},
        "fd_wavelet": {"fd_wavelet": 0.31},
    }
    for name, change in changes.items():
        error = replace(fine, **change)
        assert error.exceeded == [name] and f"not converged in {name}" in error.sentence
    assert replace(fine, hf_kurtosis_ratio=Interval(math.nan, math.nan, math.nan)).converged
    assert fine.as_json()["exceeded"] == [] and fine.as_json()["converged"] is True
