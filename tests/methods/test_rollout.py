"""Sampling against teachers whose flow is known in closed form: a Gaussian and a point mass."""

import math
from itertools import pairwise

import pytest
import torch

from dmd_dar import flow
from dmd_dar.draws import Draws, sample_range
from dmd_dar.methods import rollout
from dmd_dar.methods.generate import SampleRange, balanced_labels, few_step_generator, generate, ode_generator
from dmd_dar.methods.solvers import Solver, dpm, heun
from dmd_dar.methods.trajectories import solve_trajectories

RUNGS = (1.0, 0.9, 0.75, 0.5)
SHAPE = (2, 4, 4)
MEANS = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)


def draws(count: int = 6, start: int = 0) -> Draws:
    return Draws(0, "sample", 0, sample_range(start, start + count))


def noise_of(there: Draws) -> torch.Tensor:
    return there.normal("noise", *SHAPE, dtype=torch.float64)


def gaussian(std: float):
    """The exact velocity E[eps - x0 | x_t] where x0 ~ N(MEANS[cond], std^2)."""

    def velocity(x_t, t, cond):
        t, mean = flow.expand_t(t, x_t), flow.expand_t(MEANS[cond], x_t)
        variance = (1 - t) ** 2 * std**2 + t**2
        return (t - (1 - t) * std**2) / variance * (x_t - (1 - t) * mean) - mean

    return velocity


def on_path(noise: torch.Tensor, cond: torch.Tensor, t: float, std: float) -> torch.Tensor:
    """The ODE carries each point along the Gaussian's own quantiles."""
    mean = flow.expand_t(MEANS[cond], noise)
    return (1 - t) * mean + math.sqrt((1 - t) ** 2 * std**2 + t**2) * noise


def recorded(velocity, calls: list):
    def recording(x_t, t, cond):
        calls.append((x_t, t))
        return velocity(x_t, t, cond)

    return recording


ORDERS = [("heun", law, std) for law in ("even", "sqrt", "cosine") for std in (0.3, 2.0)]
ORDERS += [("dpm", "sqrt", 0.3), ("dpm", "cosine", 0.3), ("dpm", "cosine", 2.0)]


@pytest.mark.parametrize(("name", "law", "std"), ORDERS)  # at std 1 the path is symmetric, the leading error cancels
def test_solvers_reach_the_flow_map_with_order_two_on_every_grid(name, law, std):
    noise, cond, errors = noise_of(draws()), balanced_labels(draws().samples, 3), []
    for steps in (20, 40, 80):
        states, _ = Solver(name, steps, law).path(gaussian(std), cond, noise)
        assert len(states) == steps + 1 and torch.equal(states[0], noise)
        errors.append((states[-1] - on_path(noise, cond, 0.0, std)).abs().max().item())
    assert errors[-1] < 2e-3
    assert 3.5 < errors[0] / errors[1] < 9 and 3.7 < errors[1] / errors[2] < 8


@pytest.mark.parametrize("law", ["even", "sqrt", "cosine"])
@pytest.mark.parametrize("name", ["heun", "dpm"])
def test_a_solver_stands_where_the_ode_does_at_every_rung(name, law):
    noise, cond = noise_of(draws()), balanced_labels(draws().samples, 3)
    states, positions = Solver(name, 160, law).path(gaussian(0.3), cond, noise, RUNGS)
    for rung, position in zip(RUNGS, positions, strict=True):
        assert torch.allclose(states[position], on_path(noise, cond, rung, 0.3), atol=4e-3)


def test_dpm_takes_one_evaluation_a_step_and_extrapolates_x0_in_log_snr():
    """Two steps by hand, from the equations of arXiv:2211.01095 with alpha = 1 - t, sigma = t."""
    calls, noise, cond = [], noise_of(draws()), balanced_labels(draws().samples, 3)
    grid = [0.8, 0.5, 0.3, 0.0]
    states = dpm(recorded(gaussian(0.3), calls), cond, grid, noise)
    assert [t[0].item() for _, t in calls] == grid[:-1]
    first, second, third = (
        rollout.predict_x0(gaussian(0.3), x, t, cond) for x, t in zip(states[:-1], grid[:-1], strict=True)
    )
    logs = [math.log((1 - t) / t) for t in grid[:-1]]
    r = (logs[1] - logs[0]) / (logs[2] - logs[1])
    extrapolated = second + (second - first) / (2 * r)
    assert torch.allclose(states[1], 0.5 / 0.8 * noise - 0.5 * math.expm1(-(logs[1] - logs[0])) * first, atol=1e-12)
    expected = 0.3 / 0.5 * states[1] - 0.7 * math.expm1(-(logs[2] - logs[1])) * extrapolated
    assert torch.allclose(states[2], expected, atol=1e-12)
    assert torch.allclose(states[3], third, atol=1e-12)


