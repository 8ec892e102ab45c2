"""Routing against the equations: by hand, by an independent loop, and by what must be exactly so."""

import math

import pytest
import torch

from dmd_dar.routing.history import History
from dmd_dar.routing.layout import RoutingConfig
from dmd_dar.routing.ops import naive
from dmd_dar.routing.router import RouterBank

FORMS = ["convex", "count", "stream"]
QUERIES = ["static", "timestep", "dynamic"]


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def states(bank: RouterBank, v: list[torch.Tensor], e: torch.Tensor, observe=None) -> dict[int, torch.Tensor]:
    """h_2 .. h_{L+1} that the bank gives for the outputs v_0 .. v_L."""
    history, h = History(bank, v[0], e, observe), {}
    assert torch.equal(history.state(), v[0])
    for l, output in enumerate(v[1:], start=2):  # noqa: E741
        history.append(output)
        h[l] = history.state()
    return h


def random_bank(config: RoutingConfig, num_sublayers: int = 6, width: int = 8) -> RouterBank:
    bank = RouterBank(config, num_sublayers, width).double()
    with torch.no_grad():
        for i, parameter in enumerate(bank.parameters()):
            parameter.add_(0.7 * randn(*parameter.shape, seed=100 + i))
    return bank


V = torch.tensor(  # v_0 .. v_6; with the query below q.k/sqrt(d) is ln 3 for v_0 and 0 for all others and their sums
    [[1, 1, 1, 1], [1, 2, -2, 0], [0, 1, -1, 3], [2, 0, 0, -1], [-1, 1, -1, 2], [4, -1, 1, 0], [0, -2, 2, 2]],
    dtype=torch.float64,
)
BY_HAND = [  # chunk size, summary, form, router -> weights of v_0 .. v_6 in its state
    (1, "last", "convex", 2, [3 / 4, 1 / 4]),
    (1, "last", "convex", 4, [3 / 6, 1 / 6, 1 / 6, 1 / 6]),
    (1, "last", "convex", 7, [3 / 9] + [1 / 9] * 6),
    (1, "sum", "count", 7, [21 / 9] + [7 / 9] * 6),
    (1, "last", "stream", 7, [21 / 9] + [7 / 9] * 6),
    (6, "sum", "convex", 6, [3 / 8] + [1 / 8] * 5),
    (4, "last", "convex", 4, [3 / 6, 1 / 6, 1 / 6, 1 / 6]),
    (4, "last", "convex", 5, [3 / 4, 0, 0, 0, 1 / 4]),
    (4, "sum", "convex", 5, [3 / 4, 1 / 4, 1 / 4, 1 / 4, 1 / 4]),
    (4, "last", "convex", 6, [3 / 5, 0, 0, 0, 1 / 5, 1 / 5]),
    (4, "last", "convex", 7, [3 / 6, 0, 0, 0, 1 / 6, 1 / 6, 1 / 6]),
    (4, "sum", "convex", 7, [3 / 6] + [1 / 6] * 6),
    (4, "last", "count", 7, [2, 0, 0, 0, 2 / 3, 2 / 3, 2 / 3]),
    (4, "sum", "count", 7, [2] + [2 / 3] * 6),
    (4, "last", "stream", 7, [2, 1, 1, 1, 2 / 3, 2 / 3, 2 / 3]),
    (4, "sum", "stream", 7, [2] + [2 / 3] * 6),
]


@pytest.mark.parametrize(("chunk_size", "summary", "scale", "router", "expected"), BY_HAND)
def test_states_by_hand(chunk_size, summary, scale, router, expected):
    bank = RouterBank(RoutingConfig("static", chunk_size, summary, scale), num_sublayers=6, width=4).double()
    bank.query.data[:] = math.log(3) * torch.tensor([0, 1 / 2, 2, 0])
    bank.gain.data[:] = torch.tensor([1, 2, 1 / 2, 1])
    h = states(bank, [v.expand(2, 3, 4) for v in V], torch.zeros(2, 4))[router]
    assert torch.allclose(h, torch.tensor(expected).double() @ V[: len(expected)], rtol=0, atol=1e-5)


