"""The processes of a run on one machine: how many, how they find each other, and whose failure is the command's."""

import os
import signal
import socket
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from dmd_dar.errors import UserError
from dmd_dar.messages import LOGGER
from dmd_dar.stop import EXIT_CODE, StopRequest, leaving
from dmd_dar.train.processes import supervisor
from dmd_dar.train.processes.supervisor import Ending, Member, Team
from dmd_dar.train.processes.world import MEETING, launched

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
    with StopRequest() as stop, supervisor.started(_work, processes, job, cfg, free_port()) as team:
        ending = Ending(partial(supervisor.ask_by_signal, team.processes), GRACE)
        failed = supervisor.watch(team.processes, stop, ending)
    if failed is None:
        return
    guilty = culprit([process.exitcode for process in team.processes], failed, stop.asked)
    raise SystemExit(EXIT_CODE) if guilty is None else _failure(guilty, team)


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


def culprit(codes: list[int], failed: int, stop_asked: bool) -> int | None:
    """The rank whose failure ended the processes, `failed` if it was one; None where they were only stopped.

    `codes` are their exit codes, `stop_asked` says that this command was asked to stop them.
    """
    stopped = {0, EXIT_CODE, *((-signal.SIGTERM, -signal.SIGKILL) if stop_asked else ())}
    return next((rank for rank in (failed, *range(len(codes))) if codes[rank] not in stopped), None)


def _failure(guilty: int, team: Team) -> BaseException:
    """UserError with the message that a process left, else exit code 1 after a line about the first that failed.

    Of one that a signal ended, the others can only say that it is gone.
    """
    code, processes = team.processes[guilty].exitcode, len(team.processes)
    for rank in (guilty, *(range(processes) if code > 0 else ())):
        if (message := team.last_words(rank)) is not None:
            return UserError(message)
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"failed with exit code {code}"
    LOGGER.error(f"error: process {guilty} of {processes} {how}; the same command continues")
    return SystemExit(1)


def _work(member: Member, job: Job, cfg: Any, port: int) -> None:
    """One of the processes: it finds the others by the variables that launchers set."""
    os.setpgid(0, 0)  # a terminal's Ctrl-C reaches the parent, which passes it on
    rank, processes = member.rank, member.processes
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    os.environ |= {name: str(value) for name, value in places.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(max(1, torch.get_num_threads() // processes))
    with leaving():
        job(cfg)
