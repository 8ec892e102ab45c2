"""Images from a network, in batches of any size: all draws of sample i depend on (seed, phase, i) alone."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dmd_dar.draws import Draws, sample_range
from dmd_dar.guidance import Velocity
from dmd_dar.methods import rollout
from dmd_dar.methods.rollout import Normal
from dmd_dar.methods.solvers import Solver
from dmd_dar.models.families.form import CELLS, Latents

Generator = Callable[[Tensor, Normal, Tensor], Tensor]  # (cond (B,), draws, noise (B, C, H, W)) -> x0 (B, C, H, W)


def ode_generator(velocity: Velocity, solver: Solver) -> Generator:
    """The end of the ODE from the noise."""
    return lambda cond, draws, noise: solver.path(velocity, cond, noise)[0][-1]


def few_step_generator(
    velocity: Velocity, rungs: tuple[float, ...], sampler: rollout.Sampler = "stochastic"
) -> Generator:
    """One call for each rung."""
    return lambda cond, draws, noise: rollout.Rollout(velocity, cond, rungs, draws, noise, sampler).end()


def decoded(generator: Generator, decode: Callable[[Tensor], Tensor] | None) -> Generator:
    """The generator's images: what it makes, decoded if those are latents; None for images."""
    return generator if decode is None else lambda *given: decode(generator(*given))


def balanced_labels(samples: Tensor, num_classes: int) -> Tensor:
    """Each global sample's label, the classes in turn: (N,) -> (N,)."""
    return samples % num_classes


@dataclass(frozen=True)
class OwnSeeds(Draws):
    """Draws of samples that have a seed each: those of one sample, for each of them."""

    each: tuple[Draws, ...] = ()

    def uniform(self, name: str, *shape: int) -> Tensor:
        return torch.cat([one.uniform(name, *shape) for one in self.each])

    def normal(self, name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.cat([one.normal(name, *shape, dtype=dtype) for one in self.each])


@dataclass(frozen=True)
class DrawsOfNoise:
    """What is drawn after an initial noise (B, C, H, W), keyed by it as `StudentScheduler` keys it in a pipeline."""

    noise: Tensor
    latents: Latents

    def normal(self, name: str, *shape: int) -> Tensor:
        """(B, *shape) standard normal, float32; `shape` is that of the noise."""
        from dmd_dar.models.student_scheduler import noise_after  # which imports diffusers

        drawn = noise_after(self.latents.of_cells(self.noise), name)
        return self.latents.to_cells(drawn, (shape[-2], shape[-1])).to(self.noise.device)


@dataclass(frozen=True)
class SampleRange:
    """The `count` samples from the `first` on that are drawn by (seed, phase).

    labels (count,): None for the classes in turn. noise (count, C, H, W): takes the place of the initial noise, and
    what is added between calls then depends on it alone, not on `seed`; None for that of `seed`. `latents`: the form
    in which the pipeline of diffusers draws.
    """

    count: int
    seed: int
    phase: str = "sample"
    first: int = 0
    labels: Tensor | None = None
    noise: Tensor | None = None
    own_seeds: list[int] | None = None  # one for each sample, whose draws are those of the first sample of that seed
    latents: Latents = CELLS

    def draws(self, start: int, stop: int, device: torch.device | str) -> Normal:
        """Those of samples `start` to `stop`, counted from the first."""
        if self.noise is not None:
            return DrawsOfNoise(self.noise[start:stop].to(device), self.latents)
        if self.own_seeds is not None:
            first = sample_range(0, 1, device)
            each = tuple(Draws(seed, self.phase, 0, first) for seed in self.own_seeds[start:stop])
            return OwnSeeds(0, self.phase, 0, sample_range(start, stop, device), each=each)
        return Draws(self.seed, self.phase, 0, sample_range(self.first + start, self.first + stop, device))


@torch.no_grad()
def generate(
    generator: Generator,
    samples: SampleRange,
    *,
    shape: tuple[int, ...],
    num_classes: int,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor]:
    """x0 (count, *shape) of `samples` and their labels (count,), below `num_classes`."""
    indices = torch.arange(samples.first, samples.first + samples.count)
    labels = balanced_labels(indices, num_classes) if samples.labels is None else samples.labels
    labels, images = labels.to(device), []
    for start in range(0, samples.count, batch_size):
        stop = min(start + batch_size, samples.count)
        draws = samples.draws(start, stop, device)
        noise = draws.normal("noise", *shape) if samples.noise is None else samples.noise[start:stop].to(device)
        images.append(generator(labels[start:stop], draws, noise))
    return torch.cat(images), labels
