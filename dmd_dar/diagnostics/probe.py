"""How well t can be read linearly from a state: ridge regression from token-pooled h_l, judged on unseen pairs.

A row is one (x0, eps) pair at one t. Rows of a pair share x0 and eps, so the halves are split by pair: else a probe
could know t from recognising the pair.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dmd_dar import flow
from dmd_dar.diagnostics.states import Inputs, Places, recording
from dmd_dar.guidance import Velocity

STRENGTHS = tuple(10.0**power for power in range(-8, 5))  # of the ridge, over the mean squared feature


def halves(pair: Tensor) -> tuple[Tensor, Tensor]:
    """pair (N,) integers -> two (N,) masks, together all rows, that share no pair."""
    order = pair.unique(return_inverse=True)[1]
    return order % 2 == 0, order % 2 == 1


def ridge(features: Tensor, target: Tensor) -> Callable[[Tensor, float], Tensor]:
    """Fit target (N,) on features (N, p) -> predict(features (M, p), strength) (M,); the intercept is not shrunk."""
    centre, mean = features.mean(dim=0), target.mean()
    u, s, v = torch.linalg.svd(features - centre, full_matrices=False)
    projected = u.T @ (target - mean)

    def predict(others: Tensor, strength: float) -> Tensor:
        penalty = strength * s.square().sum() / features.shape[1] + torch.finfo(s.dtype).tiny
        return (others - centre) @ (v.T @ (s / (s.square() + penalty) * projected)) + mean

    return predict


def r_squared(prediction: Tensor, target: Tensor) -> float:
    """1 - residual over total sum of squares; 1 is perfect, 0 no better than the mean, below 0 worse."""
    return (1 - (prediction - target).square().sum() / (target - target.mean()).square().sum()).item()


def probe_r_squared(features: Tensor, target: Tensor, pair: Tensor) -> float:
    """R^2 on the second half of the pairs of a ridge fitted on the first, whose own halves choose the strength.

    features (N, p), target (N,), pair (N,); computed in float64.
    """
    features, target = features.double(), target.double()
    first, second = halves(pair)
    fit, choose = halves(pair[first])
    x, y = features[first], target[first]
    trial = ridge(x[fit], y[fit])
    strength = max(STRENGTHS, key=lambda one: r_squared(trial(x[choose], one), y[choose]))
    return r_squared(ridge(x, y)(features[second], strength), target[second])


@torch.no_grad()
def timestep_probe(
    velocity: Velocity, places: Places, pairs: Inputs, times_per_pair: int
) -> dict[str, float | list[float]]:
    """R^2 of t from pooled h_1 .. h_{L+1}, and from the pixels of x_t (`input`), over P pairs; t uniform."""
    x0, cond, eps = pairs.x0, pairs.cond, pairs.draws.normal("probe_eps", *pairs.x0.shape[1:])
    t = pairs.draws.uniform("probe_t", times_per_pair).to(x0.dtype)  # (P, times)
    inputs, pooled = [], []
    for time in t.unbind(dim=1):
        for rows in pairs.batches():
            x_t = flow.interpolate(x0[rows], eps[rows], time[rows])
            with recording(places.consumers) as states:
                velocity(x_t, time[rows], cond[rows])
            inputs.append(x_t.flatten(1).cpu())
            pooled.append([h.mean(dim=1).cpu() for h in states.read])
    target, pair = t.T.flatten().cpu(), torch.arange(len(x0)).repeat(times_per_pair)

    def scored(batches: Sequence[Tensor]) -> float:
        return probe_r_squared(torch.cat(list(batches)), target, pair)

    return {"input": scored(inputs), "states": [scored(batches) for batches in zip(*pooled, strict=True)]}
