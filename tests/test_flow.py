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
    assert torch.equal(flow.velocity_to_x0(v, x_t, TIMES)[0], x_t[0])
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


ALPHAS = torch.tensor([1.0, 0.95, 0.3, 0.6, 1e-3], dtype=torch.float64)
SIGMAS = torch.tensor([1e-3, 0.31, 0.9, 0.8, 1.0], dtype=torch.float64)
MIXTURES = {  # by hand, from x0 and eps
    "x0": lambda x0, eps, a, s: x0,
    "eps": lambda x0, eps, a, s: eps,
    "v": lambda x0, eps, a, s: a * eps - s * x0,
    "flow": lambda x0, eps, a, s: eps - x0,
}


@pytest.mark.parametrize("predicted", MIXTURES)
def test_every_prediction_gives_x0_and_comes_back(predicted):
    (x0, eps), a, s = pair(), ALPHAS.reshape(-1, 1, 1, 1), SIGMAS.reshape(-1, 1, 1, 1)
    x, y = a * x0 + s * eps, MIXTURES[predicted](x0, eps, a, s)
    assert torch.allclose(flow.prediction_to_x0(predicted, y, x, ALPHAS, SIGMAS), x0, rtol=0, atol=1e-11)
    assert torch.allclose(flow.x0_to_prediction(predicted, x0, x, ALPHAS, SIGMAS), y, rtol=0, atol=1e-11)
    for other, mixture in MIXTURES.items():  # a -> x0 -> b
        through = flow.x0_to_prediction(
            other, flow.prediction_to_x0(predicted, y, x, ALPHAS, SIGMAS), x, ALPHAS, SIGMAS
        )
        assert torch.allclose(through, mixture(x0, eps, a, s), rtol=0, atol=1e-9)


@pytest.mark.parametrize("predicted", MIXTURES)
def test_predictions_at_the_very_ends(predicted):
    (x0, eps), zero, one = pair(), torch.tensor(0.0).double(), torch.tensor(1.0).double()
    y = MIXTURES[predicted](x0, eps, one, zero)
    assert torch.equal(flow.prediction_to_x0(predicted, y, x0, one, zero), x0)  # data: x = x0
    y = MIXTURES[predicted](x0, eps, zero, one)
    if predicted == "eps":
        with pytest.raises(ValueError, match="alpha = 0"):
            flow.prediction_to_x0(predicted, y, eps, zero, one)
    else:
        assert torch.allclose(flow.prediction_to_x0(predicted, y, eps, zero, one), x0, rtol=0, atol=1e-14)
    assert torch.allclose(flow.x0_to_prediction(predicted, x0, eps, zero, one), y, rtol=0, atol=1e-14)
    if predicted == "x0":
        assert torch.equal(flow.x0_to_prediction(predicted, x0, x0, one, zero), x0)
    else:
        with pytest.raises(ValueError, match="sigma = 0"):
            flow.x0_to_prediction(predicted, x0, x0, one, zero)


def test_the_flow_prediction_is_this_package_s_velocity():
    x0, eps = pair()
    x_t, v = flow.interpolate(x0, eps, TIMES), eps - x0
    through_hub = flow.prediction_to_x0("flow", v, x_t, 1 - TIMES, TIMES)
    assert torch.allclose(through_hub, flow.velocity_to_x0(v, x_t, TIMES), rtol=0, atol=1e-14)


def test_x0_and_eps_that_fit_x_t_give_v_at_every_t_and_at_the_ends_the_one_that_is_known():
    x0, eps = pair()
    x_t = flow.interpolate(x0, eps, TIMES)
    assert torch.allclose(flow.x0_and_eps_to_velocity(x0, eps, x_t, TIMES), eps - x0, rtol=0, atol=1e-14)
    wrong = x0 + 1  # at t = 0, x_t is the data whatever the estimate of x0 says; at t = 1, x_t is the noise
    v = flow.x0_and_eps_to_velocity(wrong, eps + 1, x_t, TIMES)
    assert torch.equal(v[0], eps[0] + 1 - x_t[0]) and torch.equal(v[-1], x_t[-1] - wrong[-1])


