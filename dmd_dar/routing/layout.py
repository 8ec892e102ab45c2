"""Which sources each router reads (arXiv:2605.20708 Eq. 7), as plain data.

Sublayers are counted 1..L; v_0 is the embedded input and v_l the l-th sublayer's output. Router l builds the input of
sublayer l, router L + 1 the prediction head's. Router 1 would read v_0 alone: it has no choice and no gradient, and
does not exist.
"""

from dataclasses import dataclass
from typing import Literal, get_args

from dmd_dar.keys import key

Query = Literal["residual", "static", "timestep", "dynamic"]
Summary = Literal["last", "sum"]
Scale = Literal["convex", "count", "stream"]
Final = Literal["dedicated", "reuse_last"]


@dataclass(frozen=True)
class RoutingConfig:
    """The form of a network's routing; `residual` is the plain network."""

    query: Query = key("residual", "what a router asks with: residual (no routing) | static | timestep | dynamic")
    chunk_size: int = key(4, "sublayers per chunk S; 1 reads every earlier output", unit="sublayers", least=1)
    summary: Summary = key("sum", "what stands for a finished chunk: its last output (paper) or the sum of its outputs")
    scale: Scale = key("stream", "aggregate: convex (paper) | count | stream (keeps a pretrained function bitwise)")
    final: Final = key("dedicated", "the head's router: its own, or the last sublayer's reused (paper with REPA)")

    def __post_init__(self) -> None:
        for name, choices in (("query", Query), ("summary", Summary), ("scale", Scale), ("final", Final)):
            if getattr(self, name) not in get_args(choices):
                raise ValueError(f"{name} must be one of {get_args(choices)}, got {getattr(self, name)!r}")

    @property
    def keeps_function(self) -> bool:
        """Whether zero queries leave a plain network's function as it is, up to rounding."""
        exact = self.scale == "stream" or (self.scale == "count" and self.summary == "sum")
        return self.query == "residual" or exact


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


def reads(num_sublayers: int, chunk_size: int) -> dict[int, Read]:
    """Router index l (2 .. L + 1) -> its sources, Eq. 7. Raises ValueError where chunk_size is not in 1 .. L."""
    if not 1 <= chunk_size <= num_sublayers:
        raise ValueError(f"chunk_size must be between 1 and the number of sublayers {num_sublayers}, got {chunk_size}")
    layout = {}
    for router in range(2, num_sublayers + 2):
        sublayer = min(router, num_sublayers)  # the final router reads as part of the last chunk
        chunk = (sublayer - 1) // chunk_size
        layout[router] = Read(chunks=chunk + 1, first=chunk * chunk_size + 1, last=router - 1)
    return layout
