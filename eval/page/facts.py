"""Where a report's numbers come from, as tables: facts about the sets, what was not measured, provenance."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..measure.results import Report, jsonable
from .cells import Table, fact
from .summaries import Folded

LONG = ("runs", "report", "contract")  # configurations and constants, in the whole provenance alone


@dataclass(frozen=True)
class Definition:
    """A term and what is said of it."""

    term: str
    meaning: str


def not_measured(report: Report) -> list[Definition]:
    """Each metric that was skipped, with the reason."""
    return [
        Definition(
            f"{one.metric}, {one.name or 'all sets'}" + ("" if one.requested else " (not asked for)"),
            one.reason,
        )
        for one in report.skipped
    ]


def set_facts(report: Report) -> Folded | None:
    """What came with the sets, a column for each set that brought something; None where none did."""
    facts = {row.name: _shown(known) for row in report.sets if (known := jsonable(row.facts))}
    if not facts:
        return None
    keys = list(dict.fromkeys(key for one in facts.values() for key in one))
    rows = [[key, *(fact(one.get(key)) for one in facts.values())] for key in keys]
    return Folded(f"{len(keys)} facts", Table.of("facts about the sets", ["", *facts], rows, kind="texts"))


def _shown(facts: Mapping[str, Any]) -> dict[str, Any]:
    """All but what each router did; a network's hash by its first digits. report.json holds everything whole."""
    shown = {key: value for key, value in _flat(facts).items() if not key.startswith("routing.by_router")}
    return shown | {"network": shown["network"][:8]} if "network" in shown else shown


def _flat(facts: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested facts under one name each, joined by full stops."""
    flat = {}
    for key, value in facts.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def origin(report: Report) -> Table | None:
    """The facts that a reader looks for; None without any."""
    short = {key: value for key, value in _provenance(report).items() if key not in LONG}
    rows = [[key, fact(value)] for key, value in _flat(short).items()]
    return Table.of("provenance", ["", ""], rows, kind="texts") if rows else None


def whole_origin(report: Report) -> str:
    """All of the provenance, with every run's configuration, as JSON."""
    return json.dumps(_provenance(report), indent=1, ensure_ascii=False)


def _provenance(report: Report) -> Mapping[str, Any]:
    return {} if report.provenance is None else jsonable(report.provenance)
