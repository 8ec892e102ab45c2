"""Teacher trajectories on disk, made once for each (teacher, solver, guidance, rungs, seed)."""

import hashlib
import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file, save_file

from dmd_dar.atomic import write_atomic
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
    """All that decides the trajectories; its hash names their folder."""

    teacher: str  # hash of the weights
    prediction: str
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
    """Those of `recipe`, from the cache if they are there, else made and kept. A damaged file is made anew."""
    folder = Path(cache) / recipe.name()
    weights, manifest = folder / "trajectories.safetensors", folder / "manifest.json"
    if manifest.is_file() and weights.is_file():
        described = json.loads(manifest.read_text())
        if described["sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest():
            return Trajectories(**load_file(weights, device=str(device)))
        shutil.rmtree(folder)
    made = make_trajectories(recipe, teacher, device)
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / ".trajectories.partial"
    save_file({name: getattr(made, name).contiguous().cpu() for name in ("states", "ends", "cond")}, partial)
    digest = hashlib.sha256(partial.read_bytes()).hexdigest()
    partial.replace(weights)
    write_atomic(manifest, json.dumps({"sha256": digest, "recipe": asdict(recipe)}, indent=1))
    return made
