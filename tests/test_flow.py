"""The forward process: conversions as round trips in float64, time laws against their closed forms."""

import math

import pytest
import torch

from dmd_dar import flow

TIMES = torch.tensor([0.0, 1e-3, 0.3, 0.5, 1.0], dtype=torch.float64)
U = torch.linspace(0.001, 0.999, 999, dtype=torch.float64)


def pair() -> tuple[torch.Tensor, torch.Tensor]:
    x0, eps = torch.randn(2, 5, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return x0, eps


def test_x_t_runs_from_data_to_noise_along_v():
    x0, eps = pair()
    assert torch.equal(flow.interpolate(x0, eps, torch.zeros(5)), x0)
    assert torch.equal(flow.interpolate(x0, eps, torch.ones(5)), eps)
    assert torch.equal(flow.interpolate(x0, eps, torch.tensor(0.25)), 0.75 * x0 + 0.25 * eps)
    x_t, v = flow.interpolate(x0, eps, TIMES), flow.velocity(x0, eps)
    assert torch.allclose(flow.interpolate(x0, eps, TIMES + 0.1), x_t + 0.1 * v, rtol=0, atol=1e-14)


def test_each_sample_has_its_own_t():
    x0, eps = pair()
    x_t = flow.interpolate(x0, eps, TIMES)
    for i, t in enumerate(TIMES):
        assert torch.equal(x_t[i], (1 - t) * x0[i] + t * eps[i])


def test_round_trips():
    x0, eps = pair()
    x_t, v = flow.interpolate(x0, eps, TIMES), eps - x0
    assert torch.allclose(flow.velocity_to_x0(v, x_t, TIMES), x0, rtol=0, atol=1e-14)
    assert torch.allclose(flow.velocity_to_eps(v, x_t, TIMES), eps, rtol=0, atol=1e-14)
    assert torch.equal(flow.velocity_to_x0(v, x_t, TIMES)[0], x_t[0])
    assert torch.equal(flow.velocity_to_eps(v, x_t, TIMES)[-1], x_t[-1])
    assert torch.allclose(flow.x0_to_velocity(x0[1:], x_t[1:], TIMES[1:]), v[1:], rtol=0, atol=1e-11)


def test_x0_to_velocity_divides_in_float64_and_keeps_the_dtype():
    x0, x_t = (x.float() for x in pair())
    t = torch.tensor([1e-3, 0.1, 0.3, 0.7, 0.9])
    exact = (x_t.double() - x0.double()) / t.double().reshape(-1, 1, 1, 1)
    assert torch.equal(flow.x0_to_velocity(x0, x_t, t), exact.float())


@pytest.mark.parametrize("t", [torch.tensor(0.0), torch.tensor([0.5, 0.0]), torch.tensor([0.5, -0.1])])
def test_x0_to_velocity_is_undefined_at_the_data(t):
    with pytest.raises(ValueError, match="t > 0, got t = -?0"):
        flow.x0_to_velocity(torch.zeros(2, 3), torch.zeros(2, 3), t)


def test_shift():
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    assert torch.equal(flow.shift_time(t, 1.0), t)
    assert torch.allclose(flow.shift_time(t, 3.0)[[0, 5, 10]], torch.tensor([0, 0.75, 1]).double())
    assert torch.allclose(flow.shift_time(flow.shift_time(t, 3.0), 0.5), flow.shift_time(t, 1.5))
    assert torch.allclose(flow.shift_time(t, 3.0), 1 - flow.shift_time(1 - t, 1 / 3))


LAWS = [
    flow.TimeLaw(),
    flow.TimeLaw(low=0.02, high=0.98),
    flow.TimeLaw(shift=3.0),
    flow.TimeLaw("logit_normal"),
    flow.TimeLaw("logit_normal", mean=-0.5, std=1.5, shift=2.0, low=0.1, high=0.7),
]


@pytest.mark.parametrize("law", LAWS)
def test_the_quantile_inverts_the_cumulative_distribution(law):
    t = (law.quantile(U) - law.low) / (law.high - law.low)
    unshifted = t / (law.shift - (law.shift - 1) * t)
    if law.law == "logit_normal":
        z = (torch.log(unshifted / (1 - unshifted)) - law.mean) / law.std
        cumulative = 0.5 * (1 + torch.erf(z / math.sqrt(2)))
    else:
        cumulative = unshifted
    assert torch.allclose(cumulative, U, rtol=0, atol=1e-12)


@pytest.mark.parametrize("law", LAWS)
def test_the_quantile_rises_within_its_bounds(law):
    ends = law.quantile(torch.tensor([2.0**-33, 1 - 2.0**-33], dtype=torch.float64))
    assert (law.quantile(U).diff() > 0).all()
    assert law.low <= ends[0] < law.low + 0.01 and law.high - 0.01 < ends[1] <= law.high


def test_the_score_law_of_the_recipe_and_bad_bounds():
    assert torch.allclose(flow.TimeLaw(low=0.02, high=0.98).quantile(U), 0.02 + 0.96 * U)
    with pytest.raises(ValueError, match="low must be below high"):
        flow.TimeLaw(low=0.5, high=0.5)


def test_default_rungs():
    assert flow.default_rungs(4) == (1.0, 0.9, 0.75, 0.5)
    assert flow.default_rungs(1) == (1.0,)
    assert flow.default_rungs(4, shift=1.0) == (1.0, 0.75, 0.5, 0.25)
    flow.check_rungs(flow.default_rungs(16))


@pytest.mark.parametrize(
    ("rungs", "message"),
    [
        ((), "start at 1.0"),
        ((0.9, 0.5), "start at 1.0"),
        ((1.0, 0.5, 0.5), "fall strictly"),
        ((1.0, 0.5, 0.7), "fall strictly"),
        ((1.0, 0.5, 0.0), "stay above 0"),
        ((1.0, math.nan), "fall strictly"),
        ((1.0, math.nan, 0.5), "fall strictly"),
    ],
)
def test_bad_rungs_are_refused(rungs, message):
    with pytest.raises(ValueError, match=message):
        flow.check_rungs(rungs)


@pytest.mark.parametrize(
    ("rungs", "steps"), [((1.0,), 1), ((1.0,), 7), ((1.0, 0.9, 0.75, 0.5), 4), ((1.0, 0.9, 0.75, 0.5), 15)]
)
def test_the_grid_passes_through_every_rung(rungs, steps):
    grid, positions = flow.time_grid(rungs, steps)
    assert len(grid) == steps + 1 and grid[0] == 1.0 and grid[-1] == 0.0
    assert all(b < a for a, b in zip(grid, grid[1:], strict=False))
    assert tuple(grid[i] for i in positions) == rungs
    counts = [b - a for a, b in zip(positions, [*positions[1:], steps], strict=True)]
    assert counts == sorted(counts) and counts[-1] - counts[0] <= 1


def test_the_grid_is_even_between_rungs_and_needs_enough_steps():
    grid, positions = flow.time_grid((1.0, 0.4), 5)
    assert grid == pytest.approx([1.0, 0.7, 0.4, 0.4 * 2 / 3, 0.4 / 3, 0.0]) and positions == [0, 2]
    with pytest.raises(ValueError, match="3 solver steps cannot pass through 4 rungs"):
        flow.time_grid((1.0, 0.9, 0.75, 0.5), 3)
