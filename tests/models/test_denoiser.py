"""One Gaussian seen by networks of every parametrisation: one velocity, one distribution matching gradient."""

from itertools import product

import pytest
import torch
from torch import Tensor

from dmd_dar import flow, losses
from dmd_dar.guidance import guided
from dmd_dar.methods import rollout
from dmd_dar.methods.solvers import heun
from dmd_dar.models.denoiser import EDGE, MEANINGS, Meaning, network_time, velocity_of

CHAINS = [flow.Schedule(), flow.Schedule("cosine"), flow.Schedule("scaled_linear", 1000, 0.00085, 0.012)]
KINDS = ("x0", "eps", "v", "flow")
ON_CHAINS = [Meaning(kind, chain) for kind, chain in product(KINDS, CHAINS)]
ON_FLOW = [Meaning(kind, time_scale=scale) for kind, scale in product(KINDS, (1.0, 1000.0))]
ALL = [*ON_CHAINS, *ON_FLOW, MEANINGS["sit"], Meaning(reversed=True, time_scale=1000.0)]
TIMES = torch.tensor([0.03, 0.1, 0.3, 0.5, 0.7, 0.9, 0.93], dtype=torch.float64)  # within every chain
COND = torch.arange(7)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def gaussian(meaning: Meaning, mean: float, std: float, calls: list | None = None):
    """The exact network of that meaning for data N(mean, std^2): it sees its own time and scale only."""

    def network(x: Tensor, time: Tensor, labels: Tensor) -> Tensor:
        if calls is not None:
            calls.append((x, time))
        if meaning.schedule is None:
            sigma = time / meaning.time_scale
            sigma = 1 - sigma if meaning.reversed else sigma
            alpha = 1 - sigma
        else:
            level = meaning.schedule.level(time)
            alpha, sigma = (part / torch.hypot(1 - level, level) for part in (1 - level, level))
        a, s = (part.reshape(-1, 1, 1, 1) for part in (alpha, sigma))
        residual = (x - a * mean) / (a**2 * std**2 + s**2)
        x0, eps = mean + a * std**2 * residual, s * residual
        y = {"x0": x0, "eps": eps, "v": a * eps - s * x0, "flow": eps - x0}[meaning.predicts]
        return torch.cat([-y if meaning.reversed else y, 7 + x], dim=1)  # a learned sigma, to be dropped

    return network


def exact_velocity(x_t: Tensor, t: Tensor, mean: float, std: float) -> Tensor:
    t = flow.expand_t(t, x_t)
    residual = (x_t - (1 - t) * mean) / ((1 - t) ** 2 * std**2 + t**2)
    return t * residual - (mean + (1 - t) * std**2 * residual)


@pytest.mark.parametrize("meaning", ALL, ids=str)
def test_every_parametrisation_of_one_gaussian_is_one_velocity(meaning):
    x_t = randn(7, 2, 3, 3)
    v = velocity_of(gaussian(meaning, 0.7, 0.4), meaning)(x_t, TIMES, COND)
    assert v.shape == x_t.shape and torch.allclose(v, exact_velocity(x_t, TIMES, 0.7, 0.4), rtol=0, atol=1e-10)


@pytest.mark.parametrize("meaning", ALL, ids=str)
def test_every_parametrisation_of_one_gaussian_is_one_matching_gradient(meaning):
    """Student at N(0, 1), teacher N(0.7, 0.4^2), fake score N(-0.2, 0.9^2)."""
    gradients = []
    exact = [lambda x, t, c, m=m, s=s: exact_velocity(x, t, m, s) for m, s in ((0.7, 0.4), (-0.2, 0.9))]
    asked = [velocity_of(gaussian(meaning, m, s), meaning) for m, s in ((0.7, 0.4), (-0.2, 0.9))]
    for teacher, fake in (exact, asked):
        x = randn(7, 2, 3, 3, seed=1).requires_grad_()
        x_t = flow.interpolate(x.detach(), randn(7, 2, 3, 3, seed=2), TIMES)
        estimates = [flow.velocity_to_x0(velocity(x_t, TIMES, COND), x_t, TIMES) for velocity in (teacher, fake)]
        losses.dmd_loss(x, *estimates).backward()
        gradients.append(x.grad)
    assert (gradients[0] - gradients[1]).abs().max() <= 1e-6 * gradients[0].abs().max() and gradients[0].abs().min() > 0


