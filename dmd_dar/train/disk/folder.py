"""The run folder: one configuration, one log, one run at a time.

    config.yaml  log.jsonl  checkpoints/  samples/  student/  .lock

The lock is the kernel's (`flock`): it goes when the process goes, however it dies, so it is never stale. On NFS, Linux
turns `flock` into a byte-range lock that the server holds for all clients and releases with the client's lease; on a
mount without locking (`nolock`, `local_lock=flock`) it protects within one machine only. The text in `.lock` is for the
message, never for the decision. Only the main process opens the folder; the other processes get its path.
"""

import contextlib
import dataclasses
import errno
import fcntl
import fnmatch
import json
import logging
import os
import socket
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, Self

from omegaconf import OmegaConf
from yaml import YAMLError

from dmd_dar.atomic import recover_folders, sweep, write_atomic
from dmd_dar.errors import UserError
from dmd_dar.keys import differences, filled

MAY_CHANGE = ("log.*", "card*", "launch.*", "checkpoint.*", "preflight", "resume", "out_dir", "export")
GROW_ONLY = ("steps",)
HELD = (errno.EWOULDBLOCK, errno.EACCES)  # of a lock that another process has
log = logging.getLogger(__name__)


class FolderError(UserError):
    """One message for the user about a run folder, with the remedy; nothing saved has been touched."""


@dataclasses.dataclass
class RunFolder:
    """An open, locked run folder; `resumed` says whether it held this run before. Closes as a context manager.

    Nothing but the lock is written until `begin`; closed before that, a folder that was made for the run is gone.
    """

    path: Path
    resumed: bool
    lock: int
    cfg: dict[str, Any]
    made: list[Path] = dataclasses.field(default_factory=list)  # folders that were not there, from the top
    before: dict[str, Any] = dataclasses.field(default_factory=dict)  # the configuration that a resumed run had so far

    @classmethod
    def claim(
        cls,
        out_dir: str | os.PathLike[str],
        cfg: dict[str, Any],
        *,
        may_change: Iterable[str] = MAY_CHANGE,
        grow_only: Iterable[str] = GROW_ONLY,
        resume: Literal["auto", "never"] = "auto",
        before: dict[str, Any] | None = None,
    ) -> Self:
        """Lock `out_dir` for `cfg` (plain containers); refuse another configuration and a second run.

        `before`: what a saved configuration means by keys that it lacks.
        """
        path = Path(out_dir)
        made = [folder for folder in (*reversed(path.parents), path) if not os.path.lexists(folder)]
        folder = cls(_make(path), False, -1, cfg, made)
        try:
            folder.lock = _lock(path)
            folder.resumed = _admit(path, cfg, tuple(may_change), tuple(grow_only), resume, before or {})
            folder.before = _read(path / "config.yaml") if folder.resumed else {}
        except BaseException:
            folder.close()
            raise
        return folder

    @classmethod
    def open(cls, out_dir: str | os.PathLike[str], cfg: dict[str, Any], **rules: Any) -> Self:
        """`claim` and `begin`."""
        folder = cls.claim(out_dir, cfg, **rules)
        folder.begin()
        return folder

    def begin(self) -> None:
        """Write the configuration and make the folders of what is to come."""
        try:
            recover_folders(self.path, "student")
            for name in ("checkpoints", "samples", "student"):
                (self.path / name).mkdir(exist_ok=True)
            sweep(self.path)
            write_atomic(self.path / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(self.cfg)))
        except BaseException as error:
            self.close()
            if not isinstance(error, OSError):
                raise
            reason = f"out_dir '{self.path}' cannot be written: {error.strerror}"
            raise FolderError(f"{reason}; use another out_dir") from error
        self.made.clear()

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def samples(self) -> Path:
        return self.path / "samples"

    @property
    def student(self) -> Path:
        return self.path / "student"

    def close(self) -> None:
        with contextlib.suppress(OSError):  # what others put there since stays, and the folder with it
            if self.made and self.lock >= 0:
                (self.path / ".lock").unlink()
            for folder in reversed(self.made):
                folder.rmdir()
        self.made.clear()
        if self.lock >= 0:
            os.close(self.lock)
            self.lock = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _make(path: Path) -> Path:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise FolderError(f"out_dir '{path}' is, or lies under, a file; use another out_dir") from error
    except OSError as error:
        raise FolderError(f"out_dir '{path}' cannot be created: {error.strerror}; use another out_dir") from error
    return path


