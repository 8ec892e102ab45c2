"""The keys of a distillation, and what of them contradicts itself."""

from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

from dmd_dar import flow
from dmd_dar.data.config import DataConfig
from dmd_dar.guidance import GuidanceConfig
from dmd_dar.keys import key
from dmd_dar.losses import LossWeight
from dmd_dar.models.discriminator import Pool
from dmd_dar.models.shared_lora import LoraConfig, Weights
from dmd_dar.models.teachers import TeacherConfig
from dmd_dar.pairs import RegressionConfig
from dmd_dar.routing.layout import RoutingConfig
from dmd_dar.train.disk.checkpoint import CheckpointConfig
from dmd_dar.train.disk.export import Export
from dmd_dar.train.disk.log import LogConfig
from dmd_dar.train.disk.readme import CardConfig
from dmd_dar.train.loop.optimise import OptimiserConfig
from dmd_dar.train.processes.runtime import LaunchConfig


@dataclass(frozen=True)
class StudentRouting(RoutingConfig):
    """The student's routing and how fast it learns. Routers need a larger rate than the backbone."""

    lr: float = key(2e-3, "learning rate of the routers", above=0)
    allow_change: bool = key(False, "accept a form that changes the pretrained function before training")

    def form(self) -> RoutingConfig:
        return RoutingConfig(**{field.name: getattr(self, field.name) for field in fields(RoutingConfig)})


@dataclass(frozen=True)
class StudentConfig(OptimiserConfig):
    """The few-step student."""

    ema: float | tuple[float, ...] = key(
        0.99, "decay of the weight average that is saved, or a list: the others are saved beside it", least=0, below=1
    )
    routing: StudentRouting = key(factory=StudentRouting)

    @property
    def decays(self) -> tuple[float, ...]:
        return self.ema if isinstance(self.ema, tuple) else (self.ema,)

    def __post_init__(self) -> None:
        if not self.decays or len(set(self.decays)) < len(self.decays):
            raise ValueError(f"ema must name each decay once, got {list(self.decays)}")


@dataclass(frozen=True)
class FakeScoreConfig(OptimiserConfig):
    """The online score of the student's own samples; starts as the teacher."""

    updates: int = key(5, "optimiser steps for every one of the student", unit="steps", least=1)
    per_rung: bool = key(True, "it is told which rung made a sample; off: samples of all rungs are one distribution")
    rung_lr: float = key(1e-3, "learning rate of what tells it the rung, which starts at 0", above=0)
    follow: float = key(
        0.0,
        "share of the way to the student's weights that it goes after each update of those",
        least=0,
        below=1,
    )
    space: Literal["flow", "x0"] = key("flow", "where its error is squared; x0: times t^2, so low noise counts less")


def inner_times() -> flow.TimeLaw:
    return flow.TimeLaw(low=0.02, high=0.98)


@dataclass(frozen=True)
class MatchingConfig:
    """Distribution matching."""

    weight: float = key(1.0, "weight of the loss; 0 leaves it and the fake score out", least=0)
    start: int = key(
        0,
        "student updates before the first with it, which the other losses make alone; nor is the fake score trained",
        unit="steps",
        least=0,
    )
    dm_form: Literal["standard", "decoupled"] = key(
        "standard", "decoupled: the teacher's guidance acts at a t of its own law, guidance_time"
    )
    above_next_rung: bool = key(
        False, "compare at t from the next rung up only: the noise that is added there hides what lies below"
    )
    time: flow.TimeLaw = key(factory=inner_times)
    guidance_time: flow.TimeLaw = key(factory=inner_times)

    def at(self, step: int) -> float:
        """The weight at student update `step` (from 0)."""
        return self.weight if step >= self.start else 0.0


@dataclass(frozen=True)
class GanConfig(OptimiserConfig, LossWeight):
    """The GAN term against real `data`: heads on the features of a score network. Off while its weights are 0."""

    updates: int = key(1, "optimiser steps of the heads for every one of the student", unit="steps", least=1)
    features: Literal["fake_score", "teacher"] = key("fake_score", "whose blocks the heads read")
    layers: tuple[int, ...] = key((), "those blocks, from 1; empty: the ends of the network's thirds", least=1)
    pool: Pool = key("mean", "a logit for each layer (mean over tokens), or for each token")
    hidden: int = key(256, "hidden width of a head", least=1)
    feature_weight: float = key(0.0, "weight of the GAN in the fake score's own loss; 0: it gets no gradient", least=0)
    r1_weight: float = key(0.0, "weight of the approximate R1 penalty", least=0)
    r1_sigma: float = key(0.1, "standard deviation of the noise that R1 adds to x_t", above=0)
    time: flow.TimeLaw = key(factory=inner_times)

    def __post_init__(self) -> None:
        if self.feature_weight and self.features == "teacher":
            raise ValueError("feature_weight trains the fake score, but features are the frozen teacher's: set it to 0")


