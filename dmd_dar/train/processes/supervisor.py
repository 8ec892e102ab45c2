"""Processes of one command on this machine: started together, told to stop, watched, and ended together."""

import contextlib
import multiprocessing
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

from dmd_dar import messages
from dmd_dar.errors import users_line
from dmd_dar.messages import LOGGER
from dmd_dar.stop import StopRequest

LOOK = 0.5  # seconds between looks at the processes


@dataclass(frozen=True)
class Member:
    """What a started process knows of itself: `line` is its end of a pipe to the command that started it."""

    rank: int
    processes: int
    line: Connection


@dataclass(frozen=True)
class Team:
    """The started processes by rank, and for each of them the command's end of its pipe."""

    processes: list[Any]
    lines: list[Connection]

    def last_words(self, rank: int) -> str | None:
        """The message with which a process ended that had an error of the user's to mend; None where it left none."""
        with contextlib.suppress(EOFError, OSError):
            if self.lines[rank].poll():
                return self.lines[rank].recv_bytes().decode()
        return None


@dataclass(frozen=True)
class Ending:
    """How processes are brought to their end.

    `ask(rank)` tells one of them to stop. Where one has failed, the others are killed after `grace` seconds: they wait
    for it in an exchange. Without `grace` they work independently, and are asked to stop.
    """

    ask: Callable[[int], None]
    grace: float | None = None


@contextlib.contextmanager
def started(work: Callable[..., None], processes: int, *arguments: Any) -> Iterator[Team]:
    """`processes` new interpreters that call work(member, *arguments), which must be of a module's top level.

    None of them outlives the block, nor this process, however it ends.
    """
    context, team = multiprocessing.get_context("spawn"), Team([], [])
    try:
        for rank in range(processes):
            ours, theirs = context.Pipe()
            process = context.Process(target=_enter, args=(work, Member(rank, processes, theirs), arguments))
            process.start()
            theirs.close()
            team.lines.append(ours)
            team.processes.append(process)
        yield team
    finally:
        for process in team.processes:
            process.kill()
            process.join()


def _enter(work: Callable[..., None], member: Member, arguments: tuple[Any, ...]) -> None:
    """The life of a started process. An error of the user's to mend becomes its last words, with exit code 2."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    messages.show()
    code = 0
    try:
        work(member, *arguments)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except Exception as error:
        code, message = 1, users_line(error)
        if message is None:
            LOGGER.error(traceback.format_exc().rstrip())
        else:
            code = 2
            member.line.send_bytes(message.encode())
    sys.stdout.flush()
    sys.stderr.flush()
    # All is written and closed. The farewells of libraries may wait for processes that wait for this one, and those of
    # torch 2.11 abort now and then.
    os._exit(code)


def watch(
    processes: Sequence[Any], stop: StopRequest, ending: Ending, look: Callable[[], None] = lambda: None
) -> int | None:
    """Until all have ended: pass a stop on, once, and bring the rest to its end when one has failed.

    `look` is called after every look at the processes. The rank of the first that failed, None where all did their
    work. One that a signal ended comes before those that lost it: they may be gone before the system has buried it.
    """
    passed_on, killed, failed, deadline = False, False, None, float("inf")
    while alive := [rank for rank, process in enumerate(processes) if process.is_alive()]:
        wait([processes[rank].sentinel for rank in alive], LOOK)
        if failed is None and (failed := first_failed(processes)) is not None and ending.grace is not None:
            deadline = time.monotonic() + ending.grace
        if not passed_on and (stop.asked or (failed is not None and ending.grace is None)):
            passed_on = True
            for rank in alive:
                ending.ask(rank)
        if time.monotonic() > deadline:
            killed = True
            for rank in alive:
                processes[rank].kill()
        look()
    lost = next((rank for rank, process in enumerate(processes) if process.exitcode < 0), None)
    if lost is not None and not (passed_on or killed):
        return lost
    return first_failed(processes) if failed is None else failed  # the last ones may have ended since it was looked for


def first_failed(processes: Sequence[Any]) -> int | None:
    """The lowest rank among those that ended with another exit code than 0."""
    return next((rank for rank, process in enumerate(processes) if process.exitcode), None)


def ask_by_signal(processes: Sequence[Any], rank: int) -> None:
    """SIGTERM, for processes that handle it as a command of one process does; nothing for one that has ended."""
    processes[rank].terminate()


def ask_by_line(lines: Sequence[Connection], rank: int) -> None:
    """A word on the pipe, for processes that leave signals to the command and look whether their line speaks."""
    with contextlib.suppress(OSError):
        lines[rank].send_bytes(b"stop")
