"""A folder that is replaced holds the old or the new, and always what somebody else has put there."""

import os
import shutil
import signal
from pathlib import Path

import pytest

from dmd_dar import atomic
from dmd_dar.atomic import recover_folder, recover_folders, replaced_folder, write_atomic

OWN = ("README.md", "adapter")


def put(target: Path, text: str, *names: str) -> None:
    """Replace `target` by a folder whose files, README.md and `names`, hold `text`."""
    with replaced_folder(target, OWN) as new:
        (new / "parts").mkdir()
        for name in ("README.md", "parts/a", *names):
            write_atomic(new / name, text)


def add_users(target: Path) -> None:
    """What a user may have put there: a file, a link to nowhere, a pipe, and a folder that holds some."""
    (target / "mine" / "deep").mkdir(parents=True)
    (target / "notes.txt").write_text("notes")
    (target / "mine" / "deep" / "b.txt").write_text("b")
    (target / "mine" / "link").symlink_to("deep")
    (target / "nowhere").symlink_to("/nowhere/at/all")
    os.mkfifo(target / "pipe")


def held(folder: Path) -> dict[str, str]:
    """The files and links below a folder."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            found[str(path.relative_to(folder))] = f"-> {os.readlink(path)}"
        elif not path.is_dir():
            found[str(path.relative_to(folder))] = path.read_text() if path.is_file() else "pipe"
    return found


USERS = {"notes.txt": "notes", "mine/deep/b.txt": "b", "mine/link": "-> deep", "nowhere": "-> /nowhere/at/all"}
USERS |= {"pipe": "pipe"}
OLD = {"README.md": "old", "parts/a": "old", "adapter": "old", **USERS}
NEW = {"README.md": "new", "parts/a": "new", **USERS}


def start(target: Path) -> None:
    if target.parent.exists():
        shutil.rmtree(target.parent)
    target.parent.mkdir()
    put(target, "old", "adapter")
    add_users(target)


def killed(at: int, target: Path) -> bool:
    """Whether a process that replaces the folder, killed at its point number `at`, reached that point."""
    child = os.fork()
    if not child:
        passed = 0

        def reached(point: str) -> None:
            nonlocal passed
            passed += 1
            if passed == at:
                os.kill(os.getpid(), signal.SIGKILL)

        atomic.reached = reached
        try:
            put(target, "new")
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


@pytest.fixture(params=[True, False], ids=["exchange", "no exchange"])
def exchange(request, monkeypatch) -> bool:
    if not request.param:
        monkeypatch.setattr(atomic, "_exchanged", lambda a, b: False)
    return request.param


@pytest.mark.parametrize("mend", ["resume", "save"])
def test_killed_at_any_point_of_a_replacement_nothing_is_missing(tmp_path, exchange, mend):
    target, at, absent = tmp_path / "run" / "student", 0, 0
    start(target)
    while killed(at := at + 1, target):
        there = target if target.exists() else target.with_name(".student.old")
        absent += there is not target
        assert held(there) in (OLD, NEW), at
        before = held(there)
        if mend == "resume":
            recover_folders(target.parent, "student")
            assert held(target) == before
        else:
            put(target, "new")
            assert held(target) == NEW
        assert os.listdir(target.parent) == ["student"]
        start(target)
    assert held(target) == NEW
    assert at > 15 and absent == (0 if exchange else 1)


def test_an_exception_at_any_point_leaves_the_old_folder_or_the_new_one(tmp_path, exchange, monkeypatch):
    class Stop(BaseException):
        pass

    def one(at: int) -> bool:
        left = [at]

        def reached(point: str) -> None:
            left[0] -= 1
            if not left[0]:
                raise Stop

        start(target)
        with monkeypatch.context() as patch:
            patch.setattr(atomic, "reached", reached)
            try:
                put(target, "new")
            except Stop:
                return True
        return False

    target, at = tmp_path / "run" / "student", 1
    while one(at):
        assert held(target) in (OLD, NEW), at
        assert os.listdir(target.parent) == ["student"]
        at += 1
    assert at > 15


def test_without_hard_links_a_users_files_are_copied(tmp_path, exchange, monkeypatch):
    def refused(*given, **more):
        raise OSError("no hard links here")

    target = tmp_path / "run" / "student"
    start(target)
    (target / "pipe").unlink()
    monkeypatch.setattr(atomic.os, "link", refused)
    put(target, "new")
    assert held(target) == {name: text for name, text in NEW.items() if name != "pipe"}


def test_a_file_that_comes_at_the_last_moment_is_kept(tmp_path, monkeypatch):
    target = tmp_path / "run" / "student"
    start(target)
    exchanged = atomic._exchanged

    def late(a: Path, b: Path) -> bool:
        (target / "late.txt").write_text("late")
        return exchanged(a, b)

    monkeypatch.setattr(atomic, "_exchanged", late)
    put(target, "new")
    assert held(target) == {**NEW, "late.txt": "late"}


def test_only_folders_of_that_name_are_recovered(tmp_path):
    for name in (".student.old", ".student_ema_0.99.old", ".mine.old", ".student.txt"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a").write_text(name)
    recover_folders(tmp_path, "student")
    assert sorted(os.listdir(tmp_path)) == [".mine.old", ".student.txt", "student", "student_ema_0.99"]
    assert (tmp_path / "student_ema_0.99" / "a").read_text() == ".student_ema_0.99.old"
    recover_folder(tmp_path / "student")
    assert (tmp_path / "student" / "a").read_text() == ".student.old"
