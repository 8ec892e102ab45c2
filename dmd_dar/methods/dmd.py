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
from dmd_dar.losses import LossWeight
from dmd_dar.methods import rollout
from dmd_dar.methods.gan import GAN, Batch
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
    sampler: rollout.Sampler = "stochastic"
    data: Batch | None = None  # if given, the student's input is noised data, not its own rollout
    matching_weight: float = 1.0
    unguided_teacher: Velocity | None = None  # if given, matching is decoupled
    guidance_time: flow.TimeLaw = flow.TimeLaw(low=0.02, high=0.98)  # of the t of decoupled matching's guidance
    regression_weight: LossWeight = LossWeight()
    distance: Callable[[Tensor, Tensor], Tensor] = losses.regression_loss
    trajectories: Pairs | None = None
    gan: GAN | None = None
    x0_space: bool = False  # of the fake score's loss
    fake_condition: rollout.Condition = rollout.same_condition  # with what the fake score is asked

    def student_loss(self, draws: Draws) -> tuple[Tensor, Metrics]:
        """Distribution matching + regression + GAN, jointly, at one rung for the whole batch (arXiv:2311.18828 Eq. 9).

        Each term's gradient is taken at its x0 first, and the student's is that, carried back.
        """
        loss, metrics = torch.zeros((), device=draws.samples.device), {}
        gan_weight = self.gan.weight.at(draws.step) if self.gan is not None else 0.0
        regression_weight = self.regression_weight.at(draws.step) if self.trajectories is not None else 0.0
        terms: list[tuple[str, float, Tensor, Callable[[Tensor], Tensor]]] = []
        if self.matching_weight or gan_weight:
            x0_student, cond = self.generate(draws)
            if self.matching_weight:
                matching, metrics = self.matching(x0_student, cond, draws)
                terms.append(("dm", self.matching_weight, x0_student, matching))
            if self.gan is not None and gan_weight:
                terms.append(("gan", gan_weight, x0_student, self.gan.student_term(cond, draws)))
        if self.trajectories is not None and regression_weight:
            terms.append(("regression", regression_weight, *self.regression(draws, self.trajectories)))
        for name, weight, x0, term in terms:
            value, (gradient,) = losses.value_and_gradients(term, x0)
            loss = loss + weight * losses.carry_gradients(value, [x0], [gradient])
            size = losses.per_sample_mean((weight * gradient.numel() * losses.promote(gradient)).square()).sqrt().mean()
            metrics = {**metrics, name: value, f"{name}_gradient": size}
        return loss, metrics

    def generate(self, draws: Draws) -> tuple[Tensor, Tensor]:
        """(x0_student, cond): one call with gradient at the step's rung, which no gradient leads to."""
        rung = rollout.rung_of(draws, self.rungs)
        if self.data is None:
            x_t, cond = self.simulate(rung, draws)
        else:
            x0, cond = self.data(draws)
            x_t = flow.interpolate(x0, draws.normal("noise", *self.shape), x0.new_tensor(self.rungs[rung]))
        return rollout.predict_x0(self.student, x_t, self.rungs[rung], cond), cond

    @torch.no_grad()
    def simulate(self, rung: int, draws: Draws) -> tuple[Tensor, Tensor]:
        """(x_t, cond): the student's own way from pure noise to the rung (arXiv:2405.14867 4.5)."""
        cond, noise = draws.integers("label", self.num_classes), draws.normal("noise", *self.shape)
        return rollout.state_at(self.student, cond, self.rungs, rung, draws, noise, self.sampler), cond

    def matching(self, x0_student: Tensor, cond: Tensor, draws: Draws) -> tuple[Callable[[Tensor], Tensor], Metrics]:
        """The matching term as a loss of x0_student, and metrics.

        Decoupled (arXiv:2511.22677): mu_f - mu_r = (mu_f - mu_r^cond) - (g - 1) (mu_r^cond - mu_r^uncond). The second
        part, mu_r^cond - mu_r, is taken at a t of its own law; each part is over its own teacher's distance.
        """
        plain = self.teacher if self.unguided_teacher is None else self.unguided_teacher
        networks = (plain, self.asked(draws))
        x0_teacher, x0_fake = self.estimates("score", self.renoise, networks, x0_student, cond, draws)
        gap = losses.per_sample_mean((losses.promote(x0_fake) - losses.promote(x0_teacher)).square()).mean().sqrt()
        metrics = {"fake_to_teacher_rms": gap}
        if self.unguided_teacher is None:
            return lambda x: losses.dmd_loss(x, x0_teacher, x0_fake), metrics
        networks = (self.teacher, self.unguided_teacher)
        guided, unguided = self.estimates("guidance", self.guidance_time, networks, x0_student, cond, draws)
        score, guidance = ("student", "unguided teacher", "fake score"), ("student", "teacher", "unguided teacher")

        def both(x: Tensor) -> Tensor:
            return losses.dmd_loss(x, x0_teacher, x0_fake, score) + losses.dmd_loss(x, guided, unguided, guidance)

        return both, metrics

    @torch.no_grad()
    def estimates(
        self,
        name: str,
        law: flow.TimeLaw,
        velocities: tuple[Velocity, ...],
        x0_student: Tensor,
        cond: Tensor,
        draws: Draws,
    ) -> list[Tensor]:
        """Each velocity's x0 at the student's samples, noised to a t of the law."""
        x_t, t, _ = rollout.renoise(x0_student.detach(), law, name, draws)
        return [flow.velocity_to_x0(velocity(x_t, t, cond), x_t, t) for velocity in velocities]

    def asked(self, draws: Draws) -> Velocity:
        """The fake score as a velocity of samples of this step."""
        return lambda x_t, t, cond: self.fake_score(x_t, t, self.fake_condition(cond, draws))

    def regression(self, draws: Draws, trajectories: Pairs) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """The student, from the teacher trajectory's own state at the step's rung, should reach its end (Eq. 9)."""
        rung = rollout.rung_of(draws, self.rungs)
        states, ends, cond = trajectories.at(rung, draws.integers("pair", trajectories.count))
        return rollout.predict_x0(self.student, states, self.rungs[rung], cond), lambda x0: self.distance(x0, ends)

    def fake_score_loss(self, draws: Draws) -> tuple[Tensor, Metrics]:
        """Flow matching on the student's own samples, which get no gradient (arXiv:2311.18828 Eq. 6)."""
        with torch.no_grad():
            x0_student, cond = self.generate(draws)
        x_t, t, eps = rollout.renoise(x0_student, self.renoise, "score", draws)
        weight = t.square() if self.x0_space else 1.0
        loss = losses.flow_matching_loss(self.asked(draws)(x_t, t, cond), x0_student, eps, weight)
        if self.gan is None or not self.gan.feature_weight:
            return loss, {}
        gan = self.gan.feature_loss(x0_student, cond, draws)
        return loss + self.gan.feature_weight * gan, {"flow": loss, "gan": gan}

    def discriminator_loss(self, draws: Draws) -> tuple[Tensor, Metrics]:
        """The heads', on real data and the student's own samples; neither they nor the features get a gradient."""
        assert self.gan is not None
        with torch.no_grad():
            x0_student, cond = self.generate(draws)
        return self.gan.heads_loss(x0_student, cond, draws)
