"""The teacher's trajectories, made ahead of training: python -m dmd_dar.pairs out=DIR n=1024 [config=FILE.yaml ...]

The same command continues what was stopped, and several of them share the work of one folder.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from dmd_dar import config, flow, moved
from dmd_dar.data.batches import Batches, Make
from dmd_dar.data.kept import Kept
from dmd_dar.data.shards import Form, Layout, Shards, differences
from dmd_dar.draws import Draws, sample_range
from dmd_dar.errors import DivergedError, UserError
from dmd_dar.guidance import GuidanceConfig, Velocity
from dmd_dar.keys import key
from dmd_dar.losses import LossWeight
from dmd_dar.methods.generate import balanced_labels
from dmd_dar.methods.solvers import Solver
from dmd_dar.methods.trajectories import Trajectories, solve_trajectories
from dmd_dar.models.guided import guided_velocity, rule_of
from dmd_dar.models.sizes import shape_at
from dmd_dar.models.teachers import TeacherConfig, codec_of, load_teacher
from dmd_dar.train.processes.filling import Work, fill_folder

TENSORS = ("states", "ends", "cond")  # of Trajectories
BATCH = 64
HOW = {"labels": "in turn"}


@dataclass(frozen=True)
class RegressionConfig(LossWeight, Solver):
    """The regression loss on teacher trajectories; without any weight they are left out."""

    weight: float = key(0.25, "weight of the loss", least=0)
    metric: Literal["mse", "lpips", "pseudo_huber", "spectrum"] = key(
        "mse", "distance; spectrum: squared error by frequency; lpips needs its weights on this machine"
    )
    target: Literal["end", "next_rung"] = key(
        "end", "where a trajectory is followed to: its end, or its state at the next rung (sampler deterministic)"
    )
    by_rung: tuple[float, ...] = key((), "factor of the weight at each rung; empty: 1 at all", least=0)
    count: int = key(256, "trajectories", least=1)
    seed: int = key(0, "of the trajectories' noise", least=0)
    cache: str = key(
        "out/pairs", "folder in which the teacher's trajectories and health samples are kept and found again"
    )
    pairs: str = key(
        "", "folder that dmd_dar.pairs made, in the place of count, seed and cache; empty: none", path=True
    )


@dataclass(frozen=True)
class PairsConfig(Solver):
    """python -m dmd_dar.pairs"""

    out: str = key("", "folder for the shards and their manifest")
    n: int = key(256, "pairs", least=1)
    seed: int = key(0, "of the noise; pair i depends on seed and i alone", least=0)
    rungs: tuple[float, ...] = key(flow.default_rungs(4), "the student's times, from 1 (noise) down", above=0, most=1)
    guidance_scale: float = key(1.0, "of the teacher: uncond + g (cond - uncond); 1 is none", least=0)
    guidance: GuidanceConfig = key(factory=GuidanceConfig)
    height: int = key(0, "of the images; 0: the teacher's own", unit="pixels", least=0)
    width: int = key(0, "of the images; 0: the teacher's own", unit="pixels", least=0)
    shard_size: int = key(64, "pairs in a file, which is written whole or not at all", least=1)
    batch_size: int = key(BATCH, "pairs at a time; changes none of them beyond rounding", least=1)
    workers: int = key(0, "processes of this machine; 0: one for each GPU, one without", least=0)
    threads: int = key(0, "CPU threads of each process; 0 shares out torch's choice", least=0)
    cpu: bool = key(False, "compute on the CPU although a GPU is there")
    teacher: TeacherConfig = key(factory=TeacherConfig)

    def __post_init__(self) -> None:
        if not self.out:
            raise ValueError("out is empty: name the folder to write to, out=FOLDER")
        flow.check_rungs(self.rungs, self.solver_steps)


@dataclass(frozen=True)
class Recipe:
    """All that decides the trajectories; its hash names their file in a cache."""

    teacher: str  # models.teachers.Teacher.digest
    guidance_scale: float
    rungs: tuple[float, ...]
    solver: Solver
    seed: int
    count: int
    num_classes: int
    shape: tuple[int, ...]
    guidance: dict[str, Any] = field(default_factory=dict)  # guidance.Rule.facts()

    def decides(self) -> dict[str, Any]:
        """All of it for a hash, which names no plain guidance: the only one before there were others."""
        values = asdict(self)
        return values if self.guidance else {name: values[name] for name in values if name != "guidance"}


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
        parts.append(solve_trajectories(teacher, cond, recipe.rungs, recipe.solver, noise))
    return Trajectories(*(torch.cat([getattr(part, name) for part in parts]) for name in TENSORS))


def trajectories(recipe: Recipe, teacher: Velocity, cache: str, device: torch.device) -> Trajectories:
    """Those of `recipe`, from the cache if they are there, else made and kept."""
    kept = Kept(Path(cache), recipe.decides())  # of any version of this code: a run is continued with the same ones
    if found := kept.find():
        return Trajectories(**{name: found[name].to(device) for name in TENSORS})
    made = make_trajectories(recipe, teacher, device)
    kept.keep({name: getattr(made, name) for name in TENSORS})
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


def how_solved(solver: Solver) -> dict[str, Any]:
    """A solver in a folder's content, which names no even grid: the only one before there were others."""
    values = asdict(solver)
    return {name: values[name] for name in values if (name, values[name]) != ("solver_grid", "even")}


