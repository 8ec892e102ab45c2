"""Does the matching gradient keep its direction where teacher and fake score compute in bfloat16?

    python -m benchmarks.precision

The difference of the two cancels what they have in common, and rounding stays. On samples of the shipped teacher
(teachers/photos32), a fake score is that teacher with weights moved by ever more; the gradient by bfloat16 scores is
held against that by float32 ones. Writes nothing.
"""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dmd_dar import config, flow, losses
from dmd_dar.draws import Draws, sample_range
from dmd_dar.keys import key
from dmd_dar.methods import rollout
from dmd_dar.methods.dmd import x0_of
from dmd_dar.methods.generate import few_step_generator
from dmd_dar.models.denoiser import velocity_of
from dmd_dar.models.saved import load_network

TIME = flow.TimeLaw(low=0.02, high=0.98)


@dataclass(frozen=True)
class PrecisionBenchmark:
    """python -m benchmarks.precision"""

    samples: int = key(16, "images", least=1)
    moved: tuple[float, ...] = key((1e-3, 3e-3, 1e-2, 3e-2), "relative change of every weight", above=0)


def moved_copy(network: nn.Module, by: float) -> nn.Module:
    """Each weight w of a copy is w (1 + by * N(0, 1))."""
    torch.manual_seed(1)
    other = copy.deepcopy(network)
    for parameter in other.parameters():
        parameter.mul_(1 + by * torch.randn_like(parameter))
    return other


@torch.no_grad()
def measure(bench: PrecisionBenchmark) -> None:
    network, card = load_network("teachers/photos32")
    draws = Draws(0, "precision", 0, sample_range(0, bench.samples))
    cond, noise = draws.integers("label", network.num_conditions), draws.normal("noise", *network.shape)
    x = few_step_generator(velocity_of(network, card.prediction), flow.default_rungs(4))(cond, draws, noise)
    x_t, t, _ = rollout.renoise(x, TIME, "score", draws)

    def x0_by(score: nn.Module, narrow: bool) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
            return x0_of(velocity_of(score, card.prediction), x_t, t, cond)

    teacher = [x0_by(network, narrow) for narrow in (False, True)]
    print("| fake score to teacher, rms | its rounding, rms | cosine of the gradients | ratio of their lengths |")
    print("|---|---|---|---|")
    for by in bench.moved:
        other = moved_copy(network, by)
        fake = [x0_by(other, narrow) for narrow in (False, True)]
        exact, rounded = (losses.dmd_direction(x, a, b) for a, b in zip(teacher, fake, strict=True))
        gap, error = fake[0] - teacher[0], (fake[1] - teacher[1]) - (fake[0] - teacher[0])
        cosine = F.cosine_similarity(exact.flatten(1), rounded.flatten(1)).mean().item()
        sizes = [part.square().mean().sqrt().item() for part in (gap, error)]
        print(f"| {sizes[0]:.4f} | {sizes[1]:.4f} | {cosine:.4f} | {(rounded.norm() / exact.norm()).item():.2f} |")


if __name__ == "__main__":
    config.run_job(PrecisionBenchmark, measure, description=__doc__ or "")
