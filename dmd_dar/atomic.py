"""Files that are either the old ones or the new ones, never half of one."""

import contextlib
import os
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
