"""A job that fills a folder of shards, in one process or several: what pairs and encode share."""

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from dmd_dar.atomic import make_folder
from dmd_dar.data.batches import Batches
from dmd_dar.data.shards import MANIFEST, Layout, ShardFolder, fill, holds_shards
from dmd_dar.errors import UserError
from dmd_dar.messages import LOGGER
from dmd_dar.stop import EXIT_CODE, SIGNALS, StopRequest
from dmd_dar.train.processes import supervisor
from dmd_dar.train.processes.supervisor import Ending, Member
from dmd_dar.train.processes.world import World, launched

SAY = 10.0  # seconds between lines of progress


class FillConfig(Protocol):
    """The keys of every such job."""

    @property
    def out(self) -> str: ...
    @property
    def workers(self) -> int: ...
    @property
    def threads(self) -> int: ...
    @property
    def cpu(self) -> bool: ...


@dataclass(frozen=True)
class Work:
    """What a folder holds and who makes it, in which batches.

    `check` is called once, before a folder is begun, and raises UserError for what the batches would stumble over.
    """

    layout: Layout
    batches: Batches
    unit: str = "samples"
    check: Callable[[], None] = lambda: None


Prepare = Callable[[Any, torch.device], Work]  # (configuration, device); of a module, so that workers find it


def device_of(cfg: FillConfig, rank: int) -> torch.device:
    """The GPU of process `rank`, the CPU where there is none or `cfg.cpu` says so."""
    gpus = 0 if cfg.cpu else torch.cuda.device_count()
    return torch.device("cuda", rank % gpus) if gpus else torch.device("cpu")


def fill_folder(cfg: FillConfig, prepare: Prepare, wanted: dict[str, Any] | None = None) -> str:
    """Make what is missing of `cfg.out`; one line that says what it holds then, empty in all processes but the first.

    Exits with code 143 where SIGTERM or SIGINT stopped it, a shard finished.

    `wanted` is what `cfg` alone says of the folder's samples: where that differs, nothing is prepared.
    Where RANK and WORLD_SIZE are set, this process is one of those that a launcher started, and starts none itself.
    """
    world = launched() or World(1, 0, 0)
    processes, rank = world.processes, world.rank
    if processes > 1 and cfg.workers > 1:
        raise UserError(f"workers = {cfg.workers}: WORLD_SIZE = {processes} processes are there already; leave it out")
    workers = 1 if processes > 1 else cfg.workers or (0 if cfg.cpu else torch.cuda.device_count()) or 1
    device = torch.device("cpu") if workers > 1 else device_of(cfg, world.local_rank)
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    if os.path.lexists(cfg.out):
        holds_shards(make_folder(cfg.out), wanted or {}, partly=True)
    work = prepare(cfg, device)
    if rank == 0 and not Path(cfg.out, MANIFEST).exists():
        work.check()
    with StopRequest() as stop, ShardFolder(cfg.out, work.layout) as folder:
        folder.require_space()
        made = folder.samples_made()
        if rank == 0 and made < work.layout.n:
            LOGGER.info(f"{work.layout.n} {work.unit} take up to {work.layout.all_bytes() / 1e6:.1f} MB in {cfg.out}")
        if workers > 1 and made < work.layout.n:
            finished = share(cfg, prepare, workers, folder, stop, progress(work, made))
        else:
            report = progress(work, made) if rank == 0 else None
            batches = work.batches if report is None else told_first(work, report, made)
            finished = fill(folder, batches, stopped=lambda: stop.asked, report=report, rank=rank, processes=processes)
        shards = folder.layout.shards
        done = shards - len(folder.missing())
    if not finished:
        LOGGER.info(f"stopped with {done} of {shards} shards in {cfg.out}; the same command continues")
        raise SystemExit(EXIT_CODE)
    return f"{work.layout.n} {work.unit} in {cfg.out}, in {shards} shards" if rank == 0 else ""


def share(
    cfg: FillConfig,
    prepare: Prepare,
    workers: int,
    folder: ShardFolder,
    stop: StopRequest,
    report: Callable[[int], None],
) -> bool:
    """Let several processes fill the folder; True once it is complete. One that fails stops them all, as UserError."""
    with supervisor.started(_work, workers, cfg, prepare) as team:
        ending = Ending(partial(supervisor.ask_by_line, team.lines))
        failed = supervisor.watch(team.processes, stop, ending, lambda: report(folder.samples_made()))
    if failed is not None and not stop.asked:
        code = team.processes[failed].exitcode
        unsaid = f"worker {failed} ended with code {code}; whole shards are kept, and the same command continues"
        raise UserError(team.last_words(failed) or unsaid)
    return not folder.missing()


def _work(member: Member, cfg: FillConfig, prepare: Prepare) -> None:
    """One of several processes: it stops when its line speaks, since signals are for the command that started it."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    rank, processes = member.rank, member.processes
    torch.set_num_threads(cfg.threads or max(1, torch.get_num_threads() // processes))
    work = prepare(cfg, device_of(cfg, rank))
    with ShardFolder(cfg.out, work.layout) as folder:
        fill(folder, work.batches, stopped=member.line.poll, rank=rank, processes=processes)


def told_first(work: Work, report: Callable[[int], None], start: int) -> Batches:
    """The batches; `report` hears of the first as soon as it is computed, unless it is the last, too."""
    told = False

    def make(first: int, stop: int) -> dict[str, Tensor]:
        nonlocal told
        rows = work.batches.make(first, stop)
        if not told and start + stop - first < work.layout.n:
            report(start + stop - first)
        told = True
        return rows

    return Batches(make, work.batches.size)


def progress(work: Work, start: int) -> Callable[[int], None]:
    """report(made): a line with speed and time left, at first, every now and then and at the end."""
    began = printed = time.monotonic()
    reported, n, unit = start, work.layout.n, work.unit

    def report(made: int) -> None:
        nonlocal printed, reported
        now = time.monotonic()
        if made > reported and (made == n or reported == start or now - printed >= SAY):
            printed, reported, rate = now, made, (made - start) / max(now - began, 1e-9)
            left = tqdm.format_interval((n - made) / rate)
            LOGGER.info(f"{made}/{n} {unit}  {rate:.3g} {unit}/s  ETA {left}")

    return report
