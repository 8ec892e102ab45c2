"""The log holds each step once, whatever died in between; progress tells speed and time left."""

import dataclasses
import io
import json
import math
import sys
import time
from pathlib import Path

import pytest
import torch

from dmd_dar.train.disk import log
from dmd_dar.train.disk.folder import FolderError, RunFolder
from dmd_dar.train.disk.log import LogConfig, Progress, RunLog
from dmd_dar.train.processes.runtime import LaunchConfig, Runtime

QUIET = LogConfig(wandb="disabled")


@pytest.fixture(scope="module", autouse=True)
def process() -> Runtime:
    """Trackers are accelerate's, which has to know the processes."""
    return Runtime(LaunchConfig(cpu=True))


@pytest.fixture
def folder(tmp_path: Path):
    with RunFolder.open(tmp_path / "run", {"steps": 4}) as opened:
        yield opened


def lines(folder: RunFolder) -> list[str]:
    return (folder.path / "log.jsonl").read_text().splitlines()


def test_a_record_is_on_disk_when_write_returns(folder: RunFolder) -> None:
    with RunLog.open(folder, QUIET, {}, 0) as run:
        run.write({"step": 1, "loss": 0.5})
        assert [json.loads(line) for line in lines(folder)] == [{"step": 1, "loss": 0.5}]


