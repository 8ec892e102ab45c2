"""Files that are either the old ones or the new ones, never half of one."""

import os
import tempfile
from pathlib import Path

from dmd_dar.errors import UserError


def make_folder(path: str | os.PathLike[str]) -> Path:
    """The folder for a command's output, made if need be. Raises UserError where that cannot be."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"folder '{path}' cannot be made: {error.strerror}; name another") from error
    return path


def write_atomic(path: str | os.PathLike[str], content: bytes | str) -> None:
    """Write to a temporary file in the same folder, flush it to the disk, then rename it over `path`."""
    path = Path(path)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content.encode("utf-8") if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


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
