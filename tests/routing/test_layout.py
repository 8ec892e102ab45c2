"""The source sets of arXiv:2605.20708 Eq. 7, written out by hand."""

import pytest

from dmd_dar.routing.layout import Read, RoutingConfig, reads

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


@pytest.mark.parametrize("chunk_size", [0, 7, -1])
def test_a_chunk_has_between_one_and_all_sublayers(chunk_size):
    with pytest.raises(ValueError, match=f"between 1 and the number of sublayers 6, got {chunk_size}"):
        reads(6, chunk_size)


@pytest.mark.parametrize("name", ["query", "summary", "scale", "final"])
def test_an_unknown_form_is_refused(name):
    with pytest.raises(ValueError, match=f"{name} must be one of .*, got 'dense'"):
        RoutingConfig(**{name: "dense"})
