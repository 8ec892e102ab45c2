"""The teacher's trajectories, made ahead of training: python -m dmd_dar.pairs out=DIR n=1024 [config=FILE.yaml ...]

The same command continues what was stopped, and several of them share the work of one folder.
"""

import contextlib
import hashlib
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from tqdm import tqdm

from dmd_dar import config, flow
from dmd_dar.atomic import make_folder, write_atomic
from dmd_dar.data.shards import Form, Layout, ShardFolder, Shards, differences, fill
from dmd_dar.draws import Draws, sample_range
from dmd_dar.errors import DivergedError, UserError
from dmd_dar.guidance import Velocity, guided
from dmd_dar.keys import key
from dmd_dar.methods.generate import balanced_labels
from dmd_dar.methods.trajectories import Trajectories, solve_trajectories
from dmd_dar.models.denoiser import velocity_of
from dmd_dar.models.teachers import TeacherConfig, load_teacher
from dmd_dar.train.loop import StopRequest

Make = Callable[[int, int], dict[str, Tensor]]

TENSORS = ("states", "ends", "cond")  # of Trajectories
BATCH = 64
LOOK = 0.5  # seconds between looks at the workers
SAY = 10.0  # seconds between lines of progress


@dataclass(frozen=True)
class RegressionConfig:
    """The regression loss on teacher trajectories."""

    weight: float = key(0.25, "weight of the loss; 0 leaves it and its trajectories out", least=0)
    metric: Literal["mse", "lpips"] = key("mse", "distance; lpips needs its weights on this machine")
    count: int = key(256, "trajectories", least=1)
    solver_steps: int = key(15, "Heun steps of a trajectory, two evaluations each", unit="steps", least=1)
    seed: int = key(0, "of the trajectories' noise", least=0)
    cache: str = key("out/pairs", "folder in which trajectories are kept and found again")
    pairs: str = key(
        "", "folder that dmd_dar.pairs made, in the place of count, seed and cache; empty: none", path=True
    )


@dataclass(frozen=True)
class PairsConfig:
    """python -m dmd_dar.pairs"""

    out: str = key("", "folder for the shards and their manifest")
    n: int = key(256, "pairs", least=1)
    seed: int = key(0, "of the noise; pair i depends on seed and i alone", least=0)
    rungs: tuple[float, ...] = key(flow.default_rungs(4), "the student's times, from 1 (noise) down", above=0, most=1)
    guidance_scale: float = key(1.0, "of the teacher: uncond + g (cond - uncond); 1 is none", least=0)
    solver_steps: int = key(15, "Heun steps of a trajectory, two evaluations each", unit="steps", least=1)
    shard_size: int = key(64, "pairs in a file, which is written whole or not at all", least=1)
    batch_size: int = key(BATCH, "pairs at a time; changes none of them beyond rounding", least=1)
    workers: int = key(0, "processes of this machine; 0: one for each GPU, one without", least=0)
    threads: int = key(0, "CPU threads of each process; 0 shares out torch's choice", least=0)
    cpu: bool = key(False, "compute on the CPU although a GPU is there")
    teacher: TeacherConfig = key(factory=TeacherConfig)

    def __post_init__(self) -> None:
        if not self.out:
            raise ValueError("out is empty: name the folder to write to, out=FOLDER")
        flow.check_rungs(self.rungs)
        if self.solver_steps < len(self.rungs):
            raise ValueError(f"solver_steps must be at least {len(self.rungs)}, to pass through as many rungs")


