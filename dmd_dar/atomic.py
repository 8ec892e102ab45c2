"""Files that are either the old ones or the new ones, never half of one."""

import contextlib
import ctypes
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from dmd_dar.errors import UserError


def reached(point: str) -> None:
    """Marks a point between two steps of a write, where a crash leaves its own state of the disk. Does nothing."""


def make_folder(path: str | os.PathLike[str]) -> Path:
    """The folder for a command's output, made if need be. Raises UserError where that cannot be."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"folder '{path}' cannot be made: {error.strerror}; name another") from error
    return path


@contextlib.contextmanager
def synced(target: int | Path) -> Iterator[BinaryIO]:
    """A file (a path or an open descriptor) for writing, flushed to the disk when the context ends."""
    with open(target, "wb") as file:
        yield file
        file.flush()
        reached("file written")
        os.fsync(file.fileno())
        reached("file synced")


def write_atomic(path: str | os.PathLike[str], content: bytes | str) -> None:
    """Write to a temporary file in the same folder, flush it to the disk, then rename it over `path`."""
    path = Path(path)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with synced(handle) as file:
            file.write(content.encode("utf-8") if isinstance(content, str) else content)
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    reached("file renamed")
    sync_folder(path.parent)


def sweep(folder: Path, name: str = "*") -> None:
    """Remove what a killed process left of writing `name`, which nobody else may be writing, in and below `folder`."""
    for rest in folder.rglob(f".{name}.*.tmp"):
        rest.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def sync_folder(folder: Path) -> None:
    """The rename itself must survive a power cut, too."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
    reached("folder synced")


@contextlib.contextmanager
def replaced_folder(target: str | os.PathLike[str], own: tuple[str, ...] = ()) -> Iterator[Path]:
    """An empty folder to fill; when the block ends, it takes the place of `target` in one step, fully on the disk.

    An exception leaves `target` as it was. Of the old folder, entries that the new one lacks are kept, but for those
    named in `own`. Where the file system cannot exchange two folders in one step (outside Linux, some network mounts),
    a crash between two renames leaves the old folder as `.NAME.new` or `.NAME.old` beside an absent `target`.
    """
    target = Path(target).resolve()
    new, old = (target.with_name(f".{target.name}.{word}") for word in ("new", "old"))
    shutil.rmtree(new, ignore_errors=True)
    try:
        make_folder(new)
        yield new
        for path in (*new.rglob("*"), new):
            sync_folder(path)
        if not target.is_dir() or not any(target.iterdir()):
            os.replace(new, target)
        elif _exchanged(new, target):
            reached("folders exchanged")
            _keep_foreign(new, target, own)
        else:
            shutil.rmtree(old, ignore_errors=True)
            os.replace(target, old)
            os.replace(new, target)
            _keep_foreign(old, target, own)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    reached("folder replaced")
    sync_folder(target.parent)


def _keep_foreign(old: Path, target: Path, own: tuple[str, ...]) -> None:
    for entry in old.iterdir():
        if entry.name not in own and not (target / entry.name).exists():
            os.replace(entry, target / entry.name)
    shutil.rmtree(old, ignore_errors=True)


def _exchanged(a: Path, b: Path) -> bool:
    """Whether Linux's renameat2 with RENAME_EXCHANGE (2) let the two change places."""
    rename, here = getattr(ctypes.CDLL(None), "renameat2", None), -100  # AT_FDCWD
    return rename is not None and rename(here, os.fsencode(a), here, os.fsencode(b), 2) == 0
