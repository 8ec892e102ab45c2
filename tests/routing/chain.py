"""A chain of routers with a cheap sublayer between them, for comparing backends."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dmd_dar.routing.history import History
from dmd_dar.routing.layout import RoutingConfig
from dmd_dar.routing.router import RouterBank


@dataclass(frozen=True)
class Chain:
    """v_l = tanh(h_l f_l); parameters random, so that no logit is equal to another."""

    bank: RouterBank
    v_0: Tensor  # (B, T, d)
    t_embedding: Tensor  # (B, d)
    sublayers: Tensor  # (L, d)

    def states(self, backend: str) -> list[Tensor]:
        """h_1 .. h_{L+1}."""
        self.bank.backend = backend
        history = History(self.bank, self.v_0, self.t_embedding)
        states = []
        for f in self.sublayers:
            states.append(history.state())
            history.append(torch.tanh(states[-1] * f))
        return [*states, history.state()]

    def leaves(self) -> dict[str, Tensor]:
        inputs = {"v_0": self.v_0, "t_embedding": self.t_embedding, "sublayers": self.sublayers}
        return dict(self.bank.named_parameters()) | inputs

    def gradients(self, loss: Tensor, **options) -> dict[str, Tensor]:
        """Of every leaf that is in the graph."""
        leaves = {name: leaf for name, leaf in self.leaves().items() if leaf.requires_grad}
        found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, **options)
        return {name: g for name, g in zip(leaves, found, strict=True) if g is not None}


def chain(
    config: RoutingConfig,
    num_sublayers: int,
    width: int,
    *,
    batch: int = 2,
    tokens: int = 3,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    device: str = "cpu",
    calm: float = 1.0,
) -> Chain:
    """`calm` scales queries and sublayers down: a deep chain of large ones is chaotic and multiplies any rounding."""
    rng = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng, dtype=torch.float64)

    bank = RouterBank(config, num_sublayers, width).to(device, dtype)
    with torch.no_grad():
        for name, parameter in bank.named_parameters():
            size = {"gain": 1, "w_q": calm * width**-0.5}.get(name, calm)
            parameter.copy_(draw(*parameter.shape) * size + (name == "gain"))
    inputs = draw(batch, tokens, width), draw(batch, width), calm * draw(num_sublayers, width)
    return Chain(bank, *(x.to(device, dtype).requires_grad_() for x in inputs))


def assert_the_stream_is_kept(one: Chain) -> None:
    """With zero queries, h_l is the plain sum of all outputs before it, bit for bit."""
    one.bank.reset()
    history, stream = History(one.bank, one.v_0, one.t_embedding), one.v_0
    for f in one.sublayers:
        v = torch.sin(3 * stream * f)
        stream = stream + v
        history.append(v)
        assert torch.equal(history.state(), stream)


def loss_of(states: list[Tensor]) -> Tensor:
    """Weighs every state differently, so that no gradient can stand for another."""
    return sum((k + 1) * (h.double() * h.double().cos()).mean() for k, h in enumerate(states))  # type: ignore[return-value]


def routing(query="timestep", scale="stream", summary="sum", chunk_size=4, final="dedicated") -> RoutingConfig:
    return RoutingConfig(query=query, scale=scale, summary=summary, chunk_size=chunk_size, final=final)


def worst(found: dict, expected: dict) -> float:
    """Largest error of any leaf over that leaf's largest entry."""
    assert found.keys() == expected.keys()
    return max(((found[n] - g).abs().max() / g.abs().max().clamp(min=1e-30)).item() for n, g in expected.items())