CHAINS = {
    "linear": dict(beta_schedule="linear", beta_start=1e-4, beta_end=0.02),
    "scaled_linear": dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012),
    "cosine": dict(beta_schedule="squaredcos_cap_v2"),
}


@pytest.mark.parametrize("kind", CHAINS)
def test_the_levels_of_a_chain_are_those_of_diffusers(kind):
    from diffusers import DDPMScheduler

    theirs = DDPMScheduler(num_train_timesteps=1000, **CHAINS[kind]).alphas_cumprod.double()
    start, end = CHAINS[kind].get("beta_start", 1e-4), CHAINS[kind].get("beta_end", 0.02)
    level = flow.Schedule(kind, 1000, start, end).level(torch.arange(1000))
    assert torch.allclose(((1 - level) / level).log(), 0.5 * (theirs / (1 - theirs)).log(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", CHAINS)
def test_timesteps_and_levels_are_each_other_s_inverse(kind):
    chain = flow.Schedule(kind)
    steps = torch.linspace(0, 999, 2998, dtype=torch.float64)  # thirds
    level = chain.level(steps)
    assert (level.diff() > 0).all() and chain.bounds == pytest.approx((level[0].item(), level[-1].item()), abs=1e-15)
    assert torch.allclose(chain.timestep(level), steps, rtol=0, atol=1e-6)
    between = 0.5 * (((1 - level) / level).log()[0] + ((1 - level) / level).log()[3])  # linear in the log ratio
    assert chain.timestep(torch.sigmoid(-between)).item() == pytest.approx(0.5, abs=1e-9)
    beyond = torch.tensor([0.0, level[0].item() / 2, 1 - (1 - level[-1].item()) / 2, 1.0], dtype=torch.float64)
    assert chain.timestep(beyond).tolist() == [0.0, 0.0, 999.0, 999.0]


def test_dit_s_chain_by_hand():
    """alpha^2 after one step is 1 - 1e-4; after two, (1 - 1e-4)(1 - beta_1)."""
    first, second = 1 - 1e-4, (1 - 1e-4) * (1 - 1e-4 - 0.0199 / 999)
    expected = [math.sqrt(1 - a) / (math.sqrt(a) + math.sqrt(1 - a)) for a in (first, second)]
    assert flow.Schedule().level(torch.tensor([0, 1])).tolist() == pytest.approx(expected, rel=1e-9)
    assert flow.Schedule().bounds == pytest.approx((0.0099, 0.9937), abs=1e-4)


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
@pytest.mark.parametrize("law", ["even", "sqrt", "cosine"])
def test_the_grid_passes_through_every_rung(rungs, steps, law):
    grid, positions = flow.time_grid(rungs, steps, law)
    assert len(grid) == steps + 1 and grid[0] == 1.0 and grid[-1] == 0.0
    assert all(b < a for a, b in zip(grid, grid[1:], strict=False))
    assert tuple(grid[i] for i in positions) == rungs
    counts = [b - a for a, b in zip(positions, [*positions[1:], steps], strict=True)]
    assert min(counts) >= 1 and (law != "even" or (counts == sorted(counts) and counts[-1] - counts[0] <= 1))


def test_other_laws_are_even_in_their_own_places_and_share_out_the_steps_by_them():
    assert flow.time_grid((1.0,), 4, "sqrt")[0] == pytest.approx([1.0, 0.5625, 0.25, 0.0625, 0.0])
    assert flow.time_grid((1.0,), 3, "cosine")[0] == pytest.approx([1.0, 0.75, 0.25, 0.0])
    grid, positions = flow.time_grid((1.0, 0.81), 10, "sqrt")  # in sqrt(t): a tenth of the way and nine
    assert positions == [0, 1] and grid[1:4] == pytest.approx([0.81, 0.64, 0.49])


def test_the_grid_is_even_between_rungs_and_needs_enough_steps():
    grid, positions = flow.time_grid((1.0, 0.4), 5, "even")
    assert grid == pytest.approx([1.0, 0.7, 0.4, 0.4 * 2 / 3, 0.4 / 3, 0.0]) and positions == [0, 2]
    with pytest.raises(ValueError, match="3 solver steps cannot pass through 4 rungs"):
        flow.time_grid((1.0, 0.9, 0.75, 0.5), 3, "cosine")
