import copy
import itertools

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from dmd_dar.routing.history import History
from dmd_dar.routing.ops.forward import ForwardReader
from dmd_dar.routing.router import RouterBank
from tests.routing.chain import assert_the_stream_is_kept, chain, loss_of, routing, worst

QUERIES, SCALES, SUMMARIES = ("static", "timestep", "dynamic"), ("convex", "count", "stream"), ("last", "sum")
FORMS = list(itertools.product(QUERIES, SCALES, SUMMARIES))
SHAPES = [(1, 1), (2, 1), (4, 4), (7, 3), (11, 1), (12, 4)]  # sublayers, chunk size


def assert_equal_backends(one, value_tol: float, gradient_tol: float) -> None:
    ours, theirs = one.states("torch"), one.states("naive")
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert (a - b).abs().max() <= value_tol * b.abs().max()
    assert worst(one.gradients(loss_of(ours)), one.gradients(loss_of(theirs))) <= gradient_tol


@pytest.mark.parametrize("sublayers, chunk_size", SHAPES)
@pytest.mark.parametrize("query, scale, summary", FORMS)
def test_equals_the_equations_in_float64(query, scale, summary, sublayers, chunk_size):
    assert_equal_backends(chain(routing(query, scale, summary, chunk_size), sublayers, 6), 1e-12, 1e-10)


@pytest.mark.parametrize("query", QUERIES)
@pytest.mark.parametrize("scale", SCALES)
def test_equals_the_equations_in_float32(query, scale):
    one = chain(routing(query, scale), 10, 48, tokens=7, dtype=torch.float32)
    assert_equal_backends(one, 1e-5, 1e-4)


@pytest.mark.parametrize("query", QUERIES)
def test_the_last_routers_row_serves_the_head_too(query):
    assert_equal_backends(chain(routing(query, chunk_size=3, final="reuse_last"), 7, 6), 1e-12, 1e-10)


