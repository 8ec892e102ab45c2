import pytest

from benchmarks import routing_share, turn_page
from benchmarks.routing_share import BACK, LINEAR, LOGITS, REST, ROUTER_COPIES, SOFTMAX, SUMS, Operation, by_group
from dmd_dar.routing.ops.forward import ForwardReader


def test_an_operation_counts_with_its_least_and_the_rest_is_what_is_left():
    rounds = [
        [Operation("aten::addmm", LINEAR, 50.0), Operation("aten::view", REST, 900.0)],
        [Operation("aten::addmm", LINEAR, 30.0), Operation("aten::view", REST, 2.0)],
    ]
    found = by_group(rounds, 100e-6)
    assert found[LINEAR] == pytest.approx(30e-6) and found[REST] == pytest.approx(70e-6)
    with pytest.raises(RuntimeError, match="differ in their operations"):
        by_group([rounds[0], rounds[1][:1]], 100e-6)


@pytest.mark.parametrize(
    ("name", "label", "group"),
    [
        ("aten::bmm", "Source", LOGITS),
        ("aten::baddbmm", "Route", SUMS),
        ("aten::_softmax", "Route", SOFTMAX),
        ("aten::bmm", "SourceBackward", BACK),
        ("aten::copy_", "Route", ROUTER_COPIES),
        ("aten::view", "Route", REST),
        ("SourceBackward", "SourceBackward", REST),
        ("aten::mm", None, LINEAR),
    ],
)
def test_groups(name, label, group):
    assert routing_share.group_of(name, label) == group


def test_a_routed_call_has_router_groups_and_a_plain_one_none():
    store = ForwardReader._store
    for form in routing_share.FORMS:
        call = routing_share.call_of(routing_share.routed("demo net", form), "sampling", 1)
        with routing_share.labelled():
            found = {operation.group for operation in routing_share.operations(call)}
        assert {LINEAR, REST} <= found
        assert ({LOGITS, SOFTMAX, SUMS} <= found) if form == "DAR" else not ({LOGITS, SOFTMAX, SUMS} & found)
    assert ForwardReader._store is store


def test_a_page_without_a_record_says_so():
    assert "not measured" in turn_page.routing_share(lambda name: None)
