"""What every training job shares: its run folder, its log, its sample grids, and the order in which they open."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dmd_dar.atomic import write_atomic
from dmd_dar.data.images import png_bytes, tile, to_pixels
from dmd_dar.messages import LOGGER
from dmd_dar.methods.generate import Generator, SampleRange, generate
from dmd_dar.models.compiled import eagerly
from dmd_dar.stop import EXIT_CODE
from dmd_dar.train.disk import checkpoint
from dmd_dar.train.disk.folder import RunFolder
from dmd_dar.train.disk.log import RunLog
from dmd_dar.train.loop.loop import Course, Loop, OpenRun, Phase, Watch
from dmd_dar.train.processes.runtime import Runtime

GRID_ROWS, GRID_COLUMNS = 7, 8


@dataclass(frozen=True)
class Pictures:
    """What draws the sample grids: `generator` gives images of `shape` (C, H, W) for labels below `num_classes`."""

    generator: Generator
    shape: tuple[int, ...]
    num_classes: int


@dataclass(frozen=True)
class Results:
    """Networks by the folder in the run's into which save(folder, network, step) writes them, as of a step.

    It is called with all weights of the network at hand.
    """

    networks: dict[str, nn.Module]
    save: Callable[[Path, Any, int], None]


@torch.no_grad()
def sample_grid(pictures: Pictures, seed: int, runtime: Runtime) -> Tensor:
    """uint8 (3, H, W): the same noise and labels at every step of a run, a column for each of the first classes."""
    columns = min(pictures.num_classes, GRID_COLUMNS)
    with runtime.autocast(), eagerly():  # batches of other sizes than training's
        x0, _ = generate(
            pictures.generator,
            SampleRange(GRID_ROWS * columns, seed, phase="grid"),
            shape=pictures.shape,
            num_classes=columns,
            device=runtime.device,
        )
    return tile(to_pixels(x0), columns=columns)


@contextlib.contextmanager
def open_run(cfg: Any, runtime: Runtime) -> Iterator[RunFolder | None]:
    """The locked run folder in the main process, None in the others; before teacher, data or networks are opened.

    Where the main process is refused, all of them stop. Until `begin`, a refusal leaves nothing behind.
    """
    runtime.micro_batches(cfg.batch_size)
    config, before = dataclasses.asdict(cfg), getattr(cfg, "BEFORE", None)
    folder = runtime.together(
        lambda: RunFolder.claim(cfg.out_dir, config, resume=cfg.resume, before=before) if runtime.is_main else None
    )
    with folder or contextlib.nullcontext():
        yield folder


def begin(runtime: Runtime, folder: RunFolder | None) -> None:
    """All is opened and fits: from here on the folder holds this run. Call it in every process."""
    runtime.together(folder.begin if folder is not None else lambda: None)


def run_cycle(
    cfg: Any, run: OpenRun, cycle: tuple[Phase, ...], *, watch: Watch, pictures: Pictures, results: Results
) -> None:
    """Resume, train, and save the `results`; `watch.calls` are those of the networks of the cycle.

    Where `watch.health` scores checkpoints, the first result is written a second time, as of the best of them, into a
    folder named *_best.

    Exits with code EXIT_CODE where SIGTERM or SIGINT stopped the run; `resume: auto` then continues it.
    """
    runtime, folder = run.runtime, run.folder

    def draw_grid(step: int) -> None:
        if folder is None and not runtime.sharded:
            return
        picture = sample_grid(pictures, cfg.seed, runtime)
        if folder is not None:
            write_atomic(folder.samples / f"step_{step:08d}.png", png_bytes(picture))

    def keep(step: int) -> None:
        _write(run, results, next(iter(results.networks)), step, f"_step_{step:08d}")

    loop = Loop(cycle, course_of(cfg), run, draw_grid, watch, keep=keep)
    checkpoints = Path(cfg.out_dir) / "checkpoints"
    with loop.stop:
        start = loop.restore(checkpoints)
        with RunLog.open(folder, cfg.log, dataclasses.asdict(cfg) if folder is None else folder.cfg, start) as log:
            if watch.found and not start:  # the log holds every step once
                log.write({"step": start, **watch.found})
            finished = loop.run(start, log)
        runtime.any(False)  # a launcher ends the others once one is gone: wait for the one that closes the log
        for name in results.networks if finished else ():
            _write(run, results, name, loop.reached)
        best = loop.take_best(checkpoints) if finished else 0
        if best:
            name = next(iter(results.networks))
            _write(run, results, name, best, "_best")
            if runtime.is_main:
                LOGGER.info(f"{name}_best holds the checkpoint of the best score, that of step {best}")
        if loop.stopped and loop.reached < cfg.steps and runtime.is_main:
            LOGGER.info(_why_stopped(loop, start, cfg.steps, f"{next(iter(results.networks))}_best" if best else ""))
        runtime.close()
    if not finished:
        if folder is not None:
            reached = max(checkpoint.steps_saved(folder.checkpoints), default=0)
            LOGGER.info(f"stopped at step {reached} of {cfg.steps}; the same command continues")
        raise SystemExit(EXIT_CODE)


def _why_stopped(loop: Loop, start: int, steps: int, best: str) -> str:
    """Of a run that a rule of health ended, now or when it ran before. best: the folder of the best student, if any."""
    when = "finished before, " * (loop.reached == start)
    kept = f"; {best}/ holds the best student" if best else ""
    remedy = "change log.stop_when, log.stop_patience or log.stop_after to train on"
    return f"{when}stopped at step {loop.reached} of {steps} by {loop.stopped}{kept}; {remedy}"


def course_of(cfg: Any) -> Course:
    """What the configuration of a job says of it."""
    return Course(cfg.seed, cfg.steps, cfg.batch_size, cfg.checkpoint, cfg.log.every, cfg.log.samples_every)


def _write(run: OpenRun, results: Results, name: str, step: int, suffix: str = "") -> None:
    """Save one of the results, gathered from all processes; call it in every process."""
    network = run.runtime.whole(results.networks[name])
    folder = run.folder
    save = None if folder is None else partial(results.save, folder.path / f"{name}{suffix}", network, step)
    run.runtime.together(save or (lambda: None))
