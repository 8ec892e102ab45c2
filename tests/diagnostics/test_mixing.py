import math
from functools import partial

import pytest
import torch

from dmd_dar import flow
from dmd_dar.diagnostics.mixing import (
    AlphaSums,
    GateSums,
    distance_back,
    effective_sources,
    gate_gradients,
    source_spans,
)
from dmd_dar.diagnostics.states import places_of, trace
from dmd_dar.diagnostics.usage import routing_usage
from dmd_dar.draws import Draws, sample_range
from dmd_dar.errors import UserError
from dmd_dar.models.denoiser import velocity_of
from dmd_dar.models.sit import SiT, with_routing
from dmd_dar.routing.layout import RoutingConfig
from tests.tiny import TINY, tiny_sit

LABELS = torch.tensor([0, 3, 6])
L = 2 * TINY.depth
DENSE = source_spans(RoutingConfig(), L)


def pair():
    draws = Draws(0, "diagnostics", 0, sample_range(0, 3))
    return draws.normal("x0", 3, 32, 32, dtype=torch.float64), draws.normal("eps", 3, 32, 32, dtype=torch.float64)


def gated_losses(network: SiT, gates: torch.Tensor) -> torch.Tensor:
    """(B,) losses with h_l = sum_i gates[l - 1, i] v_i written out, the network's residual additions unused."""
    x0, eps = pair()
    t = torch.full((3,), 0.3, dtype=torch.float64)
    c = network.t_embedder(t) + network.y_embedder(LABELS)
    sources = [network.x_embedder(flow.interpolate(x0, eps, t)) + network.pos_embed]

    def state() -> torch.Tensor:
        row = gates[len(sources) - 1]
        return sum(row[i] * v for i, v in enumerate(sources))

    for block in network.blocks:
        m = block.modulation(c)
        sources.append(block.attention_output(state(), *m[:3]))
        sources.append(block.mlp_output(state(), *m[3:]))
    velocity = network._unpatchify(network.final_layer(state(), c))
    return (velocity - (eps - x0)).square().flatten(1).mean(dim=1)


def measured_gates(network: SiT) -> torch.Tensor:
    x0, eps = pair()
    traced = trace(velocity_of(network), places_of(network), x0, eps, 0.3, LABELS)
    return gate_gradients(traced.states, traced.sublayer_gradients)


def test_gate_gradients_equal_autograd_through_real_gates():
    network = tiny_sit().double()
    gates = torch.ones(L + 1, L + 1, dtype=torch.float64, requires_grad=True)
    rows = [torch.autograd.grad(loss, gates, retain_graph=True)[0] for loss in gated_losses(network, gates)]
    torch.testing.assert_close(measured_gates(network), torch.stack(rows), rtol=1e-8, atol=1e-14)


def test_gate_gradients_equal_finite_differences():
    network = tiny_sit().double()
    measured, step = measured_gates(network), 1e-5
    for router, source in [(2, 0), (2, 1), (3, 1), (4, 0), (L + 1, 0), (L + 1, 2), (L + 1, L)]:
        offset = torch.zeros(L + 1, L + 1, dtype=torch.float64)
        offset[router - 1, source] = step
        slope = (gated_losses(network, 1 + offset) - gated_losses(network, 1 - offset)) / (2 * step)
        torch.testing.assert_close(measured[:, router - 1, source], slope.detach(), rtol=1e-5, atol=1e-10)


def test_gates_before_a_norm_cancel_because_it_ignores_scale():
    measured = measured_gates(tiny_sit().double())
    assert measured.sum(dim=2).abs().max() < 1e-4 * measured.abs().max()  # the norm's eps leaves a rest
    assert measured[:, 1:].abs().max() > 1e-4


def test_gate_facts_are_means_and_standard_errors_over_samples():
    network, (x0, eps) = tiny_sit().double(), pair()
    sums = GateSums(DENSE)
    for rows in torch.arange(3).split(2):
        sums.add(trace(velocity_of(network), places_of(network), x0[rows], eps[rows], 0.3, LABELS[rows]))
    facts, rows = sums.facts(), measured_gates(network)[:, 3, :4]  # router 4 reads v_0 .. v_3
    torch.testing.assert_close(torch.tensor(facts[4]["gate_gradient"], dtype=torch.float64), rows.mean(0))
    spread = (rows - rows.mean(0)).square().sum(0) / 2
    torch.testing.assert_close(torch.tensor(facts[4]["standard_error"], dtype=torch.float64), (spread / 3).sqrt())
    shares = rows.mean(0).abs() / rows.mean(0).abs().sum()
    torch.testing.assert_close(torch.tensor(facts[4]["weights"], dtype=torch.float64), shares)
    assert facts[4]["share_v0"] == pytest.approx(shares[0].item())
    assert facts[4]["effective_sources"] == pytest.approx(math.exp(-(shares * shares.log()).sum().item()))
    assert facts[4]["distance_back"] == pytest.approx((shares * torch.tensor([4, 3, 2, 1])).sum().item())
    assert sorted(facts) == list(range(2, L + 2))


