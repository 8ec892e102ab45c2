"""Are students as good where roll-outs are shared, calls without gradients are in bfloat16, t is cut by rung, or calls
follow the ODE to the next rung?

    python -m benchmarks.analytic
    python -m benchmarks.analytic compare=gradient_free
    python -m benchmarks.analytic compare=above_next_rung
    python -m benchmarks.analytic compare=sampler

Four-step students of a 1/f^2 field and of a mixture, whose score is known exactly, are distilled by the code that real
runs use (phases, draws, losses), at equal updates. Student and fake score are the teacher's velocity plus a small
network that starts at zero: they start as the teacher, as in a real run.
"""

import copy
import math
import statistics
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from benchmarks.record import save
from dmd_dar import config, flow
from dmd_dar.draws import Draws, sample_range
from dmd_dar.guidance import Velocity
from dmd_dar.keys import key
from dmd_dar.methods import rollout
from dmd_dar.methods.dmd import DMD
from dmd_dar.methods.generate import few_step_generator
from dmd_dar.methods.turns import Turns
from dmd_dar.models.denoiser import NetworkVelocity
from dmd_dar.train.loop.ema import Ema
from dmd_dar.train.loop.loop import Phase, update
from dmd_dar.train.loop.optimise import Optimiser, OptimiserConfig
from dmd_dar.train.processes.runtime import GradientFree, LaunchConfig, Runtime

FAKE_UPDATES = 5
MODES = torch.stack([torch.tensor([math.cos(a), math.sin(a)]) for a in torch.arange(8) * math.pi / 4])  # (8, 2)
SPREAD = 0.12  # of a mode
SIDE = 16
RUNGS = 4  # at most
FEATURES = 7 + RUNGS
FIELD_UPDATES = 400  # of the student


@dataclass(frozen=True)
class Arm:
    """What is compared at equal updates."""

    shared: bool = True  # roll-outs, as `rollouts: shared` says
    gradient_free: GradientFree = "float32"
    above_next_rung: bool = False  # as matching.above_next_rung
    sampler: flow.Sampler = "stochastic"


@dataclass(frozen=True)
class Recipe:
    """How a student is trained."""

    updates: int
    batch_size: int
    lr: float
    shift: float = 1.0  # of the t at which scores are compared
    per_rung: bool = True
    seed: int = 0  # of every draw


ARMS = {
    "rollouts": {"fresh": Arm(shared=False), "shared": Arm()},
    "gradient_free": {"float32": Arm(), "bfloat16": Arm(gradient_free="bfloat16")},
    "above_next_rung": {"everywhere": Arm(), "above": Arm(above_next_rung=True)},
    "sampler": {
        "stochastic": Arm(above_next_rung=True),
        "deterministic": Arm(above_next_rung=True, sampler="deterministic"),
    },
}


RESULTS = {
    "rollouts": "analytic_cpu",
    "gradient_free": "precision_cpu",
    "above_next_rung": "intervals_cpu",
    "sampler": "samplers_cpu",
}


def mixture_velocity(x_t: Tensor, t: Tensor, cond: Tensor) -> Tensor:
    """E[eps - x0 | x_t], x0 of the mixture of N(mode, SPREAD^2): shapes (B, 2, 1, 1)."""
    t, x = t[:, None, None], x_t.flatten(1)[:, None]  # (B, 1, 1), (B, 1, 2)
    variance = (1 - t) ** 2 * SPREAD**2 + t**2
    residual = x - (1 - t) * MODES  # (B, 8, 2)
    share = torch.softmax(-residual.square().sum(-1, keepdim=True) / (2 * variance), dim=1)
    x0 = (share * (MODES + (1 - t) * SPREAD**2 / variance * residual)).sum(1)
    eps = (share * (t / variance * residual)).sum(1)
    return (eps - x0).reshape_as(x_t)


def field_power() -> Tensor:
    """(SIDE, SIDE / 2 + 1): the variance of a 1/f^2 field's orthonormal real DFT, 1 on average over the plane."""
    f = (torch.fft.fftfreq(SIDE)[:, None].square() + torch.fft.rfftfreq(SIDE).square()).clamp(min=SIDE**-2.0)
    whole = (torch.fft.fftfreq(SIDE)[:, None].square() + torch.fft.fftfreq(SIDE).square()).clamp(min=SIDE**-2.0)
    return f.reciprocal() / whole.reciprocal().mean()


POWER = field_power()


