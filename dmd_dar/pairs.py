"""Teacher trajectories on disk, made once for each (teacher, solver, guidance, rungs, seed)."""

import contextlib
import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from dmd_dar.atomic import make_folder, write_atomic
from dmd_dar.draws import Draws, sample_range
from dmd_dar.guidance import Velocity
from dmd_dar.keys import key
from dmd_dar.methods.generate import balanced_labels
from dmd_dar.methods.trajectories import Trajectories, solve_trajectories

BATCH = 64


@dataclass(frozen=True)
class RegressionConfig:
    """The regression loss on teacher trajectories."""

    weight: float = key(0.25, "weight of the loss; 0 leaves it and its trajectories out", least=0)
    metric: Literal["mse", "lpips"] = key("mse", "distance; lpips needs its weights on this machine")
    count: int = key(256, "trajectories", least=1)
    solver_steps: int = key(15, "Heun steps of a trajectory, two evaluations each", unit="steps", least=1)
    seed: int = key(0, "of the trajectories' noise", least=0)
    cache: str = key("out/pairs", "folder in which trajectories are kept and found again")


@dataclass(frozen=True)
class Recipe:
    """All that decides the trajectories; its hash names their file."""

    teacher: str  # models.saved.network_hash
    guidance_scale: float
    rungs: tuple[float, ...]
    solver_steps: int
    seed: int
    count: int
    num_classes: int
    shape: tuple[int, ...]

    def name(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()[:16]


def make_trajectories(recipe: Recipe, teacher: Velocity, device: torch.device) -> Trajectories:
    """Trajectory i starts from the noise keyed by (seed, "pairs", i), with label i modulo the number of classes."""
    parts = []
    for start in range(0, recipe.count, BATCH):
        samples = sample_range(start, min(start + BATCH, recipe.count), device)
        noise = Draws(recipe.seed, "pairs", 0, samples).normal("noise", *recipe.shape)
        cond = balanced_labels(samples, recipe.num_classes)
        parts.append(solve_trajectories(teacher, cond, recipe.rungs, recipe.solver_steps, noise))
    return Trajectories(*(torch.cat([getattr(part, name) for part in parts]) for name in ("states", "ends", "cond")))


def trajectories(recipe: Recipe, teacher: Velocity, cache: str, device: torch.device) -> Trajectories:
    """Those of `recipe`, from the cache if they are there, else made and kept. A damaged file is made anew.

    Runs may share a cache: the file appears whole, under the recipe's own name.
    """
    path = make_folder(cache) / f"{recipe.name()}.safetensors"
    if path.is_file():
        with contextlib.suppress(SafetensorError):
            return Trajectories(**load_file(path, device=str(device)))
    made = make_trajectories(recipe, teacher, device)
    tensors = {name: getattr(made, name).contiguous().cpu() for name in ("states", "ends", "cond")}
    write_atomic(path, save(tensors, metadata={"recipe": json.dumps(asdict(recipe))}))
    return made
