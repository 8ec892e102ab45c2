"""Configuration: YAML files and `key=value` overrides, merged with OmegaConf onto typed frozen dataclasses.

Everything is checked before a job starts: names, types, ranges, paths, cross-field rules. A failure is one line that
names the key's full dotted path, its value, where it was written, and the remedy; `run_job` prints it and exits with
code 2. The dataclasses belong to the components (declared with `keys.key`); only jobs compose them and import this.
"""

import dataclasses
import difflib
import json
import os
import sys
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dmd_dar import keys, messages
from dmd_dar.errors import users_line
from dmd_dar.messages import LOGGER
from dmd_dar.schema import MISSING, ConfigError, Slot, entries, help_text, leaf, options, plain, shown, slots, walk
from dmd_dar.stop import leaving

T = TypeVar("T")
COMMAND_LINE = "command line"
DEFAULTS = "defaults"
# What the YAML constructors raise on text like `!!int x`, beside their own errors.
UNREADABLE = (OSError, yaml.YAMLError, OmegaConfBaseException, ValueError, TypeError, LookupError, AttributeError)
NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
FLAGS = ("--help", "-h", "--dry-run")


@dataclasses.dataclass(frozen=True)
class Layer:
    """What one file or one override says: `values` nested as in YAML, `where` for messages."""

    where: str
    values: dict[str, Any]


def load(schema: type[T], argv: Sequence[str]) -> T:
    """A checked instance of `schema` from `[config=FILE.yaml] key.sub=value ...`; `run_job`'s flags are skipped."""
    files, overrides = [], []
    for argument in argv:
        if argument in FLAGS:
            continue
        name, equals, text = argument.partition("=")
        if not equals or "" in name.split(".") or name.startswith("-"):
            raise ConfigError(f"{argument!r} ({COMMAND_LINE}): not a key=value pair; write key.sub=value, see --help")
        if name == "config":
            files.append(text)
        else:
            overrides.append(_override(name, text))
    if len(files) > 1:
        raise ConfigError(f"config = {files} ({COMMAND_LINE}): several files; name one, it may extend another")
    layers = [layer for file in files for layer in _file_layers(Path(file), ())] + overrides
    cfg = _assemble(schema, layers)
    if not getattr(cfg, "out_dir", True):
        raise ConfigError(f"out_dir = '' ({_sources(layers)}): is empty; name the folder to write to, out_dir=FOLDER")
    _check_paths(cfg, layers)
    return cfg


def from_dict(schema: type[T], values: dict[str, Any], *, where: str = "saved config") -> T:
    """A saved configuration read back, checked like a file but for paths: they may lie on another machine.

    Keys that it lacks are the schema's `BEFORE`, what was done before there was such a key, or its defaults.
    """
    return _assemble(schema, [Layer(where, keys.filled(values, getattr(schema, "BEFORE", {})))])


def read_saved(path: Path) -> dict[str, Any]:
    """The plain containers of a configuration that a run wrote. Raises ConfigError for a file that is none."""
    try:
        values = OmegaConf.to_container(OmegaConf.load(path))
        if not isinstance(values, dict):
            raise ValueError(f"it holds {type(values).__name__}, not keys")
    except UNREADABLE as error:
        problem = " ".join(str(error).split())
        raise ConfigError(f"{path} is no configuration that a run wrote: {problem}; restore it") from error
    return values  # type: ignore[return-value]


def to_dict(cfg: Any) -> dict[str, Any]:
    """Nested plain containers, tuples as lists, as YAML and JSON hold them."""
    return plain(cfg)


def to_yaml(cfg: Any) -> str:
    return OmegaConf.to_yaml(OmegaConf.create(to_dict(cfg)))


def differences(a: Any, b: Any) -> list[tuple[str, Any, Any]]:
    """(key, value in a, value in b) for every key in which two configurations differ."""
    return keys.differences(to_dict(a), to_dict(b))


