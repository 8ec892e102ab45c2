"""How a component declares its configuration keys, a dataclass field with its own help text, unit and range; and in
which keys two configurations differ.
"""

import dataclasses
from typing import Any

ABSENT = "(absent)"


def key(
    default: Any = dataclasses.MISSING,
    help: str = "",
    *,
    unit: str = "",
    above: float | None = None,
    least: float | None = None,
    below: float | None = None,
    most: float | None = None,
    path: bool = False,
    factory: Any = dataclasses.MISSING,
) -> Any:
    """A dataclass field with what `config.load` checks and what `--help` prints.

    `above`/`below` are exclusive bounds, `least`/`most` inclusive ones; they hold for each entry of a list.
    `path` marks a path that must exist before the run starts. Choices are spelled in the field's type, as `Literal`.
    """
    metadata = {"help": help, "unit": unit, "above": above, "least": least, "below": below, "most": most, "path": path}
    if factory is not dataclasses.MISSING:
        return dataclasses.field(default_factory=factory, metadata=metadata)
    if default is dataclasses.MISSING:
        return dataclasses.field(metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def filled(values: dict[str, Any], missing: dict[str, Any]) -> dict[str, Any]:
    """The nested `values`, with those of `missing` for keys that they lack."""
    nested = {name: filled(values[name], missing[name]) for name in missing if isinstance(values.get(name), dict)}
    return {**missing, **values, **nested}


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[tuple[str, Any, Any]]:
    """(dotted key, old value, new value) wherever two nested configurations differ; ABSENT stands for a missing key."""
    differing = []
    for name in [*old, *(name for name in new if name not in old)]:
        a, b = _listed(old.get(name, ABSENT)), _listed(new.get(name, ABSENT))
        if isinstance(a, dict) and isinstance(b, dict):
            differing += differences(a, b, f"{prefix}{name}.")
        elif a != b or type(a) is not type(b):
            differing.append((f"{prefix}{name}", a, b))
    return differing


def _listed(value: Any) -> Any:
    """Tuples as the lists that YAML gives back."""
    return [_listed(entry) for entry in value] if isinstance(value, tuple | list) else value
