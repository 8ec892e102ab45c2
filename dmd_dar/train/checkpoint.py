"""Checkpoints: one folder per step, complete or absent. Tensors only; loading never runs code."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dmd_dar.atomic import sync_folder
from dmd_dar.errors import DamagedFileError
from dmd_dar.keys import key


@dataclass(frozen=True)
class CheckpointConfig:
    every: int = key(500, "steps between checkpoints; one is always written at the end", unit="steps", least=1)
    keep: int = key(2, "how many of the newest are kept", least=1)


def _folder(root: Path, step: int) -> Path:
    return root / f"step_{step:08d}"


def steps_saved(root: Path) -> list[int]:
    """Steps with a complete checkpoint under `root`, ascending."""
    return sorted(int(path.name[5:]) for path in root.glob("step_*") if path.name[5:].isdigit())


def save(root: Path, step: int, state: dict[str, Any], keep: int) -> None:
    """Write `state` (nested dicts of tensors and numbers) for `step`; a crash leaves the older ones whole."""
    target, partial = _folder(root, step), root / f"partial_{step:08d}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    with open(partial / "state.pt", "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    shutil.rmtree(target, ignore_errors=True)
    os.replace(partial, target)
    sync_folder(root)
    for old in steps_saved(root)[:-keep]:
        shutil.rmtree(_folder(root, old))


def load_latest(root: Path) -> tuple[int, dict[str, Any]] | None:
    """(step, state on the CPU) of the newest checkpoint, or None. DamagedFileError names a file it cannot read."""
    steps = steps_saved(root)
    if not steps:
        return None
    path = _folder(root, steps[-1]) / "state.pt"
    try:
        return steps[-1], torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise DamagedFileError(f"{path} cannot be read ({error}); delete its folder to resume from an older") from error