def test_resume_drops_what_the_dead_run_wrote_beyond_the_checkpoint(folder: RunFolder) -> None:
    with RunLog.open(folder, QUIET, {}, 0) as run:
        for step in (1, 2, 3, 4):
            run.write({"step": step, "loss": 1.0})
    with (folder.path / "log.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')  # killed in the middle of a line
    with RunLog.open(folder, QUIET, {}, 2) as run:
        run.write({"step": 3, "loss": 2.0})
    records = log.read(folder.path / "log.jsonl")
    assert [(record["step"], record["loss"]) for record in records] == [(1, 1.0), (2, 1.0), (3, 2.0)]


@pytest.mark.parametrize("tail", [b'{"step": 3, "lo', b"\0" * 99, b"\0\0\n", b'{"step": 3\xff}\n{"step": 4}\n'])
def test_a_tail_that_a_crash_spoilt_is_dropped(folder: RunFolder, tail: bytes) -> None:
    path = folder.path / "log.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n' + tail)
    assert [record["step"] for record in log.read(path)] == [1, 2]
    RunLog.open(folder, QUIET, {}, 2).close()
    assert lines(folder) == ['{"step": 1}', '{"step": 2}']


def test_a_fresh_start_in_a_used_folder_starts_the_log_afresh(folder: RunFolder) -> None:
    for _ in range(2):
        with RunLog.open(folder, QUIET, {}, 0) as run:
            run.write({"step": 1})
    assert lines(folder) == ['{"step": 1}']


def test_numbers_that_are_not_finite_keep_their_name_in_valid_json(folder: RunFolder) -> None:
    with RunLog.open(folder, QUIET, {}, 0) as run:
        run.write({"step": 1, "loss": math.nan, "norms": [math.inf, 1.0], "t": torch.tensor([0.5, -math.inf])})
    assert json.loads(lines(folder)[0], parse_constant=pytest.fail) == {
        "step": 1, "loss": "nan", "norms": ["inf", 1.0], "t": [0.5, "-inf"],
    }  # fmt: skip


def test_other_processes_write_nothing() -> None:
    with RunLog.open(None, LogConfig(wandb="online"), {}, 0) as run:
        run.write({"step": 1})


def test_wandb_is_imported_only_where_asked_for(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    RunLog.open(folder, QUIET, {}, 0).close()
    with pytest.raises(FolderError, match="log.wandb = offline: wandb cannot be imported .*use log.wandb=disabled"):
        RunLog.open(folder, LogConfig(wandb="offline"), {}, 0)


def test_offline_wandb_stays_in_the_run_folder_and_keeps_its_id(folder: RunFolder) -> None:
    for step in (0, 1):
        with RunLog.open(folder, LogConfig(wandb="offline"), {"student": {"lr": 1e-4}}, step) as run:
            run.write({"step": step + 1, "loss": 0.5, "health/gap": 0.0625})
    runs = sorted((folder.path / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(runs) == 2 and len({run.name for run in runs}) == 1
    patience = time.monotonic() + 30  # of a busy machine: the last of them may reach the disk after the run has ended
    while not all(b"health/gap" in run.read_bytes() and b"0.0625" in run.read_bytes() for run in runs):
        assert time.monotonic() < patience
        time.sleep(0.1)
    assert [record["step"] for record in log.read(folder.path / "log.jsonl")] == [1, 2]


def test_tensorboard_is_off_by_default_and_one_error_where_it_is_missing(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not LogConfig().tensorboard
    for name in ("tensorboard", "torch.utils.tensorboard", "tensorboardX"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(FolderError, match="log.tensorboard = true: .*dmd-dar.tensorboard.*, or use log.tensorboard="):
        RunLog.open(folder, dataclasses.replace(QUIET, tensorboard=True), {}, 0)


def test_tensorboard_holds_every_step_once_in_the_run_folder(folder: RunFolder) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = dataclasses.replace(QUIET, tensorboard=True)
    with RunLog.open(folder, settings, {}, 0) as run:
        for step in (1, 2, 3):
            run.write({"step": step, "health/gap": 0.5 * step, "health/warnings": "too high"})
    with RunLog.open(folder, settings, {}, 2) as run:
        run.write({"step": 3, "health/gap": 0.0625})
    events = EventAccumulator(str(folder.path / "tensorboard"))
    events.Reload()
    assert [(one.step, one.value) for one in events.Scalars("health/gap")] == [(1, 0.5), (2, 1.0), (3, 0.0625)]


@pytest.fixture
def without_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """No credentials anywhere, and whoever asks for them fails."""
    import wandb

    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))
    monkeypatch.setattr("builtins.input", lambda *given: pytest.fail("asked for input"))
    monkeypatch.setattr("getpass.getpass", lambda *given, **more: pytest.fail("asked for a key"))
    wandb.teardown()
    yield
    wandb.teardown()


def test_wandb_online_without_a_key_is_one_error_and_no_question(folder: RunFolder, without_key: None) -> None:
    with pytest.raises(FolderError) as told:
        RunLog.open(folder, LogConfig(wandb="online"), {}, 0)
    line = str(told.value)
    assert "log.wandb = online: no API key is set" in line and "WANDB_API_KEY" in line and "\n" not in line


def test_wandb_offline_asks_for_nothing_and_says_nothing(
    folder: RunFolder, without_key: None, capfd: pytest.CaptureFixture[str]
) -> None:
    with RunLog.open(folder, LogConfig(), {}, 0) as run:
        wandb_run = run.wandb.tracker
        assert wandb_run.settings.mode == "offline" and wandb_run.offline
        run.write({"step": 1, "health/gap": 0.5, "health/warnings": "too high; lower it"})
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("wrong", ["../../etc", "a/b", "what?", "line\nbreak"])
def test_names_for_wandb_lead_nowhere(wrong: str) -> None:
    for name in ("project", "name"):
        with pytest.raises(ValueError, match=f"^{name} must be printable and without /"):
            LogConfig(**{name: wrong})


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_in_a_file_is_a_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = [100.0]
    monkeypatch.setattr(log.time, "monotonic", lambda: clock[0])
    with Progress(20, 4, interval=30, stream=io.StringIO()) as progress:
        for step in range(5, 21):
            clock[0] += 10
            progress.advance(step)
    told = capsys.readouterr().err.splitlines()
    assert told[0] == "step 7/20  0.1 steps/s  ETA 02:10"
    assert len(told) == 6 and told[-1] == "step 20/20  0.1 steps/s  ETA 00:00"
    assert progress.rate == pytest.approx(0.1)


def test_progress_on_a_terminal_is_a_bar_and_in_other_processes_silent(capsys: pytest.CaptureFixture[str]) -> None:
    terminal = Terminal()
    with Progress(4, 2, stream=terminal) as bar, Progress(4, 2, enabled=False, stream=io.StringIO()) as none:
        for step in (3, 4):
            bar.advance(step)
            none.advance(step)
    assert "4/4" in terminal.getvalue() and "step/s" in terminal.getvalue()
    assert capsys.readouterr() == ("", "")