def run_job(
    schema: type[T],
    job: Callable[[T], Any],
    argv: Sequence[str] | None = None,
    *,
    description: str = "",
    plan: Callable[[T], str] | None = None,
) -> None:
    """A command's `main`: `--help` and `--dry-run` print and return, a user's error is one line and exit code 2.

    From here on the package's messages are shown on stderr.

    `--dry-run` prints the configuration and then, as comments, what `plan` says of it.
    """
    argv = sys.argv[1:] if argv is None else argv
    messages.show()
    if "--help" in argv or "-h" in argv:
        print(help_text(schema, description))
        return
    try:
        cfg = load(schema, argv)
        if "--dry-run" in argv:
            print(to_yaml(cfg), end="", flush=True)
            if plan is not None:
                print("\n".join(f"# {line}".rstrip() for line in plan(cfg).splitlines()))
        else:
            with leaving():
                job(cfg)
    except Exception as error:
        message = users_line(error)
        if message is None:
            raise
        LOGGER.error(f"error: {message}")
        sys.exit(2)


def _override(name: str, text: str) -> Layer:
    """`a.b.c=text` as a layer; the text is read as YAML without comments, as OmegaConf reads a dotlist."""
    if "${" in name:
        raise ConfigError(f"{name} ({COMMAND_LINE}): interpolations are refused; write the key out")
    value = _uncommented(name, text) if text else ""
    *sections, last = name.split(".")
    values: dict[str, Any] = {last: value}
    for section in reversed(sections):
        values = {section: values}
    return Layer(COMMAND_LINE, values)


def _uncommented(name: str, text: str) -> Any:
    """The YAML value of `text`, in which no # starts a comment; plain text that YAML would cut short is refused."""
    stand_in = next(mark for mark in map(chr, range(0xE000, 0xF8FF)) if mark not in text)  # of private use, so plain
    held = text.replace("#", stand_in)
    try:
        node = _compose(held, COMMAND_LINE, name)
        value = typing.cast(dict, OmegaConf.to_container(OmegaConf.from_dotlist([f"value={held}"]), resolve=False))
    except UNREADABLE as error:
        message = str(error) if isinstance(error, ConfigError) else ""
        message = message or f"{name} = {shown(held)} ({COMMAND_LINE}): {_yaml_problem(error)}; quote it"
        raise ConfigError(message.replace(stand_in, "#").replace(ascii(stand_in)[1:-1], "#")) from error
    value = _replaced(value["value"], stand_in)
    if isinstance(node, yaml.ScalarNode) and node.style is None and isinstance(value, str) and value != text:
        remedy = f"quote it: {name}='{json.dumps(text, ensure_ascii=False)}'"
        raise ConfigError(f"{name} = {shown(text)} ({COMMAND_LINE}): YAML would read only {shown(value)}; {remedy}")
    return value


def _replaced(value: Any, stand_in: str) -> Any:
    """The value with # again wherever `stand_in` took its place."""
    if isinstance(value, dict):
        return {_replaced(name, stand_in): _replaced(entry, stand_in) for name, entry in value.items()}
    if isinstance(value, list):
        return [_replaced(entry, stand_in) for entry in value]
    return value.replace(stand_in, "#") if isinstance(value, str) else value


def _file_layers(path: Path, chain: tuple[Path, ...]) -> list[Layer]:
    """The layers of a file, what it extends first."""
    _require_file(path, chain)
    if path.resolve() in chain:
        names = " -> ".join(str(file) for file in (*chain, path.resolve()))
        raise ConfigError(f"extends = {names}: the files extend each other in a circle; remove one `extends`")
    values = _read_file(path)
    if "extends" not in values:
        return [Layer(str(path), values)]
    base = values.pop("extends")
    if not isinstance(base, str) or not base.strip() or not base.isprintable():
        raise ConfigError(f"extends = {shown(base)} ({path}): not the name of one file; write extends: FILE.yaml")
    return [*_file_layers(path.parent / base, (*chain, path.resolve())), Layer(str(path), values)]


def _require_file(path: Path, chain: tuple[Path, ...]) -> None:
    if path.name and os.path.isfile(path):  # False, too, for what can be no path at all
        return
    problem = "is not a file" if os.path.exists(path) else "does not exist"
    beside = [file.name for file in path.parent.glob("*.yaml")] if os.path.isdir(path.parent) else []
    near = difflib.get_close_matches(path.name, beside, 1)
    hint = f"nearest is {path.parent / near[0]}" if near else "name an existing YAML file"
    note = f" (extended by {chain[-1]})" if chain else ""
    raise ConfigError(f"config = {shown(str(path))}{note}: {problem}; {hint}")


