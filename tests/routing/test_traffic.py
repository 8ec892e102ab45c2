"""Traffic: the counts of SiT-XL/2, small cases counted tensor by tensor, and the command that prints them."""

import json
import subprocess
import sys
from itertools import product

import pytest

from dmd_dar import config
from dmd_dar.routing import traffic
from dmd_dar.routing.layout import RoutingConfig, reads
from dmd_dar.routing.layout.command import LayoutConfig, described, show


@pytest.mark.parametrize(
    ("passes", "expected"),
    [
        (traffic.residual(56), 168),
        (traffic.dense(56), 1710),
        (traffic.dense_grouped(56, 10), 604),
        (traffic.dense_grouped(56, 8), 632),
        (traffic.chunked(56, 4, "last"), 579),
        (traffic.chunked(56, 4, "sum"), 592),
        (traffic.chunked_two_phase(56, 4, "last"), 376),
        (traffic.chunked_two_phase(56, 4, "sum"), 389),
        (traffic.stream_extra(56), 57 + 168),
    ],
)
def test_the_paper_s_backbone(passes, expected):
    assert passes == expected


def events_of_one_read(layout, summary, chunk_size):
    """Every tensor read or written, by name."""
    events = [("read", "v_0"), ("write", "h_1")]
    for router, read in layout.items():
        events += [("read", source) for source in read.sources] + [("write", f"h_{router}")]
    return events + sums_of(layout, summary, chunk_size)


def sums_of(layout, summary, chunk_size):
    read_later = {source for read in layout.values() for source in read.sources if source.startswith("c_")} - {"c_0"}
    return [("write", source) for source in sorted(read_later)] if summary == "sum" and chunk_size > 1 else []


