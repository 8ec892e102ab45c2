import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from dmd_dar.errors import UserError
from dmd_dar.train.processes import launch, supervisor
from dmd_dar.train.processes.runtime import LaunchConfig
from tests.train.waiting import Config, Launch, job

ROOT = Path(__file__).parents[3]


def pids(folder: Path, patience: float = 120) -> list[int]:
    began = time.monotonic()
    while not all((folder / f"began{i}").exists() and (folder / f"began{i}").read_text() for i in (0, 1)):
        assert time.monotonic() - began < patience
        time.sleep(0.05)
    return [int((folder / f"began{i}").read_text()) for i in (0, 1)]


def gone(pid: int, patience: float = 30) -> bool:
    began = time.monotonic()
    while time.monotonic() - began < patience:
        with contextlib.suppress(OSError):
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
                time.sleep(0.05)
                continue
        return True
    return False


def test_a_dead_process_ends_all_within_half_a_minute():
    """The others get GRACE seconds once it is seen to be dead, which takes LOOK at most."""
    assert launch.GRACE + supervisor.LOOK < 30


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(launch, "GRACE", 1.0)
    monkeypatch.delenv("WORLD_SIZE", raising=False)


@pytest.mark.parametrize(
    "act, code, said",
    [("die", 1, "process 1 of 2 was ended by SIGKILL"), ("raise", 1, "process 1 of 2 failed with exit code 1")],
)
def test_a_process_that_fails_ends_them_all(tmp_path, capfd, act, code, said):
    with pytest.raises(SystemExit) as end:
        launch.run(job, Config(tmp_path, act))
    printed = capfd.readouterr().err
    assert end.value.code == code and said in printed.splitlines()[-1]
    assert ("ZeroDivisionError: planted" in printed) == (act == "raise")
    assert all(gone(pid) for pid in pids(tmp_path)) and not (tmp_path / "saved0").exists()


def test_a_refusal_in_one_process_is_the_commands(tmp_path):
    with pytest.raises(UserError, match="this is wrong; do that"):
        launch.run(job, Config(tmp_path, "refuse"))


def command(folder: Path, act: str = "wait") -> subprocess.Popen:
    code = "from pathlib import Path; from dmd_dar.train import launch; from tests.train.waiting import Config, job; "
    code += f"launch.run(job, Config(Path({str(folder)!r}), {act!r}))"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True)


def test_a_signal_is_passed_on_and_sent_to_all_it_counts_once(tmp_path):
    parent = command(tmp_path)
    for pid in (parent.pid, *pids(tmp_path)):
        os.kill(pid, signal.SIGTERM)
    assert parent.wait(60) == 143
    assert (tmp_path / "saved0").exists() and (tmp_path / "saved1").exists()


def test_a_failure_of_the_last_save_is_told_although_a_stop_was_asked_for(tmp_path):
    parent = command(tmp_path, "fill")
    pids(tmp_path)
    parent.send_signal(signal.SIGTERM)
    assert "UserError: no room for the last checkpoint" in parent.communicate(timeout=60)[1]
    assert parent.returncode == 1 and (tmp_path / "saved1").exists()


@pytest.mark.parametrize(
    ("codes", "failed", "asked", "guilty"),
    [
        ([143, 0], 0, False, None),
        ([143, -9], 0, True, None),
        ([-15, 143], 0, True, None),
        ([143, -9], 0, False, 1),
        ([143, 2], 0, True, 1),
        ([-9, 1], 1, True, 1),
    ],
)
def test_whose_failure_ended_the_processes(codes, failed, asked, guilty):
    assert launch.culprit(codes, failed, asked) == guilty


def test_no_process_outlives_a_parent_that_is_killed(tmp_path):
    parent = command(tmp_path)
    workers = pids(tmp_path)
    parent.kill()
    parent.wait()
    assert all(gone(pid) for pid in workers)


def test_how_many_processes_a_command_starts(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert launch.processes_of(LaunchConfig()) == 4
    assert launch.processes_of(LaunchConfig(cpu=True)) == 1
    assert launch.processes_of(LaunchConfig(cpu=True, processes=6)) == 6
    assert launch.processes_of(LaunchConfig(processes=2)) == 2
    with pytest.raises(UserError, match="launch.processes = 5: there are 4 GPUs"):
        launch.processes_of(LaunchConfig(processes=5))


MET = {"RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


def test_where_a_launcher_has_started_processes_none_is_added(monkeypatch):
    for name, value in {"WORLD_SIZE": "2", **MET}.items():
        monkeypatch.setenv(name, value)
    seen = []
    launch.run(seen.append, Config(Path(), "", Launch(processes=3)))
    assert len(seen) == 1
