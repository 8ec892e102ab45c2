"""Calls side by side: their order, threads, gradients and errors; the same images as one call after the other."""

import threading
import time
from functools import partial

import pytest
import torch

from dmd_dar.methods.generate import few_step_generator
from dmd_dar.models.denoiser import velocity_of
from dmd_dar.models.sit import with_routing
from dmd_dar.routing.layout import RoutingConfig
from eval.samples.parallel import side_by_side, torch_threads
from eval.samples.sampling import Bench
from eval.study.controls import with_routers_reset
from tests.tiny import tiny_sit


def test_results_come_in_order_from_several_threads():
    seen = []

    def call(number: int) -> int:
        seen.append((threading.get_ident(), torch.get_num_threads(), torch.is_grad_enabled()))
        time.sleep(0.02 * (3 - number % 4))
        return number

    before = torch.get_num_threads()
    with torch.no_grad():
        assert list(side_by_side([partial(call, i) for i in range(8)], 3, 1)) == list(range(8))
    assert torch.get_num_threads() == before
    assert 1 < len({ident for ident, _, _ in seen} - {threading.get_ident()}) <= 3
    assert all(threads == 1 and not grad for _, threads, grad in seen)
    assert list(side_by_side([torch.is_grad_enabled] * 2, 2, 1)) == [True, True]


def test_one_worker_or_one_call_needs_no_thread():
    for calls, workers in (([threading.get_ident] * 3, 1), ([threading.get_ident], 4)):
        assert set(side_by_side(calls, workers, 1)) == {threading.get_ident()}


def test_an_error_comes_in_its_turn_and_later_calls_do_not_begin():
    begun = []

    def call(number: int) -> int:
        begun.append(number)
        time.sleep(0.02)
        if number == 1:
            raise ValueError("number 1")
        return number

    results, before = side_by_side([partial(call, i) for i in range(40)], 2, 1), torch.get_num_threads()
    assert next(results) == 0
    with pytest.raises(ValueError, match="number 1"):
        next(results)
    assert len(begun) < 10 and torch.get_num_threads() == before


def bench(network, **changes) -> Bench:
    shape = network.config
    side = shape.in_channels, shape.input_size, shape.input_size
    common = {"cache": None, "num_classes": shape.num_classes, "shape": side, "device": torch.device("cpu")}
    return Bench(**{"count": 70, "seed": 3, "batch_size": 32, **common, **changes})


@pytest.fixture
def network():
    return with_routing(tiny_sit(), RoutingConfig("timestep", 2)).eval()


def test_batches_side_by_side_make_the_same_images(network):
    generator = few_step_generator(velocity_of(network), (1.0, 0.5))
    made = []
    for shareable, threads in ((False, 1), (True, 2)):
        with torch_threads(threads):
            one = bench(network, shareable=shareable)
            assert one.workers() == threads
            made.append(one.images(generator))
    a, b = made
    assert torch.equal(a.labels, b.labels) and len(a.images) == 70
    assert (a.images.int() - b.images.int()).abs().max() <= 1  # a batch's size may move a rounding
    assert torch.equal(a.images, b.images) or (a.images != b.images).float().mean() < 1e-3


def test_only_networks_that_keep_nothing_are_shared(network):
    with torch_threads(4):
        assert bench(network).workers() == 1
        assert bench(network, shareable=True).workers() == 2  # of at least 16 images each
        assert bench(network, shareable=True, batch_size=8).workers() == 1
        assert bench(network, shareable=True, device=torch.device("meta")).workers() == 1


@pytest.mark.parametrize("scale", ["stream", "count", "convex"])
def test_reset_routers_are_the_network_that_adds_plainly(scale):
    network = with_routing(tiny_sit(), RoutingConfig("timestep", 2, scale=scale), allow_change=True).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    x, t, labels = torch.randn(2, 3, 32, 32, generator=generator), torch.tensor([0.3, 0.9]), torch.tensor([0, 1])
    plain = with_routers_reset(network)
    with torch.no_grad():
        routed = network(x, t, labels)
        network.dar.reset()
        expected = network(x, t, labels)
        assert torch.equal(plain(x, t, labels), expected) and (routed - expected).abs().max() > 1e-3