def _lock(path: Path) -> int:
    try:
        lock = os.open(path / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise FolderError(f"out_dir '{path}' cannot be written: {error.strerror}; use another out_dir") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.fstat(lock).st_nlink:  # its last holder took it away, with a folder that was to stay empty
            raise BlockingIOError(errno.EWOULDBLOCK, "is being removed")
    except OSError as error:
        holder = _holder(lock)
        os.close(lock)
        if error.errno not in HELD:
            raise FolderError(f"out_dir '{path}' cannot be locked: {error.strerror}; use a local out_dir") from error
        raise FolderError(
            f"out_dir '{path}' is in use by another run ({holder}), or its student is being pushed; "
            "wait for it, stop it, or use another out_dir"
        ) from error
    owner = {"pid": os.getpid(), "host": socket.gethostname(), "start": time.strftime("%Y-%m-%d %H:%M:%S")}
    os.ftruncate(lock, 0)
    os.pwrite(lock, json.dumps(owner).encode(), 0)
    return lock


@contextlib.contextmanager
def kept_still(path: Path) -> Iterator[None]:
    """No run begins or goes on in the folder `path` meanwhile; other readers may come. FolderError where one goes on.

    A folder without a lock was never a run's. Where locking fails, as on some network mounts, a warning says so.
    """
    try:
        lock = os.open(path / ".lock", os.O_RDONLY | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        yield
        return
    except OSError as error:
        _warn_unlocked(path, error)
        yield
        return
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in HELD:
                raise FolderError(f"out_dir '{path}' is in use by a run ({_holder(lock)}); wait for it") from error
            _warn_unlocked(path, error)
        yield
    finally:
        os.close(lock)


def _warn_unlocked(path: Path, error: OSError) -> None:
    log.warning("'%s' cannot be locked (%s): see to it that no run goes on there meanwhile", path, error.strerror)


def _holder(lock: int) -> str:
    with contextlib.suppress(ValueError, KeyError, TypeError):
        owner = json.loads(os.pread(lock, 4096, 0))
        return f"pid {owner['pid']} on {owner['host']} since {owner['start']}"
    return "starting just now"


def _admit(
    path: Path,
    cfg: dict[str, Any],
    may_change: tuple[str, ...],
    grow_only: tuple[str, ...],
    resume: str,
    before: dict[str, Any],
) -> bool:
    """Whether the folder already held this run; a FolderError if it held another one or may not be resumed."""
    saved = path / "config.yaml"
    if not saved.exists():
        if (path / "log.jsonl").exists() or any((path / "checkpoints").glob("*")):
            raise FolderError(f"out_dir '{path}' holds a run but no config.yaml; restore it or use another out_dir")
        return False
    if resume == "never":
        raise FolderError(f"out_dir '{path}' already holds a run; use another out_dir, or allow resuming")
    refused = [
        f"{key}: {json.dumps(old)} -> {json.dumps(new)}" + (" (may only grow)" if key in grow_only else "")
        for key, old, new in differences(filled(_read(saved), before), cfg)
        if not any(fnmatch.fnmatchcase(key, pattern) for pattern in may_change)
        and not (key in grow_only and _grows(old, new))
    ]
    if refused:
        raise FolderError(
            f"out_dir '{path}' holds a run with another configuration: {'; '.join(refused)}. "
            "Use another out_dir or restore these values"
        )
    return True


def _grows(old: Any, new: Any) -> bool:
    return type(old) is type(new) and isinstance(new, int | float) and new > old


def _read(saved: Path) -> dict[str, Any]:
    try:
        values = OmegaConf.to_container(OmegaConf.load(saved), resolve=False)
    except (OSError, YAMLError) as error:
        reason = " ".join(str(error).split())
        raise FolderError(f"'{saved}' cannot be read: {reason}; restore it or use another out_dir") from error
    if not isinstance(values, dict):
        raise FolderError(f"'{saved}' is not a configuration; restore it or use another out_dir")
    return values  # type: ignore[return-value]