def test_the_matching_gradient_is_its_closed_form_and_of_each_sample_alone():
    x, real, fake = (
        randn(5, 2, 3, 3, seed=seed) * torch.tensor([1, 0.01, 100, 1, 3]).reshape(5, 1, 1, 1) for seed in range(3)
    )

    def gradient(rows: slice) -> Tensor:
        student = x[rows].clone().requires_grad_()
        losses.dmd_loss(student, real[rows], fake[rows]).backward()
        return student.grad * student.numel()

    together = gradient(slice(0, 5))
    for i in range(5):
        expected = (fake[i] - real[i]) / ((x[i] - real[i]).abs().mean() + 1e-6)
        for found in (together[i], gradient(slice(i, i + 1))[0], gradient(slice(max(i - 1, 0), i + 1))[-1]):
            assert (found - expected).abs().max() <= 1e-12 * expected.abs().max()


@pytest.mark.parametrize("meaning", ALL, ids=str)
def test_the_time_that_a_network_is_given_can_be_asked(meaning):
    t, calls = torch.tensor([0.0, 0.03, 0.3, 0.7, 0.9, 1.0], dtype=torch.float64), []
    velocity_of(gaussian(meaning, 0, 1, calls), meaning)(randn(6, 2, 3, 3), t, COND[:6])
    assert torch.equal(network_time(meaning, t), calls[0][1])
    if meaning.reversed:
        assert torch.equal(network_time(meaning, t), (1 - t) * meaning.time_scale)


def test_a_chain_s_network_gets_its_own_scale_and_time():
    chain, calls = flow.Schedule(), []
    meaning = Meaning("eps", chain)
    t = chain.level(torch.tensor([0.0, 10.0, 250.5, 999.0], dtype=torch.float64))
    x_t = randn(4, 2, 3, 3)
    velocity_of(gaussian(meaning, 0, 1, calls), meaning)(x_t, t, COND[:4])
    (x, time), wide = calls[0], t.reshape(-1, 1, 1, 1)
    assert torch.allclose(time, torch.tensor([0.0, 10.0, 250.5, 999.0], dtype=torch.float64), rtol=0, atol=1e-9)
    assert torch.allclose(x, x_t / ((1 - wide) ** 2 + wide**2).sqrt(), rtol=1e-14)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chain", [None, *CHAINS], ids=str)
def test_the_ends_of_t_are_asked_at_the_nearest_level_that_is_known(kind, chain):
    meaning, calls = Meaning(kind, chain), []
    low, high = (EDGE, 1 - EDGE) if chain is None else chain.bounds
    t, x_t = torch.tensor([0.0, low / 2, (1 + high) / 2, 1.0], dtype=torch.float64), randn(4, 2, 3, 3)
    v = velocity_of(gaussian(meaning, 0.7, 0.4, calls), meaning)(x_t, t, COND[:4])
    if kind == "flow" and chain is None:
        assert torch.equal(calls[0][1], t) and torch.allclose(v, exact_velocity(x_t, t, 0.7, 0.4), rtol=0, atol=1e-12)
        return
    known = torch.tensor([low, low, high, high], dtype=torch.float64)
    assert torch.allclose(calls[0][1], known if chain is None else chain.timestep(known), rtol=0, atol=1e-9)
    a, s, wide = (part.reshape(-1, 1, 1, 1) for part in (1 - known, known, t))
    x = x_t
    if chain is not None:
        a, s, x = a / torch.hypot(a, s), s / torch.hypot(a, s), x_t / torch.hypot(1 - wide, wide)
    residual = (x - a * 0.7) / (a**2 * 0.16 + s**2)
    x0, eps = 0.7 + a * 0.16 * residual, s * residual
    assert torch.allclose(v[:2], ((eps - x_t) / (1 - wide))[:2], rtol=0, atol=1e-9)  # near data, eps says it
    assert torch.allclose(flow.velocity_to_x0(v, x_t, t)[2:], x0[2:], rtol=0, atol=1e-9)  # near noise, x0


