"""The training loop: cycles of optimiser steps, checkpoints, logs, a clean stop."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dmd_dar.draws import Draws, Habits
from dmd_dar.errors import UserError, users_line
from dmd_dar.messages import LOGGER
from dmd_dar.stop import StopRequest
from dmd_dar.train.disk import checkpoint
from dmd_dar.train.disk.folder import RunFolder
from dmd_dar.train.disk.log import Progress, RunLog
from dmd_dar.train.loop.ema import Ema, Follower
from dmd_dar.train.loop.optimise import Optimiser
from dmd_dar.train.processes import replicas
from dmd_dar.train.processes.compiling import FirstTurn
from dmd_dar.train.processes.parts import gathered, load_network, load_optimiser
from dmd_dar.train.processes.runtime import Runtime
from dmd_dar.train.watch.failure import Calls, Place, failed
from dmd_dar.train.watch.health import Health

Metrics = dict[str, Tensor]


@dataclass
class Phase:
    """One network in training. `loss` maps the step's draws to a scalar and what to log of it."""

    name: str
    network: nn.Module
    optimiser: Optimiser
    loss: Callable[[Draws], tuple[Tensor, Metrics]]
    ema: Ema | None = None
    follower: Follower | None = None  # of the network; its weights are saved by the phase that trains it
    start: int = 0  # steps of the run before the first in which it is trained
    steps: int = field(default=0, init=False)  # optimiser steps made
    habits: Habits = field(default_factory=Habits, init=False, repr=False)

    def held(self) -> dict[str, Any]:
        """All that training changes, as this process holds it: sharded tensors are in parts."""
        ema = None if self.ema is None else self.ema.state_dict()
        optimiser = self.optimiser.adamw.state_dict()
        return {"network": self.network.state_dict(), "optimiser": optimiser, "ema": ema, "steps": self.steps}

    def state(self) -> dict[str, Any]:
        """The same whatever the number of processes: whole tensors, in the main one. Call it in every process."""
        return gathered(self.held())

    def restore(self, state: dict[str, Any]) -> None:
        load_network(self.network, state["network"])
        load_optimiser(self.optimiser.adamw, state["optimiser"])
        if self.ema is not None:
            for decay, module in self.ema.modules.items():
                load_network(module, state["ema"][decay])
        self.steps = state["steps"]


def update(phase: Phase, seed: int, batch_size: int, runtime: Runtime) -> dict[str, Tensor]:
    """One optimiser step of one network over the global batch; its metrics, named after the phase.

    Raises FloatingPointError where the loss or gradient is not finite; the network's weights are then untouched.
    """
    metrics = gradients(phase, seed, batch_size, runtime)
    norm = phase.optimiser.norm()
    loss, size = torch.stack([metrics["loss"].double(), norm.double()]).tolist()  # the step's one wait for the device
    for name, value in (("loss", loss), ("gradient norm", size)):
        if not math.isfinite(value):
            raise FloatingPointError(f"the {name} is {value}")
    followers = [phase.follower.network] if phase.follower is not None else []
    runtime.settle(phase.network, *followers, *(phase.ema.modules.values() if phase.ema is not None else ()))
    phase.optimiser.step(phase.steps, norm)
    metrics["gradient_norm"] = torch.tensor(size)
    phase.steps += 1
    if phase.ema is not None:
        phase.ema.update(phase.network, phase.steps)
    if phase.follower is not None:
        phase.follower.follow(phase.network)
    return {f"{phase.name}/{name}": value for name, value in metrics.items()}


def gradients(phase: Phase, seed: int, batch_size: int, runtime: Runtime) -> Metrics:
    """Gradients of the mean loss over the global batch, summed over micro-batches; the mean metrics."""
    parts = runtime.micro_batches(batch_size)
    total: Metrics = {}
    for part, samples in enumerate(parts):
        with runtime.autocast():
            loss, metrics = phase.loss(Draws(seed, phase.name, phase.steps, samples, phase.habits, part))
        with runtime.averaging(phase.optimiser.parameters, last=samples is parts[-1]):
            (loss / len(parts)).backward()
        for name, value in {"loss": loss, **metrics}.items():
            total[name] = total.get(name, 0) + value.detach() / len(parts)
    return total


