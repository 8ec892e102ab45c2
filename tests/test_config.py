"""Each error a user can make in a configuration is one line with the key, the value, its place and the remedy."""

import dataclasses
import json
from pathlib import Path
from typing import Literal

import pytest

from dmd_dar import config
from dmd_dar.config import ConfigError
from dmd_dar.keys import key
from dmd_dar.train.processes.runtime import LaunchConfig


@dataclasses.dataclass(frozen=True)
class Routing:
    query: Literal["residual", "static", "timestep"] = key("residual", "what asks the sources")
    chunk_size: int = key(4, "sublayers per chunk", unit="sublayers", least=1)


@dataclasses.dataclass(frozen=True)
class Student:
    lr: float = key(1e-4, "Adam's step size", above=0)
    routing: Routing = key(factory=Routing)
    warm: bool = key(False, "warm start")


@dataclasses.dataclass(frozen=True)
class Gan:
    weight: float = key(0.1, "loss weight", least=0)


@dataclasses.dataclass(frozen=True)
class Job:
    out_dir: str = key(help="the run folder")
    steps: int = key(100, "student updates", unit="steps", least=1)
    rungs: tuple[float, ...] = key((1.0, 0.5), "times at which the student is called", above=0, most=1)
    betas: tuple[float, float] = key((0.9, 0.99), "Adam's averages", least=0, below=1)
    seed: int = key(0, "of every draw")
    note: str = key("", "free text")
    teacher: str | None = key(None, "teacher folder", path=True)
    runs: tuple[str, ...] = key((), "run folders", path=True)
    cap: float | None = key(None, "gradient cap", above=0)
    student: Student = key(factory=lambda: Student(lr=2e-4))
    gan: Gan | None = key(None)

    def __post_init__(self) -> None:
        if self.rungs[0] != 1 or any(a <= b for a, b in zip(self.rungs, self.rungs[1:], strict=False)):
            raise ValueError(f"rungs must descend strictly from 1, got {self.rungs}")
        if self.seed == 13:
            raise ValueError("student.lr is too high for seed 13")


GOOD = "out_dir=out/a"


def message(*argv: str) -> str:
    with pytest.raises(ConfigError) as caught:
        config.load(Job, argv)
    text = str(caught.value)
    assert "\n" not in text
    return text


def yaml_file(folder: Path, text: str, name: str = "job.yaml") -> Path:
    (folder / name).write_text(text)
    return folder / name


def test_defaults_files_and_overrides_merge_in_that_order(tmp_path: Path) -> None:
    file = yaml_file(tmp_path, "out_dir: out/b\nstudent:\n  lr: 3e-4\n  routing: {chunk_size: 2}\nrungs: [1, 0.25]\n")
    cfg = config.load(Job, [f"config={file}", "student.lr=1", "student.routing.query=static"])
    assert cfg == Job("out/b", rungs=(1.0, 0.25), student=Student(lr=1.0, routing=Routing("static", 2)))
    assert isinstance(cfg.student.lr, float) and isinstance(cfg.rungs[0], float)
    with pytest.raises(dataclasses.FrozenInstanceError):
        cfg.student.lr = 2.0  # type: ignore[misc]


def test_a_factorys_own_defaults_survive_a_partial_section() -> None:
    assert config.load(Job, [GOOD, "student.warm=true"]).student == Student(lr=2e-4, warm=True)


def test_a_choice_that_yaml_reads_as_a_truth_value_needs_no_quotes(tmp_path: Path) -> None:
    assert config.load(LaunchConfig, ["precision=no"]) == LaunchConfig(precision="no")
    file = yaml_file(tmp_path, "precision: no\n")
    assert config.load(LaunchConfig, [f"config={file}"]).precision == "no"
    for text in ("precision=yes", "precision=true", "precision=0"):
        with pytest.raises(ConfigError, match="expected one of auto, no, bf16"):
            config.load(LaunchConfig, [text])