@dataclass(frozen=True)
class DistillConfig:
    """python distill.py"""

    # what a distillation did whose configuration was written before the key existed
    BEFORE: ClassVar[dict[str, Any]] = {
        "rollouts": "fresh",
        "regression": {"solver": "heun", "solver_grid": "even", "by_rung": (), "target": "end"},
        "matching": {"above_next_rung": False, "start": 0},
        "fake_score": {"follow": 0.0},
        "guidance": {"form": "auto", "interval": (0.0, 1.0)},
        "teacher": {"codec_decode": "whole", "lora": ""},
        **{"height": 0, "width": 0, "sizes": ()},
    }

    out_dir: str = key("", "run folder")
    seed: int = key(0, "of every draw", least=0)
    steps: int = key(1000, "student updates", unit="steps", least=1)
    batch_size: int = key(32, "samples per optimiser step, over all processes", least=1)
    rungs: tuple[float, ...] = key(flow.default_rungs(4), "the student's times, from 1 (noise) down", above=0, most=1)
    guidance_scale: float = key(1.0, "of the teacher: uncond + g (cond - uncond); 1 is none", least=0)
    guidance: GuidanceConfig = key(factory=GuidanceConfig)
    height: int = key(0, "of the student's images; 0: the teacher's own", unit="pixels", least=0)
    width: int = key(0, "of the student's images; 0: the teacher's own", unit="pixels", least=0)
    sizes: tuple[tuple[int, int], ...] = key(
        (), "several [height, width] in their place, of which each step draws one", unit="pixels", least=1
    )
    sampler: flow.Sampler = key("stochastic", "between calls, in training and sampling: re-noise, or follow the ODE")
    student_input: Literal["simulate", "data"] = key(
        "simulate", "in training: its own rollout from noise to the rung, or noised data"
    )
    rollouts: Literal["shared", "fresh"] = key(
        "shared", "where student_input is simulate: one for all rungs' updates of a turn, or one for every update"
    )
    weights: Weights = key(
        "full", "full: three networks; shared_lora: one frozen base, with adapters for student and fake score"
    )
    lora: LoraConfig = key(factory=LoraConfig)
    export: Export = key("both", "what a shared_lora run hands out: the merged network, its adapter, or both")
    frozen_dtype: Literal["float32", "bfloat16"] = key(
        "float32", "type in which frozen linear weights are kept: the teacher's, which shared_lora shares"
    )
    resume: Literal["auto", "never"] = key("auto", "auto: continue the run in out_dir; never: refuse a used folder")
    preflight: bool = key(True, "first see whether the teacher denoises the data, if that can be its own")
    teacher: TeacherConfig = key(factory=TeacherConfig)
    data: DataConfig = key(factory=DataConfig)
    student: StudentConfig = key(factory=StudentConfig)
    fake_score: FakeScoreConfig = key(factory=FakeScoreConfig)
    matching: MatchingConfig = key(factory=MatchingConfig)
    regression: RegressionConfig = key(factory=RegressionConfig)
    gan: GanConfig = key(factory=GanConfig)
    checkpoint: CheckpointConfig = key(factory=CheckpointConfig)
    log: LogConfig = key(factory=LogConfig)
    card: CardConfig = key(factory=CardConfig)
    launch: LaunchConfig = key(factory=LaunchConfig)

    def __post_init__(self) -> None:
        self.checkpoint.require_within(self.steps)
        self._check_sizes()
        flow.check_rungs(self.rungs, self.regression.solver_steps if self.regression.used else None)
        if not (self.matching.weight or self.regression.used or self.gan.used):
            raise ValueError("matching.weight, regression.weight and gan.weight are 0: nothing would train the student")
        if self.matching.weight and self.matching.start >= self.steps:
            raise ValueError(
                f"matching.start is {self.matching.start} of {self.steps} steps: no update would match distributions;"
                " lower it, or set matching.weight to 0"
            )
        ramped = (self.regression, self.gan)
        turns = (0, self.matching.start - 1, self.steps - 1, *(one.ramp_start + one.ramp_steps for one in ramped))
        for step in sorted(turns):  # weights are straight lines: where both are 0 anywhere, they are so at one of these
            if not (self.matching.at(step) or any(one.at(step) for one in ramped)) and 0 <= step < self.steps:
                matching = "weight is 0" if not self.matching.weight else f"start is {self.matching.start}"
                raise ValueError(
                    f"matching.{matching}, and regression.weight and gan.weight are both 0 at student update {step}:"
                    " nothing would train the student there; let them overlap"
                )
        if self.regression.by_rung:
            self._check_regression_by_rung()
        self._check_steps()
        if self.matching.dm_form == "decoupled" and self.guidance_scale == 1:
            raise ValueError("guidance_scale is 1, no guidance, but matching.dm_form decoupled gives it a t of its own")
        if self.matching.above_next_rung:
            self._check_intervals()
        if self.export != "both" and self.weights == "full":
            raise ValueError(
                f"export = {self.export} is of a LoRA student, and weights are full: leave it out, or set weights to"
                " shared_lora"
            )
        if self.fake_score.follow and self.weights == "shared_lora":
            raise ValueError(
                "fake_score.follow moves weights, but under weights shared_lora student and fake score have adapters,"
                " whose product it would not move alike: set it to 0, or weights to full"
            )
        frozen = self.frozen_dtype != "float32" or self.launch.offload
        if frozen and self.weights == "full" and self.launch.sharding != "none":
            raise ValueError(
                "launch.sharding splits weights that are trained in full, and frozen_dtype bfloat16 and launch.offload"
                " keep frozen ones beside them whole in every process: set it to none, or weights to shared_lora, or"
                " leave these out"
            )

    def _check_sizes(self) -> None:
        if self.sizes and (self.height or self.width):
            raise ValueError("sizes and height or width both say how large images are: leave sizes or the others out")
        if len(set(self.sizes)) < len(self.sizes):
            raise ValueError(f"sizes must name each size once, got {[list(size) for size in self.sizes]}")
        if len(self.sizes) < 2:
            return
        if self.needs_data:
            purpose = "student_input = data" if self.student_input == "data" else f"gan.weight = {self.gan.weight:g}"
            raise ValueError(
                f"sizes are {len(self.sizes)}, but {purpose} needs real data, which have one size: name one"
            )
        if self.regression.used and self.regression.pairs:
            raise ValueError(
                f"regression.pairs = {self.regression.pairs}: a folder of pairs is of one size, and sizes are"
                f" {len(self.sizes)}; leave it out, trajectories of each size are then made for this run"
            )

    def _check_regression_by_rung(self) -> None:
        factors = list(self.regression.by_rung)
        if len(factors) != len(self.rungs):
            raise ValueError(f"regression.by_rung has {len(factors)} factors for {len(self.rungs)} rungs: {factors}")
        others = self.matching.at(0) or (self.gan.weight and self.gan.end_weight != 0)  # at every update
        if not others and 0 in factors:
            raise ValueError(
                f"regression.by_rung is {factors}, and where matching (before matching.start, too) and gan.weight are 0"
                " nothing would train the student at a rung of factor 0; set it above 0"
            )

    def _check_steps(self) -> None:
        """A call is to reach the end of the way or the next rung, by all losses alike."""
        steps = self.regression.used and self.regression.target == "next_rung"
        if steps and self.sampler != "deterministic":
            raise ValueError(
                "regression.target next_rung trains calls that step to the next rung along the ODE, and sampler"
                " stochastic adds fresh noise to their x0: set sampler to deterministic, or regression.target to end"
            )
        if self.sampler != "deterministic":
            return
        between = steps or self.matching.above_next_rung
        if between and self.gan.used:
            raise ValueError(
                "gan compares each call's x0 with real data, but with sampler deterministic and"
                f" {'regression.target next_rung' if steps else 'matching.above_next_rung'} it is but a step to the"
                " next rung: set gan.weight to 0"
            )
        if self.matching.weight and self.regression.used and steps != self.matching.above_next_rung:
            raise ValueError(
                f"with sampler deterministic, regression.target {self.regression.target} and matching.above_next_rung"
                f" {str(self.matching.above_next_rung).lower()} ask different things of a call: a step to the next"
                " rung takes next_rung and true, a sample at once end and false"
            )

    def _check_intervals(self) -> None:
        """Each rung has an interval of t to be matched in."""
        if self.matching.dm_form == "decoupled":
            raise ValueError(
                "matching.dm_form decoupled draws t of guidance_time at every rung alike, which"
                " matching.above_next_rung does not bound: set it to false, or dm_form to standard"
            )
        lowest = self.rungs[1] if len(self.rungs) > 1 else 0.0
        if self.sampler == "deterministic":  # methods.dmd.DMD.time_of
            lowest += self.matching.time.low
        if len(self.rungs) > 1 and lowest >= self.matching.time.high:
            raise ValueError(
                f"matching.above_next_rung leaves the first rung t from {lowest:g} to matching.time.high ="
                f" {self.matching.time.high:g}, which is nothing: lower rungs, or raise matching.time.high"
            )

    @property
    def pixels(self) -> tuple[tuple[int, int], ...]:
        """(height, width) of the student's images, 0 for the teacher's own; each step draws one of them."""
        return self.sizes or ((self.height, self.width),)

    @property
    def sized(self) -> bool:
        """Whether any size is named."""
        return any(side for size in self.pixels for side in size)

    @property
    def trains_fake_score(self) -> bool:
        return self.matching.weight > 0 or (self.gan.used and self.gan.features == "fake_score")

    @property
    def fake_score_start(self) -> int:
        """Student updates before the fake score's first: until matching or a GAN that trains it asks for it."""
        return self.matching.start if self.matching.weight and not self.gan.feature_weight else 0

    @property
    def updates(self) -> dict[str, int]:
        """Optimiser steps of each phase for one of the student, in their order."""
        fake_score = self.fake_score.updates if self.trains_fake_score else 0
        return {"fake_score": fake_score, "discriminator": self.gan.updates if self.gan.used else 0, "student": 1}

    @property
    def needs_data(self) -> bool:
        return self.student_input == "data" or self.gan.used