def test_dpm_is_exact_for_data_that_is_one_point():
    noise, cond = noise_of(draws()), balanced_labels(draws().samples, 3)
    states, positions = Solver("dpm", 5, "cosine").path(gaussian(0.0), cond, noise, RUNGS[:2])
    assert torch.allclose(states[-1], flow.expand_t(MEANS[cond], noise).expand_as(noise), atol=1e-12)
    assert torch.allclose(states[positions[1]], on_path(noise, cond, 0.9, 0.0), atol=1e-12)


def test_heun_takes_two_evaluations_a_step_at_the_grid_s_times():
    calls = []
    heun(recorded(gaussian(0.3), calls), torch.tensor([0]), [1.0, 0.4, 0.0], noise_of(draws(1)))
    assert [t.item() for _, t in calls] == [1.0, 0.4, 0.4, 0.0]


@pytest.mark.parametrize("sampler", ["stochastic", "deterministic"])
@pytest.mark.parametrize("rungs", [(1.0,), (1.0, 0.5), RUNGS])
def test_few_steps_of_a_point_mass_are_exact(sampler, rungs):
    there, cond = draws(), torch.tensor([0, 1, 2, 2, 1, 0])

    def point_mass(x_t, t, cond):
        return (x_t - flow.expand_t(MEANS[cond], x_t)) / flow.expand_t(t, x_t)

    x0 = rollout.Rollout(point_mass, cond, rungs, there, noise_of(there), sampler).end()
    assert torch.allclose(x0, flow.expand_t(MEANS[cond], x0).expand_as(x0), rtol=0, atol=1e-13)


@pytest.mark.parametrize("sampler", ["stochastic", "deterministic"])
def test_the_states_at_the_rungs_are_those_that_sampling_passes(sampler):
    there, cond, calls = draws(), torch.tensor([0, 1, 2, 2, 1, 0]), []
    noise, velocity = noise_of(there), gaussian(0.3)
    rollout.Rollout(recorded(velocity, calls), cond, RUNGS, there, noise, sampler).end()
    assert [t.unique().item() for _, t in calls] == list(RUNGS)
    for rung, (x_t, _) in enumerate(calls):
        again = []
        state = rollout.Rollout(recorded(velocity, again), cond, RUNGS, there, noise, sampler).state(rung)
        assert torch.equal(state, x_t) and len(again) == rung


def test_each_rung_is_renoised_afresh():
    there, cond, calls = draws(64), torch.zeros(64, dtype=torch.long), []
    rollout.Rollout(recorded(gaussian(0.3), calls), cond, RUNGS, there, noise_of(there)).end()
    added = [noise_of(there)]
    for (x, _), (x_next, _), t, t_next in zip(calls, calls[1:], RUNGS, RUNGS[1:], strict=False):
        x0 = rollout.predict_x0(gaussian(0.3), x, t, cond)
        added.append((x_next - (1 - t_next) * x0) / t_next)
    for eps in added:
        assert abs(eps.mean()) < 0.08 and abs(eps.std() - 1) < 0.06
    correlations = torch.corrcoef(torch.stack([eps.flatten() for eps in added])) - torch.eye(4)
    assert correlations.abs().max() < 4 / math.sqrt(added[0].numel())


def test_deterministic_sampling_is_euler_on_the_rungs():
    there, cond = draws(), torch.tensor([0, 1, 2, 2, 1, 0])

    def curved(x_t, t, cond):
        return torch.sin(3 * x_t) + flow.expand_t(t * cond, x_t)

    x = noise = noise_of(there)
    for t, t_next in zip(RUNGS, (*RUNGS[1:], 0.0), strict=True):
        x = x + (t_next - t) * curved(x, torch.full((6,), t, dtype=torch.float64), cond)
    sampled = rollout.Rollout(curved, cond, RUNGS, there, noise, "deterministic").end()
    assert torch.allclose(sampled, x, rtol=0, atol=1e-12)


