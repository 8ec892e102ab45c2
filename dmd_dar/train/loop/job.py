"""What every training job shares: its run folder, its log, its sample grids, and the order in which they open."""

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dmd_dar.atomic import write_atomic
from dmd_dar.data.images import png_bytes, tile, to_pixels
from dmd_dar.methods.generate import Generator, generate
from dmd_dar.stop import EXIT_CODE
from dmd_dar.train.disk import checkpoint
from dmd_dar.train.disk.folder import RunFolder
from dmd_dar.train.disk.log import RunLog
from dmd_dar.train.loop.loop import Loop, Phase
from dmd_dar.train.processes.runtime import Runtime
from dmd_dar.train.watch.failure import Calls
from dmd_dar.train.watch.health import Health

GRID_ROWS, GRID_COLUMNS = 7, 8


@torch.no_grad()
def sample_grid(generator: Generator, seed: int, shape: tuple[int, ...], num_classes: int, runtime: Runtime) -> Tensor:
    """uint8 (3, H, W): the same noise and labels at every step of a run, a column for each of the first classes."""
    columns = min(num_classes, GRID_COLUMNS)
    with runtime.autocast():
        x0, _ = generate(
            generator,
            GRID_ROWS * columns,
            seed=seed,
            shape=shape,
            num_classes=columns,
            phase="grid",
            device=runtime.device,
        )
    return tile(to_pixels(x0), columns=columns)


@contextlib.contextmanager
def open_run(cfg: Any, runtime: Runtime) -> Iterator[RunFolder | None]:
    """The locked run folder in the main process, None in the others; before teacher, data or networks are opened.

    Where the main process is refused, all of them stop. Until `begin`, a refusal leaves nothing behind.
    """
    runtime.micro_batches(cfg.batch_size)
    config = dataclasses.asdict(cfg)
    folder = runtime.together(
        lambda: RunFolder.claim(cfg.out_dir, config, resume=cfg.resume) if runtime.is_main else None
    )
    with folder or contextlib.nullcontext():
        yield folder


def begin(runtime: Runtime, folder: RunFolder | None) -> None:
    """All is opened and fits: from here on the folder holds this run. Call it in every process."""
    runtime.together(folder.begin if folder is not None else lambda: None)


def run_cycle(
    cfg: Any,
    runtime: Runtime,
    folder: RunFolder | None,
    cycle: tuple[Phase, ...],
    *,
    identity: dict[str, str],
    generator: Generator,
    shape: tuple[int, ...],
    num_classes: int,
    calls: Calls,
    results: dict[str, nn.Module],
    save: Callable[[Path, Any, int], None],
    health: Health | None = None,
) -> None:
    """Resume, train, and save the `results`, networks by their folder in the run's; `calls` are those of the cycle.

    save(folder, network, step) writes one of them, all its weights at hand, as of a step. Where `health` scores
    checkpoints, the first result is written a second time, as of the best of them, into a folder named *_best.

    Exits with code EXIT_CODE where SIGTERM or SIGINT stopped the run; `resume: auto` then continues it.
    """

    def draw_grid(step: int) -> None:
        if folder is None and not runtime.sharded:
            return
        picture = sample_grid(generator, cfg.seed, shape, num_classes, runtime)
        if folder is not None:
            write_atomic(folder.samples / f"step_{step:08d}.png", png_bytes(picture))

    loop = Loop(
        cycle=cycle,
        seed=cfg.seed,
        steps=cfg.steps,
        batch_size=cfg.batch_size,
        runtime=runtime,
        folder=folder,
        identity=identity,
        checkpoints=cfg.checkpoint,
        log_every=cfg.log.every,
        samples_every=cfg.log.samples_every,
        sample=draw_grid,
        calls=calls,
        out_dir=Path(cfg.out_dir),
        health=health,
    )
    checkpoints = Path(cfg.out_dir) / "checkpoints"

    def write(name: str, result: nn.Module, step: int) -> None:
        network = runtime.whole(result)
        runtime.together(partial(save, folder.path / name, network, step) if folder is not None else lambda: None)

    with loop.stop:
        start = loop.restore(checkpoints)
        with RunLog.open(folder, cfg.log, dataclasses.asdict(cfg), start) as log:
            finished = loop.run(start, log)
        runtime.any(False)  # a launcher ends the others once one is gone: wait for the one that closes the log
        for name, result in results.items() if finished else ():
            write(name, result, cfg.steps)
        if finished and (best := loop.take_best(checkpoints)):
            name, result = next(iter(results.items()))
            write(f"{name}_best", result, best)
            if runtime.is_main:
                print(f"{name}_best holds the checkpoint of the best score, that of step {best}", file=sys.stderr)
        runtime.close()
    if not finished:
        if folder is not None:
            reached = max(checkpoint.steps_saved(folder.checkpoints), default=0)
            print(f"stopped at step {reached} of {cfg.steps}; the same command continues", file=sys.stderr)
        raise SystemExit(EXIT_CODE)
