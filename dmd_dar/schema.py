"""What a configuration dataclass says about its keys: types, ranges, defaults, help; and whether a value fits a key."""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterator
from typing import Any, Literal

import yaml

from dmd_dar.errors import UserError

MISSING = dataclasses.MISSING


class ConfigError(UserError, ValueError):
    """One line for the user; jobs may raise it too, for example for a request that contradicts a saved student."""

    def __init__(self, message: str):
        super().__init__(" ".join(message.splitlines()))


@dataclasses.dataclass(frozen=True)
class Slot:
    """One key of a schema as the loader and `--help` see it; `section` is the nested dataclass, or None for a value."""

    path: str
    kind: Any
    section: type | None
    default: Any
    metadata: Any

    @property
    def name(self) -> str:
        return self.path.rpartition(".")[2]


def slots(schema: type, base: Any, prefix: str) -> list[Slot]:
    """One level of a schema; defaults come from the instance `base` where there is one: factories may set their own."""
    hints = typing.get_type_hints(schema)
    level = []
    for field in dataclasses.fields(schema):
        default = field.default
        if base not in (MISSING, None):
            default = getattr(base, field.name)
        elif field.default_factory is not MISSING:
            default = field.default_factory()
        if field.init:
            path, kind = f"{prefix}.{field.name}".lstrip("."), hints[field.name]
            level.append(Slot(path, kind, _section(kind), default, field.metadata))
    return level


def walk(schema: type, base: Any = MISSING, prefix: str = "") -> Iterator[Slot]:
    for slot in slots(schema, base, prefix):
        yield slot
        if slot.section is not None:
            yield from walk(slot.section, slot.default, slot.path)


def _section(kind: Any) -> type | None:
    sections = [option for option in options(kind) if isinstance(option, type) and dataclasses.is_dataclass(option)]
    return sections[0] if sections else None


def options(kind: Any) -> tuple[Any, ...]:
    return typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)


def leaf(value: Any, slot: Slot, where: str) -> Any:
    """The value in its key's type, or a ConfigError."""
    fault = f"{slot.path} = {shown(value)} ({where}):"
    try:
        typed = _typed(value, slot.kind)
    except TypeError:
        problem = f"expected {_kind_name(slot.kind)}, got {_value_name(value)}"
        raise ConfigError(f"{fault} {problem}; {_type_remedy(value, slot)}") from None
    if isinstance(typed, str | tuple | list) and len(typed) == 0 and typed != slot.default:
        raise ConfigError(f"{fault} is empty; give it a value")
    for entry in entries(typed):
        if isinstance(entry, str) and (entry == "???" or (not entry.strip() and entry != slot.default)):
            raise ConfigError(f"{fault} is empty; give it a value")
        if isinstance(entry, float) and not math.isfinite(entry):
            raise ConfigError(f"{fault} is not a finite number; write a finite one")
        if isinstance(entry, int) and abs(entry) >= 2**63:
            raise ConfigError(f"{fault} does not fit into 64 bits; use a smaller number")
        if isinstance(entry, int | float) and not isinstance(entry, bool) and not _in_range(entry, slot.metadata):
            raise ConfigError(f"{fault} out of range; must be{_range_text(slot.metadata).replace(' <', ' and <', 1)}")
    return typed


