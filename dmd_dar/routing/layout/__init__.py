"""Which sources each router reads (arXiv:2605.20708 Eq. 7), as plain data, and how long a chunk should be (Prop. 1).

Sublayers are counted 1..L; v_0 is the embedded input and v_l the l-th sublayer's output. Router l builds the input of
sublayer l, router L + 1 the prediction head's. Router 1 would read v_0 alone: it has no choice and no gradient, and
does not exist. `python -m dmd_dar.routing.layout depth=28 chunk_size=4` prints all of it.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal, Self, TypedDict, Unpack, get_args

from dmd_dar.keys import key

Query = Literal["residual", "static", "timestep", "dynamic"]
Summary = Literal["last", "sum"]
Scale = Literal["convex", "count", "stream"]
Final = Literal["dedicated", "reuse_last"]
ChunkSize = int | Literal["auto"]

ALPHA = 0.5  # of Prop. 1: the middle of [0.4, 0.6], for which the paper evaluates it


def chunk_cost(num_sublayers: int, chunk_size: float, alpha: float) -> float:
    """log(L/S + S) + a log S, arXiv:2605.20708 Prop. 1: sources of a router against what a long chunk loses."""
    return math.log(num_sublayers / chunk_size + chunk_size) + alpha * math.log(chunk_size)


def chunk_size_minimum(num_sublayers: int, alpha: float) -> float:
    """S* = sqrt(L (1 - a) / (1 + a)), the minimum of `chunk_cost` over real S > 0 (below 1 for small L).

    Raises ValueError where L < 1 or a is not in (0, 1).
    """
    if num_sublayers < 1 or not 0 < alpha < 1:
        raise ValueError(f"needs num_sublayers >= 1 and alpha between 0 and 1, got {num_sublayers} and {alpha}")
    return math.sqrt(num_sublayers * (1 - alpha) / (1 + alpha))


def optimal_chunk_size(num_sublayers: int, alpha: float = ALPHA) -> int:
    """The integer S in 1 .. L of least `chunk_cost`, the smaller of two that tie. Raises as `chunk_size_minimum`."""
    below = max(1, math.floor(chunk_size_minimum(num_sublayers, alpha)))  # the cost is convex in log S
    return min((below, min(below + 1, num_sublayers)), key=lambda size: chunk_cost(num_sublayers, size, alpha))


@dataclass(frozen=True)
class RoutingConfig:
    """The form of a network's routing; `residual` is the plain network."""

    query: Query = key("residual", "what a router asks with: residual (no routing) | static | timestep | dynamic")
    chunk_size: ChunkSize = key(
        4, "sublayers per chunk S; 1 reads every earlier output; auto is Prop. 1's", unit="sublayers", least=1
    )
    summary: Summary = key("sum", "what stands for a finished chunk: its last output (paper) or the sum of its outputs")
    scale: Scale = key("stream", "aggregate: convex (paper) | count | stream (keeps a pretrained function bitwise)")
    final: Final = key("dedicated", "the head's router: its own, or the last sublayer's reused (paper with REPA)")

    def __post_init__(self) -> None:
        for name, choices in (("query", Query), ("summary", Summary), ("scale", Scale), ("final", Final)):
            if getattr(self, name) not in get_args(choices):
                raise ValueError(f"{name} must be one of {get_args(choices)}, got {getattr(self, name)!r}")
        if self.chunk_size != "auto" and (type(self.chunk_size) is not int or self.chunk_size < 1):
            raise ValueError(f"chunk_size must be a whole number >= 1 or 'auto', got {self.chunk_size!r}")

    def resolved(self, num_sublayers: int) -> Self:
        """The same form with `auto` replaced by `optimal_chunk_size(num_sublayers)`; what a network keeps and saves."""
        return replace(self, chunk_size=optimal_chunk_size(num_sublayers)) if self.chunk_size == "auto" else self

    @property
    def keeps_function(self) -> bool:
        """Whether zero queries leave a plain network's function as it is, up to rounding."""
        exact = self.scale == "stream" or (self.scale == "count" and self.summary == "sum")
        return self.query == "residual" or exact


class FormOptions(TypedDict, total=False):
    """The fields of a `RoutingConfig` beside its query, for functions that take them as keywords."""

    chunk_size: ChunkSize
    summary: Summary
    scale: Scale
    final: Final


def routing_form(query: Query | RoutingConfig, **options: Unpack[FormOptions]) -> RoutingConfig:
    """The form of a query and its options; a whole form as it is. Raises ValueError for a whole form with options."""
    if not isinstance(query, RoutingConfig):
        return RoutingConfig(query, **options)
    if options:
        raise ValueError(f"{', '.join(options)} beside a whole form: set them in that form, {query}")
    return query


@dataclass(frozen=True)
class Read:
    """What one router reads: the summaries c_0 .. c_{chunks-1}, then the outputs v_first .. v_last (none if empty)."""

    chunks: int
    first: int
    last: int

    @property
    def count(self) -> int:
        """Number of sources n = |S_l|."""
        return self.chunks + max(0, self.last - self.first + 1)

    @property
    def sources(self) -> list[str]:
        """The names of the sources in order, such as ["c_0", "c_1", "v_9"]."""
        outputs = range(self.first, self.last + 1)
        return [f"c_{n}" for n in range(self.chunks)] + [f"v_{i}" for i in outputs]


def chunk_length(num_sublayers: int, chunk_size: ChunkSize) -> int:
    """S as a number, `auto` by Prop. 1. Raises ValueError where it is not in 1 .. L."""
    length = optimal_chunk_size(num_sublayers) if chunk_size == "auto" else chunk_size
    if not 1 <= length <= num_sublayers:
        raise ValueError(f"chunk_size must be between 1 and the number of sublayers {num_sublayers}, got {length}")
    return length


def reads(num_sublayers: int, chunk_size: ChunkSize) -> dict[int, Read]:
    """Router index l (2 .. L + 1) -> its sources, Eq. 7. Raises ValueError where chunk_size is not in 1 .. L."""
    chunk_size, layout = chunk_length(num_sublayers, chunk_size), {}
    for router in range(2, num_sublayers + 2):
        sublayer = min(router, num_sublayers)  # the final router reads as part of the last chunk
        chunk = (sublayer - 1) // chunk_size
        layout[router] = Read(chunks=chunk + 1, first=chunk * chunk_size + 1, last=router - 1)
    return layout