def test_optional_section_is_null_or_a_section() -> None:
    assert config.load(Job, [GOOD]).gan is None
    assert config.load(Job, [GOOD, "gan.weight=0.5"]).gan == Gan(0.5)
    assert config.load(Job, [GOOD, "gan.weight=0.5", "gan=null"]).gan is None
    assert config.load(Job, [GOOD, "gan=null", "gan={weight: 2}"]).gan == Gan(2.0)


@pytest.mark.parametrize(
    ("argument", "parts"),
    [
        ("stepz=3", ["stepz = 3", "unknown key", "nearest valid key: steps"]),
        ("student.routing.chunk=3", ["student.routing.chunk = 3", "nearest valid key: student.routing.chunk_size"]),
        ("lr=3", ["lr = 3", "nearest valid key: student.lr"]),
        ("steps.x=3", ["steps = {'x': 3}", "expected int, got a section", "steps is a value, not a section"]),
        ("steps=true", ["steps = True", "expected int, got bool True"]),
        ("steps=2.0", ["steps = 2.0", "expected int", "write 2"]),
        ("steps=2.5", ["steps = 2.5", "expected int, got float 2.5"]),
        ("steps=null", ["steps = null", "expected int, got null"]),
        ("steps=[1]", ["steps = [1]", "expected int, got a list"]),
        ("steps='7'", ["steps = '7'", "expected int, got the string '7'", "write a number without quotes"]),
        ("steps=0", ["steps = 0", "must be >= 1"]),
        ("student.lr=0", ["student.lr = 0", "must be > 0"]),
        ("student.lr=-1e-4", ["student.lr = -0.0001", "must be > 0"]),
        ("student.lr='1e-4'", ["student.lr = '1e-4'", "expected float", "write a number without quotes"]),
        ("student.lr=true", ["student.lr = True", "expected float, got bool True"]),
        ("student.lr=.nan", ["student.lr = nan", "not a finite number"]),
        ("student.lr=1e999", ["student.lr = inf", "not a finite number"]),
        ("cap=-.inf", ["cap = -inf", "not a finite number"]),
        ("rungs=[1,.nan]", ["rungs = [1, nan]", "not a finite number"]),
        ("rungs=[1,0.5,0]", ["rungs = [1, 0.5, 0]", "must be > 0 and <= 1"]),
        ("rungs=[1.5,0.5]", ["rungs = [1.5, 0.5]", "must be > 0 and <= 1"]),
        ("rungs=[0.9,0.5]", ["rungs = [0.9, 0.5]", "must descend strictly from 1"]),
        ("rungs=[1,0.5,0.5]", ["rungs = [1.0, 0.5, 0.5]", "must descend strictly from 1"]),
        ("rungs=[]", ["rungs = []", "is empty"]),
        ("rungs=1", ["rungs = 1", "expected list of float, got int 1", "write rungs=[1]"]),
        ("rungs=[1,a]", ["rungs = [1, 'a']", "expected list of float"]),
        ("betas=[0.9]", ["betas = [0.9]", "expected list [float, float]"]),
        ("betas=[0.9,1]", ["betas = [0.9, 1]", "must be >= 0 and < 1"]),
        ("seed=13", ["student.lr = 0.0002", "too high for seed 13"]),
        ("student=3", ["student = 3", "student is a section", "such as student.lr"]),
        ("student=null", ["student = null", "student is a section"]),
        ("student.warm=1", ["student.warm = 1", "expected bool, got int 1"]),
        ("student.routing.query=statik", ["expected one of residual, static, timestep", "nearest choice: static"]),
        ("note=5", ["note = 5", "expected str, got int 5", "quote it"]),
        ("out_dir=", ["out_dir = ''", "is empty"]),
        ("out_dir=' '", ["out_dir = ' '", "is empty"]),
        ("out_dir=???", ["out_dir = '???'", "is empty"]),
        ("out_dir=null", ["out_dir = null", "expected str, got null"]),
        ("teacher=no/where", ["teacher = 'no/where'", "no such file or folder"]),
        ("runs=[tests,no/where]", ["runs = 'no/where'", "no such file or folder"]),
        ("note=${oc.env:HOME}", ["note = '${oc.env:HOME}'", "interpolations are refused"]),
        ("runs=[a,'${note}']", ["runs = '${note}'", "interpolations are refused"]),
        ("note=${", ["note = '${'", "interpolations are refused"]),
        ("student.${note}=3", ["student.${note}", "interpolations are refused"]),
        ("student={'${note}': 3}", ["interpolations are refused"]),
        ("student={lr: 1, lr: 2}", ["student", "duplicate key lr"]),
        ("student={1: 2}", ["student", "key 1 is not a string", "quote it"]),
        ("student..lr=1", ["'student..lr=1'", "not a key=value pair"]),
        ("=1", ["'=1'", "not a key=value pair"]),
        ("note=!!int x", ["note = '!!int x'", "invalid literal", "quote it"]),
        ("note=a: b", ["note = {'a': 'b'}", "expected str, got a section"]),
        ("seed=9223372036854775808", ["seed = 9223372036854775808", "64 bits"]),
        ("runs=[a", ["runs = '[a'", "line 1"]),
        ("extends=a.yaml", ["extends = 'a.yaml'", "unknown key"]),
        ("steps", ["'steps'", "not a key=value pair"]),
        ("--steps=3", ["'--steps=3'", "not a key=value pair", "key.sub=value"]),
    ],
)
def test_a_bad_override_is_one_clear_line(argument: str, parts: list[str]) -> None:
    text = message(GOOD, argument)
    for part in [*parts, "command line"]:
        assert part in text, text