def layout_of(recipe: Recipe, shard_size: int) -> Layout:
    """What a folder of the recipe's trajectories holds, float32."""
    decides = recipe.decides() | how_solved(recipe.solver)
    count = decides.pop("count")
    states, ends = Form("F32", (len(recipe.rungs), *recipe.shape)), Form("F32", recipe.shape)
    tensors = {"states": states, "ends": ends, "cond": Form("I64", ())}
    return Layout({**HOW, **decides}, count, shard_size, tensors)


def wanted_by(cfg: PairsConfig) -> dict[str, Any]:
    """What of `layout_of` needs no look at the teacher."""
    same = ("guidance_scale", "rungs", "seed", "n", "shard_size")
    return {**HOW, **how_solved(cfg.ode), **{name: getattr(cfg, name) for name in same}}


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
    codec = codec_of(teacher) if cfg.height or cfg.width else None  # its own size needs no look at the VAE
    recipe = Recipe(
        teacher=teacher.digest,
        guidance_scale=cfg.guidance_scale,
        rungs=cfg.rungs,
        solver=cfg.ode,
        seed=cfg.seed,
        count=cfg.n,
        num_classes=teacher.network.num_conditions,
        shape=shape_at(teacher.network, 1 if codec is None else codec.factor, cfg.height, cfg.width),
        guidance=rule_of(teacher.network, cfg.guidance_scale, cfg.guidance).facts(),
    )
    return recipe, guided_velocity(teacher.network, teacher.prediction, cfg.guidance_scale, cfg.guidance)


def batch_maker(cfg: PairsConfig, recipe: Recipe, teacher: Velocity, device: torch.device) -> Make:
    """make(first, stop) -> tensors of these pairs; raises DivergedError where the teacher gives no number."""

    def make(first: int, stop: int) -> dict[str, Tensor]:
        made = make_trajectories(recipe, teacher, device, first, stop, stop - first)
        broken = (~made.ends.isfinite().flatten(1).all(1)).nonzero().flatten()
        if len(broken):
            pair = first + int(broken[0])
            raise DivergedError(
                f"teacher.path = {cfg.teacher.path}: its trajectory of pair {pair} is not finite; mend the teacher"
            )
        return {name: getattr(made, name) for name in TENSORS}

    return make


def prepare(cfg: PairsConfig, device: torch.device) -> Work:
    """The pairs of `cfg`, for `fill_folder`."""
    recipe, teacher = recipe_and_teacher(cfg, device)
    batches = Batches(batch_maker(cfg, recipe, teacher, device), cfg.batch_size)
    return Work(layout_of(recipe, cfg.shard_size), batches, "pairs")


def make_pairs(cfg: PairsConfig) -> None:
    """Make what is missing of the folder, see `fill_folder`."""
    if held := fill_folder(cfg, prepare, wanted_by(cfg)):
        print(held)


def main(argv: Sequence[str] | None = None) -> None:
    config.run_job(PairsConfig, make_pairs, argv, description=__doc__ or "")


moved.keep_names(__name__)


if __name__ == "__main__":
    main()