def _typed(value: Any, kind: Any) -> Any:
    """The value as `kind`, TypeError otherwise; an int may stand for a float, nothing else converts."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        for option in inner:
            try:
                return _typed(value, option)
            except TypeError:
                continue
    if origin is Literal:
        for choice in inner:
            if type(value) is type(choice) and value == choice:
                return choice
        words = [choice for choice in inner if isinstance(choice, str) and yaml.safe_load(choice) is value]
        if isinstance(value, bool) and len(words) == 1:  # YAML reads no, off, yes and on as truth values
            return words[0]
    if origin in (tuple, list) and isinstance(value, list | tuple):
        kinds = inner if origin is tuple and inner[-1] is not Ellipsis else inner[:1] * len(value)
        if len(kinds) == len(value):
            return origin(_typed(entry, part) for entry, part in zip(value, kinds, strict=True))
    if kind is float and type(value) is int and abs(value) < 2**1000:
        return float(value)
    if kind in (bool, int, float, str, type(None)) and type(value) is kind:
        return value
    raise TypeError


def _in_range(number: float, metadata: Any) -> bool:
    above, least, below, most = (metadata.get(name) for name in ("above", "least", "below", "most"))
    low = (above is None or number > above) and (least is None or number >= least)
    return low and (below is None or number < below) and (most is None or number <= most)


def entries(value: Any) -> Iterator[Any]:
    if isinstance(value, tuple | list):
        for entry in value:
            yield from entries(entry)
    else:
        yield value


def plain(value: Any) -> Any:
    """Nested plain containers, tuples as lists, as YAML and JSON hold them."""
    if dataclasses.is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value) if field.init}
    return [plain(entry) for entry in value] if isinstance(value, tuple | list) else value


def shown(value: Any) -> str:
    text = "null" if value is None else repr(value)
    return text if len(text) <= 100 else text[:97] + "..."


def _kind_name(kind: Any) -> str:
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_kind_name(option) for option in inner)
    if origin is Literal:
        return "one of " * (len(inner) > 1) + ", ".join(str(choice) for choice in inner)
    if origin in (tuple, list):
        entries = [_kind_name(part) for part in inner if part is not Ellipsis]
        return f"list of {entries[0]}" if inner[-1] is Ellipsis or origin is list else f"list [{', '.join(entries)}]"
    return "null" if kind is type(None) else kind.__name__


def _value_name(value: Any) -> str:
    names = {dict: "a section", list: "a list", tuple: "a list", type(None): "null", str: "the string"}
    name = names.get(type(value), type(value).__name__)
    return name if value is None or isinstance(value, dict | list | tuple) else f"{name} {shown(value)}"


def _type_remedy(value: Any, slot: Slot) -> str:
    kinds = [typing.get_origin(kind) or kind for kind in options(slot.kind)]
    if isinstance(value, dict):
        return f"{slot.path} is a value, not a section"
    if Literal in kinds and isinstance(value, str):
        choices = [str(choice) for kind in options(slot.kind) for choice in typing.get_args(kind)]
        near = difflib.get_close_matches(value, choices, 1)
        return f"nearest choice: {near[0]}" if near else "use one of the choices"
    if tuple in kinds and not isinstance(value, list | tuple):
        return f"write {slot.path}=[{value}]"
    if int in kinds and isinstance(value, float) and value == value // 1:
        return f"write {int(value)}"
    if isinstance(value, str) and int in kinds and value.startswith("0") and value.isdecimal():
        return f"write {int(value)}, without the zero in front"
    if isinstance(value, str) and (int in kinds or float in kinds):
        return "write a number without quotes"
    return f"quote it: {slot.path}='\"{value}\"'" if str in kinds and value is not None else "see --help"


def _range_text(metadata: Any) -> str:
    signs = {"above": ">", "least": ">=", "below": "<", "most": "<="}
    return "".join(f" {sign} {metadata[name]:g}" for name, sign in signs.items() if metadata.get(name) is not None)


def help_text(schema: type, description: str = "") -> str:
    """All keys by section, with type, range, unit, default and help."""
    lines = [description, ""] if description else []
    lines += ["arguments: [config=FILE.yaml] [key=value ...] [--dry-run] [--help]"]
    lines += ["a file may start from another one with `extends: OTHER.yaml`; overrides win over files", ""]
    return "\n".join(lines + _help_section(schema, MISSING, "")).rstrip()


def _help_section(schema: type, base: Any, prefix: str) -> list[str]:
    level = slots(schema, base, prefix)
    lines = [f"{prefix}:" if prefix else "top level:"]
    for slot in level:
        if slot.section is None:
            kind = _kind_name(slot.kind) + _range_text(slot.metadata)
            about = [part for part in (kind, slot.metadata.get("unit"), _default_text(slot)) if part]
            lines += [f"  {slot.path}  [{', '.join(about)}]"]
            lines += [f"      {slot.metadata['help']}"] if slot.metadata.get("help") else []
    lines = lines + [""] if len(lines) > 1 else []
    for slot in level:
        if slot.section is not None:
            lines += _help_section(slot.section, slot.default, slot.path)
    return lines


def _default_text(slot: Slot) -> str:
    return "required" if slot.default is MISSING else f"default {shown(plain(slot.default))}"
