"""The losses, each a short function beside its equation. All compute in promote_types(dtype, float32).

Shapes: images or latents (B, ...); means run over all non-batch dimensions, then over the batch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from dmd_dar.keys import key

Batch = Float[Tensor, "b *rest"]
PerSample = Float[Tensor, "b"]  # noqa: F821
Scalar = Float[Tensor, ""]
THREE = ("student", "teacher", "fake score")  # whose x0 a matching loss compares


def promote(x: Tensor) -> Tensor:
    """bf16 and fp16 go up to float32; float32 and float64 stay."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def per_sample_mean(x: Batch) -> PerSample:
    """(B, ...) -> (B,)."""
    return x.flatten(1).mean(dim=1)


# DMD, arXiv:2311.18828 Eq. 7 and 8: the gradient mu_fake - mu_real over the per-sample mean |x - mu_real|.
def dmd_direction(x0_student: Batch, x0_teacher: Batch, x0_fake: Batch, names: tuple[str, str, str] = THREE) -> Batch:
    """g (B, ...), detached: the direction along which the student's samples are too likely.

    Raises FloatingPointError where it is not finite, naming whose estimate is not by `names`, in the arguments' order.
    """
    x0_student, x0_teacher, x0_fake = (promote(x.detach()) for x in (x0_student, x0_teacher, x0_fake))
    normaliser = per_sample_mean((x0_student - x0_teacher).abs()) + 1e-6
    g = (x0_fake - x0_teacher) / normaliser.reshape(-1, *[1] * (x0_fake.dim() - 1))
    if not (torch.isfinite(g).all() and torch.isfinite(normaliser).all()):  # an infinite student only shows in it
        estimates = (x0_student, x0_teacher, x0_fake)
        guilty = [name for name, x in zip(names, estimates, strict=True) if not torch.isfinite(x).all()]
        source = guilty or "none, the gradient overflows"
        raise FloatingPointError(f"distribution matching gradient is not finite; non-finite output from: {source}")
    return g


def dmd_loss(x0_student: Batch, x0_teacher: Batch, x0_fake: Batch, names: tuple[str, str, str] = THREE) -> Scalar:
    """Scalar 1/2 mean (x - sg(x - g))^2, whose gradient in x0_student is g / numel. Only x0_student gets one."""
    g = dmd_direction(x0_student, x0_teacher, x0_fake, names)
    x = promote(x0_student)
    return 0.5 * per_sample_mean((x - (x.detach() - g)).square()).mean()


# Flow matching, arXiv:2210.02747 Eq. 23 for the linear path: || v(x_t, t) - (eps - x0) ||^2.
def flow_matching_loss(v: Batch, x0: Batch, eps: Batch, weight: PerSample | float = 1.0) -> Scalar:
    """Scalar mean squared error of the velocity, each sample's times its `weight`; t^2 makes it that of x0."""
    return (weight * per_sample_mean((promote(v) - (promote(eps) - promote(x0))).square())).mean()


# DMD, arXiv:2311.18828 Eq. 9, with a squared error in the place of LPIPS.
def regression_loss(x0_student: Batch, x0_target: Batch) -> Scalar:
    """Scalar mean squared error between the student's sample and the end of the teacher's trajectory."""
    return per_sample_mean((promote(x0_student) - promote(x0_target)).square()).mean()


# The pseudo-Huber metric of arXiv:2310.14189, both its terms divided by sqrt(n), n the values of a sample.
def pseudo_huber_loss(x0_student: Batch, x0_target: Batch, c: float = 0.00054) -> Scalar:
    """Scalar mean of sqrt(m + c^2) - c, with m a sample's mean squared error: near 0 as m / (2c), beyond c as sqrt(m).

    Samples far off weigh less than in the squared error: the gradient's size is bounded by 1 / sqrt(n) for each sample.
    """
    m = per_sample_mean((promote(x0_student) - promote(x0_target)).square())
    return ((m + c**2).sqrt() - c).mean()