@dataclass(frozen=True)
class Course:
    """How long a run trains, from which seed, and after how many steps it saves, logs and draws samples."""

    seed: int
    steps: int
    batch_size: int  # over all processes
    checkpoints: checkpoint.CheckpointConfig
    log_every: int
    samples_every: int


@dataclass(frozen=True)
class OpenRun:
    """A run as one of its processes holds it."""

    runtime: Runtime
    folder: RunFolder | None  # the main process's; None elsewhere
    identity: dict[str, str]  # hashes of what the configuration names by path: teacher, data
    out_dir: Path | None = None  # where a failure leaves what it saw; None: nowhere


@dataclass(frozen=True)
class Watch:
    """What is kept and measured beside training: the networks' last calls, for when one fails, and health signals."""

    calls: Calls = field(default_factory=Calls)
    health: Health | None = None
    turns: FirstTurn | None = None  # of networks that are compiled
    found: dict[str, int] = field(default_factory=dict)  # what was measured before the first step, for the log


@dataclass
class Loop:
    """Trains `cycle`: each phase makes one optimiser step in order, the main one last; that is one step of the run.
    Before its `start` a phase is left out.

    `sample` is called as sample(step) every `course.samples_every` steps and at the end, `keep` as keep(step) after
    those of `course.checkpoints.students`. Whoever runs the loop enters `stop` before.
    """

    cycle: tuple[Phase, ...]
    course: Course
    home: OpenRun
    sample: Callable[[int], None]
    watch: Watch = field(default_factory=Watch)
    stop: StopRequest = field(default_factory=StopRequest)
    keep: Callable[[int], None] = lambda _: None
    reached: int = field(default=0, init=False)  # steps of the run that are made

    @property
    def stopped(self) -> str:
        """Why a rule of health ended the run; empty where none did."""
        return "" if self.watch.health is None else self.watch.health.stopping.stopped

    @property
    def runtime(self) -> Runtime:
        return self.home.runtime

    def phases(self) -> list[Phase]:
        return list({phase.name: phase for phase in self.cycle}.values())

    def restore(self, root: Path) -> int:
        """Continue from the newest whole checkpoint under `root`; the step reached, 0 where there is none.

        Raises UserError in all processes where none is whole, where the teacher or the data are not those that it was
        made with, or where it does not fit the networks.
        """
        step = self.runtime.together(lambda: checkpoint.newest_whole(root) if self.runtime.is_main else None)
        step = self.runtime.of_main(step or 0)
        if not step:
            return 0
        state = self.runtime.together(lambda: self._load(root, step))
        for phase in self.phases():
            try:
                phase.restore(state[phase.name])
            except (KeyError, ValueError, RuntimeError) as error:
                fault = f"'{root}': the checkpoint of step {step} does not fit this run's {phase.name}"
                raise UserError(f"{fault} ({' '.join(str(error).split())}); use another out_dir") from error
        if self.watch.health is not None and "health" in state:
            self.watch.health.restore(state["health"])
        if self.runtime.is_main:
            self._tell_passed(step)
        return step

    def _tell_passed(self, step: int) -> None:
        """Say which of `checkpoint.students` were asked for after the run had passed them."""
        folder = self.home.folder
        kept = () if folder is None else {path.name for path in folder.path.glob("*_step_*")}
        steps = [one for one in self.course.checkpoints.students if one <= step]
        passed = [one for one in steps if not any(name.endswith(f"_step_{one:08d}") for name in kept)]
        if passed:
            LOGGER.warning(f"checkpoint.students: this run passed {passed} before; no student is kept of these steps")

    def take_best(self, root: Path) -> int:
        """Load the state of the last phase from the checkpoint of the least score; its step, 0 where none has one.

        Where it is damaged, one line says so and nothing is loaded: 0, too.
        """
        step = self.runtime.together(lambda: checkpoint.best_whole(root) if self.runtime.is_main else None)
        step = self.runtime.of_main(step or 0)
        if step:
            self.cycle[-1].restore(self.runtime.together(lambda: self._load(root, step))[self.cycle[-1].name])
        return step

    def update(self, phase: Phase) -> dict[str, Tensor]:
        """`update`; raises DivergedError or NetworkError naming the network, the step, the cause and the remedy."""
        with self._explained(phase.name, phase.steps, phase.network):
            return update(phase, self.course.seed, self.course.batch_size, self.runtime)

    @contextmanager
    def _explained(self, name: str, steps: int, network: nn.Module | None = None) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if users_line(error) is not None:
                raise
            place = Place(name, steps, self.course.seed, self.runtime.rank)
            raise failed(error, place, network, self.watch.calls, self.home.out_dir) from error

    def _load(self, root: Path, step: int) -> dict[str, Any]:
        identity = checkpoint.read_manifest(root, step, hashed=not self.runtime.is_main)["identity"]
        for name in [*self.home.identity, *(name for name in identity if name not in self.home.identity)]:
            if identity.get(name) != self.home.identity.get(name):
                raise UserError(f"'{root}': this run's {name} has changed since; restore it, or use another out_dir")
        return checkpoint.load(root, step, mapped=self.runtime.device.type != "cpu")

    def check_replicas(self, step: int) -> None:
        """Raises ReplicaError in all processes where one has come to hold something else than it should.

        Where the seed and the steps made agree, so do turn, rung and every draw.
        """
        state = {phase.name: phase.held() for phase in self.phases()}
        replicas.check(self.runtime, {"seed": self.course.seed, "step": step, **state}, step)

    def save(self, step: int, score: float | None = None) -> None:
        """Write a checkpoint, once at most for a step; that of the least `score` is kept. If it fails, all end."""
        state = {phase.name: phase.state() for phase in self.phases()}
        if self.watch.health is not None:
            state["health"] = self.watch.health.state()
        folder, config = self.home.folder, self.course.checkpoints

        def write() -> None:
            if folder is not None:
                checkpoint.save(folder.checkpoints, step, state, config, identity=self.home.identity, score=score)

        self.runtime.together(write)

    def run(self, start: int, log: RunLog) -> bool:
        """Train from step `start` to the end, or to where a rule of health ends it, now or when it ran before; False
        where a signal stopped it early, the last step saved.
        """
        self.reached = start
        if self.stopped:
            return True
        with Progress(self.course.steps, start, enabled=self.home.folder is not None) as progress:
            stopping = self.runtime.any(self.stop.asked)
            for step in range(start + 1, self.course.steps + 1):
                if stopping:
                    return False
                metrics: dict[str, Tensor] = {}
                with self.watch.turns.timed() if self.watch.turns is not None else nullcontext():
                    for phase in self.cycle:
                        if step > phase.start:
                            metrics.update(self.update(phase))
                last = step == self.course.steps
                progress.advance(step)
                regular = last or step % self.course.checkpoints.every == 0
                record: dict[str, Any] = {}
                if last or step % self.course.log_every == 0:
                    record = self.runtime.average({name: value.item() for name, value in metrics.items()})
                    record["steps_per_second"] = progress.rate
                if self.watch.health is not None:
                    with self._explained("health", step):
                        record |= self.watch.health(step, metrics, scored=regular)
                self.reached = step
                if record:
                    log.write({"step": step, **record})
                if last or self.stopped or step % self.course.samples_every == 0:
                    with self._explained("pictures", step):
                        self.sample(step)
                if step in self.course.checkpoints.students:
                    self.keep(step)
                stopping = self.runtime.any(self.stop.asked)
                saving = regular or stopping or bool(self.stopped)
                if saving or step % self.runtime.check_every == 0:
                    self.check_replicas(step)
                if saving:
                    log.sync()
                    self.save(step, record.get("health/score") if regular else None)
                    if self.stopped:
                        return True
                    stopping = self.runtime.any(self.stop.asked)
        return True
