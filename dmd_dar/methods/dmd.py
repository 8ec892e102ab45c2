"""Distribution matching distillation of a few-step student, as functions of one optimiser step's draws.

Shapes: images (B, C, H, W); cond (B,) labels; t (B,); rung the index of the step's, one for the whole batch.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from dmd_dar import flow, losses
from dmd_dar.draws import Draws
from dmd_dar.guidance import Velocity
from dmd_dar.losses import LossWeight
from dmd_dar.methods import rollout
from dmd_dar.methods.gan import GAN, Batch
from dmd_dar.methods.sizes import Sizes
from dmd_dar.methods.trajectories import Pairs
from dmd_dar.methods.turns import Turns

Metrics = dict[str, Tensor]
Target = Literal["end", "next_rung"]
Loss = Callable[[Tensor], Tensor]  # x0_student -> scalar
FakeScore = Callable[[Tensor, Tensor, Tensor, int], Tensor]  # (x_t, t, cond, rung that made the samples) -> v


@dataclass(frozen=True)
class Guidance:
    """Decoupled matching (arXiv:2511.22677): the teacher's guidance acts at a t of a law of its own.

    mu_f - mu_r = (mu_f - mu_r^cond) - (g - 1) (mu_r^cond - mu_r^uncond). The first part is matching against the
    unguided teacher; the second, mu_r^cond - mu_r, is `loss`. Each part is over its own teacher's distance.
    """

    unguided: Velocity  # the teacher without guidance
    time: flow.TimeLaw = flow.TimeLaw(low=0.02, high=0.98)

    def loss(self, teacher: Velocity, x0_student: Tensor, cond: Tensor, draws: Draws) -> Loss:
        """The second part as a function of x0_student, and of nothing else that gets a gradient."""
        x_t, t, _ = rollout.renoise(x0_student.detach(), self.time, "guidance", draws)
        x0_guided, x0_unguided = (x0_of(velocity, x_t, t, cond) for velocity in (teacher, self.unguided))
        names = ("student", "teacher", "unguided teacher")
        return lambda x: losses.dmd_loss(x, x0_guided, x0_unguided, names)


@dataclass(frozen=True)
class Regression:
    """The student, from a teacher trajectory's own state at the step's rung, should reach its end (DMD Eq. 9)."""

    trajectories: Pairs
    weight: LossWeight
    distance: Callable[[Tensor, Tensor], Tensor] = losses.regression_loss
    by_rung: tuple[float, ...] = ()  # factor of the weight at each rung; empty: 1 at all
    others: tuple[Pairs, ...] = ()  # trajectories of the further sizes of a run
    sizes: Sizes | None = None  # of which each step draws one, in that order
    target: Target = "end"

    def weight_at(self, step: int, rung: int) -> float:
        """The weight at student update `step` (from 0), at the rung of that index."""
        return self.weight.at(step) * (self.by_rung[rung] if self.by_rung else 1.0)

    def loss(self, student: Velocity, rungs: tuple[float, ...], rung: int, draws: Draws) -> tuple[Tensor, Loss]:
        """(x0_student from the stored states, its distance from their ends as a function of it)."""
        pairs = self.trajectories if self.sizes is None else (self.trajectories, *self.others)[self.sizes.index(draws)]
        index = draws.integers("pair", pairs.count)
        states, target, cond = pairs.at(rung, index)
        if self.target == "next_rung" and rung + 1 < len(rungs):
            target = rollout.x0_towards(states, pairs.at(rung + 1, index)[0], rungs[rung], rungs[rung + 1])
        return rollout.predict_x0(student, states, rungs[rung], cond), lambda x: self.distance(x, target)


@dataclass(frozen=True)
class Term:
    """One part of the student's loss, a function of x0_student at which its gradient is taken."""

    name: str
    weight: float
    x0_student: Tensor
    loss: Loss


