"""The source sets of arXiv:2605.20708 Eq. 7, written out by hand; Prop. 1 against a search over all chunk sizes."""

import math
from dataclasses import replace

import pytest

from dmd_dar import config
from dmd_dar.routing.layout import (
    Read,
    RoutingConfig,
    chunk_cost,
    chunk_length,
    chunk_size_minimum,
    optimal_chunk_size,
    reads,
)

ALPHAS = [i / 40 for i in range(1, 40)]

# For L = 6: router -> (summaries c_0 .. that it reads, outputs v_i that it reads); router 7 is the head's.
SOURCES = {
    1: {
        2: ([0, 1], []),
        3: ([0, 1, 2], []),
        4: ([0, 1, 2, 3], []),
        5: ([0, 1, 2, 3, 4], []),
        6: ([0, 1, 2, 3, 4, 5], []),
        7: ([0, 1, 2, 3, 4, 5], [6]),
    },
    2: {
        2: ([0], [1]),
        3: ([0, 1], []),
        4: ([0, 1], [3]),
        5: ([0, 1, 2], []),
        6: ([0, 1, 2], [5]),
        7: ([0, 1, 2], [5, 6]),
    },
    4: {
        2: ([0], [1]),
        3: ([0], [1, 2]),
        4: ([0], [1, 2, 3]),
        5: ([0, 1], []),
        6: ([0, 1], [5]),
        7: ([0, 1], [5, 6]),
    },
    6: {
        2: ([0], [1]),
        3: ([0], [1, 2]),
        4: ([0], [1, 2, 3]),
        5: ([0], [1, 2, 3, 4]),
        6: ([0], [1, 2, 3, 4, 5]),
        7: ([0], [1, 2, 3, 4, 5, 6]),
    },
}


@pytest.mark.parametrize("chunk_size", SOURCES)
def test_source_sets(chunk_size):
    layout = reads(6, chunk_size)
    listed = {l: (list(range(r.chunks)), list(range(r.first, r.last + 1))) for l, r in layout.items()}  # noqa: E741
    assert listed == SOURCES[chunk_size]
    assert {router: read.count for router, read in layout.items()} == {
        router: len(chunks) + len(outputs) for router, (chunks, outputs) in SOURCES[chunk_size].items()
    }


@pytest.mark.parametrize(("chunk_size", "count"), [(1, 57), (4, 18), (8, 15), (56, 57)])
def test_the_final_router_of_the_paper_s_backbone(chunk_size, count):
    layout = reads(56, chunk_size)
    assert list(layout) == list(range(2, 58)) and layout[57].count == count
    assert min(read.count for read in layout.values()) == 2


def test_an_empty_range_counts_nothing():
    assert Read(chunks=3, first=9, last=8).count == 3
    assert Read(chunks=3, first=9, last=8).sources == ["c_0", "c_1", "c_2"]


def test_sources_by_name():
    assert reads(6, 4)[7].sources == ["c_0", "c_1", "v_5", "v_6"]
    assert all(len(read.sources) == read.count for read in reads(56, 5).values())


@pytest.mark.parametrize("chunk_size", [0, 7, -1])
def test_a_chunk_has_between_one_and_all_sublayers(chunk_size):
    with pytest.raises(ValueError, match=f"between 1 and the number of sublayers 6, got {chunk_size}"):
        reads(6, chunk_size)


@pytest.mark.parametrize("name", ["query", "summary", "scale", "final"])
def test_an_unknown_form_is_refused(name):
    with pytest.raises(ValueError, match=f"{name} must be one of .*, got 'dense'"):
        RoutingConfig(**{name: "dense"})


@pytest.mark.parametrize("num_sublayers", [1, 2, 3, 7, 12, 24, 56, 57, 76, 120, 400])
def test_the_best_chunk_size_is_that_of_a_search(num_sublayers):
    found = [optimal_chunk_size(num_sublayers, alpha) for alpha in ALPHAS]
    for alpha, best in zip(ALPHAS, found, strict=True):
        costs = [chunk_cost(num_sublayers, size, alpha) for size in range(1, num_sublayers + 1)]
        assert best == costs.index(min(costs)) + 1, alpha
    assert found == sorted(found, reverse=True)


def test_the_cost_by_hand():
    assert chunk_cost(56, 4, 0.5) == pytest.approx(math.log(18) + math.log(2), abs=1e-12)
    assert chunk_cost(56, 1, 0.5) == pytest.approx(math.log(57), abs=1e-12)


def test_the_minimum_is_that_of_the_cost():
    for alpha in ALPHAS:
        minimum = chunk_size_minimum(56, alpha)
        slope = (chunk_cost(56, minimum + 1e-4, alpha) - chunk_cost(56, minimum - 1e-4, alpha)) / 2e-4
        assert abs(slope) < 1e-6 and chunk_cost(56, 2 * minimum, alpha) > chunk_cost(56, minimum, alpha)


def test_the_paper_s_interval():
    minima = [chunk_size_minimum(56, alpha) for alpha in (0.4, 0.5, 0.6)]
    assert [round(minimum, 1) for minimum in minima] == [4.9, 4.3, 3.7]
    assert [optimal_chunk_size(56, alpha) for alpha in (0.4, 0.5, 0.6)] == [5, 4, 4]
    assert chunk_size_minimum(4 * 56, 0.5) == pytest.approx(2 * minima[1])  # grows as the root of the depth


@pytest.mark.parametrize(("num_sublayers", "alpha"), [(0, 0.5), (56, 0.0), (56, 1.0), (56, -0.1), (56, math.nan)])
def test_prop_1_refuses_what_it_does_not_speak_of(num_sublayers, alpha):
    with pytest.raises(ValueError, match="alpha between 0 and 1"):
        optimal_chunk_size(num_sublayers, alpha)


def test_auto_becomes_a_number_once_the_depth_is_known():
    auto = RoutingConfig("static", "auto")
    assert auto.resolved(56) == RoutingConfig("static", 4) and auto.resolved(2) == RoutingConfig("static", 1)
    assert auto.resolved(400) == RoutingConfig("static", chunk_length(400, "auto")) == RoutingConfig("static", 12)
    assert reads(56, "auto") == reads(56, 4)
    fixed = replace(auto, chunk_size=7)
    assert fixed.resolved(2) is fixed  # a residual network may be shallower than the default chunk


@pytest.mark.parametrize("chunk_size", [0, -1, 2.0, 2.5, True, None, "4", "foo"])
def test_a_chunk_size_is_a_whole_number_or_auto(chunk_size):
    with pytest.raises(ValueError, match="chunk_size must be a whole number >= 1 or 'auto', got"):
        RoutingConfig(chunk_size=chunk_size)


def test_the_loader_takes_a_number_or_auto():
    assert config.load(RoutingConfig, ["chunk_size=auto"]) == RoutingConfig(chunk_size="auto")
    assert config.load(RoutingConfig, ["chunk_size=7"]).chunk_size == 7
    assert config.from_dict(RoutingConfig, config.to_dict(RoutingConfig(chunk_size="auto"))).chunk_size == "auto"


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("0", "must be >= 1"),
        ("2.5", "expected int or auto, got float 2.5"),
        ("foo", "expected int or auto, got the string 'foo'"),
        ("atuo", "nearest choice: auto"),
        ("true", "expected int or auto, got bool True"),
    ],
)
def test_the_loader_names_a_wrong_chunk_size(value, said):
    with pytest.raises(config.ConfigError, match=f"^chunk_size = .*{said}"):
        config.load(RoutingConfig, [f"chunk_size={value}"])
