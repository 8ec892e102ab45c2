"""The classes of a report's results hold just what report.json holds: the published files come back key by key."""

import json
import types
from dataclasses import fields, is_dataclass
from math import nan
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import pytest

from eval.measure.results import Forest, Report, Skipped, jsonable

PUBLISHED = sorted((Path(__file__).parents[3] / "docs" / "results").glob("*/report.json"))


def built(kind: Any, value: Any, bound: dict[Any, Any] | None = None) -> Any:
    """`value`, of a JSON file, as what the annotation `kind` says; TypeVars by `bound`."""
    kind = (bound or {}).get(kind, kind) if isinstance(kind, TypeVar) else kind
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (types.UnionType, Union):
        return None if value is None else built(union_member(parts, value, bound), value, bound)
    if origin in (list, tuple):
        return origin(built(parts[0], item, bound) for item in value)
    if origin is dict:
        return {key: built(parts[1], item, bound) for key, item in value.items()}
    if hasattr(kind, "as_json"):
        return value  # as the file has it: SetFacts says itself what its object is
    if is_dataclass(origin or kind):
        return record(origin or kind, value, dict(zip(getattr(origin, "__parameters__", ()), parts, strict=True)))
    return nan if kind is float and value is None else value


def union_member(parts: tuple, value: Any, bound: dict[Any, Any] | None) -> Any:
    """The smallest class of a union that has all keys of the value, else its first part."""
    held = set(value) if isinstance(value, dict) else set()
    kinds = [(bound or {}).get(part, part) for part in parts if part is not type(None)]
    fitting = [kind for kind in kinds if is_dataclass(kind) and held <= {one.name for one in fields(kind)}]
    return min(fitting, key=lambda kind: len(fields(kind)), default=kinds[0])


def record(kind: Any, value: dict[str, Any], bound: dict[Any, Any]) -> Any:
    """The class from its object; keys that it does not name go where `FLAT` puts them."""
    hints, left, found = get_type_hints(kind), dict(value), {}
    own = {one.name: left.pop(one.name) for one in fields(kind) if one.name in left}
    for one in fields(kind):
        if one.metadata.get("json") == "flat":
            found[one.name] = built(hints[one.name], left, bound)
        elif one.name in own and one.init:
            found[one.name] = built(hints[one.name], own[one.name], bound)
    return kind(**found)


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.parent.name)
def test_a_published_report_comes_back_key_by_key(path: Path) -> None:
    whole = json.loads(path.read_text())
    again = jsonable(record(Report, whole, {}))
    assert again == whole
    if whole["forest"] is None:  # its keys stand in another order in older files
        assert json.dumps(again, indent=1) == path.read_text().rstrip("\n")


def test_marks_of_a_field_and_numbers_that_are_not_finite() -> None:
    skipped = jsonable(Skipped("fid", "", "no weights"))
    assert skipped == {"metric": "fid", "name": "", "reason": "no weights", "requested": True}
    forest = Forest(source="runs", label="", conclusion="", comparisons=[])
    assert "curve" not in jsonable(forest)
    assert jsonable({1: (nan, float("inf"), 2.0)}) == {"1": [None, None, 2.0]}
