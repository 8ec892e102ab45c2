"""Checkpoints: one folder for each step, complete or absent, with the hashes of its files.

    step_00000500/{state.pt, checkpoint.json}

A folder is written under the name partial_*, flushed to the disk, and renamed; it is removed by renaming it back first.
So a step_* folder is whole unless something else harmed it, which its hashes tell. Tensors, numbers and texts only:
loading never runs code.
"""

import errno
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import torch

from dmd_dar import atomic
from dmd_dar.errors import DamagedFileError, UserError
from dmd_dar.keys import key
from dmd_dar.messages import LOGGER

FORMAT = 1
MANIFEST, STATE = "checkpoint.json", "state.pt"
OVERHEAD = 1 << 20  # bytes of a checkpoint beside its tensors, generously


@dataclass(frozen=True)
class CheckpointConfig:
    every: int = key(500, "steps between checkpoints; one is always written at the end", unit="steps", least=1)
    keep_last: int = key(2, "how many of the newest are kept", least=1)
    keep_every: int = key(0, "those of its multiples are kept for good; 0: none", unit="steps", least=0)
    students: tuple[int, ...] = key((), "steps as of which the student is kept, too, in student_step_N", least=1)

    def __post_init__(self) -> None:
        if self.keep_every % self.every:
            raise ValueError(f"keep_every {self.keep_every} must be a multiple of every, {self.every}")

    def require_within(self, steps: int) -> None:
        """ValueError where a student is to be kept that a run of so many steps never has."""
        beyond = [step for step in self.students if step > steps]
        if beyond:
            raise ValueError(f"checkpoint.students names {beyond}, but steps is {steps}: leave these out, or raise it")


def steps_saved(root: Path) -> list[int]:
    """Steps with a checkpoint under `root`, ascending."""
    return sorted(int(path.name[5:]) for path in root.glob("step_*") if path.name[5:].isdigit())


