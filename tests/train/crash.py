"""The main job, tiny, in a process of its own to which something happens at one of the points that its writes pass.

A fork server imports this once, so that a run costs no import of torch.
"""

import errno
import os
import signal
from pathlib import Path

import torch
import torch._dynamo  # which the first optimiser would import

from dmd_dar import atomic
from dmd_dar.distillation import job as distill
from dmd_dar.train.loop import job
from tests.tiny import ON_CPU

torch.set_num_threads(1)
KEYS = (
    "seed=1 batch_size=2 rungs=[1.0,0.5] data.name=textures data.size=32 student.routing.query=timestep"
    " student.warmup=3 student.weight_decay=0.01 student.lr=1e-3 fake_score.updates=2 fake_score.lr=1e-3"
    " fake_score.decay_start=2 fake_score.decay_steps=8 regression.count=4 regression.solver_steps=2"
    " log.every=1 log.samples_every=3 log.health_every=0 log.wandb=disabled launch.threads=1"
    " preflight=false"
)


def full() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


ACTS = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "term": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "interrupt": lambda: os.kill(os.getpid(), signal.SIGINT),
    "full": full,
}


def train(keys: list[str], said: Path, act: str = "", at: int = 0, world: dict[str, str] | None = None) -> None:
    """The job; `act` happens at point number `at` (from 1). `said` gets the points and whatever it prints.

    `world` is what a launcher tells one of several processes.
    """
    job.GRID_ROWS, job.GRID_COLUMNS = 1, 2  # pictures take longer than the training here
    os.environ |= world or {}
    stream = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for number in (1, 2):
        os.dup2(stream, number)
    passed = 0

    def reached(point: str) -> None:
        nonlocal passed
        passed += 1
        os.write(stream, f"[{point}]\n".encode())
        if passed == at:
            ACTS[act]()

    atomic.reached = reached
    distill.main([*KEYS.split(), *ON_CPU, *keys])