def _read_file(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        node = _compose(text, str(path), "")
        if not isinstance(node, yaml.MappingNode):
            problem = "is empty" if node is None else "is not a mapping"
            raise ConfigError(f"config = '{path}': the file {problem}; write key: value lines")
        return typing.cast(dict, OmegaConf.to_container(OmegaConf.create(text), resolve=False))
    except ConfigError:
        raise
    except UNREADABLE as error:
        raise ConfigError(f"config = '{path}': {_yaml_problem(error)}; correct the file") from error


def _compose(text: str, where: str, name: str) -> yaml.Node | None:
    """The YAML tree, refused where it holds interpolations, keys that are not strings, or itself."""
    try:
        tree = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        key = f"{name} = {shown(text)}" if name else "syntax"
        raise ConfigError(f"{key} ({where}): {_yaml_problem(error)}; {_syntax_remedy(error)}") from error
    if tree is not None:
        _refuse_nodes(tree, where, name, ())
    return tree


def _syntax_remedy(error: yaml.YAMLError) -> str:
    """For a character that YAML cannot hold quotes are none: bytes that are not UTF-8 come as lone surrogates."""
    if not isinstance(error, yaml.reader.ReaderError):
        return "correct it, quoting special characters"
    code = ord(error.character) if isinstance(error.character, str) else error.character
    if 0xD800 <= code <= 0xDFFF:
        return "it is not UTF-8, which configurations are written in: rename it, or name it by a link in UTF-8"
    return f'leave the character out, or write it as "\\u{code:04x}" within double quotes'


def _refuse_nodes(node: yaml.Node, where: str, path: str, above: tuple[yaml.Node, ...]) -> None:
    place = where if where == COMMAND_LINE else f"{where}, line {node.start_mark.line + 1}"
    if any(node is parent for parent in above):
        raise ConfigError(f"{path} ({place}): the value contains itself; write it out without the alias")
    if isinstance(node, yaml.ScalarNode) and "${" in node.value:
        raise ConfigError(f"{path} = {shown(node.value)} ({place}): interpolations are refused; write the value out")
    if isinstance(node, yaml.ScalarNode) and node.tag in NUMBERS and (problem := _odd_number(node.value)):
        raise ConfigError(f"{path} = {node.value} ({place}): {problem}; or quote it if it is a text")
    if isinstance(node, yaml.SequenceNode):
        for entry in node.value:
            _refuse_nodes(entry, where, path, (*above, node))
    if isinstance(node, yaml.MappingNode):
        for name, entry in node.value:
            _refuse_nodes(name, where, f"{path}.{name.value}".lstrip("."), (*above, node))
            if name.tag not in ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"):
                key = f"the key {name.value}" if isinstance(name, yaml.ScalarNode) else "a key"
                raise ConfigError(f"{path or 'config'} ({place}): {key} is not a string; quote it")
            _refuse_nodes(entry, where, f"{path}.{name.value}".lstrip("."), (*above, node))


def _odd_number(text: str) -> str:
    """What is wrong with a number that YAML 1.1 reads in another base than ten or sixteen, with the remedy."""
    if ":" in text:
        return f"YAML reads it in base 60, as {yaml.safe_load(text)}; write that"
    digits, sign = text.lstrip("+-").replace("_", ""), "-" * text.startswith("-")
    if digits[:2] in ("0b", "0B"):
        return f"YAML reads it as binary, as {yaml.safe_load(text)}; write that"
    if len(digits) > 1 and digits.isdecimal() and digits[0] == "0":
        return f"YAML reads it as octal, as {yaml.safe_load(text)}; write {sign}{int(digits)} without the zero in front"
    return ""


def _yaml_problem(error: Exception) -> str:
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    text = " ".join(str(problem or error).split())
    return f"{text} (line {mark.line + 1}, column {mark.column + 1})" if mark is not None else text


def _assemble(schema: type[T], layers: list[Layer]) -> T:
    """Each layer is checked by itself, so that an error names its file; the merged values become the instance."""
    for layer in layers:
        _check(schema, schema, MISSING, layer.values, layer.where, "")
    merged = OmegaConf.to_container(OmegaConf.merge({}, *(layer.values for layer in layers)), resolve=False)
    return _build(schema, MISSING, typing.cast(dict, merged), layers, "")


def _check(root: type, schema: type, base: Any, values: dict[str, Any], where: str, prefix: str) -> None:
    known = {slot.name: slot for slot in slots(schema, base, prefix)}
    for name, value in values.items():
        path = f"{prefix}.{name}".lstrip(".")
        if name not in known:
            full, value = _typed_path(path, value)
            hint = _nearest(root, list(known.values()) if full == path else [], full)
            raise ConfigError(f"{full} = {shown(value)} ({where}): unknown key; {hint}")
        slot = known[name]
        if slot.section is None:
            leaf(value, slot, where)
        elif isinstance(value, dict):
            _check(root, slot.section, slot.default, value, where, path)
        elif value is not None or type(None) not in options(slot.kind):
            some = slots(slot.section, slot.default, path)[0].path
            raise ConfigError(f"{path} = {shown(value)} ({where}): {path} is a section; set its keys, such as {some}")


def _typed_path(path: str, value: Any) -> tuple[str, Any]:
    """`a: {b: 1}` as it is typed on a command line, a.b and 1; anything else as it is."""
    while isinstance(value, dict) and len(value) == 1:
        ((name, value),) = value.items()
        path = f"{path}.{name}"
    return path, value


def _nearest(root: type, siblings: list[Slot], path: str) -> str:
    name = path.rpartition(".")[2]
    near = difflib.get_close_matches(name, [slot.name for slot in siblings], 1)
    if near:
        return f"nearest valid key: {next(slot.path for slot in siblings if slot.name == near[0])}"
    everywhere = [slot.path for slot in walk(root)]
    same_name = [other for other in everywhere if other.rpartition(".")[2] == name]
    same_name.sort(key=lambda other: -difflib.SequenceMatcher(None, path, other).ratio())
    near = same_name[:1] or difflib.get_close_matches(path, everywhere, 1, cutoff=0.0)
    return f"nearest valid key: {near[0]}" if near else "see --help"


def _build(schema: type[T], base: Any, values: dict[str, Any], layers: list[Layer], prefix: str) -> T:
    values_of, checked = {}, {}
    for slot in slots(schema, base, prefix):
        value = values.get(slot.name, MISSING)
        if slot.section is not None and isinstance(value, dict):
            values_of[slot.name] = _build(slot.section, slot.default, value, layers, slot.path)
        elif value is not MISSING:
            values_of[slot.name] = None if slot.section is not None else leaf(value, slot, _origin(layers, slot.path))
        elif slot.default is not MISSING:
            values_of[slot.name] = slot.default
        elif slot.section is not None:
            values_of[slot.name] = _build(slot.section, MISSING, {}, layers, slot.path)
        else:
            raise ConfigError(f"{slot.path} ({_sources(layers)}): required and not set; add {slot.path}=VALUE")
        checked[slot.name] = values_of[slot.name]
    try:
        return schema(**values_of)
    except (ValueError, TypeError) as error:
        raise _rule_error(error, checked, layers, prefix) from error


def _rule_error(error: Exception, values: dict[str, Any], layers: list[Layer], prefix: str) -> ConfigError:
    """A `__post_init__` rule; a message that starts with a key's name (`low must be ...`) tells the key and value."""
    rule = " ".join(str(error).split())
    name = rule.partition(" ")[0].strip(":,;'\"`")
    value: Any = values
    for part in name.split("."):
        value = value.get(part, MISSING) if isinstance(value, dict) else getattr(value, part, MISSING)
    if value is MISSING:
        return ConfigError(f"{prefix or 'config'} ({_sources(layers)}): {rule}; see --help")
    path = f"{prefix}.{name}".lstrip(".")
    written = "" if dataclasses.is_dataclass(value) else f" = {shown(plain(value))}"
    where = _origin(layers, path)
    return ConfigError(f"{path}{written} ({where if where != DEFAULTS else _sources(layers)}): {rule}; see --help")


def _origin(layers: list[Layer], path: str) -> str:
    """Where a key was last written."""
    for layer in reversed(layers):
        value: Any = layer.values
        for part in path.split(".") if path else ():
            value = value.get(part, MISSING) if isinstance(value, dict) else MISSING
        if value is not MISSING:
            return layer.where
    return DEFAULTS


def _sources(layers: list[Layer]) -> str:
    return ", ".join(dict.fromkeys(layer.where for layer in layers)) or COMMAND_LINE


def _check_paths(cfg: Any, layers: list[Layer]) -> None:
    for slot in walk(type(cfg), cfg):
        if slot.metadata.get("path") and slot.default is not None:
            for entry in entries(slot.default):
                if entry and not os.path.exists(entry):
                    fault = f"{slot.path} = {shown(entry)} ({_origin(layers, slot.path)})"
                    raise ConfigError(f"{fault}: no such file or folder; name an existing path")
