"""Roll-outs that the updates of a turn share.

A turn is one update of the student and those of the fake score and the heads before it, in all of which the student is
the same. A roll-out through R rungs passes a sample at every one of them, so it can serve R updates; it is computed as
far as they need it. Each update still sees one rung, uniform over the turns, and noise and labels that no earlier turn
saw. The student draws its rung by itself, as with a roll-out of its own: were it one that the roll-out's other updates
leave over, the fake score would never have been updated at just the student's rung. What is not as with a roll-out for
every update: the other updates draw rungs without replacement, samples at different rungs come from the same noise and
labels, and the student's may be one that an update before it saw.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from dmd_dar.draws import Draws, Habits
from dmd_dar.flow import Sampler
from dmd_dar.guidance import Velocity
from dmd_dar.methods.rollout import Rollout, rung_of
from dmd_dar.methods.sizes import Sizes

PHASE = "rollout"


@dataclass(frozen=True)
class Place:
    """Where in the roll-outs an update finds its samples."""

    rollout: int  # counted from the first of the run
    rung: int


@dataclass
class Turns:
    """The student's samples for the updates of a turn: `updates` says how many each phase makes, in order, one of the
    student's at the end.
    """

    updates: dict[str, int]
    student: Velocity
    rungs: tuple[float, ...]
    num_classes: int
    shape: tuple[int, ...]  # (C, H, W)
    sampler: Sampler = "stochastic"
    starts: dict[str, int] = field(default_factory=dict)  # turns before a phase's first update; 0 where it is not named
    sizes: Sizes | None = None  # of which each roll-out has one; None: `shape`
    ahead: Callable[[Tensor], None] | None = None  # hears of the labels of the roll-out after the one at hand
    under_way: int = field(default=-1, init=False)  # the roll-out that is asked for; none before it will be again
    rollouts: dict[int, Rollout] = field(default_factory=dict, init=False)  # its own, by micro-batch
    habits: Habits = field(default_factory=Habits, init=False)

    def place(self, draws: Draws) -> Place:
        """The roll-out and the rung of a step's update."""
        turn, slot = divmod(draws.step, self.updates[draws.phase])
        turn += self.starts.get(draws.phase, 0)
        for phase, count in self.updates.items():
            if phase == draws.phase:
                break
            slot += count
        row, column = divmod(slot, len(self.rungs))
        number = turn * self.per_turn + row
        own = draws.phase == list(self.updates)[-1]
        return Place(number, rung_of(draws, self.rungs) if own else self.order(number, draws)[column])

    @property
    def per_turn(self) -> int:
        """Roll-outs in a turn."""
        return -(-sum(self.updates.values()) // len(self.rungs))

    def order(self, number: int, draws: Draws) -> list[int]:
        """The order in which a roll-out's updates take its rungs, uniform over all (Fisher and Yates)."""
        there, order = Draws(draws.seed, PHASE, number, draws.samples), list(range(len(self.rungs)))
        for last in range(len(order) - 1, 0, -1):
            other = there.shared_integer(f"order_{last}", last + 1)
            order[last], order[other] = order[other], order[last]
        return order

    def state(self, rung: int, draws: Draws) -> tuple[Tensor, Tensor]:
        """(x_t, cond): the student's input at a rung, in the update's roll-out."""
        rollout = self._rollout(draws)
        with torch.no_grad():
            return rollout.state(rung), rollout.cond

    def sample(self, rung: int, draws: Draws) -> tuple[Tensor, Tensor, Tensor]:
        """(x0_student, cond, x_t): its output from there, and what it was made from."""
        rollout = self._rollout(draws)
        with torch.no_grad():
            return rollout.output(rung), rollout.cond, rollout.state(rung)

    def forget(self) -> None:
        """Drop the roll-out at hand; an update makes what it needs of it anew."""
        self.under_way, self.rollouts = -1, {}

    def _rollout(self, draws: Draws) -> Rollout:
        number = self.place(draws).rollout
        if number != self.under_way:
            self.under_way, self.rollouts = number, {}
        if draws.part not in self.rollouts:
            there = replace(draws, phase=PHASE, step=number, habits=self.habits)
            shape = self.shape if self.sizes is None else self.sizes.shape(there)
            cond, noise = there.integers("label", self.num_classes), there.normal("noise", *shape)
            self.rollouts[draws.part] = Rollout(self.student, cond, self.rungs, there, noise, self.sampler)
            if self.ahead is not None:
                self.ahead(Draws(draws.seed, PHASE, number + 1, draws.samples).integers("label", self.num_classes))
        return self.rollouts[draws.part]