def field_velocity(x_t: Tensor, t: Tensor, cond: Tensor) -> Tensor:
    """E[eps - x0 | x_t], x0 the Gaussian field of that power: shapes (B, 1, SIDE, SIDE)."""
    t = t[:, None, None, None]
    gain = (t - (1 - t) * POWER) / ((1 - t) ** 2 * POWER + t**2)
    return torch.fft.irfft2(gain * torch.fft.rfft2(x_t), s=(SIDE, SIDE))


def features_of(t: Tensor, rung: int) -> Tensor:
    """Of the time (B,) and of a rung -> (B, FEATURES)."""
    rate, rung = math.pi * torch.tensor([1.0, 2.0, 4.0]), nn.functional.one_hot(torch.full((len(t),), rung), RUNGS)
    return torch.cat([t[:, None], (t[:, None] * rate).sin(), (t[:, None] * rate).cos(), rung], dim=1)


class Corrected(nn.Module):
    """The teacher's velocity plus `correction`(x_t, features of t and rung)."""

    def __init__(self, teacher: Velocity, correction: nn.Module):
        super().__init__()
        self.teacher, self.correction = teacher, correction

    def forward(self, x_t: Tensor, t: Tensor, cond: Tensor, rung: int = 0) -> Tensor:
        return self.teacher(x_t, t, cond) + self.correction(x_t, features_of(t.float(), rung))


class Perceptron(nn.Module):
    """Of x_t (B, 2, 1, 1) through sines and cosines, fine enough for the edges between modes."""

    def __init__(self, width: int = 96):
        super().__init__()
        self.rate = math.pi * torch.tensor([0.5, 1.0, 2.0, 4.0, 8.0])
        layers = [
            nn.Linear(2 + 20 + FEATURES, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, 2),
        ]
        self.layers = nn.Sequential(*layers)
        nn.init.zeros_(layers[-1].weight)
        nn.init.zeros_(layers[-1].bias)

    def forward(self, x_t: Tensor, features: Tensor) -> Tensor:
        angles = (x_t.flatten(1)[:, :, None] * self.rate).flatten(1)
        given = torch.cat([x_t.flatten(1), angles.sin(), angles.cos(), features], dim=1)
        return self.layers(given).reshape_as(x_t)


class Filter(nn.Module):
    """A linear filter of x_t whose gain at a frequency is a small network of that frequency and t."""

    def __init__(self, width: int = 32):
        super().__init__()
        radius = (torch.fft.fftfreq(SIDE)[:, None].square() + torch.fft.rfftfreq(SIDE).square()).sqrt()
        self.radius = (radius + 1 / SIDE).log2()[None, ..., None]
        self.by_time, self.by_frequency = nn.Linear(FEATURES, width), nn.Linear(1, width)
        self.out = nn.Sequential(nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1))
        nn.init.zeros_(self.out[-1].weight)
        nn.init.zeros_(self.out[-1].bias)

    def forward(self, x_t: Tensor, features: Tensor) -> Tensor:
        gain = self.out(self.by_time(features)[:, None, None] + self.by_frequency(self.radius)).squeeze(-1)[:, None]
        return torch.fft.irfft2(gain * torch.fft.rfft2(x_t), s=(SIDE, SIDE))


def as_network(velocity: Callable[..., Tensor]) -> NetworkVelocity:
    """The velocity as a network gives it: under autocast, its input and its output are rounded to bfloat16."""

    def call(x_t: Tensor, t: Tensor, cond: Tensor, *rung: int) -> Tensor:
        if not torch.is_autocast_enabled("cpu"):
            return velocity(x_t, t, cond, *rung)
        return velocity(x_t.bfloat16().float(), t, cond, *rung).bfloat16()

    return call


