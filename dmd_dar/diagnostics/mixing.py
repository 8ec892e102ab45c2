"""What reaches a sublayer from which earlier output: alpha of a DAR network, gate gradients of a residual one.

Sources are named by the sublayers they stand for: v_0 is the embedded input, v_i the output of sublayer i.
"""

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from dmd_dar.diagnostics.states import Traced
from dmd_dar.diagnostics.usage import deviation
from dmd_dar.errors import UserError
from dmd_dar.routing.layout import Read, RoutingConfig, Summary, chunk_length, reads

Span = tuple[int, int]  # first and last sublayer that a source stands for; (0, 0) is v_0


def spans_of(read: Read, size: int, summary: Summary) -> list[Span]:
    """Of one router's sources in order. A `last` summary is its chunk's last output; a `sum` stands for all of them."""
    ends = [chunk * size for chunk in range(1, read.chunks)]
    chunks = [(end, end) if summary == "last" else (end - size + 1, end) for end in ends]
    return [(0, 0), *chunks, *((i, i) for i in range(read.first, read.last + 1))]


def source_spans(config: RoutingConfig, num_sublayers: int) -> dict[int, list[Span]]:
    """Router l -> its sources' spans; without routers, `residual`, every h_l from l = 2 on reads v_0 .. v_{l-1}."""
    if config.query == "residual":
        return {router: [(i, i) for i in range(router)] for router in range(2, num_sublayers + 2)}
    size = chunk_length(num_sublayers, config.chunk_size)
    return {router: spans_of(read, size, config.summary) for router, read in reads(num_sublayers, size).items()}


def effective_sources(weights: Tensor) -> Tensor:
    """exp(entropy) of weights (n, ...) that sum to 1 over the sources -> (...): n if uniform, 1 if one-hot."""
    return torch.special.entr(weights).sum(dim=0).exp()


def distance_back(weights: Tensor, spans: Sequence[Span], router: int) -> Tensor:
    """sum_i weights_i (l - i), (n, ...) -> (...); a source that spans several sublayers counts as their mean index."""
    index = torch.tensor([(first + last) / 2 for first, last in spans], dtype=weights.dtype, device=weights.device)
    return router - (weights * index.reshape(-1, *[1] * (weights.dim() - 1))).sum(dim=0)


def weight_facts(weights: Tensor, spans: Sequence[Span], router: int) -> dict[str, Tensor]:
    """Of weights (n, B, T): their mean (n,), and means over samples and tokens of what summarises them."""
    return {
        "weights": weights.mean(dim=(1, 2)),
        "effective_sources": effective_sources(weights).mean(),
        "share_v0": weights[0].mean(),
        "distance_back": distance_back(weights, spans, router).mean(),
    }


class AlphaSums:
    """Collects alpha of all routers over the batches of one t: `observe` is the network's callback."""

    def __init__(self, spans: dict[int, list[Span]]):
        self.spans, self.samples = spans, defaultdict(int)
        self.sums: dict[int, dict[str, Tensor]] = defaultdict(dict)

    def observe(self, router: int, alpha: Tensor) -> None:
        alpha = alpha.detach().double()  # (n, B, T)
        facts = weight_facts(alpha, self.spans[router], router) | {"deviation": deviation(alpha)}
        size = alpha.shape[1]
        for name, value in facts.items():
            self.sums[router][name] = self.sums[router].get(name, 0) + size * value
        self.samples[router] += size

    def facts(self) -> dict[int, dict[str, float | list[float]]]:
        """Router -> weights (mean alpha), effective_sources, share_v0, distance_back, deviation."""
        return {
            router: {name: (total / self.samples[router]).tolist() for name, total in sums.items()}
            for router, sums in sorted(self.sums.items())
        }


def gate_gradients(states: Sequence[Tensor], sublayer_gradients: Sequence[Tensor]) -> Tensor:
    """(B, L + 1, L + 1): at [b, l-1, i], d loss_b / d g of a gate g = 1 on source v_i in h_l = sum_i g_{i->l} v_i.

    For a residual network, whose states h_1 .. h_{L+1} differ by the outputs, v_i = h_{i+1} - h_i. The gate's gradient
    is the inner product of v_i with the loss's gradient in h_l that passes through sublayer l. Only i < l exist.
    """
    h = torch.stack(list(states), dim=1).double().flatten(2)  # (B, L + 1, T d)
    sources = torch.cat([h[:, :1], h.diff(dim=1)], dim=1)
    gradients = torch.stack(list(sublayer_gradients), dim=1).double().flatten(2)
    return (gradients @ sources.mT).tril()


class GateSums:
    """Collects the gate gradients of a residual network over the batches of one t."""

    def __init__(self, spans: dict[int, list[Span]]):
        self.spans, self.batches = spans, []

    def add(self, traced: Traced) -> None:
        self.batches.append(gate_gradients(traced.states, traced.sublayer_gradients))

    def facts(self) -> dict[int, dict[str, float | list[float]]]:
        """Router -> gate_gradient, its mean over samples; its standard_error; weights, the share of each |mean| in
        their sum; effective_sources, share_v0 and distance_back of these weights. Raises UserError where all are 0.
        """
        gates = torch.cat(self.batches)  # (N, L + 1, L + 1)
        mean, error = gates.mean(dim=0), gates.std(dim=0) / len(gates) ** 0.5
        by_router = {}
        for router, spans in self.spans.items():
            row = mean[router - 1, :router]
            if not row.any():
                raise UserError(f"no gate of h_{router} has a gradient: train the network first, it is at its start")
            shares = (row.abs() / row.abs().sum())[:, None, None]
            facts = {"gate_gradient": row, "standard_error": error[router - 1, :router]}
            facts |= weight_facts(shares, spans, router)
            by_router[router] = {name: value.tolist() for name, value in facts.items()}
        return by_router
