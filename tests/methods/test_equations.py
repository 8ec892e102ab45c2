"""The method's equations in float64 against closed forms: gradients, parametrisations, forms, who is trained."""

import copy
import dataclasses
import math

import pytest
import torch
from torch import Tensor, nn

from dmd_dar import flow, losses
from dmd_dar.draws import Draws, sample_range
from dmd_dar.guidance import guided
from dmd_dar.losses import LossWeight
from dmd_dar.methods.dmd import DMD, Guidance, Regression
from dmd_dar.methods.generate import few_step_generator
from dmd_dar.methods.solvers import Solver
from dmd_dar.methods.trajectories import solve_trajectories
from dmd_dar.models.denoiser import Meaning, velocity_of
from dmd_dar.models.sit import with_routing
from dmd_dar.routing.layout import RoutingConfig
from dmd_dar.train.loop.loop import Phase, update
from dmd_dar.train.loop.optimise import Optimiser, OptimiserConfig
from dmd_dar.train.processes.runtime import LaunchConfig, Runtime
from tests.tiny import tiny_sit

SHAPE = (2, 4, 4)
RUNGS = (1.0, 0.9, 0.75, 0.5)
LAW = flow.TimeLaw(low=0.02, high=0.98)


def draws_for(step: int = 0, start: int = 0, stop: int = 6) -> Draws:
    return Draws(0, "student", step, sample_range(start, stop))


def gaussian(mean: float, std: float, by_label: float = 0.0):
    """E[eps - x0 | x_t] for data N(mean + by_label cond, std^2)."""

    def velocity(x_t: Tensor, t: Tensor, cond: Tensor, *rung: int) -> Tensor:
        t, centre = flow.expand_t(t, x_t), flow.expand_t(mean + by_label * cond.to(x_t.dtype), x_t)
        variance = (1 - t) ** 2 * std**2 + t**2
        residual = x_t - (1 - t) * centre
        return t / variance * residual - (centre + (1 - t) * std**2 / variance * residual)

    return velocity