@dataclass(frozen=True)
class Recipe:
    """All that decides the trajectories; its hash names their file in a cache."""

    teacher: str  # models.teachers.Teacher.digest
    guidance_scale: float
    rungs: tuple[float, ...]
    solver_steps: int
    seed: int
    count: int
    num_classes: int
    shape: tuple[int, ...]

    def name(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()[:16]


def make_trajectories(
    recipe: Recipe,
    teacher: Velocity,
    device: torch.device,
    first: int = 0,
    stop: int | None = None,
    batch_size: int = BATCH,
) -> Trajectories:
    """Trajectories `first` .. `stop` - 1 of the recipe, all where `stop` is None.

    Trajectory i starts from the noise keyed by (seed, "pairs", i), with label i modulo the number of classes.
    """
    stop, parts = recipe.count if stop is None else stop, []
    for start in range(first, stop, batch_size):
        samples = sample_range(start, min(start + batch_size, stop), device)
        noise = Draws(recipe.seed, "pairs", 0, samples).normal("noise", *recipe.shape)
        cond = balanced_labels(samples, recipe.num_classes)
        parts.append(solve_trajectories(teacher, cond, recipe.rungs, recipe.solver_steps, noise))
    return Trajectories(*(torch.cat([getattr(part, name) for part in parts]) for name in TENSORS))


def trajectories(recipe: Recipe, teacher: Velocity, cache: str, device: torch.device) -> Trajectories:
    """Those of `recipe`, from the cache if they are there, else made and kept. A damaged file is made anew.

    Runs may share a cache: the file appears whole, under the recipe's own name.
    """
    path = make_folder(cache) / f"{recipe.name()}.safetensors"
    if path.is_file():
        with contextlib.suppress(SafetensorError):
            return Trajectories(**load_file(path, device=str(device)))
    made = make_trajectories(recipe, teacher, device)
    tensors = {name: getattr(made, name).contiguous().cpu() for name in TENSORS}
    write_atomic(path, save(tensors, metadata={"recipe": json.dumps(asdict(recipe))}))
    return made


@dataclass(frozen=True)
class StoredTrajectories:
    """A folder of pairs in the place of `Trajectories`: read as they are asked for, onto `device`."""

    shards: Shards
    device: torch.device

    @property
    def count(self) -> int:
        return len(self.shards)

    def at(self, rung: int, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """States at rungs[rung], ends and labels of the trajectories `index` (B,)."""
        states = self.shards.rows("states", index, rung)
        ends, cond = self.shards.rows("ends", index), self.shards.rows("cond", index)
        return states.to(self.device), ends.to(self.device), cond.to(self.device)


def layout_of(recipe: Recipe, shard_size: int) -> Layout:
    """What a folder of the recipe's trajectories holds, float32."""
    decides = asdict(recipe)
    count = decides.pop("count")
    states, ends = Form("F32", (len(recipe.rungs), *recipe.shape)), Form("F32", recipe.shape)
    tensors = {"states": states, "ends": ends, "cond": Form("I64", ())}
    return Layout({"solver": "heun", "labels": "in turn", **decides}, count, shard_size, tensors)


def open_pairs(folder: str, recipe: Recipe, device: torch.device) -> StoredTrajectories:
    """The pairs in `folder`, for a run that needs trajectories like the recipe's; number and seed are the folder's.

    Raises UserError naming each key in which they differ, and what `Shards` raises.
    """
    shards = Shards(folder)
    held, wanted = (
        {**layout["content"], "seed": None, "tensors": layout["tensors"]}
        for layout in (shards.layout.described(), layout_of(recipe, 1).described())
    )
    differ = differences(held, wanted)
    if differ:
        raise UserError(
            f"regression.pairs = {folder}: it holds other pairs than this run needs: {'; '.join(differ)}."
            " Restore these keys, or make pairs for them (python -m dmd_dar.pairs)"
        )
    return StoredTrajectories(shards, device)


def trajectories_for(
    regression: RegressionConfig, recipe: Recipe, teacher: Velocity, device: torch.device
) -> Trajectories | StoredTrajectories:
    """A run's trajectories: those of the folder that it names, else those of its cache."""
    if regression.pairs:
        return open_pairs(regression.pairs, recipe, device)
    return trajectories(recipe, teacher, regression.cache, device)


def recipe_and_teacher(cfg: PairsConfig, device: torch.device) -> tuple[Recipe, Velocity]:
    """What the pairs are, and the guided teacher that makes them."""
    teacher = load_teacher(cfg.teacher, device)
    form = teacher.network.config
    recipe = Recipe(
        teacher=teacher.digest,
        guidance_scale=cfg.guidance_scale,
        rungs=cfg.rungs,
        solver_steps=cfg.solver_steps,
        seed=cfg.seed,
        count=cfg.n,
        num_classes=form.num_classes,
        shape=(form.in_channels, form.input_size, form.input_size),
    )
    return recipe, guided(velocity_of(teacher.network, teacher.prediction), cfg.guidance_scale, form.num_classes)


def shard_maker(cfg: PairsConfig, recipe: Recipe, teacher: Velocity, device: torch.device) -> Make:
    """make(first, stop) -> tensors of these pairs; raises DivergedError where the teacher gives no number."""

    def make(first: int, stop: int) -> dict[str, Tensor]:
        made = make_trajectories(recipe, teacher, device, first, stop, cfg.batch_size)
        broken = (~made.ends.isfinite().flatten(1).all(1)).nonzero().flatten()
        if len(broken):
            pair = first + int(broken[0])
            raise DivergedError(
                f"teacher.path = {cfg.teacher.path}: its trajectory of pair {pair} is not finite; mend the teacher"
            )
        return {name: getattr(made, name) for name in TENSORS}

    return make


def device_of(cfg: PairsConfig, rank: int) -> torch.device:
    gpus = 0 if cfg.cpu else torch.cuda.device_count()
    return torch.device("cuda", rank % gpus) if gpus else torch.device("cpu")


def _worker(cfg: PairsConfig, rank: int, processes: int, line: Connection) -> None:
    """One of several processes: stops when `line` speaks, and dies with its parent, whose business signals are."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    torch.set_num_threads(cfg.threads or max(1, torch.get_num_threads() // processes))
    device = device_of(cfg, rank)
    try:
        recipe, teacher = recipe_and_teacher(cfg, device)
        make = shard_maker(cfg, recipe, teacher, device)
        with ShardFolder(cfg.out, layout_of(recipe, cfg.shard_size)) as folder:
            fill(folder, make, stopped=line.poll, rank=rank, processes=processes)
    except UserError as error:
        line.send_bytes(str(error).encode())
        sys.exit(2)


def share(
    cfg: PairsConfig, workers: int, folder: ShardFolder, stop: StopRequest, report: Callable[[int], None]
) -> bool:
    """Let several processes fill the folder; True once it is complete. One that fails stops them all, as UserError."""
    context = multiprocessing.get_context("spawn")
    lines = [context.Pipe() for _ in range(workers)]
    started = [
        context.Process(target=_worker, args=(cfg, rank, workers, theirs)) for rank, (_, theirs) in enumerate(lines)
    ]
    told = False
    try:
        for process, (_, theirs) in zip(started, lines, strict=True):
            process.start()
            theirs.close()
        while alive := [process for process in started if process.is_alive()]:
            alive[0].join(LOOK)
            if not told and (stop.asked or any(process.exitcode for process in started)):
                told = True
                for ours, _ in lines:
                    with contextlib.suppress(OSError):
                        ours.send_bytes(b"stop")
            report(folder.samples_made())
        for rank, process in enumerate(started):
            if process.exitcode and not stop.asked:
                raise UserError(_last_words(rank, process.exitcode, lines[rank][0]))
    finally:
        for process in started:
            if process.is_alive():
                process.kill()
    return not folder.missing()


def _last_words(rank: int, code: int, line: Connection) -> str:
    with contextlib.suppress(EOFError, OSError):
        if line.poll():
            return line.recv_bytes().decode()
    return f"worker {rank} ended with code {code}; whole shards are kept, and the same command continues"


def progress(n: int, start: int) -> Callable[[int], None]:
    """report(made): a line with speed and time left, every now and then and at the end."""
    began = printed = time.monotonic()
    said = start

    def report(made: int) -> None:
        nonlocal printed, said
        now = time.monotonic()
        if made > said and (made == n or now - printed >= SAY):
            printed, said, rate = now, made, (made - start) / max(now - began, 1e-9)
            left = tqdm.format_interval((n - made) / rate)
            print(f"{made}/{n} pairs  {rate:.3g} pairs/s  ETA {left}", file=sys.stderr, flush=True)

    return report


def make_pairs(cfg: PairsConfig) -> None:
    """Make what is missing of the folder. Exits with code 143 where SIGTERM or SIGINT stopped it, a shard finished.

    Where RANK and WORLD_SIZE are set, this process is one of those that a launcher started, and starts none itself.
    """
    processes = int(os.environ.get("WORLD_SIZE", 1))
    rank = int(os.environ.get("RANK", 0)) if processes > 1 else 0
    if processes > 1 and cfg.workers > 1:
        raise UserError(f"workers = {cfg.workers}: WORLD_SIZE = {processes} processes are there already; leave it out")
    workers = 1 if processes > 1 else cfg.workers or (0 if cfg.cpu else torch.cuda.device_count()) or 1
    device = torch.device("cpu") if workers > 1 else device_of(cfg, int(os.environ.get("LOCAL_RANK", rank)))
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    recipe, teacher = recipe_and_teacher(cfg, device)
    with StopRequest() as stop, ShardFolder(cfg.out, layout_of(recipe, cfg.shard_size)) as folder:
        folder.require_space()
        made = folder.samples_made()
        report = progress(cfg.n, made) if rank == 0 else None
        if workers > 1 and made < cfg.n:
            finished = share(cfg, workers, folder, stop, report)
        else:
            make = shard_maker(cfg, recipe, teacher, device)
            finished = fill(folder, make, stopped=lambda: stop.asked, report=report, rank=rank, processes=processes)
        shards = folder.layout.shards
        done = shards - len(folder.missing())
    if not finished:
        print(f"stopped with {done} of {shards} shards in {cfg.out}; the same command continues", file=sys.stderr)
        raise SystemExit(143)
    if rank == 0:
        print(f"{cfg.n} pairs in {cfg.out}, in {shards} shards")


if __name__ == "__main__":
    config.run_job(PairsConfig, make_pairs, sys.argv[1:], description=__doc__ or "")
