"""Activations that are computed again: the same values and gradients, for less memory and one more forward."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from dmd_dar.models.footprint import trace, without_data
from dmd_dar.models.sit import Block, build_sit
from dmd_dar.routing.layout import RoutingConfig
from tests.tiny import TINY, tiny_sit

FORMS = [
    RoutingConfig(),
    RoutingConfig("timestep", 4, "sum", "stream"),
    RoutingConfig("timestep", 3, "last", "convex"),
    RoutingConfig("static", 1, "sum", "stream"),
    RoutingConfig("dynamic", 2, "sum", "count"),
]


@pytest.mark.parametrize("routing", FORMS, ids=str)
def test_outputs_are_bit_equal_and_gradients_equal(routing):
    plain = tiny_sit(replace(TINY, depth=3, routing=routing)).double()
    for parameter in plain.router_parameters():
        nn.init.normal_(parameter)
    again = copy.deepcopy(plain)
    again.checkpoint_activations()
    x, t = torch.randn(2, 3, 32, 32, dtype=torch.float64), torch.tensor([0.3, 0.8], dtype=torch.float64)
    outputs = [network(x, t, torch.tensor([1, 2])) for network in (plain, again)]
    assert torch.equal(*outputs)
    for output in outputs:
        (output.sin() * x).sum().backward()
    for ours, theirs in zip(again.parameters(), plain.parameters(), strict=True):
        if ours.requires_grad:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-11, atol=1e-13)
    with torch.no_grad():  # routed by a reader of its own, ops/forward.py, whose rounding is its own too
        without = [network(x, t, torch.tensor([1, 2])) for network in (plain, again)]
    assert torch.equal(*without)
    torch.testing.assert_close(without[0], outputs[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("routing", FORMS[:2], ids=str)
def test_every_sublayer_runs_once_more_in_the_backward_pass(routing, monkeypatch):
    calls = []
    for name in ("attention_output", "mlp_output"):
        whole = getattr(Block, name)
        monkeypatch.setattr(Block, name, lambda *given, whole=whole, name=name: (calls.append(name), whole(*given))[1])
    network = tiny_sit(replace(TINY, routing=routing))
    network.checkpoint_activations()
    output = network(torch.randn(2, 3, 32, 32), torch.rand(2), torch.tensor([1, 2]))
    assert len(calls) == 4
    output.sum().backward()
    assert len(calls) == 8


@pytest.mark.parametrize("query", ["residual", "timestep"])
def test_what_is_kept_is_the_stream_and_the_summaries(query):
    """SiT-S/2 at B 2: a block's input (B, T, d) for each of 12 blocks, or for each of 6 chunks input and summary."""
    kept = []
    with without_data():
        for checkpointing in (False, True):
            network = build_sit("S/2", routing=query)
            if checkpointing:
                network.checkpoint_activations()
            x, t, labels = torch.randn(2, 4, 32, 32), torch.rand(2), torch.zeros(2, dtype=torch.long)
            kept.append(trace(lambda: network(x, t, labels), network.parameters(), bf16=False).kept)  # noqa: B023
    state, logits = 2 * 256 * 384 * 4, 25 * 9 * 2 * 256 * 4  # those of 25 routers over at most 9 sources
    assert kept[1] < 15.5 * state + logits and kept[0] > 15 * kept[1]
