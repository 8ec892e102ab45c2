"""The GAN term of distribution matching distillation (DMD2, arXiv:2405.14867 4.3): heads on a score network's features.

Who gets gradients: the student through `student_term`, the heads through `heads_loss`, the network whose features they
read through `feature_loss`; in each, the others none. Shapes: x0 and x_t (B, C, H, W); cond (B,); t (B,); rung the
index of the step's; features one (B, T, d) for each layer; logits (B, n).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dmd_dar import flow, losses
from dmd_dar.draws import Draws
from dmd_dar.losses import LossWeight
from dmd_dar.methods.rollout import renoise

Batch = Callable[[Draws], tuple[Tensor, Tensor]]  # draws -> real x0 (B, C, H, W) in the teacher's space, cond (B,)
Features = Callable[[Tensor, Tensor, Tensor, int], list[Tensor]]  # (x_t, t, cond, rung) -> the chosen layers' states
Heads = Callable[[list[Tensor]], Tensor]
Metrics = dict[str, Tensor]


@dataclass(frozen=True)
class GAN:
    """What the sides of the game share."""

    features: Features
    heads: Heads
    real: Batch
    time: flow.TimeLaw
    weight: LossWeight  # of the student's term
    feature_weight: float = 0.0  # of the game in the loss of the network that gives the features
    r1_weight: float = 0.0
    r1_sigma: float = 0.1  # standard deviation of what R1 adds to x_t

    def student_term(self, cond: Tensor, rung: int, draws: Draws) -> Callable[[Tensor], Tensor]:
        """The student's loss as a function of its x0, made at the step's rung: softplus(-D(x_t))."""

        def term(x0: Tensor) -> Tensor:
            x_t, t, _ = renoise(x0, self.time, "gan", draws)
            return losses.gan_loss(self.heads(self.features(x_t, t, cond, rung)))

        return term

    def heads_loss(self, x0_student: Tensor, cond: Tensor, rung: int, draws: Draws) -> tuple[Tensor, Metrics]:
        """Real data against the student's samples, for the heads; `x0_student` carries no gradient."""
        with torch.no_grad():
            features = self.features(*self.inputs(x0_student, cond, draws), rung)
        return self.game(features)

    def feature_loss(self, x0_student: Tensor, cond: Tensor, rung: int, draws: Draws) -> Tensor:
        """The same, for the network that gives the features."""
        features = self.features(*self.inputs(x0_student, cond, draws), rung)
        value, gradients = losses.value_and_gradients(lambda *states: self.game(list(states))[0], *features)
        return losses.carry_gradients(value, features, gradients)

    def inputs(self, x0_student: Tensor, cond: Tensor, draws: Draws) -> tuple[Tensor, Tensor, Tensor]:
        """(x_t, t, cond) of one call on real data, the student's samples and, for R1, the perturbed real x_t.

        A real sample and the student's meet at one t, with noise of their own. R1 perturbs what the discriminator sees,
        the noised real data: data perturbed before it is noised would smooth another function.
        """
        x0_real, cond_real = self.real(replace(draws, phase=f"{draws.phase}_real"))
        fake, t, eps = renoise(x0_student, self.time, "gan", draws)
        real = flow.interpolate(x0_real.to(eps), draws.normal("gan_real_eps", *eps.shape[1:], dtype=eps.dtype), t)
        x_t, conds = [real, fake], [cond_real, cond]
        if self.r1_weight:
            n = draws.normal("r1", *eps.shape[1:], dtype=eps.dtype)
            x_t, conds = [*x_t, real + self.r1_sigma * n], [*conds, cond_real]
        return torch.cat(x_t), t.repeat(len(x_t)), torch.cat(conds)

    def game(self, features: list[Tensor]) -> tuple[Tensor, Metrics]:
        """The discriminator's loss, from the features of `inputs`."""
        real, fake, *perturbed = self.heads(features).chunk(3 if self.r1_weight else 2)
        loss = losses.discriminator_loss(real, fake)
        metrics = {"gan": loss, "real_logit": real.mean(), "fake_logit": fake.mean()}
        for logits in perturbed:
            metrics["r1"] = losses.approximate_r1(real, logits, self.r1_sigma)
            loss = loss + self.r1_weight * metrics["r1"]
        return loss, metrics
