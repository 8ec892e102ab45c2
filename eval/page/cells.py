"""The tables and figures of a report's page as plain data, and how numbers are written in them.

Markup stands in the templates alone: a text here is shown as it is, whatever it holds.
"""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ..metrics.intervals import Interval

NOTHING = "–"


@dataclass(frozen=True)
class Cell:
    """One cell of a table. `small`: a line of small print under its text."""

    text: str
    small: str = ""
    kind: Literal["", "verdict", "colour", "code"] = ""


@dataclass(frozen=True)
class Table:
    """A table that scrolls by itself. `label` names it to a screen reader; the first cell of a row heads the row.

    note: a paragraph above it. kind: "verdicts" where the second column holds words, "texts" where every column does.
    """

    label: str
    headings: tuple[Cell, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""
    kind: Literal["", "verdicts", "texts"] = ""

    @staticmethod
    def of(label: str, headings: Sequence[Cell | str], rows: Sequence[Sequence[Cell | str]], **more: Any) -> "Table":
        """The same from texts, each of which is a cell without small print."""
        return Table(label, _cells(headings), tuple(_cells(row) for row in rows), **more)


@dataclass(frozen=True)
class Figure:
    """A picture with its caption, which is its text alternative too, and the numbers behind it.

    conclusion: a sentence below the figure, empty without one. rows: what its rows show, for who points at it or does
    not see it.
    """

    png: bytes
    kind: Literal["chart", "grid", "opening"]
    heading: str
    caption: str
    tables: tuple[Table, ...]
    conclusion: str = ""
    rows: str = ""


def _cells(row: Sequence[Cell | str]) -> tuple[Cell, ...]:
    return tuple(cell if isinstance(cell, Cell) else Cell(cell) for cell in row)


def finite(value: float | None) -> float | None:
    """The number, None where it is not finite: not defined, or the end of an interval that is unbounded."""
    return value if value is not None and math.isfinite(value) else None


def number(value: float | None, digits: int = 2, signed: bool = False) -> str:
    """Rounded, with a minus sign instead of a hyphen; a dash for a number that is not defined."""
    if value is None or finite(value) is None:
        return NOTHING
    return minus(f"{round(value, digits) + 0.0:{'+' if signed else ''}.{digits}f}")  # + 0.0 turns -0.0 into 0.0


def short(value: float) -> str:
    """Three digits, or a whole number with its thousands apart."""
    return minus(f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}")


def minus(words: str) -> str:
    """A hyphen before a digit, or between two numbers, becomes a minus sign."""
    return re.sub(r"-(?= ?\d)", "−", words)


def span(low: float | None, high: float | None, digits: int = 2, signed: bool = False) -> str:
    """low to high; an end that is not finite is unbounded. Nothing where both are: there is no interval then."""
    ends = [finite(end) for end in (low, high)]
    if ends == [None, None]:
        return ""
    return " to ".join("unbounded" if end is None else number(end, digits, signed) for end in ends)


def interval_cell(interval: Interval, digits: int = 2, signed: bool = True) -> Cell:
    """A number with its interval as small print."""
    return Cell(number(interval.value, digits, signed), span(interval.low, interval.high, digits, signed))


def the(name: str) -> str:
    """A set in a sentence."""
    return f"the {name}" if name == "teacher" else name


def fact(value: Any) -> str:
    """A fact about a set, whatever its type."""
    if value is None:
        return NOTHING
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) else json.dumps(value)