@pytest.mark.parametrize("query", QUERIES)
@pytest.mark.parametrize("width, tokens, sublayers, chunk_size", [(33, 5, 6, 1), (1152, 3, 5, 2), (4, 1, 127, 1)])
def test_odd_widths_odd_tokens_and_128_sources(query, width, tokens, sublayers, chunk_size):
    one = chain(routing(query, "convex", chunk_size=chunk_size), sublayers, width, tokens=tokens)
    assert_equal_backends(one, 1e-11, 1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("query, scale", list(itertools.product(QUERIES, SCALES)))
def test_half_precision_is_routed_in_float32(query, scale, dtype):
    one = chain(routing(query, scale, chunk_size=2), 5, 16, dtype=dtype)
    ulp = torch.finfo(dtype).eps
    assert_equal_backends(one, 3 * ulp, 20 * ulp)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("query, chunk_size", list(itertools.product(QUERIES, (1, 4))))
def test_zero_queries_return_the_stream_bit_for_bit(query, chunk_size, dtype):
    assert_the_stream_is_kept(chain(routing(query, chunk_size=chunk_size), 30, 24, dtype=dtype))


def test_a_narrow_block_of_wide_copies_changes_nothing(monkeypatch):
    one = chain(routing("dynamic"), 6, 16, tokens=9, dtype=torch.bfloat16)
    whole = one.states("torch")
    monkeypatch.setattr("dmd_dar.routing.ops.gather.BLOCK_BYTES", 1000)
    assert all(torch.equal(a, b) for a, b in zip(whole, one.states("torch"), strict=True))


@pytest.mark.parametrize("query, scale", list(itertools.product(QUERIES, SCALES)))
@pytest.mark.parametrize("backend", ["naive", "torch"])
def test_gradcheck(backend, query, scale):
    one = chain(routing(query, scale, chunk_size=2), 3, 3, batch=1, tokens=2)
    leaves = list(one.leaves().values())
    assert torch.autograd.gradcheck(lambda *_: one.states(backend)[1:], leaves)


@pytest.mark.parametrize("query", QUERIES)
def test_two_forwards_before_one_backward(query):
    one, losses = chain(routing(query), 9, 6), {}
    for backend in ("torch", "naive"):
        first, second = one.states(backend), one.states(backend)
        losses[backend] = one.gradients(loss_of(first) * loss_of(second))
    assert worst(losses["torch"], losses["naive"]) < 1e-10


@pytest.mark.parametrize("query", QUERIES)
def test_a_second_backward_starts_afresh(query):
    """The first pass reaches all routers, the second stops at an early state: nothing of the first may remain."""
    one = chain(routing(query, chunk_size=3), 8, 6)
    states, expected = one.states("torch"), one.states("naive")
    for some in (states[:], states[2:4], states[-1:]):
        chosen = [expected[[id(s) for s in states].index(id(h))] for h in some]
        ours = one.gradients(loss_of(some), retain_graph=True)
        assert worst(ours, one.gradients(loss_of(chosen), retain_graph=True)) < 1e-10


def test_gradient_to_a_state_stops_there():
    one = chain(routing(), 8, 6)
    found = {}
    for backend in ("torch", "naive"):
        states = one.states(backend)
        found[backend] = torch.autograd.grad(states[-1].square().sum(), states[5], retain_graph=True)[0]
        later = torch.autograd.grad(states[4].square().sum(), one.v_0)[0]
        found[f"{backend} later"] = later
    torch.testing.assert_close(found["torch"], found["naive"])
    torch.testing.assert_close(found["torch later"], found["naive later"])


@pytest.mark.parametrize("query", QUERIES)
@pytest.mark.parametrize("frozen", [["query", "gate", "gain", "w_q"], ["v_0"], ["sublayers", "v_0"], ["gain"]])
def test_frozen_leaves(query, frozen):
    one = chain(routing(query, chunk_size=3), 7, 6)
    for name in frozen:
        if name in one.leaves():
            one.leaves()[name].requires_grad_(False)
    ours, theirs = one.gradients(loss_of(one.states("torch"))), one.gradients(loss_of(one.states("naive")))
    assert worst(ours, theirs) < 1e-10


@pytest.mark.parametrize("query", QUERIES)
def test_sources_of_any_stride(query):
    one = chain(routing(query, chunk_size=3), 5, 8, tokens=6)
    found = {}
    for backend in ("torch", "naive"):
        one.bank.backend = backend
        history = History(one.bank, one.v_0.flip(1), one.t_embedding)
        for f in one.sublayers:
            transposed = torch.tanh(history.state() * f).transpose(1, 2).contiguous().transpose(1, 2)
            history.append(transposed if backend == "torch" else transposed.contiguous())
        state = history.state()
        grad = torch.randn(8, 6, 2, generator=torch.Generator().manual_seed(1), dtype=state.dtype).permute(2, 1, 0)
        found[backend] = one.gradients((state * grad).sum())
    assert worst(found["torch"], found["naive"]) < 1e-10


@pytest.mark.parametrize("query", QUERIES)
def test_recomputed_blocks_have_equal_gradients(query):
    """Gradient checkpointing: each sublayer is recomputed on a snapshot of the history."""
    one = chain(routing(query, chunk_size=3), 9, 6)
    expected = one.gradients(loss_of(one.states("naive")))
    one.bank.backend = "torch"
    history, states = History(one.bank, one.v_0, one.t_embedding), []
    for f in one.sublayers:
        entry = history.snapshot()
        ran = []

        def block(f, entry=entry, ran=ran):
            mine = entry.snapshot()
            ran.append(mine)
            h = mine.state()
            mine.append(torch.tanh(h * f))
            return h, mine.stream

        h, _ = checkpoint(block, f, use_reentrant=False)
        history = ran[0]
        states.append(h)
    assert worst(one.gradients(loss_of([*states, history.state()])), expected) < 1e-10


@pytest.mark.parametrize("query", QUERIES)
def test_saved_tensors_may_be_moved_away(query):
    one = chain(routing(query, chunk_size=3), 9, 6)
    expected = one.gradients(loss_of(one.states("torch")))
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.clone(), lambda x: x):
        states = one.states("torch")
    assert worst(one.gradients(loss_of(states)), expected) == 0


@pytest.mark.parametrize("query", QUERIES)
@pytest.mark.parametrize("without", [range(2, 4), range(0, 1), range(5, 9)])
def test_a_part_without_gradients_is_a_constant(query, without):
    """Sublayers under no_grad: what they hand on has no gradient, all else has the same as in the equations."""
    one, found = chain(routing(query, "convex", chunk_size=3), 9, 6), {}
    for backend in ("torch", "naive"):
        one.bank.backend = backend
        history, states = History(one.bank, one.v_0, one.t_embedding), []
        for k, f in enumerate(one.sublayers):
            states.append(history.state())
            with torch.set_grad_enabled(k not in without):
                history.append(torch.tanh(states[-1] * f))
        found[backend] = one.gradients(loss_of([*states, history.state()]))
    assert worst(found["torch"], found["naive"]) < 1e-10


