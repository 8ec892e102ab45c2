"""How far the routers of a network have moved from the plain residual stream, and how much they depend on t."""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dmd_dar import flow
from dmd_dar.draws import Draws
from dmd_dar.guidance import Velocity
from dmd_dar.routing.history import Observer


@dataclass(frozen=True)
class RouterUsage:
    """One router: mean |n alpha - 1|, the range of n alpha over t, and n alpha at each time, (times, n)."""

    deviation: float
    change_over_t: float
    n_alpha: list[list[float]]


@dataclass(frozen=True)
class RoutingUsage:
    """All routers of a network: means over routers, and each by its number. See `routing_usage`."""

    deviation: float
    change_over_t: float
    by_router: dict[int, RouterUsage]


def deviation(alpha: Tensor) -> Tensor:
    """Scalar mean |n alpha - 1| of alpha (n, B, T): 0 is the residual stream."""
    return (alpha * len(alpha) - 1).abs().mean()


@torch.no_grad()
def routing_usage(
    observed: Callable[[Observer], Velocity], x0: Tensor, cond: Tensor, times: tuple[float, ...], draws: Draws
) -> RoutingUsage:
    """alpha of every router on x0 (B, C, S, S) noised to each of `times`.

    `observed(observe)` is the network's velocity that shows its alpha to `observe`.
    `deviation`: mean |n alpha - 1| over routers, sources, tokens and times; 0 is the residual stream.
    `change_over_t`: mean over routers and sources of the range over `times` of n alpha, averaged over tokens; needs at
    least two times. `by_router`: for router l its deviation, its change, and n alpha at each time, (times, n).
    """
    eps = draws.normal("usage_eps", *x0.shape[1:])
    mixtures: dict[int, list[Tensor]] = defaultdict(list)
    deviations: dict[int, list[float]] = defaultdict(list)

    def observe(router: int, alpha: Tensor) -> None:
        mixtures[router].append(len(alpha) * alpha.mean(dim=(1, 2)))
        deviations[router].append(deviation(alpha).item())

    velocity = observed(observe)
    for time in times:
        t = torch.full((len(x0),), time, dtype=x0.dtype, device=x0.device)
        velocity(flow.interpolate(x0, eps, t), t, cond)
    by_router: dict[int, RouterUsage] = {}
    for router, rows in mixtures.items():
        mixture = torch.stack(rows)  # (times, n)
        change = (mixture.amax(dim=0) - mixture.amin(dim=0)).mean().item()
        moved = sum(deviations[router]) / len(times)
        by_router[router] = RouterUsage(moved, change, mixture.tolist())
    routers = by_router.values()
    return RoutingUsage(
        deviation=sum(router.deviation for router in routers) / len(routers),
        change_over_t=sum(router.change_over_t for router in routers) / len(routers),
        by_router=by_router,
    )
