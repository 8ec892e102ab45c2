"""What every training job shares: its run folder, its log, its sample grids, and the order in which they open."""

import contextlib
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dmd_dar.data.images import png_bytes, tile, to_pixels
from dmd_dar.data.photos import NAMES, balanced_labels
from dmd_dar.draws import Draws, sample_range
from dmd_dar.methods import rollout
from dmd_dar.models.denoiser import velocity_of
from dmd_dar.train.atomic import write_atomic
from dmd_dar.train.folder import RunFolder
from dmd_dar.train.log import RunLog
from dmd_dar.train.loop import Loop, Phase
from dmd_dar.train.runtime import Runtime

GRID_IMAGES = 49  # 7 x 7: one column for each photograph
GRID_STEPS = 16  # Heun steps for a teacher's grid


Generate = Callable[[Tensor, Draws, Tensor], Tensor]  # (labels (N,), draws, noise (N, 3, S, S)) -> x0 (N, 3, S, S)


def ode_generator(network: nn.Module) -> Generate:
    """A many-step network's sampler: Heun on an even grid."""
    grid = torch.linspace(1, 0, GRID_STEPS + 1, dtype=torch.float64).tolist()
    return lambda labels, draws, noise: rollout.solve_ode(velocity_of(network), labels, grid, noise)[-1]


def few_step_generator(network: nn.Module, rungs: tuple[float, ...]) -> Generate:
    """A few-step student's sampler."""
    return lambda labels, draws, noise: rollout.sample(velocity_of(network), labels, rungs, draws, noise)


@torch.no_grad()
def sample_grid(generate: Generate, seed: int, size: int, runtime: Runtime) -> Tensor:
    """uint8 (3, H, W): the same noise and labels at every step of a run, one column per class."""
    draws = Draws(seed, "grid", 0, sample_range(0, GRID_IMAGES, runtime.device))
    labels = balanced_labels(draws.samples, len(NAMES))
    with runtime.autocast():
        return tile(to_pixels(generate(labels, draws, draws.normal("noise", 3, size, size))), columns=len(NAMES))


def run_cycle(
    cfg: Any,
    runtime: Runtime,
    cycle: tuple[Phase, ...],
    *,
    generate: Generate,
    size: int,
    save: Callable[[Path], None],
) -> None:
    """Open out_dir, resume, train, and save the result. `save` writes the trained network into a folder.

    Exits with code 143 where SIGTERM or SIGINT stopped the run; `resume: auto` then continues it.
    """
    plain = dataclasses.asdict(cfg)
    with contextlib.ExitStack() as stack:
        folder = None
        if runtime.is_main:
            folder = stack.enter_context(RunFolder.open(cfg.out_dir, plain, resume=cfg.resume))
        runtime.barrier()

        def draw_grid(step: int) -> None:
            if folder is not None:
                picture = sample_grid(generate, cfg.seed, size, runtime)
                write_atomic(folder.samples / f"step_{step:08d}.png", png_bytes(picture))

        loop = Loop(
            cycle=cycle,
            seed=cfg.seed,
            steps=cfg.steps,
            batch_size=cfg.batch_size,
            runtime=runtime,
            folder=folder,
            checkpoints=cfg.checkpoint,
            log_every=cfg.log.every,
            samples_every=cfg.log.samples_every,
            sample=draw_grid,
        )
        start = loop.restore(Path(cfg.out_dir) / "checkpoints")
        log = stack.enter_context(
            RunLog(
                Path(cfg.out_dir),
                enabled=runtime.is_main,
                step=start,
                wandb_mode=cfg.log.wandb,
                project=cfg.log.project,
                name=cfg.log.name,
                config=plain,
            )
        )
        finished = loop.run(start, log)
        if finished and folder is not None:
            save(folder.student)
    runtime.close()
    if not finished:
        raise SystemExit(143)
