"""Results as plain data: what becomes of a frozen dataclass in a JSON file.

A field is a key of the same name, in the order of the class. Two marks change that, `field(metadata=FLAT)` and so on.
"""

import math
from dataclasses import fields, is_dataclass
from typing import Any, Protocol, runtime_checkable

FLAT = {"json": "flat"}  # a dict whose entries are keys of the object itself, in the field's place
OPTIONAL = {"json": "optional"}  # no key where the value is None: a metric that nobody asked for


@runtime_checkable
class Described(Protocol):
    """A class that says itself what its object in the file is."""

    def as_json(self) -> dict[str, Any]: ...


def jsonable(value: Any) -> Any:
    """Dataclasses to dicts, tuples to lists, keys to strings, numbers that are not finite to None."""
    if is_dataclass(value) and not isinstance(value, type):
        return jsonable(value.as_json()) if isinstance(value, Described) else _record(value)
    if isinstance(value, dict):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value


def _record(one: Any) -> dict[str, Any]:
    record: dict[str, Any] = {}
    for field in fields(one):
        value, mark = getattr(one, field.name), field.metadata.get("json")
        if mark == "flat":
            record |= jsonable(value)
        elif mark != "optional" or value is not None:
            record[field.name] = jsonable(value)
    return record
