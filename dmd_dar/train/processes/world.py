"""Which of a launcher's processes this one is, as torchrun, accelerate, Slurm's script or `launch` say it."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

from dmd_dar.errors import UserError

MEETING = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # what processes need to find each other
NUMBERS = ("WORLD_SIZE", "RANK", "LOCAL_RANK")


@dataclass(frozen=True)
class World:
    """Process `rank` of `processes`, from 0, and of those of its machine, `local_rank`."""

    processes: int
    rank: int
    local_rank: int


def launched(*needed: str) -> World | None:
    """What the environment says; None where WORLD_SIZE is not set, whatever else was left in it.

    Raises UserError naming the variables that are no such numbers and those of `needed` that several processes lack.
    """
    if not os.environ.get("WORLD_SIZE"):
        return None
    processes = _number("WORLD_SIZE", 1, 2**31)
    absent = [name for name in needed if not os.environ.get(name)] if processes > 1 else []
    if absent:
        raise UserError(
            f"WORLD_SIZE = {processes} says that a launcher started {processes} processes, but {', '.join(absent)}"
            f" {'is' if len(absent) == 1 else 'are'} not set: start them with torchrun, or unset WORLD_SIZE"
        )
    rank = _number("RANK", 0, processes - 1)
    if "MASTER_PORT" in needed and processes > 1:
        _number("MASTER_PORT", 1, 65535)
    return World(processes, rank, _number("LOCAL_RANK", 0, processes - 1, rank))


def _number(name: str, least: int, most: int, default: int = 0) -> int:
    text = os.environ.get(name) or str(default)
    if not text.isdecimal() or not least <= int(text) <= most:
        raise UserError(
            f"{name} = {text!r} in the environment: must be a number from {least} to {most}: set it as a launcher"
            " does, or unset WORLD_SIZE to run in one process"
        )
    return int(text)


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """While nobody is to be looked for: what is left of a launcher in the environment is out of sight."""
    held = {name: os.environ.pop(name) for name in NUMBERS if name in os.environ}
    try:
        yield
    finally:
        os.environ |= held