def equations(bank: RouterBank, v: list[torch.Tensor], e: torch.Tensor) -> dict[int, torch.Tensor]:
    """arXiv:2605.20708 Eq. 5-7, token by token."""
    form, L, S, d = bank.config, len(v) - 1, bank.config.chunk_size, v[0].shape[-1]
    h = {}
    for l in range(2, L + 2):  # noqa: E741
        n = math.ceil(min(l, L) / S)
        c = [v[0]]
        for m in range(1, n):
            c.append(v[m * S] if form.summary == "last" else sum(v[(m - 1) * S + 1 : m * S + 1]))
        sources = c + v[(n - 1) * S + 1 : l]
        r = (L if l == L + 1 and form.final == "reuse_last" else l) - 2
        h[l] = torch.empty_like(v[0])
        for b in range(v[0].shape[0]):
            for token in range(v[0].shape[1]):
                if form.query == "dynamic":
                    q = bank.w_q[r] @ v[l - 1][b, token]
                else:
                    q = bank.query[r] + (bank.gate[r] * e[b] if form.query == "timestep" else 0)
                vs = [source[b, token] for source in sources]
                k = [bank.gain[r] * x / (x.square().mean() + 1e-6).sqrt() for x in vs]
                alpha = torch.stack([q @ key / math.sqrt(d) for key in k]).softmax(0)
                if form.scale == "stream":
                    total = sum(x[b, token] for x in v[:l])
                    mixed = total + sum((len(vs) * a - 1) * x for a, x in zip(alpha, vs, strict=True))
                else:
                    mixed = sum(a * x for a, x in zip(alpha, vs, strict=True))
                h[l][b, token] = mixed * (len(vs) if form.scale == "count" else 1)
    return h


@pytest.mark.parametrize("query", QUERIES)
@pytest.mark.parametrize("scale", FORMS)
@pytest.mark.parametrize("summary", ["last", "sum"])
@pytest.mark.parametrize(
    ("chunk_size", "final"), [(1, "dedicated"), (4, "dedicated"), (4, "reuse_last"), (6, "dedicated"), (3, "dedicated")]
)
@torch.no_grad()
def test_the_bank_and_its_history_compute_the_equations(query, scale, summary, chunk_size, final):
    bank = random_bank(RoutingConfig(query, chunk_size, summary, scale, final))
    v, e = list(randn(7, 2, 2, 8)), randn(2, 8, seed=1)
    ours, theirs = states(bank, v, e), equations(bank, v, e)
    assert ours.keys() == theirs.keys()
    for router in theirs:
        assert torch.allclose(ours[router], theirs[router], rtol=1e-11, atol=1e-11), router