@dataclass(frozen=True)
class DMD:
    """The three networks as velocities and what joins them. The teacher is already guided; the fake score is not.

    Draws decide labels, noise, rung and t (with `turns`, labels and noise are the roll-out's), so both arms of a
    comparison see the same ones. The optional parts are None where they are off.
    """

    student: Velocity
    teacher: Velocity
    fake_score: FakeScore
    rungs: tuple[float, ...]
    renoise: flow.TimeLaw  # of the t at which student and teacher are compared; see `time_of`
    num_classes: int
    shape: tuple[int, ...]  # (C, H, W)
    sampler: rollout.Sampler = "stochastic"
    data: Batch | None = None  # if given, the student's input is noised data, not its own rollout
    matching_weight: float = 1.0
    matching_start: int = 0  # student updates before the first with that weight
    x0_space: bool = False  # of the fake score's loss
    guidance: Guidance | None = None
    regression: Regression | None = None
    gan: GAN | None = None
    turns: Turns | None = None  # if given, the student's samples are of roll-outs that a turn's updates share
    above_next_rung: bool = False
    sizes: Sizes | None = None  # of which each of its own roll-outs has one; None: `shape`

    def rung_of(self, draws: Draws) -> int:
        """The index of the rung of a training step, one for the whole batch."""
        return rollout.rung_of(draws, self.rungs) if self.turns is None else self.turns.place(draws).rung

    def time_of(self, rung: int) -> flow.TimeLaw:
        """The law of t at which samples of a rung are compared with the teacher's.

        With `above_next_rung` it is mapped into t from the next rung up. Where the sampler re-noises, fresh noise of
        that size is added to them anyway, and two distributions that are equal once they are noised to the next rung's
        t are equal at every larger t, too. Where it follows the ODE, what a rung hands on is its state at the next
        rung, and t keeps the law's low from there. What lies below is left to the rungs below. (Intervals of t for
        each step: arXiv:2510.27684.)
        """
        if not self.above_next_rung or rung + 1 == len(self.rungs):
            return self.renoise
        if held := self.held_at(rung):
            return replace(self.renoise, low=held + self.renoise.low)
        return replace(self.renoise, low=max(self.renoise.low, self.rungs[rung + 1]))

    def held_at(self, rung: int) -> float:
        """The time s of the samples of a rung that are compared: 0, or the next rung's where they are its states."""
        follows = self.above_next_rung and self.sampler == "deterministic" and rung + 1 < len(self.rungs)
        return self.rungs[rung + 1] if follows else 0.0

    def noised(self, x0_student: Tensor, x_t: Tensor, rung: int, draws: Draws) -> tuple[Tensor, Tensor, Tensor]:
        """Samples of a rung, from its input x_t, at the drawn t: x_t, its t (B,) and eps; without gradient."""
        s, x = self.held_at(rung), x0_student.detach()
        if s:
            x = rollout.next_state(x, x_t, self.rungs[rung], s, None)
        return rollout.renoise(x, self.time_of(rung), "score", draws, s)

    def student_loss(self, draws: Draws) -> tuple[Tensor, Metrics]:
        """Distribution matching + regression + GAN, jointly, at one rung (arXiv:2311.18828 Eq. 9)."""
        rung = self.rung_of(draws)
        gan_weight = self.gan.weight.at(draws.step) if self.gan is not None else 0.0
        matching_weight = self.matching_weight if draws.step >= self.matching_start else 0.0
        terms, metrics = [], {}
        if matching_weight or gan_weight:
            x0_student, cond, x_t = self.generate(rung, draws)  # (B, C, H, W), gradient through the last call only
            if matching_weight:
                loss, metrics = self.matching(x0_student, cond, x_t, rung, draws)
                terms.append(Term("dm", matching_weight, x0_student, loss))
            if self.gan is not None and gan_weight:
                terms.append(Term("gan", gan_weight, x0_student, self.gan.student_term(cond, rung, draws)))
        if self.regression is not None and (weight := self.regression.weight_at(draws.step, rung)):
            terms.append(Term("regression", weight, *self.regression.loss(self.student, self.rungs, rung, draws)))
        return joint(terms, metrics, draws.samples.device)

    def matching(self, x0_student: Tensor, cond: Tensor, x_t: Tensor, rung: int, draws: Draws) -> tuple[Loss, Metrics]:
        """The matching term as a loss of x0_student (arXiv:2311.18828 Eq. 7), and how far the two scores differ.

        x_t (B, ...) is the input from which x0_student was made. Where the state at the next rung is compared, which
        moves with x0_student by a positive factor, so does the gradient; the normaliser leaves the factor out.
        """
        teacher = self.teacher if self.guidance is None else self.guidance.unguided
        noised, t, _ = self.noised(x0_student, x_t, rung, draws)
        x0_teacher = x0_of(teacher, noised, t, cond)
        x0_fake = x0_of(self.fake_score, noised, t, cond, rung)
        gap = losses.per_sample_mean((losses.promote(x0_fake) - losses.promote(x0_teacher)).square()).mean().sqrt()
        metrics = {"fake_to_teacher_rms": gap}
        if self.guidance is None:
            return lambda x: losses.dmd_loss(x, x0_teacher, x0_fake), metrics
        guidance = self.guidance.loss(self.teacher, x0_student, cond, draws)
        names = ("student", "unguided teacher", "fake score")
        return lambda x: losses.dmd_loss(x, x0_teacher, x0_fake, names) + guidance(x), metrics

    def generate(self, rung: int, draws: Draws) -> tuple[Tensor, Tensor, Tensor]:
        """(x0_student, cond, x_t): one call with gradient at the step's rung, from x_t, which no gradient leads to."""
        if self.data is None:
            x_t, cond = self.simulate(rung, draws)
        else:
            x0, cond = self.data(draws)
            x_t = flow.interpolate(x0, draws.normal("noise", *self.shape), x0.new_full((), self.rungs[rung]))
        return rollout.predict_x0(self.student, x_t, self.rungs[rung], cond), cond, x_t

    @torch.no_grad()
    def samples(self, rung: int, draws: Draws) -> tuple[Tensor, Tensor, Tensor]:
        """(x0_student, cond, x_t) as `generate` makes them, without gradient."""
        return self.generate(rung, draws) if self.turns is None else self.turns.sample(rung, draws)

    @torch.no_grad()
    def simulate(self, rung: int, draws: Draws) -> tuple[Tensor, Tensor]:
        """(x_t, cond): the student's own way from pure noise to the rung (arXiv:2405.14867 4.5)."""
        if self.turns is not None:
            return self.turns.state(rung, draws)
        shape = self.shape if self.sizes is None else self.sizes.shape(draws)
        cond, noise = draws.integers("label", self.num_classes), draws.normal("noise", *shape)
        return rollout.Rollout(self.student, cond, self.rungs, draws, noise, self.sampler).state(rung), cond

    def fake_score_loss(self, draws: Draws) -> tuple[Tensor, Metrics]:
        """Flow matching on the student's own samples, which get no gradient (arXiv:2311.18828 Eq. 6)."""
        rung = self.rung_of(draws)
        x0_student, cond, x_t = self.samples(rung, draws)
        x_t, t, eps = self.noised(x0_student, x_t, rung, draws)
        weight: Tensor | float = t.square() if self.x0_space else 1.0
        if s := self.held_at(rung):  # of their x0, x_t alone says something; its noise spreads, and counts by how much
            x0_student = (x_t - flow.expand_t(t, eps) * eps) / flow.expand_t(1 - t, eps)
            weight = weight * (flow.added(s, t) / t).square()
        loss = losses.flow_matching_loss(self.fake_score(x_t, t, cond, rung), x0_student, eps, weight)
        if self.gan is None or not self.gan.feature_weight:
            return loss, {}
        gan = self.gan.feature_loss(x0_student, cond, rung, draws)
        return loss + self.gan.feature_weight * gan, {"flow": loss, "gan": gan}

    def discriminator_loss(self, draws: Draws) -> tuple[Tensor, Metrics]:
        """The heads', on real data and the student's own samples; neither they nor the features get a gradient."""
        assert self.gan is not None
        rung = self.rung_of(draws)
        x0_student, cond, _ = self.samples(rung, draws)
        return self.gan.heads_loss(x0_student, cond, rung, draws)


@torch.no_grad()
def x0_of(velocity: Callable[..., Tensor], x_t: Tensor, t: Tensor, cond: Tensor, *rung: int) -> Tensor:
    """The estimate of x0 (B, C, H, W) from x_t by one call of a velocity, without gradient."""
    return flow.velocity_to_x0(velocity(x_t, t, cond, *rung), x_t, t)


def joint(terms: list[Term], metrics: Metrics, device: torch.device) -> tuple[Tensor, Metrics]:
    """The weighted sum of the terms, and `metrics` with each term's value and the size of its gradient at x0_student.

    Each term's gradient is taken at its x0_student first, and the student's is that, carried back.
    """
    loss = torch.zeros((), device=device)
    for term in terms:
        value, (gradient,) = losses.value_and_gradients(term.loss, term.x0_student)
        loss = loss + term.weight * losses.carry_gradients(value, [term.x0_student], [gradient])
        moved = (term.weight * gradient.numel() * losses.promote(gradient)).square()
        size = losses.per_sample_mean(moved).sqrt().mean()
        metrics = {**metrics, term.name: value, f"{term.name}_gradient": size}
    return loss, metrics
