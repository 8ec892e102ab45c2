"""What routing moves through memory in one forward pass, in passes: reads or writes of one (B, T, d) tensor.

Counted, for sublayers 1..L and routers 1..L + 1, a router reading n sources:

    plain residual  every addition reads x_l and v_l and writes x_{l+1}
    one read        every router reads its n sources and writes h_l
    two-phase       routers form groups. Phase one reads a group's older sources once for all its routers and writes a
                    partial aggregate for each. Phase two, router by router, reads that partial and the newer sources,
                    merges the two by log-sum-exp and writes h_l. Without older sources there is no partial.
        dense       groups of g: routers g k + 1 .. g k + g; older are v_0 .. v_{g k - 1}
        chunks      a group is the routers of a chunk's sublayers, older are the summaries; the final router stands
                    alone and reads all its sources in one go
    `sum`           one write more for each of c_1 .. c_{N-1}, unless S = 1, where the sum is the output itself
    `stream`        one read more, of x_l, for every router, beside all of the plain residual

Not counted: what a sublayer does with or without routing (it reads h_l and writes v_l), and what is smaller by a factor
of T or d (logits, norms, queries). Router 1, which only copies v_0, is counted, so that there is one router for every
h_l, 57 at L = 56; a network that skips it saves 2 passes, or 3 in two phases over chunks. A `sum` is taken to be formed
where its addends are at hand; in a step of its own it would read S more. A partial counts one pass, as in the sources'
dtype.
"""

from collections.abc import Iterable
from typing import get_args

from dmd_dar.routing.layout import Read, RoutingConfig, Summary, chunk_length, reads


def residual(num_sublayers: int) -> int:
    """Passes of the plain residual additions."""
    return 3 * num_sublayers


def stream_extra(num_sublayers: int) -> int:
    """Passes that scale `stream` adds to any routed form."""
    return num_sublayers + 1 + residual(num_sublayers)


def dense(num_sublayers: int) -> int:
    """Passes where every router reads every earlier output."""
    return sum(n + 1 for n in range(1, num_sublayers + 2))


def dense_grouped(num_sublayers: int, group: int) -> int:
    """Passes of the dense form in two phases, `group` routers together. Raises ValueError where group < 1."""
    if group < 1:
        raise ValueError(f"a group has at least one router, got {group}")
    routers = range(num_sublayers + 1)  # router l = index + 1
    return two_phase((i // group, i // group * group, i % group + 1) for i in routers)


def chunked(num_sublayers: int, chunk_size: int, summary: Summary) -> int:
    """Passes of the chunked form, one read per router. Raises ValueError where chunk_size is not in 1 .. L."""
    layout = [Read(chunks=1, first=1, last=0), *reads(num_sublayers, chunk_size).values()]
    return sum(read.count + 1 for read in layout) + written_sums(num_sublayers, chunk_size, summary)


def chunked_two_phase(num_sublayers: int, chunk_size: int, summary: Summary) -> int:
    """Passes of the chunked form, a chunk's summaries read once for its routers. Raises as `chunked`."""
    *inner, final = [Read(chunks=1, first=1, last=0), *reads(num_sublayers, chunk_size).values()]
    grouped = two_phase((read.chunks, read.chunks, read.count - read.chunks) for read in inner)
    return grouped + final.count + 1 + written_sums(num_sublayers, chunk_size, summary)


def two_phase(routers: Iterable[tuple[int, int, int]]) -> int:
    """Passes for routers given as (group, number of older sources, which their group shares, number of newer ones)."""
    shared, passes = {}, 0
    for group, older, newer in routers:
        shared[group] = older
        passes += (2 if older else 0) + newer + 1
    return passes + sum(shared.values())


def written_sums(num_sublayers: int, chunk_size: int, summary: Summary) -> int:
    """Writes of the summaries c_1 .. c_{N-1}; `last` has them already."""
    return -(-num_sublayers // chunk_size) - 1 if summary == "sum" and chunk_size > 1 else 0


def forward_passes(num_sublayers: int, config: RoutingConfig, groups: Iterable[int] = (8, 10)) -> dict[str, int]:
    """Form -> passes of one forward, the last for `config` itself; `groups` are group sizes of the dense form.

    A `dynamic` query needs v_{l-1}, so its older sources cannot be read ahead: no two-phase forms. `residual` has no
    routers. Raises ValueError where chunk_size is not in 1 .. L.
    """
    table = {"plain residual": residual(num_sublayers)}
    if config.query == "residual":
        return table
    size, ahead = chunk_length(num_sublayers, config.chunk_size), config.query != "dynamic"
    table["dense, one read per router"] = dense(num_sublayers)
    table |= {f"dense, groups of {group}": dense_grouped(num_sublayers, group) for group in groups if ahead}
    least = {}
    for summary in get_args(Summary):
        forms = {f"chunks of {size}, {summary}": chunked(num_sublayers, size, summary)}
        if ahead:
            forms[f"chunks of {size}, {summary}, two-phase"] = chunked_two_phase(num_sublayers, size, summary)
        table |= forms
        least[summary] = min(forms.values())
    extra = stream_extra(num_sublayers)
    configured = least[config.summary] + (extra if config.scale == "stream" else 0)
    return table | {"scale stream adds": extra, "as configured": configured}
