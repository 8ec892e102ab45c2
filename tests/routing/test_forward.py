"""Routing without gradients (ops/forward.py) against the equations, over every form and awkward shapes."""

import dataclasses
import itertools

import pytest
import torch

from benchmarks.turn_cost import Launches
from dmd_dar.routing.history import History
from dmd_dar.routing.ops.forward import ForwardReader
from dmd_dar.routing.router import RouterBank
from tests.routing.chain import assert_the_stream_is_kept, chain, routing
from tests.routing.test_torch import SCALES, SHAPES, SUMMARIES

QUERIES = ("static", "timestep")


@torch.no_grad()
def assert_equals_the_equations(one, tolerance: float) -> None:
    for a, b in zip(one.states("torch"), one.states("naive"), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert (a - b).abs().max() <= tolerance * b.abs().max()


@pytest.mark.parametrize("sublayers, chunk_size", SHAPES)
def test_equals_the_equations_in_float64(sublayers, chunk_size):
    for query, scale, summary in itertools.product(QUERIES, SCALES, SUMMARIES):
        assert_equals_the_equations(chain(routing(query, scale, summary, chunk_size), sublayers, 6), 1e-12)


@pytest.mark.parametrize(
    "final, chunk_size, sublayers", [("reuse_last", 3, 7), ("dedicated", 1, 40), ("reuse_last", 1, 2)]
)
def test_the_heads_router_and_many_sources(final, chunk_size, sublayers):
    assert_equals_the_equations(chain(routing(chunk_size=chunk_size, final=final), sublayers, 33, calm=0.3), 1e-11)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("scale", SCALES)
def test_narrow_types_are_routed_in_float32(scale, dtype):
    tolerance = 3 * torch.finfo(dtype).eps if dtype.itemsize == 2 else 1e-5
    assert_equals_the_equations(chain(routing(scale=scale, chunk_size=2), 9, 48, dtype=dtype), tolerance)


def test_autocast_does_not_reach_into_it():
    one = chain(routing(), 9, 48, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert_equals_the_equations(one, 3 * torch.finfo(torch.bfloat16).eps)


@pytest.mark.parametrize("width", [48, 160])  # sources are added one by one; by a product from 4 on
def test_many_tokens_equal_the_equations(width):
    for query, scale in itertools.product(QUERIES, SCALES):
        assert_equals_the_equations(chain(routing(query, scale), 9, width, tokens=130), 1e-11)


@torch.no_grad()
@pytest.mark.parametrize("tokens", [5, 300])
def test_the_layout_of_the_stream_in_memory_makes_no_difference(tokens):
    one = chain(routing(), 9, 160, batch=1, tokens=tokens)
    plain = one.states("torch")
    other = dataclasses.replace(one, v_0=one.v_0.mT.contiguous().mT)
    for a, b in zip(other.states("torch"), plain, strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-12 * b.abs().max().item())
        assert b.is_contiguous()


@torch.no_grad()
def test_a_pass_starts_few_operations():
    """13 sources and 12 routers: a bound on what the demo's network pays beside its residual additions."""
    one = chain(routing(), 12, 128, batch=1, tokens=64, dtype=torch.float32)
    with Launches() as counted:
        one.states("torch")
    sublayers = 2 * 12  # their own product and tanh
    assert counted.counts.total() - sublayers <= 165


@torch.no_grad()
@pytest.mark.parametrize("width", [48, 160])
def test_zero_queries_return_the_stream_of_many_tokens_bit_for_bit(width):
    assert_the_stream_is_kept(chain(routing(), 20, width, tokens=130, dtype=torch.float32))


@torch.no_grad()
@pytest.mark.parametrize("chunk_size", [1, 4])
def test_zero_queries_return_the_stream_bit_for_bit(chunk_size):
    assert_the_stream_is_kept(chain(routing(chunk_size=chunk_size), 60, 24, dtype=torch.float32))


@torch.no_grad()
def test_the_weights_that_are_seen_are_the_equations():
    one, seen = chain(routing(chunk_size=3), 7, 6), {}
    for backend in ("torch", "naive"):
        one.bank.backend, seen[backend] = backend, []
        history = History(one.bank, one.v_0, one.t_embedding, lambda *given, to=seen[backend]: to.append(given))
        for f in one.sublayers:
            history.append(torch.tanh(history.state() * f))
        history.state()
    for (router, a), (other, b) in zip(seen["torch"], seen["naive"], strict=True):
        assert router == other and a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=1e-14)


@torch.no_grad()
def test_streams_that_are_joined_go_on_as_the_equations_say():
    """As in SD3 and FLUX: two streams of 6 sublayers, then one of 5 more over the tokens of both."""
    config, states = routing(chunk_size=4), {}
    for backend in ("torch", "naive"):
        a, b = (chain(config, 6, 8, tokens=n, seed=n) for n in (3, 5))
        torch.manual_seed(0)
        bank = RouterBank(config, 11, 8, range(7, 13)).double()
        for parameter in bank.parameters():
            parameter.copy_(torch.randn_like(parameter))
        histories = []
        for one in (a, b):
            one.bank.backend = backend
            history = History(one.bank, one.v_0, one.t_embedding, joinable=True)
            for f in one.sublayers:
                history.append(torch.tanh(history.state() * f))
            histories.append(history)
        bank.backend = backend
        joint = History.joined(*histories, bank, a.t_embedding)
        assert isinstance(joint.reader, ForwardReader) == (backend == "torch")
        states[backend] = []
        for f in a.sublayers[:5]:
            states[backend].append(joint.state())
            joint.append(torch.tanh(states[backend][-1] * f))
        states[backend].append(joint.state())
    for x, y in zip(states["torch"], states["naive"], strict=True):
        assert torch.allclose(x, y, rtol=0, atol=1e-12 * y.abs().max().item())
