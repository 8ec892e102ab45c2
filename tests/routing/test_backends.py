"""Which implementation serves a pass, and what is said where one gives way."""

import logging
import os
import sys

import pytest
import torch

from dmd_dar.routing import ops
from dmd_dar.routing.history import History
from tests.routing.chain import chain, loss_of, routing, worst


def test_an_unknown_backend_is_named(monkeypatch):
    one = chain(routing(), 5, 6)
    with pytest.raises(ValueError, match="unknown routing backend 'fast'.*torch"):
        one.states("fast")
    monkeypatch.setenv(ops.VARIABLE, "faster")
    one.bank.backend = None
    with pytest.raises(ValueError, match="unknown routing backend 'faster'.*DMD_DAR_ROUTING_BACKEND"):
        History(one.bank, one.v_0, one.t_embedding)


def test_the_environment_chooses(monkeypatch):
    one = chain(routing(), 5, 6)
    monkeypatch.setenv(ops.VARIABLE, "naive")
    one.bank.backend = None
    assert isinstance(History(one.bank, one.v_0, one.t_embedding).reader, ops.ListedReader)
    one.bank.backend = "torch"
    assert isinstance(History(one.bank, one.v_0, one.t_embedding).reader, ops.TorchReader)


def test_the_default_belongs_to_the_device(monkeypatch):
    monkeypatch.delenv(ops.VARIABLE, raising=False)
    monkeypatch.setattr(ops, "_has_triton", lambda: True)
    assert [ops.chosen(None, device) for device in ("cuda", "cpu", "mps")] == ["triton", "torch", "torch"]
    assert ops.chosen("naive", "cuda") == "naive"
    monkeypatch.setattr(ops, "_has_triton", lambda: False)
    assert ops.chosen(None, "cuda") == "torch"


def test_a_preferred_backend_serves_banks_that_name_none(monkeypatch):
    one = chain(routing(), 6, 6)
    monkeypatch.setenv(ops.VARIABLE, "torch")
    with ops.preferring("naive"):
        for backend, kind in ((None, ops.ListedReader), ("torch", ops.TorchReader)):
            one.bank.backend = backend
            assert isinstance(History(one.bank, one.v_0, one.t_embedding).reader, kind)
    one.bank.backend = None
    assert isinstance(History(one.bank, one.v_0, one.t_embedding).reader, ops.TorchReader)


def test_giving_way_is_logged_once(caplog):
    """Inside torch.func the equations serve, with the same values; a compiled graph traces them."""
    ops.give_way.cache_clear()
    one = chain(routing("static"), 5, 6)
    expected = torch.autograd.grad(one.states("torch")[-1].sum(), one.v_0)[0]

    def total(v_0):
        return type(one)(one.bank, v_0, one.t_embedding, one.sublayers).states("torch")[-1].sum()

    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            torch.testing.assert_close(torch.func.grad(total)(one.v_0), expected)
    assert [record.message for record in caplog.records] == [
        "routing backend torch gives way to naive: it does not work inside torch.func transforms"
    ]


@pytest.mark.parametrize("missing", [True, False])
def test_triton_gives_way_where_it_cannot_serve(caplog, monkeypatch, missing):
    """Without triton, or without a GPU or its interpreter, the torch backend serves; each reason is logged once."""
    ops.give_way.cache_clear()
    if missing:
        monkeypatch.setitem(sys.modules, "dmd_dar.routing.ops.triton", None)
        monkeypatch.delattr(ops, "triton", raising=False)
    elif os.environ.get("TRITON_INTERPRET") == "1" or torch.cuda.is_available():
        pytest.skip("triton can serve here")
    one = chain(routing(), 5, 6)
    expected = one.states("torch")
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert all(torch.equal(a, b) for a, b in zip(one.states("triton"), expected, strict=True))
    (record,) = caplog.records
    assert record.message.startswith("routing backend triton gives way to torch: ")
    assert ("cannot be imported" in record.message) == missing


def test_a_compiled_chain_is_one_graph(caplog):
    ops.give_way.cache_clear()
    one = chain(routing("timestep", chunk_size=2), 5, 6)
    expected = one.gradients(loss_of(one.states("torch")))
    compiled = torch.compile(lambda: loss_of(one.states("torch")), backend="aot_eager", fullgraph=True)
    with caplog.at_level(logging.WARNING):
        assert worst(one.gradients(compiled()), expected) < 1e-10
        compiled()
    assert sum("gives way to naive: under torch.compile" in record.message for record in caplog.records) == 1
