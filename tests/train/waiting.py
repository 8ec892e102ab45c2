"""A job of two processes for test_launch.py that waits, as in an exchange, for what does not come."""

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from dmd_dar.errors import UserError
from dmd_dar.stop import StopRequest


@dataclass(frozen=True)
class Launch:
    processes: int = 2
    cpu: bool = False


@dataclass(frozen=True)
class Config:
    folder: Path
    act: str  # of process 1, once both have begun
    launch: Launch = Launch()


def job(cfg: Config) -> None:
    rank = int(os.environ["RANK"])
    with StopRequest() as stop:
        (cfg.folder / f"began{rank}").write_text(str(os.getpid()))
        while not all((cfg.folder / f"began{i}").exists() for i in (0, 1)):
            time.sleep(0.02)
        if rank == 1 and cfg.act == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if rank == 1 and cfg.act == "raise":
            raise ZeroDivisionError("planted")
        if rank == 1 and cfg.act == "refuse":
            raise UserError("this is wrong; do that")
        while not stop.asked:
            time.sleep(0.02)
    if rank == 0 and cfg.act == "fill":
        raise UserError("no room for the last checkpoint")
    (cfg.folder / f"saved{rank}").touch()
    raise SystemExit(143)