def test_a_step_towards_the_next_state_of_a_trajectory_ends_in_it():
    noise, cond = noise_of(draws()), torch.tensor([0, 1, 2, 2, 1, 0])
    made = solve_trajectories(gaussian(0.3), cond, RUNGS, Solver("heun", 40, "even"), noise)
    for rung, (t, t_next) in enumerate(pairwise(RUNGS)):
        x_t, x_next = made.states[:, rung], made.states[:, rung + 1]
        towards = rollout.x0_towards(x_t, x_next, t, t_next)
        assert (towards - made.ends).abs().max() > 0.01  # the way is curved: its end is another x0
        assert torch.allclose(rollout.next_state(towards, x_t, t, t_next, None), x_next, rtol=0, atol=1e-12)


def test_trajectories_pass_the_rungs_of_a_direct_solve():
    noise, cond, calls = noise_of(draws()), torch.tensor([0, 1, 2, 2, 1, 0]), []
    made = solve_trajectories(recorded(gaussian(0.3), calls), cond, RUNGS, Solver("heun", 40, "even"), noise)
    assert made.count == 6 and made.states.shape == (6, 4, *SHAPE) and len(calls) == 80
    assert torch.equal(made.states[:, 0], noise) and torch.equal(made.cond, cond)
    grid = flow.time_grid(RUNGS, 40, "even")[0]
    for rung, t in enumerate(RUNGS):
        direct = heun(gaussian(0.3), cond, grid[: grid.index(t) + 1], noise)[-1]
        assert torch.equal(made.states[:, rung], direct)
        assert torch.allclose(direct, on_path(noise, cond, t, 0.3), atol=5e-3)
    assert torch.allclose(made.ends, on_path(noise, cond, 0.0, 0.3), atol=5e-3)
    index = torch.tensor([4, 0, 4])
    states, ends, labels = made.at(2, index)
    assert torch.equal(states, made.states[[4, 0, 4], 2]) and torch.equal(ends, made.ends[[4, 0, 4]])
    assert labels.tolist() == [1, 0, 1]


def test_the_end_follows_from_the_state_at_any_rung():
    noise, cond = noise_of(draws()), torch.tensor([0, 1, 2, 2, 1, 0])
    made = solve_trajectories(gaussian(0.3), cond, RUNGS, Solver("heun", 40, "even"), noise)
    grid, positions = flow.time_grid(RUNGS, 40, "even")
    for rung, position in enumerate(positions):
        states, ends, labels = made.at(rung, torch.arange(6))
        assert torch.equal(heun(gaussian(0.3), labels, grid[position:], states)[-1], ends)


GENERATORS = {
    "ode": ode_generator(gaussian(0.3), Solver(solver_steps=10)),
    "stochastic": few_step_generator(gaussian(0.3), RUNGS),
    "deterministic": few_step_generator(gaussian(0.3), RUNGS, "deterministic"),
}


@pytest.mark.parametrize("name", GENERATORS)
def test_generated_images_do_not_depend_on_the_batch_size(name):
    ten, form = SampleRange(10, seed=3), {"shape": SHAPE, "num_classes": 3}
    made = {n: generate(GENERATORS[name], ten, batch_size=n, **form) for n in (1, 4, 10, 64)}
    images, labels = made[64]
    assert images.shape == (10, *SHAPE) and labels.tolist() == [0, 1, 2, 0, 1, 2, 0, 1, 2, 0]
    for other, other_labels in made.values():
        assert torch.equal(other, images) and torch.equal(other_labels, labels)
    fewer, _ = generate(GENERATORS[name], SampleRange(4, seed=3), **form)
    assert torch.equal(fewer, images[:4])
    assert len(images.flatten(1).unique(dim=0)) == 10


def test_seed_and_phase_choose_the_noise_and_label_the_class():
    def images(**changed):
        samples = SampleRange(6, **{"seed": 3, **changed})
        return generate(GENERATORS["ode"], samples, shape=SHAPE, num_classes=3)

    base, _ = images()
    assert not torch.allclose(images(seed=4)[0], base) and not torch.allclose(images(phase="pairs")[0], base)
    of_one, labels = images(labels=torch.ones(6, dtype=torch.int64))
    assert labels.tolist() == [1] * 6
    assert torch.equal(of_one[[1, 4]], base[[1, 4]]) and not torch.allclose(of_one[0], base[0])
