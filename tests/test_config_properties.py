"""Whatever is written into a configuration, the loader gives it back or says in one line which key is wrong."""

import dataclasses
import math
import subprocess
import sys
import tempfile
import typing
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from dmd_dar import config
from dmd_dar.config import ConfigError
from dmd_dar.distillation.config import DistillConfig
from dmd_dar.pretrain import PretrainConfig
from dmd_dar.sample import SampleConfig
from dmd_dar.schema import Slot, options, walk

ROOT = Path(__file__).parents[1]
SCHEMAS = (DistillConfig, PretrainConfig, SampleConfig)
LEAVES = {schema: [slot for slot in walk(schema) if slot.section is None] for schema in SCHEMAS}
SECTIONS = {schema: [slot for slot in walk(schema) if slot.section is not None] for schema in SCHEMAS}

always = settings(
    max_examples=80, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
schemas = st.sampled_from(SCHEMAS)
words = st.text(st.characters(codec="utf-8"), max_size=12)
numbers = st.one_of(st.integers(), st.integers(-(2**70), 2**70), st.floats(), st.sampled_from([1e308, -0.0, 10**400]))
scalars = st.one_of(st.none(), st.booleans(), numbers, words)
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3))


def given_dir(schema: type) -> list[str]:
    """What each schema cannot do without."""
    return ["student=teachers/photos32"] if schema is SampleConfig else ["out_dir=out/x"]


def outcome(schema: type, *argv: str) -> tuple[Any, str]:
    """(configuration, "") or (None, the one line of a ConfigError); any other exception is the test's failure."""
    try:
        return config.load(schema, argv), ""
    except ConfigError as error:
        line = str(error)
        assert line and len(line.splitlines()) == 1, repr(line)
        return None, line


def written(document: Any, schema: type) -> tuple[Any, str]:
    """The outcome of a file that holds the document."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "job.yaml"
        file.write_text(yaml.safe_dump(document, allow_unicode=True, default_style='"'), encoding="utf-8")
        return outcome(schema, f"config={file}", *given_dir(schema))


def nested(path: str, value: Any) -> dict[str, Any]:
    for name in reversed(path.split(".")):
        value = {name: value}
    return value


def fits(value: Any, slot: Slot) -> bool:
    """Whether the type alone lets a value pass; what the loader says of ranges and rules is its own."""
    for kind in options(slot.kind):
        origin, inner = typing.get_origin(kind), typing.get_args(kind)
        if origin is Literal and any(type(value) is type(choice) and value == choice for choice in inner):
            return True
        if kind is float and type(value) in (int, float) or kind is type(None) and value is None:
            return True
        if kind in (bool, int, str) and type(value) is kind or origin is tuple and isinstance(value, list):
            return True
    return False


@always
@given(schema=schemas, data=st.data(), value=values)
def test_any_value_of_any_key_is_taken_or_named(schema, data, value):
    slot = data.draw(st.sampled_from(LEAVES[schema]))
    cfg, line = written(nested(slot.path, value), schema)
    if not fits(value, slot):
        assert cfg is None
    if cfg is None and not isinstance(value, dict):
        assert slot.path in line or any(name in line for name in (slot.name, slot.path.partition(".")[0])), line


def outside(slot: Slot) -> list[float]:
    """Numbers that the key's range leaves out, and those that no range holds."""
    told = {name: slot.metadata.get(name) for name in ("above", "least", "below", "most")}
    found = [told["above"], None if told["least"] is None else told["least"] - 1]
    found += [told["below"], None if told["most"] is None else told["most"] + 1]
    return [value for value in found if value is not None] + [math.nan, math.inf, -math.inf]


NUMERIC = {schema: [slot for slot in LEAVES[schema] if {int, float} & {*options(slot.kind)}] for schema in SCHEMAS}


@pytest.mark.parametrize("schema", SCHEMAS)
def test_every_number_of_every_key_is_finite_and_within_its_range(schema):
    checked = 0
    for slot in NUMERIC[schema]:
        for value in outside(slot):
            if int in options(slot.kind) and math.isfinite(value):
                value = int(value)
            cfg, line = written(nested(slot.path, value), schema)
            assert cfg is None and slot.path in line, (slot.path, value, line)
            checked += math.isfinite(value)
    assert checked >= len(NUMERIC[schema]) // 2  # most keys have a bound


@always
@given(path=st.sampled_from(["log.name", "log.project"]), before=words, after=words)
def test_a_name_leads_nowhere(path, before, after):
    for text in (f"{before}../{after}", f"{before}/{after}", f"{before}\\{after}"):
        cfg, line = written(nested(path, text), DistillConfig)
        assert cfg is None and (path in line or "interpolations" in line), line


@always
@given(schema=schemas, name=words, value=values)
@example(schema=DistillConfig, name="../../etc/passwd", value=1)
@example(schema=DistillConfig, name="студент", value={"lr": 1})
@example(schema=DistillConfig, name="__class__", value="x")
def test_unknown_keys_are_refused_by_name(schema, name, value):
    known = {slot.path.partition(".")[0] for slot in walk(schema)} | {"extends"}
    if name in known:
        return
    cfg, line = written({name: value}, schema)
    assert cfg is None and ("unknown key" in line or "interpolations" in line or "quote it" in line or "syntax" in line)


