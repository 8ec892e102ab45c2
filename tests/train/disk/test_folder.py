"""A run folder holds one configuration and one run; what is saved survives every refusal."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dmd_dar import atomic
from dmd_dar.atomic import write_atomic
from dmd_dar.train.disk.folder import FolderError, RunFolder

CFG = {
    "out_dir": "a",
    "steps": 10,
    "rungs": [1.0, 0.5],
    "student": {"lr": 1e-4, "cap": None},
    "log": {"every": 5},
    "launch": {"threads": 0},
    "checkpoint": {"every": 50},
}

HOLD = """
import sys, time
from dmd_dar.train.disk.folder import RunFolder
folder = RunFolder.open(sys.argv[1], {"steps": 1})
print("held", flush=True)
time.sleep(60)
"""


def changed(**values: object) -> dict:
    return CFG | values


def test_a_new_folder_and_its_resumption(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "run"
    with RunFolder.open(path, CFG) as folder:
        assert not folder.resumed
        assert sorted(p.name for p in path.iterdir()) == [".lock", "checkpoints", "config.yaml", "samples", "student"]
        assert (folder.checkpoints, folder.samples, folder.student) == tuple(
            path / name for name in ("checkpoints", "samples", "student")
        )
    with RunFolder.open(path, changed(rungs=(1.0, 0.5))) as folder:
        assert folder.resumed


def test_steps_grow_and_free_sections_change(tmp_path: Path) -> None:
    RunFolder.open(tmp_path, CFG).close()
    later = changed(steps=20, log={"every": 1}, launch={"threads": 2, "new": 1}, checkpoint={"every": 5})
    RunFolder.open(tmp_path, later).close()
    assert "steps: 20" in (tmp_path / "config.yaml").read_text()


def test_one_error_lists_every_difference_and_the_remedy_and_harms_nothing(tmp_path: Path) -> None:
    RunFolder.open(tmp_path, CFG).close()
    (tmp_path / "checkpoints" / "1.pt").write_text("weights")
    saved = (tmp_path / "config.yaml").read_text()
    other = changed(steps=5, rungs=[1.0], student={"lr": 1, "cap": None, "ema": 0.5}, log={"every": 1})
    with pytest.raises(FolderError) as caught:
        RunFolder.open(tmp_path, other)
    text = str(caught.value)
    for part in (
        f"'{tmp_path}'",
        "steps: 10 -> 5 (may only grow)",
        "rungs: [1.0, 0.5] -> [1.0]",
        "student.lr: 0.0001 -> 1",
        'student.ema: "(absent)" -> 0.5',
        "Use another out_dir or restore these values",
    ):
        assert part in text
    assert "log.every" not in text and "\n" not in text
    assert (tmp_path / "config.yaml").read_text() == saved
    assert (tmp_path / "checkpoints" / "1.pt").read_text() == "weights"
    RunFolder.open(tmp_path, CFG).close()  # the refusal left no lock behind


def test_resume_never_and_a_folder_without_its_config(tmp_path: Path) -> None:
    RunFolder.open(tmp_path, CFG, resume="never").close()
    with pytest.raises(FolderError, match="already holds a run; use another out_dir"):
        RunFolder.open(tmp_path, CFG, resume="never")
    (tmp_path / "config.yaml").unlink()
    (tmp_path / "log.jsonl").write_text("{}\n")
    with pytest.raises(FolderError, match="holds a run but no config.yaml"):
        RunFolder.open(tmp_path, CFG)


def test_a_broken_saved_config_is_told(tmp_path: Path) -> None:
    RunFolder.open(tmp_path, CFG).close()
    for text in ("a: [", "- 1\n"):
        (tmp_path / "config.yaml").write_text(text)
        with pytest.raises(FolderError, match="config.yaml' .*restore it"):
            RunFolder.open(tmp_path, CFG)


def test_two_opens_in_one_process_are_two_runs(tmp_path: Path) -> None:
    with (
        RunFolder.open(tmp_path, CFG),
        pytest.raises(FolderError, match=f"in use by another run .pid {os.getpid()} on .* since .*wait for it"),
    ):
        RunFolder.open(tmp_path, CFG)


def test_a_killed_run_leaves_no_lock(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(FolderError, match=f"pid {holder.pid} on"):
            RunFolder.open(tmp_path, {"steps": 1})
    finally:
        holder.kill()
        holder.communicate()
    with RunFolder.open(tmp_path, {"steps": 1}) as folder:
        assert folder.resumed


def test_out_dir_that_is_a_file_or_below_one(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(FolderError, match="is, or lies under, a file; use another out_dir"):
            RunFolder.open(path, CFG)
    assert (tmp_path / "file").read_text() == "mine"


def test_out_dir_that_cannot_be_written() -> None:
    with pytest.raises(FolderError, match=r"out_dir '/proc/.*' (cannot be|is)"):
        RunFolder.open("/proc/run", CFG)
    with pytest.raises(FolderError, match="out_dir '/proc' cannot be written"):
        RunFolder.open("/proc", CFG)


def test_write_atomic_replaces_whole_files_or_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    write_atomic(path, "old \u00e9")
    assert path.read_bytes() == "old \u00e9".encode()
    write_atomic(path, b"new")
    assert path.read_bytes() == b"new"

    def dies(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(atomic.os, "fsync", dies)
    with pytest.raises(OSError, match="disk full"):
        write_atomic(path, b"half")
    assert path.read_bytes() == b"new" and [p.name for p in tmp_path.iterdir()] == ["file"]
