"""The losses' values and gradients in closed form."""

import pytest
import torch

from dmd_dar import losses


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
