"""Distribution matching distillation of a few-step student, as functions of one optimiser step's draws.

Shapes: images (B, C, S, S); cond (B,) labels; t (B,).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dmd_dar import flow, losses
from dmd_dar.draws import Draws
from dmd_dar.guidance import Velocity
from dmd_dar.methods import rollout
from dmd_dar.methods.trajectories import Pairs

Metrics = dict[str, Tensor]


@dataclass(frozen=True)
class DMD:
    """The three networks as velocities and what joins them. The teacher is already guided; the fake score is not.

    A phase's draws decide labels, noise, rung and t, so both arms of a comparison see the same ones.
    """

    student: Velocity
    teacher: Velocity
    fake_score: Velocity
    rungs: tuple[float, ...]
    renoise: flow.TimeLaw  # of the t at which student and teacher are compared
    num_classes: int
    shape: tuple[int, ...]  # (C, S, S)
    matching_weight: float = 1.0
    regression_weight: float = 0.0
    distance: Callable[[Tensor, Tensor], Tensor] = losses.regression_loss
    trajectories: Pairs | None = None

    def student_loss(self, draws: Draws) -> tuple[Tensor, Metrics]:
        """Distribution matching + regression, jointly, at one rung for the whole batch (arXiv:2311.18828 Eq. 7-9)."""
        loss, metrics = torch.zeros((), device=draws.samples.device), {}
        if self.matching_weight:
            matching, metrics = self.distribution_matching(draws)
            loss = loss + self.matching_weight * matching
        if self.trajectories is not None and self.regression_weight:
            regression = self.regression(draws, self.trajectories)
            loss, metrics = loss + self.regression_weight * regression, {**metrics, "regression": regression}
        return loss, metrics

    def simulate(self, draws: Draws) -> tuple[Tensor, Tensor]:
        """(x0_student, cond): unroll to the step's rung without gradient, then one call with it (arXiv:2405.14867)."""
        cond = draws.integers("label", self.num_classes)
        rung = draws.shared_integer("rung", len(self.rungs))
        with torch.no_grad():
            x_t = rollout.state_at(self.student, cond, self.rungs, rung, draws, draws.normal("noise", *self.shape))
        return rollout.predict_x0(self.student, x_t, self.rungs[rung], cond), cond

    def distribution_matching(self, draws: Draws) -> tuple[Tensor, Metrics]:
        x0_student, cond = self.simulate(draws)
        t, eps = self.noise_level(draws)
        x_t = flow.interpolate(x0_student.detach(), eps, t)
        with torch.no_grad():
            x0_teacher = flow.velocity_to_x0(self.teacher(x_t, t, cond), x_t, t)
            x0_fake = flow.velocity_to_x0(self.fake_score(x_t, t, cond), x_t, t)
        gap = losses.per_sample_mean((losses.promote(x0_fake) - losses.promote(x0_teacher)).square()).mean().sqrt()
        loss = losses.dmd_loss(x0_student, x0_teacher, x0_fake)
        return loss, {"dm": loss, "fake_to_teacher_rms": gap}

    def regression(self, draws: Draws, trajectories: Pairs) -> Tensor:
        """The student, from the teacher trajectory's own state at the step's rung, should reach its end (Eq. 9)."""
        rung = draws.shared_integer("rung", len(self.rungs))
        states, ends, cond = trajectories.at(rung, draws.integers("pair", trajectories.count))
        return self.distance(rollout.predict_x0(self.student, states, self.rungs[rung], cond), ends)

    def fake_score_loss(self, draws: Draws) -> tuple[Tensor, Metrics]:
        """Flow matching on the student's own samples, which get no gradient (arXiv:2311.18828 Eq. 6)."""
        with torch.no_grad():
            x0_student, cond = self.simulate(draws)
        t, eps = self.noise_level(draws)
        x_t = flow.interpolate(x0_student, eps, t)
        return losses.flow_matching_loss(self.fake_score(x_t, t, cond), x0_student, eps), {}

    def noise_level(self, draws: Draws) -> tuple[Tensor, Tensor]:
        """t (B,) by the renoising law and fresh eps (B, C, S, S)."""
        eps = draws.normal("score_eps", *self.shape)
        return self.renoise.quantile(draws.uniform("score_t")).to(eps.dtype), eps