@always
@given(schema=schemas, data=st.data(), text=st.one_of(words, st.sampled_from([".nan", ".inf", "1e999", "-9" * 40])))
def test_any_text_of_an_override_is_taken_or_named(schema, data, text):
    slot = data.draw(st.sampled_from(LEAVES[schema]))
    cfg, line = outcome(schema, *given_dir(schema), f"{slot.path}={text}")
    assert cfg is not None or slot.name in line or slot.path.partition(".")[0] in line, line


@always
@given(schema=schemas, argument=words)
def test_any_argument_is_taken_or_told(schema, argument):
    if not argument.startswith("config="):
        outcome(schema, *given_dir(schema), argument)


@always
@given(schema=schemas, text=st.one_of(words, st.binary(max_size=30)))
def test_any_file_is_taken_or_told(schema, text):
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "job.yaml"
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        cfg, line = outcome(schema, f"config={file}", *given_dir(schema))
        assert cfg is not None or "job.yaml" in line


@always
@given(path=words)
@example(path="\0")
@example(path="../" * 40)
@example(path="x" * 5000)
def test_any_name_of_a_file_is_taken_or_told(path):
    for argument in (f"config={path}", f"data.path={path}", f"regression.pairs={path}"):
        outcome(DistillConfig, "out_dir=out/x", "data.name=folder", argument)


@always
@given(schema=schemas, data=st.data(), value=st.one_of(scalars, st.lists(scalars, max_size=2)))
def test_a_section_takes_keys_only(schema, data, value):
    if not SECTIONS[schema]:
        return
    slot = data.draw(st.sampled_from(SECTIONS[schema]))
    cfg, line = written(nested(slot.path, value), schema)
    assert (cfg is not None) == (value is None and type(None) in options(slot.kind))
    assert cfg is not None or slot.path in line


@always
@given(schema=schemas, data=st.data())
def test_a_section_in_the_wrong_place_is_an_unknown_key(schema, data):
    places = [slot for slot in SECTIONS[schema] if slot.path.count(".") == 0]
    if len(places) < 2:
        return
    outer, inner = data.draw(st.permutations(places))[:2]
    cfg, line = written({outer.name: {inner.name: {"x": 1}}}, schema)
    assert cfg is None and f"{outer.name}.{inner.name}" in line and "unknown key" in line


def in_type(slot: Slot) -> st.SearchStrategy[Any]:
    """Values of the key's type within its range; rules across keys may still refuse them."""
    kind = next(option for option in options(slot.kind) if option is not type(None))
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    bounds = {name: slot.metadata.get(name) for name in ("above", "least", "below", "most")}
    low = bounds["above"] if bounds["least"] is None else bounds["least"]
    high = bounds["below"] if bounds["most"] is None else bounds["most"]
    floats = st.floats(
        low,
        high,
        allow_nan=False,
        allow_infinity=False,
        exclude_min=bounds["above"] is not None,
        exclude_max=bounds["below"] is not None,
    )
    if origin is Literal:
        return st.sampled_from(inner)
    if origin is tuple and (slot.metadata.get("path") or str in inner):
        return st.just(list(slot.default))
    if origin is tuple:
        return st.lists(floats if float in inner else st.integers(1, 9), min_size=1, max_size=3)
    if kind is float:
        return floats
    if kind is int:
        least = -(2**62) if low is None else math.ceil(low) + (bounds["above"] is not None)
        return st.integers(least, 2**62 if high is None else math.floor(high))
    if kind is bool:
        return st.booleans()
    return st.just(slot.default) if slot.metadata.get("path") else words.filter(str.strip)


@always
@given(schema=schemas, data=st.data())
def test_what_loads_comes_back_from_its_own_yaml(schema, data):
    chosen = data.draw(st.lists(st.sampled_from(LEAVES[schema]), max_size=4, unique_by=lambda slot: slot.path))
    merged: dict[str, Any] = {}
    for slot in chosen:
        section = merged
        for name in slot.path.split(".")[:-1]:
            section = section.setdefault(name, {})
        section[slot.name] = data.draw(in_type(slot))
    cfg, _ = written(merged, schema)
    if cfg is None:
        return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.yaml"
        file.write_text(config.to_yaml(cfg), encoding="utf-8")
        assert config.load(schema, [f"config={file}"]) == cfg
    assert config.from_dict(schema, config.to_dict(cfg)) == cfg
    assert dataclasses.is_dataclass(cfg)


@pytest.mark.parametrize(
    ("job", "argument", "said"),
    [
        (["distill.py"], "studnt.lr=1", "studnt.lr = 1 (command line): unknown key; nearest valid key: student.lr"),
        (["distill.py"], "student.lr=.nan", "student.lr = nan (command line): is not a finite number"),
        (["distill.py"], "log.name=../../x", "log.name = '../../x' (command line): name must be printable"),
        (["-m", "dmd_dar.pretrain"], "steps=1e400", "steps = inf (command line): expected int"),
        (["-m", "dmd_dar.pretrain"], "config=näh.yaml", "config = 'näh.yaml': does not exist"),
        (["-m", "dmd_dar.sample"], "n=[1,2]", "n = [1, 2] (command line): expected int, got a list"),
    ],
)
def test_a_mistake_in_the_shell_is_one_line_and_writes_nothing(tmp_path, job, argument, said):
    out = tmp_path / "out"
    place = f"out={out}" if "dmd_dar.sample" in job else f"out_dir={out}"
    job = [str(ROOT / job[0]), *job[1:]] if job[0].endswith(".py") else job
    command = [sys.executable, *job, argument, place]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert (ran.returncode, ran.stdout) == (2, "") and not out.exists()
    (line,) = ran.stderr.splitlines()
    assert line.startswith(f"error: {said}")