def events_of_two_phases(num_sublayers, chunk_size, summary):
    layout = reads(num_sublayers, chunk_size)
    events = sums_of(layout, summary, chunk_size)
    for first in range(1, num_sublayers + 1, chunk_size):
        routers = range(first, min(first + chunk_size, num_sublayers + 1))
        older = [f"c_{i}" for i in range((first - 1) // chunk_size + 1)]
        events += [("read", source) for source in older] + [("write", f"partial_{router}") for router in routers]
        for router in routers:
            sources = layout[router].sources if router > 1 else ["c_0"]
            assert sources[: len(older)] == older
            newer = [("read", source) for source in sources[len(older) :]]
            events += [("read", f"partial_{router}"), *newer, ("write", f"h_{router}")]
    final = layout[num_sublayers + 1].sources
    return events + [("read", source) for source in final] + [("write", "head")]


def events_of_dense_groups(num_sublayers, group):
    events = []
    for first in range(0, num_sublayers + 1, group):  # router index - 1, and the number of older outputs
        routers = range(first, min(first + group, num_sublayers + 1))
        events += [("read", f"v_{i}") for i in range(first)]
        for router in routers:
            events += [("write", f"partial_{router}"), ("read", f"partial_{router}")] if first else []
            events += [("read", f"v_{i}") for i in range(first, router + 1)] + [("write", f"h_{router + 1}")]
    return events


@pytest.mark.parametrize(("num_sublayers", "chunk_size"), [(2, 1), (2, 2), (6, 1), (6, 4), (7, 3), (7, 7), (24, 5)])
def test_counts_are_those_of_the_tensors_moved(num_sublayers, chunk_size):
    layout = reads(num_sublayers, chunk_size)
    for summary in ("last", "sum"):
        one_read = events_of_one_read(layout, summary, chunk_size)
        two_phase = events_of_two_phases(num_sublayers, chunk_size, summary)
        assert traffic.chunked(num_sublayers, chunk_size, summary) == len(one_read)
        assert traffic.chunked_two_phase(num_sublayers, chunk_size, summary) == len(two_phase)
    assert traffic.dense_grouped(num_sublayers, chunk_size) == len(events_of_dense_groups(num_sublayers, chunk_size))


def test_the_dense_form_has_several_names():
    for size, summary in product((1, 56), ("last", "sum")):
        assert traffic.chunked(56, size, summary) == traffic.dense(56)
    assert traffic.dense_grouped(56, 57) == traffic.dense(56)  # no older sources, no partials
    with pytest.raises(ValueError, match="at least one router, got 0"):
        traffic.dense_grouped(56, 0)


@pytest.mark.parametrize(
    ("form", "configured"),
    [
        (RoutingConfig("timestep", 4, "last", "convex"), 376),
        (RoutingConfig("static", "auto", "sum", "count"), 389),
        (RoutingConfig("timestep", 4, "sum", "stream", "reuse_last"), 389 + 57 + 168),
        (RoutingConfig("dynamic", 4, "last", "convex"), 579),  # asks with v_{l-1}: nothing can be read ahead
        (RoutingConfig("dynamic", 4, "sum", "stream"), 592 + 57 + 168),
        (RoutingConfig("static", 1, "sum", "count"), 1710),
        (RoutingConfig("residual", 57), None),
    ],
)
def test_the_configured_form(form, configured):
    table = traffic.forward_passes(56, form, groups=(8, 10, 12))
    assert table.get("as configured") == configured and table["plain residual"] == 168
    grouped = [name for name in table if "groups" in name]
    assert len(grouped) == (3 if form.query in ("static", "timestep") else 0)
    assert any("two-phase" in name for name in table) == bool(grouped)


def test_data_is_what_json_holds():
    data = described(config.load(LayoutConfig, ["depth=3", "chunk_size=auto", "batch=2", "dtype=fp32", "width=8"]))
    assert json.loads(json.dumps(data)) == data
    assert data["sublayers"] == 6 and data["config"]["chunk_size"] == 1  # S* = 1.41: 2 costs more
    assert data["routers"] == [
        {"router": router, "sources": read.sources, "n": read.count} for router, read in reads(6, 1).items()
    ]
    assert data["traffic"][0] == {"form": "plain residual", "passes": 18, "bytes": 18 * 2 * 256 * 8 * 4}


def test_the_table(capsys, tmp_path):
    out = tmp_path / "new" / "layout.json"
    show(config.load(LayoutConfig, ["depth=3", "chunk_size=4", "summary=last", "final=reuse_last", f"out={out}"]))
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["3", "c_0", "v_1", "..", "v_2", "3"] in lines and ["5", "c_0", "..", "c_1", "2"] in lines
    assert ["7", "c_0", "..", "c_1", "v_5", "..", "v_6", "4"] in lines and ["all", "18"] in lines
    mb = 256 * 1152 * 2 / 1e6
    assert ["plain", "residual", "18", f"{18 * mb:.1f}"] in lines
    assert ["chunks", "of", "4,", "last", "26", f"{26 * mb:.1f}"] in lines
    assert json.loads(out.read_text())["routers"][-1] == {"router": 7, "sources": ["c_0", "c_1", "v_5", "v_6"], "n": 4}


def test_a_residual_network_has_no_routers(capsys):
    show(config.load(LayoutConfig, ["query=residual", "depth=1"]))  # its default chunk size exceeds it
    text = capsys.readouterr().out
    assert "no routers" in text and "as configured" not in text and "plain residual" in text


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("chunk_size=0", "chunk_size = 0 (command line): out of range; must be >= 1"),
        ("chunk_size=57", "chunk_size = 57 (command line): chunk_size must be between 1 and"),
        ("query=statik", "nearest choice: static"),
        ("chunksize=4", "unknown key; nearest valid key: chunk_size"),
        ("groups=[0]", "must be >= 1"),
        ("out=/", "out is a folder"),
        ("out=/proc/x.json", "out = '/proc/x.json' cannot be written"),
    ],
)
def test_mistakes_end_with_one_line_and_exit_code_2(argument, said, capsys):
    with pytest.raises(SystemExit) as stop:
        config.run_job(LayoutConfig, show, [argument])
    message = capsys.readouterr().err
    assert stop.value.code == 2 and message.startswith("error: ") and said in message and message.count("\n") == 1


def test_the_command():
    command = [sys.executable, "-W", "error", "-m", "dmd_dar.routing.layout"]
    ran = subprocess.run([*command, "depth=28", "chunk_size=4"], capture_output=True, text=True, check=True)
    assert "chunks of 4, sum, two-phase" in ran.stdout and ran.stderr == ""