@pytest.mark.parametrize("meaning", ALL, ids=str)
def test_gradients_pass_and_stay_finite_at_both_ends(meaning):
    x_t = randn(3, 2, 3, 3).requires_grad_()
    t = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    velocity_of(gaussian(meaning, 0.7, 0.4), meaning)(x_t, t, COND[:3]).square().sum().backward()
    assert torch.isfinite(x_t.grad).all() and x_t.grad[1].abs().min() > 0


@pytest.mark.parametrize("meaning", [*ON_CHAINS[:6], MEANINGS["sit"]], ids=str)
def test_the_ode_of_any_network_takes_noise_to_the_gaussian(meaning):
    """For one Gaussian the map from t = 1 to t = 0 is mean + std eps; solver, rollout and rungs see no chain."""
    noise, grid = randn(7, 2, 3, 3), torch.linspace(1, 0, 201, dtype=torch.float64).tolist()
    velocity = velocity_of(gaussian(meaning, 0.7, 0.4), meaning)
    end = heun(velocity, COND, grid, noise)[-1]
    assert (end - (0.7 + 0.4 * noise)).abs().max() < 0.02
    estimate = rollout.predict_x0(velocity, noise, 1.0, COND)
    assert (estimate - 0.7).abs().max() < 0.04  # the last step of the scaled_linear chain still holds 7 % of x0


@pytest.mark.parametrize("meaning", [MEANINGS["dit"], Meaning("v", flow.Schedule("cosine")), MEANINGS["sit"]], ids=str)
def test_guiding_velocities_is_guiding_the_network_s_own_output(meaning):
    def network(x, time, labels):  # conditional: N(0.7, 0.4^2); unconditional, label 9: N(-0.2, 0.9^2)
        one, other = (gaussian(meaning, m, s)(x, time, labels) for m, s in ((0.7, 0.4), (-0.2, 0.9)))
        return torch.where(labels.reshape(-1, 1, 1, 1) == 9, other, one)

    def guided_network(x, time, labels):
        cond, uncond = network(x, time, labels), network(x, time, torch.full_like(labels, 9))
        return uncond + 2.5 * (cond - uncond)

    x_t = randn(7, 2, 3, 3)
    ours = guided(velocity_of(network, meaning), 2.5, 9)(x_t, TIMES, COND)
    assert torch.allclose(ours, velocity_of(guided_network, meaning)(x_t, TIMES, COND), rtol=0, atol=1e-9)


def test_float32_inputs_stay_float32_and_convert_in_float64():
    x_t, t, seen = randn(7, 2, 3, 3), TIMES.float(), []
    dit = MEANINGS["dit"]
    network = gaussian(dit, 0.7, 0.4)

    def recording(x, time, labels):
        seen.append((x.dtype, time.dtype))
        return network(x.double(), time.double(), labels).float()

    v = velocity_of(recording, "dit")(x_t.float(), t, COND)
    assert v.dtype == torch.float32 and seen == [(torch.float32, torch.float32)]
    assert torch.allclose(v.double(), exact_velocity(x_t, t.double(), 0.7, 0.4), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "wrong", [{"schedule": flow.Schedule(), "reversed": True}, {"schedule": flow.Schedule(), "time_scale": 2.0}]
)
def test_a_chain_has_its_own_time(wrong):
    with pytest.raises(ValueError, match="linear flow"):
        Meaning(**wrong)
    with pytest.raises(ValueError, match="reversed networks predict flow"):
        Meaning("eps", reversed=True)