@pytest.mark.parametrize(
    ("argument", "name", "value"),
    [
        ("out_dir=out/run #1", "out_dir", "out/run #1"),
        ("note=#1", "note", "#1"),
        ("note=a # b #c", "note", "a # b #c"),
        ("note='a #b'", "note", "a #b"),
        ('note="a #b"', "note", "a #b"),
        ("runs=[tests, '#']", "runs", ("tests", "#")),
        ("runs=[tests #1, docs]", "runs", ("tests #1", "docs")),
        ("cap=null", "cap", None),
        ("seed=-3", "seed", -3),
        ("seed=0", "seed", 0),
        ("seed=1_000", "seed", 1000),
        ("seed=0x10", "seed", 16),
        ("note='010'", "note", "010"),
        ("note='1:30'", "note", "1:30"),
        ("rungs=[1,0.5]", "rungs", (1.0, 0.5)),
    ],
)
def test_an_override_is_taken_as_it_is_typed(tmp_path: Path, monkeypatch, argument: str, name: str, value: object):
    for place in ("tests", "tests #1", "docs", "#"):
        (tmp_path / place).mkdir()
    monkeypatch.chdir(tmp_path)
    assert getattr(config.load(Job, [GOOD, argument]), name) == value


def test_what_follows_a_number_is_not_dropped() -> None:
    assert "steps = '3 #x' (command line): expected int" in message(GOOD, "steps=3 #x")
    assert "student.lr = '1 #x' (command line): expected float" in message(GOOD, "student={lr: 1 #x}")


@pytest.mark.parametrize("text", ["&a b", "--- b", " b", "b ", "a\nb", "!!str b"])
def test_a_text_that_yaml_would_cut_short_is_to_be_quoted(text: str) -> None:
    told = message(GOOD, f"note={text}")
    assert "note = " in told and "YAML would read only" in told and "quote it" in told
    assert config.load(Job, [GOOD, f"note={json.dumps(text)}"]).note == text


@pytest.mark.parametrize(
    ("number", "read", "remedy"),
    [
        ("010", "octal, as 8", "write 10"),
        ("-010", "octal, as -8", "write -10"),
        ("00", "octal, as 0", "write 0"),
        ("0_17", "octal, as 15", "write 17"),
        ("0b11", "binary, as 3", "write that"),
        ("1:30", "base 60, as 90", "write that"),
        ("1:30.5", "base 60, as 90.5", "write that"),
    ],
)
@pytest.mark.parametrize("name", ["seed", "student.lr", "note", "rungs"])
def test_numbers_of_other_bases_are_refused_in_arguments_and_files(tmp_path: Path, number, read, remedy, name) -> None:
    given = f"[1, {number}]" if name == "rungs" else number
    text = f"{name}: {given}\n" if "." not in name else f"student:\n  lr: {given}\n"
    for told in (message(GOOD, f"{name}={given}"), message(f"config={yaml_file(tmp_path, text)}", GOOD)):
        assert f"{name} = {number} (" in told and read in told and remedy in told


