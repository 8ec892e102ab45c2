"""How a component declares its configuration keys: a dataclass field that carries its own help text, unit and range."""

import dataclasses
from typing import Any


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