def test_a_network_at_its_start_has_no_gate_gradients_and_says_so():
    network, (x0, eps) = SiT(TINY).double(), pair()
    sums = GateSums(DENSE)
    sums.add(trace(velocity_of(network), places_of(network), x0, eps, 0.3, LABELS))
    with pytest.raises(UserError, match="h_2.*train the network first"):
        sums.facts()


@pytest.mark.parametrize("n", [1, 2, 7])
def test_effective_sources_of_uniform_and_one_hot_weights(n):
    assert effective_sources(torch.full((n, 2, 3), 1 / n)).sub(n).abs().max() < 1e-5
    assert torch.equal(effective_sources(torch.eye(n)), torch.ones(n))


def test_two_equal_sources_among_four_count_as_two():
    assert effective_sources(torch.tensor([0.5, 0.0, 0.5, 0.0])).item() == pytest.approx(2)


def test_distance_counts_sublayers_back():
    uniform = torch.full((5,), 0.2)
    assert distance_back(uniform, [(i, i) for i in range(5)], 5).item() == pytest.approx(3)  # (5 + 4 + 3 + 2 + 1) / 5
    newest = torch.tensor([0.0, 0.0, 1.0])
    assert distance_back(newest, [(0, 0), (1, 4), (5, 5)], 6).item() == pytest.approx(1)
    summary = torch.tensor([0.0, 1.0, 0.0])
    assert distance_back(summary, [(0, 0), (1, 4), (5, 5)], 6).item() == pytest.approx(3.5)  # mean of 5, 4, 3, 2
    assert distance_back(summary, [(0, 0), (4, 4), (5, 5)], 6).item() == pytest.approx(2)


def test_spans_of_chunks():
    last = source_spans(RoutingConfig(query="static", chunk_size=2, summary="last"), 6)
    total = source_spans(RoutingConfig(query="static", chunk_size=2, summary="sum"), 6)
    assert last[4] == [(0, 0), (2, 2), (3, 3)] and total[4] == [(0, 0), (1, 2), (3, 3)]
    assert total[5] == [(0, 0), (1, 2), (3, 4)]
    assert total[7] == [(0, 0), (1, 2), (3, 4), (5, 5), (6, 6)]  # the head's: the last chunk in full
    assert source_spans(RoutingConfig(), 2) == {2: [(0, 0), (1, 1)], 3: [(0, 0), (1, 1), (2, 2)]}


@pytest.mark.parametrize("summary", ["last", "sum"])
@pytest.mark.parametrize("chunk_size", [1, 2, 3, 4])
def test_every_weight_has_its_span(chunk_size, summary):
    config = RoutingConfig(query="timestep", chunk_size=chunk_size, summary=summary)
    network, (x0, _) = with_routing(tiny_sit(), config), pair()
    seen = {}
    network(x0.float(), torch.full((3,), 0.5), LABELS, observe=lambda router, alpha: seen.update({router: len(alpha)}))
    assert seen == {router: len(spans) for router, spans in source_spans(config, L).items()}


def alpha_facts(network: SiT, split: int) -> dict:
    x0, _ = pair()
    sums = AlphaSums(source_spans(network.config.routing, L))
    for rows in torch.arange(3).split(split):
        network(x0[rows].float(), torch.full((len(rows),), 0.5), LABELS[rows], observe=sums.observe)
    return sums.facts()


def test_routers_at_their_start_use_all_sources_alike():
    facts = alpha_facts(with_routing(tiny_sit(), RoutingConfig(query="static", chunk_size=2)), 3)
    for router, n in {2: 2, 3: 2, 4: 3, 5: 4}.items():
        assert facts[router]["effective_sources"] == pytest.approx(n, rel=1e-6)
        assert facts[router]["weights"] == pytest.approx([1 / n] * n)
        assert facts[router]["deviation"] == pytest.approx(0, abs=1e-6)
    assert facts[4]["distance_back"] == pytest.approx((4 + 2.5 + 1) / 3)


def test_alpha_facts_do_not_depend_on_the_batch_split_and_deviate_as_usage_says():
    network = with_routing(tiny_sit(), RoutingConfig(query="dynamic", chunk_size=2))
    torch.nn.init.normal_(network.dar.w_q, std=20.0)
    whole, split = alpha_facts(network, 3), alpha_facts(network, 2)
    for router, facts in whole.items():
        assert all(facts[name] == pytest.approx(split[router][name], rel=1e-5) for name in facts)
        assert facts["share_v0"] == facts["weights"][0] and sum(facts["weights"]) == pytest.approx(1)
        assert 1 < facts["effective_sources"] < len(facts["weights"])
    x0, _ = pair()
    draws = Draws(0, "diagnostics", 0, sample_range(0, 3))
    usage = routing_usage(lambda see: partial(network, observe=see), x0.float(), LABELS, (0.0,), draws)  # x_t = x0
    sums = AlphaSums(source_spans(network.config.routing, L))
    network(x0.float(), torch.zeros(3), LABELS, observe=sums.observe)
    for router, facts in sums.facts().items():
        assert facts["deviation"] == pytest.approx(usage.by_router[router].deviation, rel=1e-5)
        assert facts["deviation"] > 0.05
