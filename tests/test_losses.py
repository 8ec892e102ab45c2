"""The losses' values and gradients in closed form."""

import math

import pytest
import torch

from dmd_dar import flow, losses


def tensors(dtype=torch.float64, batch=3) -> list[torch.Tensor]:
    """x0_student, x0_teacher, x0_fake, samples of very different scales."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.tensor([1.0, 0.01, 100.0])[:batch].reshape(-1, 1, 1, 1)
    return [(scale * torch.randn(batch, 2, 4, 4, generator=generator)).to(dtype).requires_grad_() for _ in range(3)]


def test_the_gradient_of_dmd_in_closed_form_per_sample():
    student, teacher, fake = tensors()
    loss = losses.dmd_loss(student, teacher, fake)
    loss.backward()
    value = 0.0
    for x, real, critic, gradient in zip(student, teacher, fake, student.grad, strict=True):
        g = (critic - real) / ((x - real).abs().sum() / x.numel() + 1e-6)
        value += 0.5 * g.square().sum().item() / student.numel()
        assert torch.allclose(gradient, g / student.numel(), rtol=1e-12, atol=1e-16)
    assert loss.item() == pytest.approx(value, rel=1e-12)


def test_the_normaliser_has_its_floor():
    student, fake = torch.zeros(1, 1, 1, 2, dtype=torch.float64, requires_grad=True), torch.ones(1, 1, 1, 2).double()
    losses.dmd_loss(student, torch.zeros_like(fake), 1e-6 * fake).backward()
    assert torch.allclose(student.grad, 0.5 * fake)


def test_a_step_moves_the_student_toward_the_teacher_and_away_from_the_fake_score():
    student, ones = torch.zeros(1, 1, 2, 2, requires_grad=True), torch.ones(1, 1, 2, 2)
    losses.dmd_loss(student, x0_teacher=ones, x0_fake=-ones).backward()
    moved = student - 0.1 * student.grad
    assert (moved > 0).all()


def test_dmd_is_zero_where_the_scores_agree_and_gives_them_no_gradient():
    student, teacher, fake = tensors()
    assert losses.dmd_loss(student, teacher, teacher.detach()) == 0
    losses.dmd_loss(student, teacher, fake).backward()
    assert teacher.grad is None and fake.grad is None and student.grad.abs().min() > 0


def test_a_sample_s_direction_does_not_depend_on_its_batch():
    together = losses.dmd_direction(*tensors())
    for i in range(3):
        assert torch.equal(losses.dmd_direction(*(x[i : i + 1] for x in tensors())), together[i : i + 1])


@pytest.mark.parametrize(
    ("given", "computed"),
    [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float32, torch.float32)]
    + [(torch.float64, torch.float64)],
)
def test_losses_compute_in_float32_or_above(given, computed):
    student, teacher, fake = tensors(given)
    for loss in (losses.dmd_loss, losses.flow_matching_loss):
        assert loss(student, teacher, fake).dtype == computed
        raised = [x.detach().to(computed) for x in (student, teacher, fake)]
        assert torch.equal(loss(student, teacher, fake), loss(*raised))
    assert losses.regression_loss(student, teacher).dtype == computed
    losses.dmd_loss(student, teacher, fake).backward()
    assert student.grad.dtype == given


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(("index", "name"), [(0, "student"), (1, "teacher"), (2, "fake score")])
def test_a_value_that_is_not_finite_names_its_network(index, name, value):
    given = [x.detach().clone() for x in tensors()]
    given[index][1, 0, 2, 3] = value
    with pytest.raises(FloatingPointError, match=rf"\['{name}'\]"):
        losses.dmd_loss(*given)
    names = ("one", "two", "three")
    with pytest.raises(FloatingPointError, match=rf"\['{names[index]}'\]"):
        losses.dmd_loss(*given, names)


def test_flow_matching_has_its_minimum_at_eps_minus_x0():
    v, x0, eps = tensors()
    assert losses.flow_matching_loss(eps - x0, x0, eps) == 0
    loss = losses.flow_matching_loss(v, x0, eps)
    loss.backward()
    assert loss.item() == pytest.approx((v - eps + x0).square().mean().item(), rel=1e-12)
    assert torch.allclose(v.grad, 2 * (v - eps + x0) / v.numel(), rtol=1e-12)


def test_regression_is_the_mean_squared_error():
    student, target, _ = tensors()
    loss = losses.regression_loss(student, target)
    loss.backward()
    assert loss.item() == pytest.approx((student - target).square().mean().item(), rel=1e-12)
    assert torch.allclose(student.grad, 2 * (student - target) / student.numel(), rtol=1e-12)


def test_a_weight_turns_flow_matching_into_the_error_of_x0():
    v, x0, eps = tensors()
    t = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    x_t = flow.interpolate(x0, eps, t)
    expected = (flow.velocity_to_x0(v, x_t, t) - x0).square().mean()
    torch.testing.assert_close(losses.flow_matching_loss(v, x0, eps, t.square()), expected, rtol=1e-12, atol=0)


def test_pseudo_huber_is_quadratic_near_and_linear_far():
    x = torch.tensor([3e-6, 0.0, 4e-6, 0.0, 3.0, 0.0, 4.0, 0.0], dtype=torch.float64).reshape(2, 1, 2, 2)
    x.requires_grad_()
    losses.pseudo_huber_loss(x, torch.zeros_like(x)).backward()
    m, c = x.detach().square().flatten(1).mean(1), 0.00054
    near, far = m[0] / (2 * c), m[1].sqrt() - c
    torch.testing.assert_close(losses.pseudo_huber_loss(x, torch.zeros_like(x)), (near + far) / 2, rtol=1e-6, atol=0)
    slope = x.detach() / 4 / (m + c**2).sqrt().reshape(2, 1, 1, 1) / 2  # d sqrt(m + c^2) over two samples
    torch.testing.assert_close(x.grad, slope, rtol=1e-12, atol=0)


def test_the_spectrum_loss_weighs_a_wave_by_its_frequency():
    weights, n = losses.frequency_weights(8, 8), torch.arange(8, dtype=torch.float64)
    assert weights.mean().item() == pytest.approx(1) and weights[0, 0] == weights.min()
    assert weights[4, 3] / weights[0, 1] == pytest.approx((1 / 64 + 16 / 64 + 9 / 64) / (1 / 64 + 1 / 64))
    for row, column in ((0, 1), (3, 2), (4, 4)):
        wave = torch.cos(2 * torch.pi * (row * n[:, None] + column * n) / 8).expand(2, 3, 8, 8).clone().requires_grad_()
        loss = losses.spectrum_loss(wave, torch.zeros_like(wave))
        loss.backward()
        w = weights[row, column]
        torch.testing.assert_close(loss, w * wave.detach().square().mean(), rtol=1e-12, atol=0)
        torch.testing.assert_close(wave.grad, 2 * w * wave.detach() / wave.numel(), rtol=1e-12, atol=1e-16)


def test_the_regression_losses_agree_with_finite_differences():
    student, target, _ = tensors()
    for loss in (losses.pseudo_huber_loss, losses.spectrum_loss):
        assert torch.autograd.gradcheck(lambda x, loss=loss: loss(x, target.detach()), (student,))
        assert loss(target, target) == 0


def test_gan_losses_in_closed_form():
    real, fake = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in ([[0.0, 2.0]], [[0.0, -3.0]]))
    losses.discriminator_loss(real, fake).backward()
    torch.testing.assert_close(real.grad, -torch.sigmoid(-real.detach()) / 2)
    torch.testing.assert_close(fake.grad, torch.sigmoid(fake.detach()) / 2)
    start = torch.zeros(4, 2, dtype=torch.float64)
    assert losses.discriminator_loss(start, start).item() == pytest.approx(2 * math.log(2))
    fake.grad = None
    losses.gan_loss(fake).backward()
    torch.testing.assert_close(fake.grad, -torch.sigmoid(-fake.detach()) / 2)


def test_approximate_r1_estimates_the_squared_gradient():
    generator = torch.Generator().manual_seed(0)
    slope = torch.randn(5, generator=generator, dtype=torch.float64)
    x, n = (torch.randn(200_000, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    for sigma in (1e-3, 0.1):
        penalty = losses.approximate_r1(x @ slope[:, None], (x + sigma * n) @ slope[:, None], sigma)
        assert penalty.item() == pytest.approx(slope.square().sum().item(), rel=0.02)


def test_a_carried_gradient_is_the_loss_s_own_and_reaches_nothing_else():
    (x, target, _), weight = tensors(), torch.ones((), dtype=torch.float64, requires_grad=True)
    student = 3 * x

    def term(given):
        return weight * (given - target.detach()).square().mean()

    value, gradients = losses.value_and_gradients(term, student)
    losses.carry_gradients(value, [student], gradients).backward()
    assert value == term(student).detach() and weight.grad is None
    torch.testing.assert_close(x.grad, 6 * (student.detach() - target.detach()) / x.numel(), rtol=1e-12, atol=0)


def test_a_weight_runs_from_its_start_to_its_end():
    ramp = losses.LossWeight(weight=1.0, end_weight=0.2, ramp_start=100, ramp_steps=40)
    assert [ramp.at(step) for step in (0, 100, 120, 140, 9999)] == pytest.approx([1, 1, 0.6, 0.2, 0.2])
    assert [losses.LossWeight(1.0, 0.0, ramp_start=3).at(step) for step in (2, 3)] == [1, 0]
    assert losses.LossWeight(0.0, end_weight=0.1).used and not losses.LossWeight(0.0).used
    assert losses.LossWeight(0.5).at(10**6) == 0.5