def test_a_forward_without_gradients_keeps_no_graph_and_does_not_go_on_with_them():
    one = chain(routing(), 6, 6)
    one.bank.backend = "torch"
    with torch.no_grad():
        history = History(one.bank, one.v_0, one.t_embedding)
        history.append(history.state())
        assert not history.state().requires_grad and isinstance(history.reader, ForwardReader)
    with pytest.raises(RuntimeError, match="began under torch.no_grad"):
        history.state()


@pytest.mark.parametrize("query", QUERIES)
def test_the_equations_go_on_with_gradients(query):
    """A pass of `naive` that began without them gives its later routers theirs, queries and gains included."""
    one, found = chain(routing(query, chunk_size=3), 9, 6), []
    one.bank.backend = "naive"
    for begin in (True, False):
        with torch.set_grad_enabled(begin):
            history, states = History(one.bank, one.v_0, one.t_embedding), []
        for k, f in enumerate(one.sublayers):
            with torch.set_grad_enabled(k >= 4):
                states.append(history.state())
                history.append(torch.tanh(states[-1] * f))
        found.append(one.gradients(loss_of([*states[5:], history.state()])))
    assert worst(*found) < 1e-12 and all(gradient.any() for gradient in found[1].values())


def test_timestep_routers_ask_for_their_embedding():
    one = chain(routing("timestep"), 6, 6)
    for backend in ("torch", "naive"):
        one.bank.backend = backend
        with pytest.raises(ValueError, match="need t_embedding"):
            History(one.bank, one.v_0)


@pytest.mark.parametrize("query", QUERIES)
def test_a_backward_that_failed_leaves_nothing_behind(query):
    one = chain(routing(query, chunk_size=3), 8, 6)
    states, expected = one.states("torch"), one.states("naive")

    def fail(_):
        raise KeyError("on purpose")

    handle = states[4].register_hook(fail)
    with pytest.raises(KeyError):
        one.gradients(loss_of(states), retain_graph=True)
    handle.remove()
    for some in (slice(None), slice(2, 4)):
        ours = one.gradients(loss_of(states[some]), retain_graph=True)
        assert worst(ours, one.gradients(loss_of(expected[some]), retain_graph=True)) < 1e-10


@pytest.mark.parametrize("query", QUERIES)
def test_a_backward_within_a_backward(query):
    found = {}
    for backend in ("torch", "naive"):
        one = chain(routing(query, chunk_size=2), 6, 6)
        states, inner = one.states(backend), {}
        with torch.enable_grad():
            early = states[3].square().sum()

        def within(_, early=early, one=one, inner=inner):
            if not inner:
                inner["v_0"] = None
                inner["v_0"] = torch.autograd.grad(early, one.v_0, retain_graph=True)[0]

        states[5].register_hook(within)
        found[backend] = one.gradients(loss_of(states), retain_graph=True) | {"inner": inner["v_0"]}
    assert worst(found["torch"], found["naive"]) < 1e-10


@pytest.mark.parametrize("query", QUERIES)
def test_a_state_may_be_asked_for_twice(query):
    one, found = chain(routing(query, chunk_size=3), 7, 6), {}
    for backend in ("torch", "naive"):
        one.bank.backend = backend
        history = History(one.bank, one.v_0, one.t_embedding)
        for f in one.sublayers:
            history.append(torch.tanh(history.state() * f) + torch.cos(history.state()))
        found[backend] = one.gradients((history.state() * history.state().sin()).sum())
    assert worst(found["torch"], found["naive"]) < 1e-10


@pytest.mark.parametrize("query", ["static", "timestep"])  # a dynamic query's own product is autocast, as any other
def test_backward_inside_autocast_stays_in_float32(query):
    """The same gradients whether autocast is still on in the backward pass or not."""
    one, found = chain(routing(query, chunk_size=3), 7, 16, dtype=torch.float32), {}
    for inside in (True, False):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_of(one.states("torch"))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=inside):
            found[inside] = one.gradients(loss)
    assert worst(found[True], found[False]) < 1e-6


def test_a_state_changed_in_place_is_refused():
    states = chain(routing(scale="count"), 5, 6).states("torch")
    states[3].data.add_(0)  # unseen by autograd
    with torch.no_grad():
        states[3].add_(1)
    with pytest.raises(RuntimeError, match="inplace"):
        loss_of(states[-1:]).backward()


