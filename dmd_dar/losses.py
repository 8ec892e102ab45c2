"""The losses, each a short function beside its equation. All compute in promote_types(dtype, float32).

Shapes: images or latents (B, ...); means run over all non-batch dimensions, then over the batch.
"""

import torch
from jaxtyping import Float
from torch import Tensor

Batch = Float[Tensor, "b *rest"]
PerSample = Float[Tensor, "b"]  # noqa: F821
Scalar = Float[Tensor, ""]


def promote(x: Tensor) -> Tensor:
    """bf16 and fp16 go up to float32; float32 and float64 stay."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def per_sample_mean(x: Batch) -> PerSample:
    """(B, ...) -> (B,)."""
    return x.flatten(1).mean(dim=1)


# DMD, arXiv:2311.18828 Eq. 7 and 8: the gradient mu_fake - mu_real over the per-sample mean |x - mu_real|.
def dmd_direction(x0_student: Batch, x0_teacher: Batch, x0_fake: Batch) -> Batch:
    """g (B, ...), detached: the direction along which the student's samples are too likely. Raises if not finite."""
    x0_student, x0_teacher, x0_fake = (promote(x.detach()) for x in (x0_student, x0_teacher, x0_fake))
    normaliser = per_sample_mean((x0_student - x0_teacher).abs()) + 1e-6
    g = (x0_fake - x0_teacher) / normaliser.reshape(-1, *[1] * (x0_fake.dim() - 1))
    if not (torch.isfinite(g).all() and torch.isfinite(normaliser).all()):  # an infinite student only shows in it
        sources = {"student": x0_student, "teacher": x0_teacher, "fake score": x0_fake}
        guilty = [name for name, x in sources.items() if not torch.isfinite(x).all()]
        source = guilty or "none, the gradient overflows"
        raise FloatingPointError(f"distribution matching gradient is not finite; non-finite output from: {source}")
    return g


def dmd_loss(x0_student: Batch, x0_teacher: Batch, x0_fake: Batch) -> Scalar:
    """Scalar 1/2 mean (x - sg(x - g))^2, whose gradient in x0_student is g / numel. Only x0_student gets one."""
    g = dmd_direction(x0_student, x0_teacher, x0_fake)
    x = promote(x0_student)
    return 0.5 * per_sample_mean((x - (x.detach() - g)).square()).mean()


# Flow matching, arXiv:2210.02747 Eq. 23 for the linear path: || v(x_t, t) - (eps - x0) ||^2.
def flow_matching_loss(v: Batch, x0: Batch, eps: Batch) -> Scalar:
    """Scalar mean squared error of the velocity."""
    return per_sample_mean((promote(v) - (promote(eps) - promote(x0))).square()).mean()


# DMD, arXiv:2311.18828 Eq. 9, with a squared error in the place of LPIPS.
def regression_loss(x0_student: Batch, x0_target: Batch) -> Scalar:
    """Scalar mean squared error between the student's sample and the end of the teacher's trajectory."""
    return per_sample_mean((promote(x0_student) - promote(x0_target)).square()).mean()
