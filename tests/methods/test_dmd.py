import copy
import dataclasses

import pytest
import torch
from torch import Tensor, nn

from dmd_dar import flow, losses
from dmd_dar.draws import Draws, sample_range
from dmd_dar.losses import LossWeight
from dmd_dar.methods.dmd import DMD, Regression
from dmd_dar.methods.rollout import renoise, rung_of
from dmd_dar.methods.solvers import Solver
from dmd_dar.methods.trajectories import solve_trajectories
from dmd_dar.models.denoiser import velocity_of
from dmd_dar.models.sit import with_routing
from dmd_dar.routing.layout import RoutingConfig
from tests.tiny import tiny_sit

SHAPE = (3, 32, 32)
RUNGS = (1.0, 0.9, 0.75, 0.5)


def gaussian_velocity(mean: Tensor, std: float):
    """E[eps - x0 | x_t] for data N(mean, std^2)."""

    def velocity(x_t: Tensor, t: Tensor, cond: Tensor, *rung: int) -> Tensor:
        t = flow.expand_t(t, x_t)
        variance = (1 - t) ** 2 * std**2 + t**2
        residual = x_t - (1 - t) * mean
        return t / variance * residual - (mean + (1 - t) * std**2 / variance * residual)

    return velocity


class GaussianStudent(nn.Module):
    """x0 = mean + std noise at t = 1, as a velocity."""

    def __init__(self, mean: Tensor, std: float):
        super().__init__()
        self.mean, self.std = nn.Parameter(mean.clone()), std

    def forward(self, x_t: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        return x_t - (self.mean + self.std * x_t)


def method_of(student, teacher, fake_score, **changes) -> DMD:
    fields = {"rungs": RUNGS, "renoise": flow.TimeLaw(low=0.02, high=0.98), "num_classes": 7, "shape": SHAPE}
    return DMD(student=student, teacher=teacher, fake_score=fake_score, **{**fields, **changes})


def draws_for(step: int, start: int = 0, stop: int = 8, phase: str = "student") -> Draws:
    return Draws(0, phase, step, sample_range(start, stop))


@pytest.fixture
def networks():
    teacher = tiny_sit().requires_grad_(False)
    student = with_routing(teacher, RoutingConfig(query="timestep", chunk_size=2))
    fake_score = copy.deepcopy(teacher).requires_grad_(True)
    with torch.no_grad():
        for p in fake_score.parameters():
            p.add_(0.01 * torch.randn_like(p))
    return student, teacher, fake_score


def test_a_gaussian_student_moves_to_the_teachers_mean():
    target, std = torch.tensor([1.0, -2.0, 0.5]).reshape(3, 1, 1), 0.5
    student = GaussianStudent(torch.zeros(3, 1, 1), std)
    optimiser = torch.optim.SGD(student.parameters(), lr=0.15)
    distances = []
    for step in range(150):
        fake = gaussian_velocity(student.mean.detach().clone(), std)
        method = method_of(student, gaussian_velocity(target, std), fake, rungs=(1.0,), shape=(3, 4, 4))
        loss, _ = method.student_loss(draws_for(step, stop=32))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        distances.append((student.mean.detach() - target).norm().item())
    assert distances[10] < distances[0]
    assert distances[-1] < 0.1 * distances[0]


def test_an_equal_fake_score_and_teacher_leave_the_student_alone(networks):
    student, teacher, _ = networks
    method = method_of(*(velocity_of(n) for n in (student, teacher, teacher)))
    loss, metrics = method.student_loss(draws_for(3))
    loss.backward()
    assert metrics["fake_to_teacher_rms"] == 0
    assert all(p.grad is None or not p.grad.any() for p in student.parameters())


def test_each_loss_trains_its_own_network_alone(networks):
    student, teacher, fake_score = networks
    method = method_of(*(velocity_of(n) for n in networks))
    method.student_loss(draws_for(0))[0].backward()
    assert all(p.grad is None for n in (teacher, fake_score) for p in n.parameters())
    assert all(p.grad is not None and p.grad.any() for name, p in student.named_parameters() if name == "dar.query")
    student.zero_grad(set_to_none=True)
    method.fake_score_loss(draws_for(0, phase="fake_score"))[0].backward()
    assert all(p.grad is None for n in (student, teacher) for p in n.parameters())
    assert fake_score.final_layer.linear.weight.grad.any()


def test_gradient_flows_through_the_last_call_only(networks):
    student = networks[0]
    with_gradient = []

    def recording(x_t, t, cond, *rung):
        with_gradient.append((t[0].item(), torch.is_grad_enabled(), x_t.requires_grad))
        return velocity_of(student)(x_t, t, cond)

    method = method_of(recording, velocity_of(networks[1]), velocity_of(networks[2]))
    step = next(s for s in range(50) if draws_for(s).shared_integer("rung", 4) == 3)
    method.generate(3, draws_for(step))
    assert [round(t, 4) for t, _, _ in with_gradient] == list(RUNGS)
    assert [grad for _, grad, _ in with_gradient] == [False, False, False, True]
    assert not any(needs for _, _, needs in with_gradient)


def test_every_rung_is_trained_about_equally():
    counts = torch.zeros(4)
    for step in range(800):
        counts[draws_for(step).shared_integer("rung", 4)] += 1
    assert (counts - 200).abs().max() < 50


@pytest.mark.parametrize("which", ["student_loss", "fake_score_loss"])
def test_a_batch_in_parts_has_the_same_mean_loss(networks, which):
    teacher = velocity_of(networks[1])
    paths = solve_trajectories(teacher, torch.arange(5) % 7, RUNGS, Solver(solver_steps=4), torch.randn(5, *SHAPE))
    method = method_of(*(velocity_of(n) for n in networks), regression=Regression(paths, LossWeight(0.25)))
    loss = getattr(method, which)
    whole = loss(draws_for(2))[0]
    parts = [loss(draws_for(2, start, start + 2))[0] for start in range(0, 8, 2)]
    torch.testing.assert_close(torch.stack(parts).mean(), whole, rtol=1e-5, atol=1e-6)


def test_joint_loss_is_the_weighted_sum(networks):
    teacher = velocity_of(networks[1])
    paths = solve_trajectories(teacher, torch.arange(5) % 7, RUNGS, Solver(solver_steps=4), torch.randn(5, *SHAPE))
    method = method_of(*(velocity_of(n) for n in networks), regression=Regression(paths, LossWeight(0.3)))
    loss, metrics = method.student_loss(draws_for(1))
    regression = Regression(paths, LossWeight(1.0))
    alone, _ = dataclasses.replace(method, matching_weight=0.0, regression=regression).student_loss(draws_for(1))
    torch.testing.assert_close(metrics["regression"], alone)
    torch.testing.assert_close(loss, metrics["dm"] + 0.3 * alone)


def test_regression_weighs_each_rung_by_itself(networks):
    """Its share of the loss is weight times the rung's factor; at a factor of 0 it makes no call."""
    teacher, factors = velocity_of(networks[1]), (0.0, 0.5, 1.0, 2.0)
    paths = solve_trajectories(teacher, torch.arange(5) % 7, RUNGS, Solver(solver_steps=4), torch.randn(5, *SHAPE))
    method = method_of(*(velocity_of(n) for n in networks), regression=Regression(paths, LossWeight(0.3)))
    weighed = dataclasses.replace(method, regression=Regression(paths, LossWeight(0.3), by_rung=factors))
    seen = set()
    for step in range(12):
        draws = draws_for(step)
        rung = method.rung_of(draws)
        seen.add(rung)
        _, all_alike = method.student_loss(draws)
        loss, metrics = weighed.student_loss(draws)
        assert ("regression" in metrics) == (rung > 0)
        torch.testing.assert_close(loss, metrics["dm"] + 0.3 * factors[rung] * all_alike["regression"])
    assert seen == {0, 1, 2, 3}


def test_regression_pulls_the_trajectory_state_to_its_end(networks):
    student, teacher, _ = networks
    cond, noise = torch.zeros(1, dtype=torch.int64), torch.randn(1, *SHAPE)
    paths = solve_trajectories(velocity_of(teacher), cond, RUNGS, Solver(solver_steps=4), noise)
    method = method_of(
        velocity_of(student), None, None, matching_weight=0.0, regression=Regression(paths, LossWeight(1.0))
    )
    draws = draws_for(0, stop=1)
    rung = draws.shared_integer("rung", 4)
    t = torch.full((1,), RUNGS[rung])
    x0 = flow.velocity_to_x0(velocity_of(student)(paths.states[:, rung], t, paths.cond), paths.states[:, rung], t)
    torch.testing.assert_close(method.student_loss(draws)[0], (x0 - paths.ends).square().mean())


def test_regression_pulls_towards_the_state_at_the_next_rung_where_that_is_its_target(networks):
    student, teacher = velocity_of(networks[0]), velocity_of(networks[1])
    cond = torch.arange(5) % 7
    paths = solve_trajectories(teacher, cond, RUNGS, Solver(solver_steps=4), torch.randn(5, *SHAPE))
    regression = Regression(paths, LossWeight(1.0), target="next_rung")
    method = method_of(student, None, None, matching_weight=0.0, regression=regression)
    seen = set()
    for step in range(12):
        draws = draws_for(step)
        rung, index = method.rung_of(draws), draws.integers("pair", 5)
        seen.add(rung)
        t, x_t = torch.full((8,), RUNGS[rung]), paths.states[index, rung]
        x0 = flow.velocity_to_x0(student(x_t, t, cond[index]), x_t, t)
        reached = x_t + ((*RUNGS, 0.0)[rung + 1] - RUNGS[rung]) * (x_t - x0) / RUNGS[rung]  # Euler's step
        there = paths.ends[index] if rung == 3 else paths.states[index, rung + 1]
        share = 1 - (*RUNGS, 0.0)[rung + 1] / RUNGS[rung]  # of an error of x0 in the state that is reached
        expected = ((reached - there) / share).square().mean()
        torch.testing.assert_close(method.student_loss(draws)[0], expected, rtol=1e-4, atol=1e-6)
    assert seen == {0, 1, 2, 3}


def test_fake_score_loss_is_flow_matching_at_the_drawn_level(networks):
    student, teacher, fake_score = networks
    method = method_of(*(velocity_of(n) for n in networks))
    draws = draws_for(5, phase="fake_score")
    x0, cond, _ = method.generate(rung_of(draws, RUNGS), draws)
    t, eps = draws.uniform("score_t"), draws.normal("score_eps", *SHAPE)
    t = (0.02 + 0.96 * t).float()
    x_t = flow.interpolate(x0.detach(), eps, t)
    expected = losses.flow_matching_loss(velocity_of(fake_score)(x_t, t, cond), x0.detach(), eps)
    torch.testing.assert_close(method.fake_score_loss(draws)[0], expected)


def test_the_fake_score_alone_is_asked_with_the_rung(networks):
    rungs = {"teacher": [], "fake_score": []}

    def recording(name, velocity):
        return lambda x_t, t, cond, *rung: (rungs[name].append(rung), velocity(x_t, t, cond))[1]

    velocities = [velocity_of(n) for n in networks]
    method = method_of(velocities[0], recording("teacher", velocities[1]), recording("fake_score", velocities[2]))
    for step in range(6):
        draws = draws_for(step)
        loss, _ = method.student_loss(draws)
        assert rungs["teacher"][-1] == () and rungs["fake_score"][-1] == (rung_of(draws, RUNGS),)
        assert torch.equal(loss, method_of(*velocities).student_loss(draws)[0])
        fake = draws_for(step, phase="fake_score")
        method.fake_score_loss(fake)
        assert rungs["fake_score"][-1] == (rung_of(fake, RUNGS),)


@pytest.mark.parametrize("above", [False, True])
def test_a_rung_is_matched_above_the_next_one_alone_where_that_is_asked(above):
    seen: dict[str, dict[int, list[float]]] = {"teacher": {}, "fake_score": {}}

    def watched(name: str):
        plain = gaussian_velocity(torch.zeros(SHAPE), 0.5)

        def velocity(x_t: Tensor, t: Tensor, cond: Tensor, *rung: int) -> Tensor:
            seen[name].setdefault(here[0], []).extend(t.tolist())
            return plain(x_t, t, cond)

        return velocity

    method = method_of(
        GaussianStudent(torch.zeros(SHAPE), 0.5),
        watched("teacher"),
        watched("fake_score"),
        above_next_rung=above,
    )
    for step in range(40):
        for phase, loss in (("student", method.student_loss), ("fake_score", method.fake_score_loss)):
            draws = draws_for(step, stop=16, phase=phase)
            here = [method.rung_of(draws)]
            loss(draws)
    lowest = (0.9, 0.75, 0.5, 0.02) if above else (0.02,) * 4
    for name, by_rung in seen.items():
        assert sorted(by_rung) == [0, 1, 2, 3], name
        for rung, times in by_rung.items():
            width, drawn = 0.98 - lowest[rung], torch.tensor(times)
            assert lowest[rung] <= drawn.min() < lowest[rung] + 0.1 * width
            assert 0.98 - 0.1 * width < drawn.max() <= 0.98
            assert drawn.mean().item() == pytest.approx(lowest[rung] + width / 2, abs=0.1 * width)


def test_each_rungs_interval_ends_at_the_next_rung_and_the_last_ones_at_the_laws_own_low():
    method = method_of(None, None, None, above_next_rung=True)
    laws = [method.time_of(rung) for rung in range(4)]
    assert [law.low for law in laws] == [0.9, 0.75, 0.5, 0.02] and {law.high for law in laws} == {0.98}
    assert method_of(None, None, None, rungs=(1.0,), above_next_rung=True).time_of(0) == method.renoise


def test_where_calls_step_to_the_next_rung_their_states_there_are_matched_above_it(networks):
    """Student and fake score see the Euler step's state, noised on to t from the next rung up; the last its x0."""
    student, seen = velocity_of(networks[0]), {}

    def watched(name: str):
        def velocity(x_t: Tensor, t: Tensor, cond: Tensor, *rung: int) -> Tensor:
            seen[name] = (x_t, t)
            return 0.3 * x_t if name == "teacher" else 0.4 * x_t

        return velocity

    method = method_of(
        student, watched("teacher"), watched("fake_score"), sampler="deterministic", above_next_rung=True
    )
    rungs_seen = set()
    for step in range(14):
        draws = draws_for(step)
        rung = method.rung_of(draws)
        rungs_seen.add(rung)
        s = (*RUNGS, 0.0)[rung + 1]
        assert method.held_at(rung) == s and method.time_of(rung) == flow.TimeLaw(low=s + 0.02, high=0.98)
        x0, _, x_in = method.generate(rung, draws)
        held = x_in + (s - RUNGS[rung]) * (x_in - x0) / RUNGS[rung]  # Euler's step of its velocity
        xi, u = draws.normal("score_eps", *SHAPE), draws.uniform("score_t")
        t = (s + 0.02 + (0.96 - s) * u).float()
        a = ((1 - t) / (1 - s)).reshape(-1, 1, 1, 1)
        b = (t.square().reshape(-1, 1, 1, 1) - (a * s).square()).sqrt()
        expected = (a * held + b * xi).detach()
        method.student_loss(draws)
        for name in ("teacher", "fake_score"):
            torch.testing.assert_close(seen[name][0], expected, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(seen[name][1], t)
        loss, _ = method.fake_score_loss(draws)
        eps = t.reshape(-1, 1, 1, 1) / b * xi
        target = (eps - expected) / (1 - t.reshape(-1, 1, 1, 1))
        error = (0.4 * expected - target).square().mean((1, 2, 3)) * (b / t.reshape(-1, 1, 1, 1)).flatten().square()
        torch.testing.assert_close(loss, error.mean(), rtol=1e-3, atol=1e-5)
    assert rungs_seen == {0, 1, 2, 3}


@pytest.mark.parametrize("s", [0.0, 0.2, 0.5])
def test_samples_that_hold_noise_teach_the_fake_score_the_velocity_of_those_that_do_not(s):
    """Data N(0, 0.5^2): the best linear velocity at a t, fitted to the targets that renoise gives, is the exact one."""
    draws = Draws(0, "fake_score", 0, sample_range(0, 400_000))
    x_s = (1 - s) * 0.5 * draws.normal("x0", 1) + s * draws.normal("held", 1)
    x_t, t, eps = renoise(x_s, flow.TimeLaw(low=0.6, high=0.6 + 1e-6), "score", draws, s)
    assert x_t.var().item() == pytest.approx((0.4 * 0.5) ** 2 + 0.6**2, rel=0.01)
    t = t[:, None].float()
    target = (eps - x_t) / (1 - t)  # eps - x0, x0 being what x_t and eps leave
    slope = (target * x_t).mean() / x_t.square().mean()
    assert slope.item() == pytest.approx((0.6 - 0.4 * 0.25) / (0.4**2 * 0.25 + 0.36), rel=0.02)