def distilled(
    teacher: Velocity,
    correction: nn.Module,
    shape: tuple[int, ...],
    rungs: tuple[float, ...],
    recipe: Recipe,
    arm: Arm = Arm(),  # noqa: B008
) -> Velocity:
    """The averaged student after `recipe.updates` updates."""
    student, fake_score = (Corrected(teacher, copy.deepcopy(correction)) for _ in range(2))
    runtime = Runtime(LaunchConfig(cpu=True, gradient_free=arm.gradient_free))
    velocity = runtime.without_gradients(as_network(student), "rollout")
    fake = as_network(fake_score if recipe.per_rung else lambda x_t, t, cond, rung: fake_score(x_t, t, cond))
    counts = {"fake_score": FAKE_UPDATES, "student": 1}
    method = DMD(
        student=velocity,
        teacher=runtime.without_gradients(as_network(teacher), "score"),
        fake_score=runtime.without_gradients(fake, "score"),
        rungs=rungs,
        renoise=flow.TimeLaw(low=0.02, high=0.98, shift=recipe.shift),
        num_classes=1,
        shape=shape,
        turns=Turns(counts, velocity, rungs, 1, shape, arm.sampler) if arm.shared else None,
        sampler=arm.sampler,
        above_next_rung=arm.above_next_rung,
    )
    ema, updates, lr = Ema(student, 0.98), recipe.updates, recipe.lr
    config = OptimiserConfig(lr=lr, betas=(0.0, 0.99), decay_start=updates // 2, decay_steps=updates // 2 + 1)
    student_phase = Phase("student", student, Optimiser(config, student.parameters()), method.student_loss, ema)
    fakes = FAKE_UPDATES * updates
    config = OptimiserConfig(2 * lr, betas=(0.0, 0.99), clip=10.0, decay_start=fakes // 2, decay_steps=6 * fakes // 10)
    fake_phase = Phase("fake_score", fake_score, Optimiser(config, fake_score.parameters()), method.fake_score_loss)
    for _ in range(updates):
        for phase in (*[fake_phase] * FAKE_UPDATES, student_phase):
            update(phase, recipe.seed, recipe.batch_size, runtime)
    return ema.module


@torch.no_grad()
def samples_of(
    velocity: Velocity, rungs: tuple[float, ...], shape: tuple[int, ...], sampler: flow.Sampler = "stochastic"
) -> Tensor:
    draws = Draws(1, "sample", 0, sample_range(0, 2048))
    return few_step_generator(velocity, rungs, sampler)(
        torch.zeros_like(draws.samples), draws, draws.normal("noise", *shape)
    )


def mixture_samples() -> Tensor:
    draws = Draws(2, "truth", 0, sample_range(0, 2048))
    return MODES[draws.integers("mode", 8)] + SPREAD * draws.normal("spread", 2)


def mmd(a: Tensor, b: Tensor) -> float:
    """sqrt of the unbiased squared maximum mean discrepancy of (n, d), Gaussian kernels of widths 0.1, 0.4 and 1.6."""

    def mean_kernel(x: Tensor, y: Tensor, same: bool) -> float:
        distance = torch.cdist(x, y).square()
        total = sum(torch.exp(-distance / (2 * w**2)).double().sum().item() for w in (0.1, 0.4, 1.6))
        n = len(x)
        return (total - 3 * n) / (n * (n - 1)) if same else total / (n * len(y))

    return math.sqrt(max(mean_kernel(a, a, True) + mean_kernel(b, b, True) - 2 * mean_kernel(a, b, False), 0.0))


def modes_found(x: Tensor) -> int:
    """How many modes have at least a third of their share of the samples (n, 2) within 3 spreads."""
    distance, nearest = torch.cdist(x, MODES).min(dim=1)
    counts = torch.bincount(nearest[distance < 3 * SPREAD], minlength=8)
    return int((counts >= len(x) / 8 / 3).sum())


def octaves(x: Tensor) -> Tensor:
    """Mean power of (n, 1, SIDE, SIDE) over the truth's, in dB, in the octaves from f = 1/16, 1/8 and 1/4 to 1/2."""
    power = torch.fft.rfft2(x, norm="ortho").abs().square().mean((0, 1)) / POWER
    f = (torch.fft.fftfreq(SIDE)[:, None].square() + torch.fft.rfftfreq(SIDE).square()).sqrt()
    bands = [(f >= low) & (f < 2 * low + (low == 0.25) * 1e-6) for low in (1 / 16, 1 / 8, 1 / 4)]
    return torch.stack([10 * power[band].mean().log10() for band in bands])


def octaves_by_rung(
    student: Velocity, rungs: tuple[float, ...], shape: tuple[int, ...], sampler: flow.Sampler
) -> Tensor:
    """(rungs + 1, octaves): of the outputs at each rung, and of all of them together."""
    draws = Draws(1, "sample", 0, sample_range(0, 2048))
    cond, noise, outputs = torch.zeros_like(draws.samples), draws.normal("noise", *shape), []
    for rung, t in enumerate(rungs):
        x_t = rollout.Rollout(student, cond, rungs, draws, noise, sampler).state(rung)
        outputs.append(rollout.predict_x0(student, x_t, t, cond))
    return torch.stack([octaves(x) for x in (*outputs, torch.cat(outputs))])


def four_step_student_of_a_field(seed: int, per_rung: bool = True, arm: Arm = Arm()) -> Tensor:  # noqa: B008
    """`octaves_by_rung` of it."""
    torch.manual_seed(seed)
    shape, rungs = (1, SIDE, SIDE), flow.default_rungs(4)
    recipe = Recipe(FIELD_UPDATES, batch_size=48, lr=5e-3, shift=0.5, per_rung=per_rung, seed=seed)
    student = distilled(field_velocity, Filter(), shape, rungs, recipe, arm)
    with torch.no_grad():
        return octaves_by_rung(student, rungs, shape, arm.sampler)


def four_step_student_of_a_mixture(seed: int, updates: int, arm: Arm = Arm()) -> tuple[int, float]:  # noqa: B008
    """The modes that it finds, and its distance from the truth over that of the teacher in four steps."""
    torch.manual_seed(seed)
    shape, truth, rungs = (2, 1, 1), mixture_samples(), flow.default_rungs(4)
    before = samples_of(mixture_velocity, rungs, shape, arm.sampler).flatten(1)
    recipe = Recipe(updates, batch_size=256, lr=3e-3, shift=0.25, seed=seed)
    student = distilled(mixture_velocity, Perceptron(), shape, rungs, recipe, arm)
    after = samples_of(student, rungs, shape, arm.sampler).flatten(1)
    return modes_found(after), mmd(after, truth) / mmd(before, truth)


@dataclass(frozen=True)
class AnalyticBenchmark:
    """python -m benchmarks.analytic"""

    compare: Literal["rollouts", "gradient_free", "above_next_rung", "sampler"] = key(
        "rollouts", "the key whose values are compared"
    )
    seeds: int = key(6, "training seeds of each target and form", least=2)
    updates: int = key(800, "student updates on the mixture", unit="steps", least=1)
    workers: int = key(2, "processes, of one thread each", least=1)


def outcome(target: str, seed: int, arm: Arm, updates: int) -> dict[str, float]:
    """What one student reaches."""
    torch.set_num_threads(1)
    if target == "mixture":
        modes, distance = four_step_student_of_a_mixture(seed, updates, arm)
        return {"modes": modes, "distance": distance}
    by_rung = four_step_student_of_a_field(seed, arm=arm)
    end = by_rung[-2].abs()  # of the last rung's outputs, the samples; earlier ones need not be right where t is cut
    return {
        "worst octave": by_rung[:-1].abs().max().item(),
        "top octave": by_rung[:-1, -1].abs().mean().item(),
        "worst octave of samples": end.max().item(),
        "top octave of samples": end[-1].item(),
    }


def measure(bench: AnalyticBenchmark) -> None:
    """Each seed's outcomes in both forms, and the mean of the paired differences with its standard error."""
    torch.set_num_threads(1)  # as in the workers: the record says so
    arms, targets = ARMS[bench.compare], ("field", "mixture")
    cases = [(t, s, arm) for s in range(bench.seeds) for t in targets for arm in arms.values()]
    with ProcessPoolExecutor(bench.workers) as pool:
        made = list(pool.map(outcome, *zip(*cases, strict=True), [bench.updates] * len(cases)))
    found = dict(zip(cases, made, strict=True))
    result: dict[str, Any] = {"seeds": bench.seeds, "updates": {"field": FIELD_UPDATES, "mixture": bench.updates}}
    for target in targets:
        by_arm = {name: [found[target, seed, arm] for seed in range(bench.seeds)] for name, arm in arms.items()}
        names = next(iter(by_arm.values()))[0]
        result[target] = {one: paired({arm: [x[one] for x in made] for arm, made in by_arm.items()}) for one in names}
        print(target, result[target])
    print(save(RESULTS[bench.compare], torch.device("cpu"), result))


def paired(by_arm: dict[str, list[float]]) -> dict[str, Any]:
    """Two arms by seed, and the second less the first: its mean and standard error."""
    (first, a), (second, b) = by_arm.items()
    gaps = [y - x for x, y in zip(a, b, strict=True)]
    error = statistics.stdev(gaps) / math.sqrt(len(gaps))
    return {**by_arm, f"{second} - {first}": statistics.mean(gaps), "standard error": error}


if __name__ == "__main__":
    config.run_job(AnalyticBenchmark, measure, description=__doc__ or "")