def frequency_weights(height: int, width: int, device: torch.device | str = "cpu") -> Float[Tensor, "h w"]:
    """w(k) = (k0^2 + |k|^2) / mean, float64, k in cycles per cell and k0 = 1 / max(height, width), the lowest of them.

    An error with the 1/f^2 spectrum of photographs weighs the same in every frequency. The mean of w over k is 1.
    """
    rows, columns = (torch.fft.fftfreq(n, device=device, dtype=torch.float64) for n in (height, width))
    w = rows[:, None].square() + columns.square() + max(height, width) ** -2
    return w / w.mean()


def spectrum_loss(x0_student: Batch, x0_target: Batch) -> Scalar:
    """Scalar mean over k of w(k) |F(x0_student - x0_target)(k)|^2: F the orthonormal 2-D DFT, w `frequency_weights`.

    With w = 1 it is the mean squared error (Parseval). Its gradient is 2/numel times the error filtered by w.
    """
    error = promote(x0_student) - promote(x0_target)
    weights = frequency_weights(error.shape[-2], error.shape[-1], error.device).to(error.dtype)
    power = torch.view_as_real(torch.fft.fft2(error, norm="ortho")).square().sum(-1)
    return per_sample_mean(power * weights).mean()


# The non-saturating GAN in logits (arXiv:1406.2661), as DMD2 has it (arXiv:2405.14867 4.3). Logits are (B, ...).
def gan_loss(fake_logits: Batch) -> Scalar:
    """The student's: scalar mean softplus(-D(student)), which falls as its samples pass for real."""
    return per_sample_mean(F.softplus(-promote(fake_logits))).mean()


def discriminator_loss(real_logits: Batch, fake_logits: Batch) -> Scalar:
    """The discriminator's: scalar mean softplus(-D(real)) + softplus(D(student)); 2 log 2 where it knows nothing."""
    real, fake = F.softplus(-promote(real_logits)), F.softplus(promote(fake_logits))
    return per_sample_mean(real).mean() + per_sample_mean(fake).mean()


# Approximate R1, arXiv:2501.08316, over sigma^2, so that its weight is that of R1 itself (arXiv:1801.04406).
def approximate_r1(logits: Batch, perturbed_logits: Batch, sigma: float) -> Scalar:
    """Scalar mean (D(x + sigma n) - D(x))^2 / sigma^2, an estimate of E |dD/dx|^2; x is what D is given, real x_t."""
    return per_sample_mean(((promote(perturbed_logits) - promote(logits)) / sigma).square()).mean()


def value_and_gradients(loss: Callable[..., Scalar], *tensors: Tensor) -> tuple[Scalar, list[Tensor]]:
    """loss(*tensors), detached, and its gradients in them; whatever else it depends on gets none."""
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in tensors]
        value = loss(*leaves)
    return value.detach(), list(torch.autograd.grad(value, leaves))


def carry_gradients(value: Scalar, tensors: Sequence[Tensor], gradients: Sequence[Tensor]) -> Scalar:
    """A scalar of this value with these gradients in these tensors."""
    terms = [(promote(x - x.detach()) * g).sum() for x, g in zip(tensors, gradients, strict=True)]
    return value + torch.stack(terms).sum()


@dataclass(frozen=True)
class LossWeight:
    """A loss's weight over the student's updates: `weight`, then on a straight line to `end_weight`, then that."""

    weight: float = key(0.0, "weight of the loss", least=0)
    end_weight: float | None = key(None, "weight after the ramp; null: weight all along", least=0)
    ramp_start: int = key(0, "student update at which the weight starts to change", unit="steps", least=0)
    ramp_steps: int = key(0, "updates until it is end_weight; 0: at once", unit="steps", least=0)

    @property
    def used(self) -> bool:
        """Whether any update has a weight above 0."""
        return self.weight > 0 or bool(self.end_weight)

    def at(self, step: int) -> float:
        """The weight at student update `step` (from 0)."""
        if self.end_weight is None or step < self.ramp_start:
            return self.weight
        done = min(1.0, (step - self.ramp_start) / self.ramp_steps) if self.ramp_steps else 1.0
        return self.weight + (self.end_weight - self.weight) * done
