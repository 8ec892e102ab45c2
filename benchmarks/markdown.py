"""What the sections of docs/performance.md share: results read, tables and numbers written."""

import json
from collections.abc import Callable
from typing import Any

from benchmarks.record import RESULTS
from eval.measure.machine import NOT_INSTALLED

OPEN = "not measured"
ABSENT = (None, NOT_INSTALLED)

Read = Callable[[str], dict[str, Any] | None]  # a result by its name; None where it was not measured


def load(name: str) -> dict[str, Any] | None:
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def markdown_table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def stand(result: dict[str, Any]) -> str:
    """Where and how a result was measured."""
    m = result["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in m["versions"].items() if version not in ABSENT)
    return (
        f"{m['device']}, {m['threads']} threads of {m['cores']} cores, {m['memory_gib']} GiB; Python {m['python']}, "
        f"{versions}; commit `{m['commit']}`; `{m['command']}`.\n"
    )


def milli(spread: dict[str, float]) -> str:
    return f"{1000 * spread['median']:.4g}"


def times(value: float) -> str:
    return f"{value:.2f}x" if value < 10 else f"{value:.1f}x"


def mega(count: float) -> str:
    return f"{count / 1e6:,.0f} MB"
