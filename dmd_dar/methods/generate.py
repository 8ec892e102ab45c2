"""Images from a network, in batches of any size: all draws of sample i depend on (seed, phase, i) alone."""

from collections.abc import Callable

import torch
from torch import Tensor

from dmd_dar.draws import Draws, sample_range
from dmd_dar.guidance import Velocity
from dmd_dar.methods import rollout
from dmd_dar.methods.solvers import Solver

Generator = Callable[[Tensor, Draws, Tensor], Tensor]  # (cond (B,), draws, noise (B, C, S, S)) -> x0 (B, C, S, S)


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


@torch.no_grad()
def generate(
    generator: Generator,
    count: int,
    *,
    seed: int,
    shape: tuple[int, ...],
    num_classes: int,
    phase: str = "sample",
    batch_size: int = 64,
    device: torch.device | str = "cpu",
    labels: Tensor | None = None,
    noise: Tensor | None = None,
    first: int = 0,
) -> tuple[Tensor, Tensor]:
    """x0 (count, *shape) and labels (count,) of the samples from `first` on: `labels`, else the classes in turn.

    `noise` (count, *shape) takes the place of the initial noise; what is added between calls is drawn by `seed` still.
    """
    each = torch.arange(first, first + count)
    given, images = (balanced_labels(each, num_classes) if labels is None else labels).to(device), []
    for start in range(0, count, batch_size):
        part = slice(start, min(start + batch_size, count))
        draws = Draws(seed, phase, 0, sample_range(first + part.start, first + part.stop, device))
        begin = draws.normal("noise", *shape) if noise is None else noise[part].to(device)
        images.append(generator(given[part], draws, begin))
    return torch.cat(images), given