def test_what_a_pass_gathered_is_let_go():
    loss = loss_of(chain(routing(), 9, 6).states("torch"))
    (passes,) = passes_under(loss)
    loss.backward()
    assert not passes.running


def passes_under(loss) -> set:
    """What the routing nodes under a loss share."""
    found, stack, seen = set(), [loss.grad_fn], set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "passes"):
            found.add(node.passes)
        stack += [parent for parent, _ in node.next_functions]
    return found


def test_autocast_keeps_half_precision_sources():
    found = {}
    for backend in ("torch", "naive"):
        one = chain(routing("timestep", "stream"), 6, 16, dtype=torch.float32)
        one.bank.backend = backend
        with torch.autocast("cpu", dtype=torch.bfloat16):
            history = History(one.bank, one.v_0, one.t_embedding)
            for f in one.sublayers:
                weight = torch.diag(f)
                history.append(torch.nn.functional.linear(history.state(), weight))
            state = history.state()
        assert history.dtype == torch.bfloat16 and state.dtype == torch.float32
        found[backend] = one.gradients(state.square().sum())
    assert worst(found["torch"], found["naive"]) < 0.05


def test_alpha_is_shown_to_an_observer():
    one, seen = chain(routing("timestep", chunk_size=3), 7, 6), {}
    for backend in ("torch", "naive"):
        one.bank.backend = backend
        history = History(one.bank, one.v_0, one.t_embedding, seen.setdefault(backend, {}).__setitem__)
        for f in one.sublayers:
            history.append(torch.tanh(history.state() * f))
        history.state()
    for router in range(2, 9):
        alpha = seen["torch"][router]
        torch.testing.assert_close(alpha, seen["naive"][router])
        torch.testing.assert_close(alpha.sum(dim=0), torch.ones_like(alpha[0]))


def test_two_streams_join():
    """Histories of two token streams, then routers of their concatenation: all backends agree."""
    config, found = routing("timestep", chunk_size=3), {}
    text, image = (chain(config, 9, 6, tokens=tokens, seed=tokens) for tokens in (2, 5))
    joint = RouterBank(config, 9, 6, routers=range(5, 11)).double()
    for parameter in joint.parameters():
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(3))
    for backend in ("torch", "naive"):
        histories = []
        for one in (text, image):
            one.bank.routers = range(2, 5)
            one.bank.backend = backend
            history = History(one.bank, one.v_0, one.t_embedding, joinable=True)
            for f in one.sublayers[:4]:
                history.append(torch.tanh(history.state() * f))
            histories.append(history)
        joint.backend = backend
        history = History.joined(*histories, joint, text.t_embedding)
        for f in text.sublayers[4:]:
            history.append(torch.tanh(history.state() * f))
        state = history.state()
        leaves = [*joint.parameters(), text.v_0, image.v_0, text.sublayers, image.sublayers]
        found[backend] = dict(enumerate([state, *torch.autograd.grad(state.cos().sum(), leaves)]))
    assert found["torch"][0].shape == (2, 7, 6)
    assert worst(found["torch"], found["naive"]) < 1e-10


def test_histories_that_are_not_equally_far_do_not_join():
    one = chain(routing(), 5, 6)
    a, b = (History(one.bank, one.v_0, one.t_embedding, joinable=True) for _ in range(2))
    b.append(b.state())
    with pytest.raises(ValueError, match="equally far: 0 and 1 sublayers"):
        History.joined(a, b, one.bank)
    with pytest.raises(ValueError, match="joinable"):
        History.joined(History(one.bank, one.v_0, one.t_embedding), a, one.bank)


def test_a_deep_copy_routes_alike():
    one = chain(routing(), 6, 6)
    twin = copy.deepcopy(one.bank)
    expected = one.states("torch")[-1]
    other = type(one)(twin, one.v_0, one.t_embedding, one.sublayers)
    assert torch.equal(other.states("torch")[-1], expected)


@pytest.mark.slow
@pytest.mark.parametrize("sublayers, chunk_size", [(56, 1), (56, 4), (56, 56), (24, 5), (127, 11), (13, 2)])
@pytest.mark.parametrize("query, scale, summary", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_all_forms_at_depth(query, scale, summary, sublayers, chunk_size, dtype):
    one = chain(routing(query, scale, summary, chunk_size), sublayers, 33, tokens=5, dtype=dtype, calm=0.1)
    assert_equal_backends(one, *((1e-5, 3e-5) if dtype == torch.float32 else (1e-13, 1e-12)))