def save(
    root: Path,
    step: int,
    state: dict[str, Any],
    config: CheckpointConfig,
    *,
    identity: dict[str, str] | None = None,
    score: float | None = None,
) -> None:
    """Write `state` (nested dicts of tensors, numbers and texts) for `step`, then prune; a crash leaves whole ones.

    `identity` names what the state belongs to. `score` judges it, less is better: the best of all that have one is
    kept. Raises UserError where the disk has no room or fails; the older ones are whole and nothing half made is left.
    """
    partial = _folder(root, step, "partial")
    score = score if score is not None and math.isfinite(score) else None
    manifest = {"format": FORMAT, "step": step, "identity": identity or {}, "score": score}
    sweep(root)
    try:
        _require_space(root, step, size(state) + OVERHEAD)
        partial.mkdir()
        _write(partial, state, manifest)
        os.replace(partial, _folder(root, step))
        atomic.reached("checkpoint renamed")
        atomic.sync_folder(root)
    except (OSError, RuntimeError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise _unsaved(root, step, _cause(error)) from error
    _prune(root, config)


def newest_whole(root: Path) -> int | None:
    """The newest step whose files are what its manifest says, None where there is no checkpoint.

    Newer ones that are damaged are named in a warning and set aside as damaged_*. Raises DamagedFileError where none is
    whole; then all stay as they are. Raises UserError where one is a link whose content is not here. For the only
    process that writes under `root`: it sweeps first.
    """
    sweep(root)
    damaged: dict[int, DamagedFileError] = {}
    for step in reversed(steps_saved(root)):
        try:
            read_manifest(root, step)
            break
        except DamagedFileError as error:
            damaged[step] = error
    else:
        if damaged:
            faults = "; ".join(str(error) for error in damaged.values())
            remedy = f"restore one from a copy, or remove '{root}' to start from step 0"
            raise DamagedFileError(f"no checkpoint is whole: {faults}: {remedy}")
        return None
    for other, error in damaged.items():
        aside = _folder(root, other, "damaged")
        _remove(aside)
        os.replace(_folder(root, other), aside)
        LOGGER.warning(f"{error}; set aside as {aside.name}, continuing from step {step}")
    return step


def read_manifest(root: Path, step: int, *, hashed: bool = True) -> dict[str, Any]:
    """What checkpoint.json says: format, step, identity, score, files.

    Raises DamagedFileError where a file is not there in its length or, if `hashed`, has not its hash; UserError where
    it is a link whose content is elsewhere.
    """
    folder = _folder(root, step)
    _require_content(folder)
    _require_content(folder / MANIFEST)
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        if (manifest["format"], manifest["step"]) != (FORMAT, step):
            raise ValueError(f"its {MANIFEST} is not of format {FORMAT} and step {step}")
        if STATE not in manifest["files"] or not isinstance(manifest["identity"], dict):
            raise ValueError(f"its {MANIFEST} names no {STATE} or no identity")
        for name, file in manifest["files"].items():
            _check_file(folder, name, file["bytes"], file["sha256"] if hashed else None)
    except OSError as error:
        name = Path(error.filename or folder).name
        raise DamagedFileError(f"checkpoint '{folder}' is damaged: {name}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = f"its {MANIFEST} has no {error}" if isinstance(error, KeyError) else error
        raise DamagedFileError(f"checkpoint '{folder}' is damaged: {reason}") from error
    return manifest


def load(root: Path, step: int, *, mapped: bool) -> dict[str, Any]:
    """The state of `step` on the CPU; `mapped` from its file if it is to be copied, so that processes share it."""
    path = _folder(root, step) / STATE
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:
        raise DamagedFileError(f"'{path}' cannot be read: {_line(error)}; remove its folder to use an older") from error


def best(root: Path) -> int | None:
    """The step with the least score, the earliest of equals; None where none has one."""
    scores = {step: score for step in steps_saved(root) if (score := _score(root, step)) is not None}
    return min(scores, key=lambda step: (scores[step], step), default=None)


def best_whole(root: Path) -> int | None:
    """`best`; None, too, after a warning, where its files are not here or not what its manifest says."""
    step = best(root)
    try:
        if step is not None:
            read_manifest(root, step)
        return step
    except UserError as error:
        LOGGER.warning(f"{error}; the best checkpoint is left out")
        return None


def sweep(root: Path) -> None:
    """Remove what was being written or removed when a process died."""
    for rest in root.glob("partial_*"):
        _remove(rest)


def size(state: Any) -> int:
    """Bytes of all tensors in nested containers; those that share memory count once, as they are saved."""
    storages = {storage.data_ptr(): storage.nbytes() for storage in _storages(state)}
    return sum(storages.values())


def _storages(state: Any) -> Iterator[torch.UntypedStorage]:
    if isinstance(state, torch.Tensor):
        yield state.untyped_storage()
    elif isinstance(state, dict | list | tuple):
        for part in state.values() if isinstance(state, dict) else state:
            yield from _storages(part)


class _Hashed:
    """What torch.save writes to: hashes the bytes on their way to the file, so nothing is held or read twice.

    Of a file's methods it has the two that torch.save calls.
    """

    def __init__(self, file: BinaryIO):
        self.file, self.bytes, self.sha256 = file, 0, hashlib.sha256()

    def write(self, data: Any) -> int:
        self.sha256.update(data)
        self.bytes += memoryview(data).nbytes
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def _folder(root: Path, step: int, kind: str = "step") -> Path:
    return root / f"{kind}_{step:08d}"


def _check_file(folder: Path, name: str, size: int, sha256: str | None) -> None:
    path = folder / name
    if Path(name).name != name or name in ("", ".."):
        raise ValueError(f"its {MANIFEST} names '{name}', which is not a file in its own folder")
    _require_content(path)
    if path.stat().st_size != size:
        raise ValueError(f"{name} has {path.stat().st_size} bytes, not {size}")
    if sha256 is None:
        return
    with open(path, "rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
            raise ValueError(f"the SHA-256 of {name} is not that of {MANIFEST}")


def _require_content(path: Path) -> None:
    """Stores of large files (DVC, git-annex) leave a link; its content is judged like a file's, its absence is not."""
    if path.is_symlink() and not path.exists():
        raise UserError(
            f"'{path}' is a link to {os.readlink(path)}, which is not on this machine: fetch it from where it is stored"
            " (such as dvc pull or git annex get), and run again"
        )


def _write(folder: Path, state: dict[str, Any], manifest: dict[str, Any]) -> None:
    with atomic.synced(folder / STATE) as file:
        hashed = _Hashed(file)
        torch.save(state, cast(IO[bytes], hashed))
    files = {STATE: {"bytes": hashed.bytes, "sha256": hashed.sha256.hexdigest()}}
    with atomic.synced(folder / MANIFEST) as file:
        file.write(json.dumps({**manifest, "files": files}, indent=1).encode())
    atomic.sync_folder(folder)


def _score(root: Path, step: int) -> float | None:
    try:
        score = json.loads((_folder(root, step) / MANIFEST).read_bytes())["score"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return score if isinstance(score, int | float) and math.isfinite(score) else None


def _prune(root: Path, config: CheckpointConfig) -> None:
    atomic.reached("before prune")
    steps = steps_saved(root)
    kept = {*steps[-config.keep_last :], best(root)}
    for step in steps:
        if step not in kept and not (config.keep_every and step % config.keep_every == 0):
            rest = _folder(root, step, "partial")
            os.replace(_folder(root, step), rest)  # so none is ever seen half removed
            atomic.reached("checkpoint withdrawn")
            _remove(rest)
            atomic.reached("checkpoint pruned")


def _remove(folder: Path) -> None:
    """A folder, or the link to one that is stored elsewhere, whose content stays there."""
    if folder.is_symlink():
        folder.unlink()
    else:
        shutil.rmtree(folder, ignore_errors=True)


def _require_space(root: Path, step: int, need: int) -> None:
    root.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(root).free
    if need > free:
        raise _unsaved(root, step, f"it needs {need / 1e6:.1f} MB, and {free / 1e6:.1f} MB of the disk are free")


def _cause(error: BaseException) -> BaseException:
    """The system's error, where torch.save's own came on top of it."""
    while not isinstance(error, OSError) and error.__context__ is not None:
        error = error.__context__
    return error


def _unsaved(root: Path, step: int, reason: BaseException | str) -> UserError:
    full = isinstance(reason, str) or getattr(reason, "errno", 0) in (errno.ENOSPC, errno.EDQUOT)
    remedy = "free some space (checkpoint.keep_last and keep_every say what is kept)" if full else "mend that"
    kept = steps_saved(root)
    left = f"that of step {kept[-1]} is whole" if kept else "there is none yet"
    cause = reason if isinstance(reason, str) else _line(reason)
    return UserError(f"'{root}': the checkpoint of step {step} was not saved, {cause}; {left}: {remedy}, and run again")


def _line(error: BaseException) -> str:
    return " ".join(str(getattr(error, "strerror", None) or error).split())