class Samples(nn.Module):
    """A one-step student whose x0 are free numbers, float64, one row for each global sample."""

    def __init__(self, count: int = 6):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.x0 = nn.Parameter(3 * torch.randn(count, *SHAPE, generator=generator, dtype=torch.float64))
        self.rows = slice(None)

    def forward(self, x_t: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        return x_t - self.x0[self.rows]


def method_of(student, teacher, fake_score, **changes) -> DMD:
    fields = {"rungs": (1.0,), "renoise": LAW, "num_classes": 3, "shape": SHAPE}
    return DMD(student=student, teacher=teacher, fake_score=fake_score, **{**fields, **changes})


def gradient_of(method: DMD, student: Samples, draws: Draws) -> Tensor:
    student.x0.grad = None
    method.student_loss(draws)[0].backward()
    return student.x0.grad.clone()


def level(name: str, draws: Draws, x0: Tensor) -> tuple[Tensor, Tensor]:
    """x_t and t as the draws of this name decide them."""
    t, eps = LAW.quantile(draws.uniform(f"{name}_t")), draws.normal(f"{name}_eps", *SHAPE, dtype=torch.float64)
    return flow.interpolate(x0, eps, t), t


def estimate(velocity, x_t: Tensor, t: Tensor, cond: Tensor) -> Tensor:
    return flow.velocity_to_x0(velocity(x_t, t, cond), x_t, t)


def test_the_gradient_is_the_difference_of_the_estimates_over_the_distance_to_the_teacher():
    student, teacher, fake = Samples(), gaussian(1.0, 0.5, 0.3), gaussian(-0.5, 1.5)
    method, draws = method_of(student, teacher, fake), draws_for()
    found = gradient_of(method, student, draws)
    cond, x = draws.integers("label", 3), student.x0.detach()
    x_t, t = level("score", draws, x)
    mu_r, mu_f = (estimate(velocity, x_t, t, cond) for velocity in (teacher, fake))
    for i in range(6):
        expected = (mu_f[i] - mu_r[i]) / ((x[i] - mu_r[i]).abs().mean() + 1e-6) / x.numel()
        assert (found[i] - expected).abs().max() <= 1e-12 * expected.abs().max()


def test_a_sample_s_gradient_does_not_depend_on_its_batch():
    student = Samples()
    method = method_of(student, gaussian(1.0, 0.5, 0.3), gaussian(-0.5, 1.5))
    whole = gradient_of(method, student, draws_for()) * 6
    for i in range(6):
        student.rows = slice(i, i + 1)
        alone = gradient_of(method, student, draws_for(0, i, i + 1))
        assert (alone[i] - whole[i]).abs().max() <= 1e-12 * whole[i].abs().max()


def predicting(predicts: flow.Predicted, schedule: flow.Schedule | None, mean: float, std: float):
    """A network that answers exactly, for data N(mean, std^2), by what it predicts, on its own process."""

    def network(x: Tensor, time: Tensor, cond: Tensor, *rung: int) -> Tensor:
        sigma = time if schedule is None else schedule.level(time)
        alpha = 1 - sigma
        if schedule is not None:
            norm = torch.hypot(alpha, sigma)
            alpha, sigma = alpha / norm, sigma / norm
        a, s = flow.expand_t(alpha, x), flow.expand_t(sigma, x)
        x0 = mean + a * std**2 / (a**2 * std**2 + s**2) * (x - a * mean)
        eps = (x - a * x0) / s
        return {"x0": x0, "eps": eps, "v": a * eps - s * x0, "flow": eps - x0}[predicts]

    return velocity_of(network, Meaning(predicts, schedule))


@pytest.mark.parametrize("schedule", [None, flow.Schedule(), flow.Schedule("cosine")], ids=["linear", "ddpm", "cosine"])
@pytest.mark.parametrize("predicts", ["x0", "eps", "v", "flow"])
def test_every_parametrisation_gives_the_same_gradient(predicts, schedule):
    student, draws = Samples(), draws_for(3)
    expected = gradient_of(method_of(student, gaussian(1.0, 0.5), gaussian(-0.5, 1.5)), student, draws)
    networks = (predicting(predicts, schedule, 1.0, 0.5), predicting(predicts, schedule, -0.5, 1.5))
    found = gradient_of(method_of(student, *networks), student, draws)
    assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()


def test_decoupled_matching_splits_the_guided_difference():
    g, student, draws = 3.0, Samples(), draws_for(1)
    plain, fake = gaussian(1.0, 0.5, 0.3), gaussian(-0.5, 1.5)
    teacher = guided(plain, g, 3)
    found = gradient_of(method_of(student, teacher, fake, guidance=Guidance(plain)), student, draws)
    cond, x = draws.integers("label", 3), student.x0.detach()
    (x_t, t), (x_s, s) = (level(name, draws, x) for name in ("score", "guidance"))
    mu_cond, mu_f = estimate(plain, x_t, t, cond), estimate(fake, x_t, t, cond)
    at_s = [estimate(plain, x_s, s, c) for c in (cond, torch.full_like(cond, 3))]
    mu_guided = at_s[1] + g * (at_s[0] - at_s[1])
    scales = [(x - mu).abs().flatten(1).mean(1).reshape(-1, 1, 1, 1) + 1e-6 for mu in (mu_cond, mu_guided)]
    expected = (mu_f - mu_cond) / scales[0] - (g - 1) * (at_s[0] - at_s[1]) / scales[1]
    torch.testing.assert_close(found * x.numel(), expected, rtol=1e-10, atol=1e-10)


def test_decoupled_matching_names_the_unguided_teacher():
    calls = []

    def plain(x_t: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        calls.append(t)  # the first is the score's, the second the guidance's
        return gaussian(1.0, 0.5)(x_t, t, cond) * (math.nan if len(calls) == 2 else 1)

    student = Samples()
    method = method_of(student, gaussian(1.0, 0.5), gaussian(-0.5, 1.5), guidance=Guidance(plain))
    with pytest.raises(FloatingPointError, match=r"\['unguided teacher'\]"):
        method.student_loss(draws_for(1))


def test_the_fake_score_s_loss_in_x0_is_that_of_flow_times_t_squared():
    student, t = Samples(), LAW.quantile(draws_for().uniform("score_t"))
    method = method_of(student, None, gaussian(0.3, 1.2), x0_space=True)
    x0, cond = student.x0.detach(), draws_for().integers("label", 3)
    x_t, t = level("score", draws_for(), x0)
    expected = (estimate(method.fake_score, x_t, t, cond) - x0).square().mean()
    torch.testing.assert_close(method.fake_score_loss(draws_for())[0], expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("rung", range(4))
@pytest.mark.parametrize("sampler", ["stochastic", "deterministic"])
def test_backward_simulation_makes_one_forward_for_each_rung_and_is_what_sampling_does(rung, sampler):
    step = next(s for s in range(50) if draws_for(s).shared_integer("rung", 4) == rung)
    seen, draws, velocity = [], draws_for(step), gaussian(0.5, 0.7, 0.2)

    def student(x_t: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        seen.append((t[0].item(), torch.is_grad_enabled()))
        return velocity(x_t, t, cond)

    x0, cond, _ = method_of(student, None, None, rungs=RUNGS, sampler=sampler).generate(rung, draws)
    assert [t for t, _ in seen] == pytest.approx(RUNGS[: rung + 1])
    assert [grad for _, grad in seen] == [False] * rung + [True]
    generator = few_step_generator(velocity, RUNGS[: rung + 1], sampler)
    assert torch.equal(x0, generator(cond, draws, draws.normal("noise", *SHAPE)))


def test_on_data_the_student_is_asked_once_at_the_noised_data():
    def data(draws: Draws):
        return draws.normal("image", *SHAPE), torch.full_like(draws.samples, 2)

    seen = []

    def student(x_t: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        seen.append((x_t, t, cond))
        return 0 * x_t

    step = next(s for s in range(50) if draws_for(s).shared_integer("rung", 4) == 2)
    draws = draws_for(step)
    _, cond, _ = method_of(student, None, None, rungs=RUNGS, data=data).generate(2, draws)
    ((x_t, t, asked),) = seen
    assert torch.equal(t, torch.full((6,), 0.75)) and torch.equal(asked, cond) and (cond == 2).all()
    torch.testing.assert_close(x_t, 0.25 * draws.normal("image", *SHAPE) + 0.75 * draws.normal("noise", *SHAPE))


def test_the_size_of_each_term_s_gradient_is_told():
    student = Samples()
    paths = solve_trajectories(
        gaussian(0.0, 1.0), torch.zeros(4).long(), (1.0,), Solver(solver_steps=2), torch.randn(4, *SHAPE).double()
    )
    method = method_of(student, gaussian(1.0, 0.5), gaussian(-0.5, 1.5), matching_weight=2.0)
    method = dataclasses.replace(method, regression=Regression(paths, LossWeight(0.5)))
    metrics = method.student_loss(draws_for())[1]
    cond, x = draws_for().integers("label", 3), student.x0.detach()
    x_t, t = level("score", draws_for(), x)
    g = losses.dmd_direction(x, *(estimate(velocity, x_t, t, cond) for velocity in (method.teacher, method.fake_score)))
    expected = 2 * g.flatten(1).square().mean(1).sqrt().mean()
    torch.testing.assert_close(metrics["dm_gradient"], expected, rtol=1e-10, atol=0)
    ends = paths.ends[draws_for().integers("pair", 4)]
    expected = 0.5 * 2 * (student.x0.detach() - ends).flatten(1).square().mean(1).sqrt().mean()
    torch.testing.assert_close(metrics["regression_gradient"], expected, rtol=1e-10, atol=0)


def test_a_weight_of_zero_leaves_its_term_out_from_that_step_on():
    student, paths = (
        Samples(),
        solve_trajectories(
            gaussian(0.0, 1.0), torch.zeros(4).long(), (1.0,), Solver(solver_steps=2), torch.randn(4, *SHAPE)
        ),
    )
    ramp = LossWeight(1.0, 0.0, ramp_start=2, ramp_steps=2)
    method = method_of(student, gaussian(1.0, 0.5), gaussian(-0.5, 1.5), regression=Regression(paths, ramp))
    found = [method.student_loss(draws_for(step))[1] for step in range(5)]
    sizes = [
        metrics.get("regression_gradient", torch.zeros(())) / metrics.get("regression", 1).sqrt()
        for metrics in found[:4]
    ]
    assert "regression" not in found[4] and "dm" in found[4]
    assert (sizes[3] / sizes[2]).item() == pytest.approx(0.5, rel=0.3)


def test_frozen_networks_stay_bit_equal_and_each_phase_moves_its_own():
    teacher = tiny_sit().requires_grad_(False)
    student = with_routing(teacher, RoutingConfig(query="timestep", chunk_size=2)).requires_grad_(True)
    fake_score = copy.deepcopy(teacher).requires_grad_(True)
    networks = {"student": student, "teacher": teacher, "fake_score": fake_score}
    method = DMD(
        **{name: velocity_of(n) for name, n in networks.items()},
        rungs=RUNGS,
        renoise=LAW,
        num_classes=7,
        shape=(3, 32, 32),
    )
    runtime, config = Runtime(LaunchConfig(cpu=True)), OptimiserConfig(lr=1e-3)
    phases = {
        name: Phase(name, networks[name], Optimiser(config, networks[name].backbone_parameters()), loss)
        for name, loss in (("student", method.student_loss), ("fake_score", method.fake_score_loss))
    }
    for turn in ("fake_score", "student"):
        before = {name: copy.deepcopy(n.state_dict()) for name, n in networks.items()}
        update(phases[turn], 0, 4, runtime)
        moved = {
            name
            for name, n in networks.items()
            if any(not torch.equal(v, before[name][k]) for k, v in n.state_dict().items())
        }
        assert moved == {turn}
