"""Three symptoms of a residual stack (arXiv:2605.20708): magnitude inflation, gradient decay, redundant blocks."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from dmd_dar.diagnostics.states import Places, Traced
from dmd_dar.errors import UserError


def mean_square(tensors: Sequence[Tensor]) -> Tensor:
    """(K,) float64: mean of the squares of each tensor."""
    return torch.stack([tensor.double().square().mean() for tensor in tensors])


def neighbour_cosine(blocks: Sequence[Tensor]) -> Tensor:
    """(K - 1,) float64: mean over tokens of cos(z_k, z_{k+1}), each z (B, T, d)."""
    pairs = zip(blocks[:-1], blocks[1:], strict=True)
    return torch.stack([F.cosine_similarity(a.double(), b.double(), dim=-1).mean() for a, b in pairs])


class SymptomSums:
    """Running means over batches of one t; `facts` closes them."""

    def __init__(self) -> None:
        self.samples, self.sums = 0, dict[str, Tensor]()

    def add(self, traced: Traced, places: Places) -> None:
        size = len(traced.states[0])
        blocks = [traced.states[end - 1] for end in places.block_ends]
        gradients = [traced.stream_gradients[end - 1] for end in places.block_ends]
        through_next = [traced.sublayer_gradients[end - 1] for end in places.block_ends]
        means = {
            "loss": traced.loss.double(),
            "forward": mean_square(blocks),
            "gradient": mean_square(gradients),
            "through_next": mean_square(through_next),
            "cosine": neighbour_cosine(blocks) if len(blocks) > 1 else blocks[0].new_zeros(0),
        }
        for name, mean in means.items():
            self.sums[name] = self.sums.get(name, torch.zeros_like(mean)) + size * mean
        self.samples += size

    def facts(self) -> dict[str, float | list[float] | None]:
        """What the sums say of this t, block 1 first.

        loss; K values each of forward_rms; gradient_rms, of a sample's own loss over all paths from z_k on; and
        sublayer_gradient_rms, through the next sublayer alone (in DAR there is no other path); K - 1 of block_cosine.
        Of these: inflation, RMS(z_K) / RMS(z_1); gradient_decay, the first block's over the last's; cosine_mean (None
        for one block). Raises UserError where a block's output or gradient is zero.
        """
        mean = {name: (total / self.samples).tolist() for name, total in self.sums.items()}
        forward, gradient, through_next = (
            [square**0.5 for square in mean[name]] for name in ("forward", "gradient", "through_next")
        )
        cosine = mean["cosine"]
        if 0 in forward or 0 in gradient:
            raise UserError("a block's output or its gradient is zero: train the network first, it is at its start")
        return {
            "loss": mean["loss"],
            "forward_rms": forward,
            "gradient_rms": gradient,
            "sublayer_gradient_rms": through_next,
            "block_cosine": cosine,
            "inflation": forward[-1] / forward[0],
            "gradient_decay": gradient[0] / gradient[-1],
            "cosine_mean": sum(cosine) / len(cosine) if cosine else None,
        }
