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

    An exception leaves the old folder or the new one, whole. Of the old, entries that the new one lacks are kept, but
    for those named in `own`; at every moment they are in both or in the one that counts. Where the file system cannot
    exchange two folders in one step (outside Linux, some network mounts), a crash between two renames leaves the old
    folder as `.NAME.old` beside an absent `target`, until `recover_folder` or the next replacement.
    """
    target = Path(target).resolve()
    recover_folder(target)
    new, old = _beside(target)
    try:
        make_folder(new)
        yield new
        for path in (*new.rglob("*"), new):
            if not path.is_symlink():  # what it leads to is another's
                sync_folder(path)
        if not _filled(target):
            os.replace(new, target)
        else:
            _keep_foreign(target, new, own)
            if _exchanged(new, target):
                reached("folders exchanged")
            else:
                os.replace(target, old)
                reached("folder set aside")
                os.replace(new, target)
                reached("folder put in place")
                os.replace(old, new)  # under that name nobody takes it for one that is needed
            _keep_foreign(new, target, own)  # what was put there since
        sync_folder(target.parent)
    finally:
        recover_folder(target)
    reached("folder replaced")


def recover_folder(target: Path) -> None:
    """Undo what a killed process left of replacing `target`, which nobody else may be doing; the old folder comes back
    where the new one had not come. Raises OSError where the rest cannot be removed."""
    new, old = _beside(target)
    if old.is_dir() and not _filled(target):
        os.replace(old, target)
        sync_folder(target.parent)
    for rest in (old, new):
        if rest.is_dir():
            shutil.rmtree(rest)


def recover_folders(parent: Path, name: str) -> None:
    """`recover_folder` of every folder in `parent` whose name starts with `name`."""
    for path in {rest.with_name(rest.stem[1:]) for rest in parent.glob(f".{name}*") if rest.suffix in (".new", ".old")}:
        recover_folder(path)


def _beside(target: Path) -> tuple[Path, Path]:
    """Where the new folder is filled, and where the old one waits for it."""
    return target.with_name(f".{target.name}.new"), target.with_name(f".{target.name}.old")


def _filled(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())


def _keep_foreign(old: Path, new: Path, own: tuple[str, ...]) -> None:
    """Have the entries of `old` that `new` lacks in both, on the disk, but for those named in `own`."""
    for entry in old.iterdir():
        place = new / entry.name
        if entry.name in own or os.path.lexists(place):
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.copytree(entry, place, symlinks=True, copy_function=_link)
            for folder, _, _ in os.walk(place):
                sync_folder(Path(folder))
        else:
            _link(entry, place)
        reached("foreign entry kept")
    sync_folder(new)


def _link(source: str | Path, place: str | Path) -> None:
    """One file of two names, a copy where the file system has no hard links."""
    try:
        os.link(source, place, follow_symlinks=False)
    except (OSError, NotImplementedError):
        shutil.copy2(source, place, follow_symlinks=False)
        if not os.path.islink(place):
            sync_folder(Path(place))


def _exchanged(a: Path, b: Path) -> bool:
    """Whether Linux's renameat2 with RENAME_EXCHANGE (2) let the two change places."""
    rename, here = getattr(ctypes.CDLL(None), "renameat2", None), -100  # AT_FDCWD
    return rename is not None and rename(here, os.fsencode(a), here, os.fsencode(b), 2) == 0