def test_a_digit_that_octal_lacks_is_told_the_decimal_number() -> None:
    assert "seed = '08' (command line): expected int, got the string '08'; write 8" in message(GOOD, "seed=08")


def test_a_character_that_yaml_cannot_hold_is_not_to_be_quoted(tmp_path: Path) -> None:
    """A path that is not UTF-8 comes from the system as lone surrogates."""
    for argument in ("teacher=a\udcff", "out_dir=a\udcff", "runs=[a, b\udcff]"):
        told = message(GOOD, argument)
        assert "it is not UTF-8" in told and "rename it" in told and "quot" not in told
    assert 'leave the character out, or write it as "\\u0007" within double quotes' in message(GOOD, "note=a\x07b")
    assert config.load(Job, [GOOD, 'note="a\\u0007b"']).note == "a\x07b"
    assert "leave the character out" in message(f"config={yaml_file(tmp_path, 'note: a' + chr(7))}", GOOD)


def test_empty_text_and_unset_paths_are_fine_where_they_are_the_default() -> None:
    cfg = config.load(Job, [GOOD, "note=", "runs=[]", "teacher=null"])
    assert (cfg.note, cfg.runs, cfg.teacher) == ("", (), None)


def test_required_key() -> None:
    assert "out_dir (command line): required and not set; add out_dir=VALUE" in message("steps=3")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("steps: 3\nsteps: 4\n", ["duplicate key steps", "line 2"]),
        ("student:\n  lr: 1\n  lr: 2\n", ["duplicate key lr", "line 3"]),
        ("steps: [1\nseed: 2\n", ["line 2"]),
        ("", ["is empty"]),
        ("# only words\n", ["is empty"]),
        ("- 1\n- 2\n", ["is not a mapping"]),
        ("steps\n", ["is not a mapping"]),
        ("1: 2\n", ["line 1", "key 1 is not a string"]),
        ("student:\n  on: 2\n", ["student", "line 2", "key on is not a string"]),
        ("student:\n  lr: ${oc.env:X}\n", ["student.lr = '${oc.env:X}'", "line 2", "interpolations are refused"]),
        ("'${note}': 1\n", ["line 1", "interpolations are refused"]),
        ("runs: &a [*a]\n", ["runs", "contains itself"]),
        ("note: !!python/object:os.x 1\n", ["could not determine a constructor"]),
        ("student:\n  routng:\n    chunk_size: 1\n", ["student.routng", "nearest valid key: student.routing"]),
        ("config: a.yaml\n", ["config = 'a.yaml'", "unknown key"]),
        ("extends: 3\n", ["extends = 3", "extends: FILE.yaml"]),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, text: str, parts: list[str]) -> None:
    told = message(f"config={yaml_file(tmp_path, text)}", GOOD)
    for part in [*parts, "job.yaml"]:
        assert part in told, told


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    yaml_file(tmp_path, "steps: 3\n")
    assert f"does not exist; nearest is {tmp_path / 'job.yaml'}" in message(f"config={tmp_path / 'jop.yaml'}", GOOD)
    assert "is not a file" in message(f"config={tmp_path}", GOOD)
    assert "config = " in message("config=", GOOD)
    assert "several files" in message("config=a.yaml", "config=b.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"note: \xff\n")
    assert "latin.yaml" in message(f"config={tmp_path / 'latin.yaml'}", GOOD)


def test_extends_chains_relative_to_the_file_and_blames_the_right_one(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    base = yaml_file(tmp_path, "out_dir: out/a\nsteps: 5\nstudent:\n  lr: 1e-3\n", "base/dar.yaml")
    arm = yaml_file(tmp_path, "extends: base/dar.yaml\nout_dir: out/b\nstudent:\n  warm: true\n", "arm.yaml")
    cfg = config.load(Job, [f"config={arm}"])
    assert (cfg.out_dir, cfg.steps, cfg.student) == ("out/b", 5, Student(lr=1e-3, warm=True))
    base.write_text("out_dir: out/a\nstepps: 5\n")
    assert "stepps = 5" in message(f"config={arm}") and "dar.yaml" in message(f"config={arm}")
    base.write_text("extends: ../arm.yaml\n")
    assert "circle" in message(f"config={arm}") and "arm.yaml" in message(f"config={arm}")
    base.unlink()
    assert "dar.yaml' (extended by" in message(f"config={arm}")


def test_a_rule_broken_across_files_names_the_file_of_its_key(tmp_path: Path) -> None:
    file = yaml_file(tmp_path, "out_dir: out/a\nrungs: [0.5]\n")
    assert f"rungs = [0.5] ({file})" in message(f"config={file}", "steps=3")


def test_saved_configuration_round_trips(tmp_path: Path) -> None:
    cfg = config.load(Job, [GOOD, "teacher=tests", "note='1e-4'", "student.lr=1e-5", "gan.weight=0"])
    file = yaml_file(tmp_path, config.to_yaml(cfg))
    assert config.load(Job, [f"config={file}"]) == cfg
    saved = config.to_dict(cfg) | {"teacher": "gone"}
    assert config.from_dict(Job, saved).teacher == "gone"
    with pytest.raises(ConfigError, match=r"step = 3 \(out/a/config.yaml\): unknown key; nearest valid key: steps"):
        config.from_dict(Job, {"out_dir": "a", "step": 3}, where="out/a/config.yaml")


def test_differences_are_dotted_keys() -> None:
    a = config.load(Job, [GOOD])
    b = config.load(Job, [GOOD, "student.routing.query=static", "seed=1"])
    assert config.differences(a, b) == [("seed", 0, 1), ("student.routing.query", "residual", "static")]
    assert config.differences(a, a) == []


def test_run_job_exits_with_two_and_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    ran: list[Job] = []
    with pytest.raises(SystemExit) as caught:
        config.run_job(Job, ran.append, [GOOD, "stepz=3"])
    out, err = capsys.readouterr()
    assert caught.value.code == 2 and not ran and not out
    assert err == "error: stepz = 3 (command line): unknown key; nearest valid key: steps\n"
    config.run_job(Job, ran.append, [GOOD])
    assert ran == [Job("out/a")]


def test_a_jobs_own_refusal_is_an_exit_code_too(capsys: pytest.CaptureFixture[str]) -> None:
    def job(cfg: Job) -> None:
        raise ConfigError(f"steps = {cfg.steps}: the student was trained for 4")

    with pytest.raises(SystemExit) as caught:
        config.run_job(Job, job, [GOOD])
    assert caught.value.code == 2
    assert capsys.readouterr().err == "error: steps = 100: the student was trained for 4\n"


def test_dry_run_prints_the_resolved_config_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config.run_job(Job, lambda cfg: pytest.fail("the job ran"), [GOOD, "--dry-run", "steps=7"])
    file = yaml_file(tmp_path, capsys.readouterr().out)
    assert config.load(Job, [f"config={file}"]) == Job("out/a", steps=7)


def test_help_lists_every_key_with_type_unit_range_and_default(capsys: pytest.CaptureFixture[str]) -> None:
    config.run_job(Job, lambda cfg: pytest.fail("the job ran"), ["--help"], description="a job")
    text = capsys.readouterr().out
    for part in (
        "a job",
        "out_dir  [str, required]",
        "steps  [int >= 1, steps, default 100]",
        "rungs  [list of float > 0 <= 1, default [1.0, 0.5]]",
        "student.lr  [float > 0, default 0.0002]",
        "student.routing:",
        "student.routing.query  [one of residual, static, timestep, default 'residual']",
        "sublayers per chunk",
        "gan.weight",
    ):
        assert part in text, text
