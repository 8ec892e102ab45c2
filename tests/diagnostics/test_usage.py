from functools import partial

import pytest
import torch

from dmd_dar.diagnostics.usage import routing_usage
from dmd_dar.draws import Draws, sample_range
from dmd_dar.models.sit import with_routing
from dmd_dar.routing.layout import RoutingConfig
from tests.tiny import tiny_sit

TIMES = (1.0, 0.5, 0.1)


def usage_of(network, count: int = 3):
    draws = Draws(0, "usage", 0, sample_range(0, count))
    x0 = draws.normal("x", 3, 32, 32)
    return routing_usage(lambda see: partial(network, observe=see), x0, draws.samples % 7, TIMES, draws)


@pytest.mark.parametrize("query", ["static", "timestep", "dynamic"])
def test_routers_at_their_start_have_not_moved(query):
    usage = usage_of(with_routing(tiny_sit(), RoutingConfig(query=query, chunk_size=1)))
    assert usage.deviation == pytest.approx(0, abs=1e-6) and usage.change_over_t == pytest.approx(0, abs=1e-6)
    assert sorted(usage.by_router) == [2, 3, 4, 5]


def test_a_moved_router_is_counted_by_its_own_weights():
    network = with_routing(tiny_sit(), RoutingConfig(query="static", chunk_size=1))
    torch.nn.init.normal_(network.dar.query[1], std=5.0)  # router 3: sources v_0, v_1, v_2
    usage = usage_of(network)
    mixture = torch.tensor(usage.by_router[3].n_alpha)
    assert mixture.shape == (3, 3)
    torch.testing.assert_close(mixture.sum(dim=1), torch.full((3,), 3.0))
    spread = (mixture.amax(0) - mixture.amin(0)).mean().item()
    assert usage.by_router[3].change_over_t == pytest.approx(spread)
    others = [row.deviation for router, row in usage.by_router.items() if router != 3]
    assert usage.by_router[3].deviation > 0.1 and max(others) < 1e-6
    assert usage.deviation == pytest.approx(usage.by_router[3].deviation / 4, rel=1e-4)


def test_a_gate_on_t_makes_the_mixture_depend_on_t():
    network = with_routing(tiny_sit(), RoutingConfig(query="timestep", chunk_size=1))
    with torch.no_grad():
        network.t_embedder.mlp[2].weight.mul_(40)
        network.dar.gate.fill_(30.0)
    assert usage_of(network).change_over_t > 1e-3