@pytest.mark.parametrize(("chunk_size", "summary"), [(1, "last"), (6, "last"), (4, "sum")])
@torch.no_grad()
def test_stream_equals_count_for_every_query_where_no_source_was_dropped(chunk_size, summary):
    v, e = list(randn(7, 2, 3, 8)), randn(2, 8, seed=1)
    forms = {scale: states(random_bank(RoutingConfig("timestep", chunk_size, summary, scale)), v, e) for scale in FORMS}
    for router, h in forms["count"].items():
        n = random_bank(RoutingConfig("timestep", chunk_size, summary)).layout[router].count
        assert torch.allclose(forms["stream"][router], h, rtol=1e-12, atol=1e-12)
        assert torch.allclose(n * forms["convex"][router], h, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("n", [2, 3, 7, 18, 41, 49, 57])
def test_stream_is_the_stream_bit_for_bit_at_a_zero_query(dtype, n):
    v = (randn(n, 2, 3, 8) * 10.0 ** torch.arange(-3, 3).repeat(10)[:n, None, None, None]).to(dtype)
    stream = randn(2, 3, 8, seed=1).to(dtype)
    h = naive.route(list(v), torch.zeros(8, dtype=dtype), torch.ones(8), scale="stream", stream=stream)
    assert h.dtype == dtype and torch.equal(h, stream)


def test_stream_adds_n_alpha_minus_one_times_each_source():
    v, stream, query, gain = list(randn(4, 2, 3, 8)), randn(2, 3, 8, seed=1), randn(2, 3, 8, seed=2), randn(8, seed=3)
    alpha = naive.weights(v, query, gain)
    assert torch.allclose(alpha.sum(0), torch.ones(2, 3).double()) and alpha.min() > 0
    added = sum((4 * a - 1)[..., None] * x for a, x in zip(alpha, v, strict=True))
    assert torch.allclose(naive.route(v, query, gain, scale="stream", stream=stream) - stream, added, atol=1e-13)
    with pytest.raises(ValueError, match="needs the residual stream"):
        naive.route(v, query, gain, scale="stream")


@pytest.mark.parametrize("scale", FORMS)
def test_bfloat16_is_routed_in_float32_and_cast_once(scale):
    v, stream = randn(5, 2, 3, 8).bfloat16(), randn(2, 3, 8, seed=1).bfloat16()
    query, gain = randn(8, seed=2).float(), randn(8, seed=3).float()
    h = naive.route(list(v), query, gain, scale=scale, stream=stream)
    above = naive.route(list(v.float()), query, gain, scale=scale, stream=stream.float())
    assert h.dtype == torch.bfloat16 and torch.equal(h, above.bfloat16())


def test_large_logits_do_not_overflow():
    v = [torch.full((1, 1, 8), x) for x in (1.0, -1.0, 2.0)]
    query = torch.full((8,), 1e4)
    for scale, expected in (("convex", 1.5), ("count", 4.5), ("stream", 10 + 0.5 + 1 + 1)):
        h = naive.route(v, query, torch.ones(8), scale=scale, stream=torch.full((1, 1, 8), 10.0))
        assert torch.allclose(h, torch.full((1, 1, 8), expected), atol=1e-2), scale


def test_order_and_scale_of_sources():
    v, query, gain = list(randn(4, 2, 3, 8)), randn(8, seed=2), randn(8, seed=3)
    alpha = naive.weights(v, query, gain)
    assert torch.allclose(naive.weights(v[::-1], query, gain), alpha.flip(0))
    for scale in ("convex", "count"):
        ahead, back = (naive.route(x, query, gain, scale=scale) for x in (v, v[::-1]))
        assert torch.allclose(ahead, back, atol=1e-14)
    louder = naive.weights([1000 * v[0], *v[1:]], query, gain)
    assert torch.allclose(louder, alpha, rtol=1e-4)  # the keys' RMSNorm takes the scale out, up to its eps
    assert torch.allclose(naive.weights(v, query / 2, 2 * gain), alpha)
    odds = alpha[0] / alpha[1]
    negated = naive.weights([-x for x in v], query, gain)
    assert torch.allclose(negated[0] / negated[1], 1 / odds)


@pytest.mark.parametrize("scale", FORMS)
def test_a_zero_source_has_a_finite_gradient(scale):
    v = [x.requires_grad_() for x in (torch.zeros(2, 3, 8), torch.zeros(2, 3, 8), torch.ones(2, 3, 8))]
    query = torch.ones(8, requires_grad=True)
    naive.route(v, query, torch.ones(8), scale=scale, stream=torch.zeros(2, 3, 8)).square().sum().backward()
    for x in (*v, query):
        assert torch.isfinite(x.grad).all()
    assert v[0].grad.abs().max() > 0


@pytest.mark.parametrize("scale", FORMS)
@pytest.mark.parametrize("query_shape", [(4,), (2, 1, 4), (2, 2, 4)])
def test_gradients_of_the_route(scale, query_shape):
    inputs = [randn(2, 2, 4, seed=i) for i in range(4)] + [randn(*query_shape, seed=5), randn(4, seed=6)]

    def route(stream, *rest):
        *v, query, gain = rest
        return naive.route(v, query, gain, scale=scale, stream=stream)

    assert torch.autograd.gradcheck(route, [x.requires_grad_() for x in inputs])


@pytest.mark.parametrize("query", QUERIES)
@pytest.mark.parametrize("final", ["dedicated", "reuse_last"])
def test_every_query_learns_from_the_start_and_the_gain_once_a_query_is_not_zero(query, final):
    bank = RouterBank(RoutingConfig(query, 4, final=final), num_sublayers=6, width=8).double()
    assert all(len(p) == (6 if final == "dedicated" else 5) for p in bank.parameters())
    v, e = list(randn(7, 2, 3, 8)), randn(2, 8, seed=1)

    def gradients():
        bank.zero_grad()
        torch.stack(list(states(bank, v, e).values())).pow(3).sum().backward()
        return {name: p.grad.flatten(1).abs().amax(1) for name, p in bank.named_parameters()}

    first = gradients()
    assert first.pop("gain").eq(0).all()
    assert all(gradient.gt(0).all() for gradient in first.values())
    with torch.no_grad():
        for name, p in bank.named_parameters():
            if name != "gain":
                p += 0.1
    assert gradients()["gain"].gt(0).all()
    bank.reset()
    assert all(torch.equal(p, torch.full_like(p, name == "gain")) for name, p in bank.named_parameters())


@torch.no_grad()
def test_the_observer_sees_each_router_s_weights_and_changes_nothing():
    bank, seen = random_bank(RoutingConfig("dynamic", 4, "sum", "convex")), {}
    v, e = list(randn(7, 2, 3, 8)), randn(2, 8, seed=1)
    watched = states(bank, v, e, observe=seen.__setitem__)
    plain = states(bank, v, e)
    assert list(seen) == [2, 3, 4, 5, 6, 7] and all(torch.equal(watched[r], plain[r]) for r in plain)
    chunk = v[1] + v[2] + v[3] + v[4]
    mixed = sum(a[..., None] * x for a, x in zip(seen[7], [v[0], chunk, v[5], v[6]], strict=True))
    assert torch.allclose(mixed, plain[7])


def test_a_residual_network_has_no_bank():
    with pytest.raises(ValueError, match="no routers"):
        RouterBank(RoutingConfig(), 6, 8)
