"""Routers frozen over t: exact where there is one t, the mean query where there are several."""

import pytest
import torch

from dmd_dar.models.sit import with_routing
from dmd_dar.routing.layout import RoutingConfig
from eval.study.controls import frozen_at_mean, unfreezable
from tests.tiny import tiny_sit


@pytest.fixture(scope="module")
def student():
    network = with_routing(tiny_sit(), RoutingConfig(query="timestep", chunk_size=2)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        network.dar.query.normal_(generator=generator)
        network.dar.gate.normal_(std=40.0, generator=generator)
    return network


def output(network, time: float) -> torch.Tensor:
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return network(x, torch.full((2,), time), torch.tensor([0, 3]))


def test_frozen_at_one_time_is_the_network_at_that_time_and_not_at_another(student):
    frozen = frozen_at_mean(student, (0.5,))
    assert frozen.config.routing.query == "static"
    torch.testing.assert_close(output(frozen, 0.5), output(student, 0.5), rtol=1e-4, atol=1e-5)
    assert (output(frozen, 1.0) - output(student, 1.0)).abs().max() > 1e-3


def test_the_mean_query_lies_between_those_of_the_times(student):
    early, late, both = (frozen_at_mean(student, times).dar.query for times in ((1.0,), (0.2,), (1.0, 0.2)))
    torch.testing.assert_close(both, (early + late) / 2)
    assert (early - late).abs().max() > 1e-2


def test_the_student_itself_is_untouched(student):
    before = {name: value.clone() for name, value in student.state_dict().items()}
    frozen_at_mean(student, (1.0, 0.5))
    assert all(torch.equal(before[name], value) for name, value in student.state_dict().items())


@pytest.mark.parametrize("query", ["residual", "static", "dynamic"])
def test_only_timestep_routers_are_frozen(query):
    assert not unfreezable(with_routing(tiny_sit(), RoutingConfig(query="timestep", chunk_size=2)))
    assert "SiT students only, and these are Linear" in unfreezable(torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match=f"{query}.*query=static"):
        frozen_at_mean(with_routing(tiny_sit(), RoutingConfig(query=query, chunk_size=2)), (1.0,))
