"""Which sources each router reads and what that costs: python -m dmd_dar.routing.layout depth=28 chunk_size=4"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dmd_dar import config
from dmd_dar.atomic import make_folder, write_atomic
from dmd_dar.errors import UserError
from dmd_dar.keys import key
from dmd_dar.routing.layout import (
    ALPHA,
    Query,
    RoutingConfig,
    chunk_length,
    chunk_size_minimum,
    optimal_chunk_size,
    reads,
)
from dmd_dar.routing.traffic import forward_passes

BYTES = {"bf16": 2, "fp16": 2, "fp32": 4, "fp64": 8}


@dataclass(frozen=True)
class LayoutConfig(RoutingConfig):
    """python -m dmd_dar.routing.layout"""

    query: Query = key("timestep", "what a router asks with; dynamic knows no two-phase form, residual no router")
    depth: int = key(28, "number of blocks; twice as many sublayers L", unit="blocks", least=1)
    width: int = key(1152, "token width d", least=1)
    tokens: int = key(256, "tokens T of one sample", least=1)
    batch: int = key(1, "samples B", least=1)
    dtype: Literal["bf16", "fp16", "fp32", "fp64"] = key("bf16", "of the sources")
    groups: tuple[int, ...] = key((8, 10), "routers that read together in the dense two-phase form", least=1)
    out: str = key("", "JSON file to write the same to; empty writes none")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.query != "residual":
            chunk_length(self.sublayers, self.chunk_size)
        if self.out and Path(self.out).is_dir():
            raise ValueError("out is a folder: name a file in it, such as layout.json")

    @property
    def sublayers(self) -> int:
        return 2 * self.depth

    @property
    def pass_bytes(self) -> int:
        """Bytes of one (B, T, d) tensor."""
        return self.batch * self.tokens * self.width * BYTES[self.dtype]


def described(cfg: LayoutConfig) -> dict[str, Any]:
    """What the command knows, as JSON holds it: each router's sources, passes and bytes of each form."""
    sublayers = cfg.sublayers
    layout = {} if cfg.query == "residual" else reads(sublayers, cfg.chunk_size)
    passes = forward_passes(sublayers, cfg, cfg.groups)
    return {
        "config": config.to_dict(cfg.resolved(sublayers)),
        "sublayers": sublayers,
        "prop_1": {
            "alpha": ALPHA,
            "minimum": chunk_size_minimum(sublayers, ALPHA),
            "chunk_size": optimal_chunk_size(sublayers),
        },
        "routers": [{"router": router, "sources": read.sources, "n": read.count} for router, read in layout.items()],
        "traffic": [{"form": form, "passes": n, "bytes": n * cfg.pass_bytes} for form, n in passes.items()],
    }


def span(letter: str, first: int, last: int) -> str:
    """`v_5 .. v_8`, `v_5`, or nothing."""
    if first >= last:
        return f"{letter}_{first}" * (first == last)
    return f"{letter}_{first} .. {letter}_{last}"


def source_table(cfg: LayoutConfig) -> list[str]:
    """One line for each router, and the total."""
    if cfg.query == "residual":
        return ["no routers: every sublayer reads the residual stream"]
    layout = reads(cfg.sublayers, cfg.chunk_size)
    lines = [f"{'router':>6}  {'summaries':<15}{'outputs':<15}{'n':>6}"]
    for router, read in layout.items():
        summaries, outputs = span("c", 0, read.chunks - 1), span("v", read.first, read.last)
        lines.append(f"{router:>6}  {summaries:<15}{outputs:<15}{read.count:>6}")
    lines += [f"{'all':>6}  {'':<30}{sum(read.count for read in layout.values()):>6}", ""]
    c_n = "the last output" if cfg.summary == "last" else "the sum of the outputs"
    asks = "reuses the query of the one before" if cfg.final == "reuse_last" else "has a query of its own"
    return [*lines, f"c_0 = v_0; c_n is {c_n} of chunk n. The last router feeds the head and {asks}."]


def traffic_table(cfg: LayoutConfig, rows: list[dict[str, Any]]) -> list[str]:
    """One line for each form."""
    lines = [
        "traffic of one forward, in passes: reads or writes of one (B, T, d) tensor",
        f"B {cfg.batch}, T {cfg.tokens}, d {cfg.width}, {cfg.dtype}: a pass is {cfg.pass_bytes:,} bytes",
        f"{'form':<32}{'passes':>9}{'MB':>14}",
    ]
    return lines + [f"{row['form']:<32}{row['passes']:>9,}{row['bytes'] / 1e6:>14,.1f}" for row in rows]


def show(cfg: LayoutConfig) -> None:
    """Print the layout and its traffic, and write them to `out` where one is named."""
    known = described(cfg)
    form, best = known["config"], known["prop_1"]
    lines = [
        f"{known['sublayers']} sublayers in chunks of {form['chunk_size']}"
        f" (query {form['query']}, summary {form['summary']}, scale {form['scale']}, final {form['final']})",
        f"Prop. 1 at a = {best['alpha']}: S* = {best['minimum']:.2f}; chunk_size=auto is {best['chunk_size']}",
    ]
    print("\n".join([*lines, "", *source_table(cfg), "", *traffic_table(cfg, known["traffic"])]))
    if cfg.out:
        path = Path(cfg.out)
        try:
            write_atomic(make_folder(path.parent) / path.name, json.dumps(known, indent=1))
        except OSError as error:
            raise UserError(f"out = {cfg.out!r} cannot be written: {error.strerror}; name another file") from error


def main(argv: Sequence[str] | None = None) -> None:
    config.run_job(LayoutConfig, show, argv, description=__doc__ or "")
