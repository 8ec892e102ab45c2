"""The processes of a run on one machine: started, stopped and ended together."""

import contextlib
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from dmd_dar.errors import UserError, users_line
from dmd_dar.train.processes.stop import EXIT_CODE, StopRequest, leaving
from dmd_dar.train.processes.world import MEETING, launched

LOOK = 0.5  # seconds between looks at the processes
GRACE = 10.0  # seconds that the others have to end by themselves when one has failed

Job = Callable[[Any], None]  # of a module's top level, so that another process finds it


def run(job: Job, cfg: Any) -> None:
    """job(cfg) in as many processes as `cfg.launch.processes` says; in this one alone where it says one, or where
    WORLD_SIZE is set: then a launcher (torchrun, accelerate, Slurm's script) has started them all. Raises UserError
    where that launcher left out what they need to find each other.

    SIGTERM and SIGINT are passed on once; a second one ends all at once. Where a process fails, the others follow
    within GRACE: UserError with its message if it had one, else exit code 1. None outlives this process.
    """
    processes = processes_of(cfg.launch) if launched(*MEETING) is None else 1
    if processes == 1:
        job(cfg)
        return
    context = multiprocessing.get_context("spawn")
    port, lines, started = free_port(), [], []
    with StopRequest() as stop, ended_at_last(started):
        for rank in range(processes):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_worker, args=(job, cfg, rank, processes, port, theirs))
            process.start()
            theirs.close()
            lines.append(ours)
            started.append(process)
        failed = watch(started, stop)
    if failed is None:
        return
    guilty = culprit([process.exitcode for process in started], failed, stop.asked)
    raise SystemExit(EXIT_CODE) if guilty is None else _failure(guilty, started[guilty].exitcode, lines)


def processes_of(launch: Any) -> int:
    """As many as asked for, else one for each GPU, else one. Raises UserError where there are fewer GPUs."""
    gpus = 0 if launch.cpu else torch.cuda.device_count()
    if gpus and launch.processes > gpus:
        raise UserError(f"launch.processes = {launch.processes}: there are {gpus} GPUs; ask for {gpus} at most")
    return launch.processes or gpus or 1


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def watch(started: list[Any], stop: StopRequest) -> int | None:
    """Until all have ended: pass a signal on, and kill the rest once one has failed and GRACE is over.

    The rank of the first that failed, None where all did their work. One that a signal ended comes before those that
    lost it: they may be gone before the system has buried it.
    """
    told, killed, failed, deadline = False, False, None, float("inf")
    while alive := [process for process in started if process.is_alive()]:
        wait([process.sentinel for process in alive], LOOK)
        if stop.asked and not told:
            told = True
            for process in alive:
                os.kill(process.pid, signal.SIGTERM)
        if failed is None:
            failed = first_failed(started)
            deadline = float("inf") if failed is None else time.monotonic() + GRACE
        if time.monotonic() > deadline:
            killed = True
            for process in alive:
                process.kill()
    lost = next((rank for rank, process in enumerate(started) if process.exitcode < 0), None)
    if lost is not None and not (told or killed):
        return lost
    return first_failed(started) if failed is None else failed  # the last ones may have ended since it was looked for


def first_failed(started: list[Any]) -> int | None:
    return next((rank for rank, process in enumerate(started) if process.exitcode), None)


def culprit(codes: list[int], failed: int, asked: bool) -> int | None:
    """The rank whose failure ended the processes, `failed` if it was one; None where they were only stopped.

    `codes` are their exit codes, `asked` says that this command was told to stop them.
    """
    stopped = {0, EXIT_CODE, *((-signal.SIGTERM, -signal.SIGKILL) if asked else ())}
    return next((rank for rank in (failed, *range(len(codes))) if codes[rank] not in stopped), None)


@contextlib.contextmanager
def ended_at_last(started: list[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for process in started:
            process.kill()
            process.join()


def _failure(rank: int, code: int, lines: list[Connection]) -> BaseException:
    """UserError with the message that a process left, else exit code 1 after a line about the first that failed.

    Of one that a signal ended, the others can only say that it is gone.
    """
    for line in (lines[rank], *(lines if code > 0 else ())):
        with contextlib.suppress(EOFError, OSError):
            if line.poll():
                return UserError(line.recv_bytes().decode())
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"failed with exit code {code}"
    print(f"error: process {rank} of {len(lines)} {how}; the same command continues", file=sys.stderr)
    return SystemExit(1)


def _worker(job: Job, cfg: Any, rank: int, processes: int, port: int, line: Connection) -> None:
    """One of the processes. It dies with its parent."""
    os.setpgid(0, 0)  # a terminal's Ctrl-C reaches the parent, which passes it on
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    os.environ |= {name: str(value) for name, value in places.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(max(1, torch.get_num_threads() // processes))
    code = 0
    try:
        with leaving():
            job(cfg)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except Exception as error:
        code, message = 1, users_line(error)
        if message is None:
            traceback.print_exc()
        else:
            code = 2
            line.send_bytes(message.encode())
    sys.stdout.flush()
    sys.stderr.flush()
    # All is written and closed. The farewells of libraries may wait for processes that wait for this one, and those of
    # torch 2.11 abort now and then.
    os._exit(code)
