"""The student that is exact at every rung: python runs/restarts.py [n=512] [out=out/restarts]

A student that re-noises between calls starts the teacher's ODE anew at every rung. If the teacher were the exact score of
some data, the samples would have the teacher's distribution; what they differ by is the teacher's own error, and no
student of these rungs and this sampler that has learned the ODE's map is nearer. Writes the samples as a folder of images
for eval.report.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from dmd_dar import config, flow
from dmd_dar.atomic import make_folder, write_atomic
from dmd_dar.data.images import to_pixels
from dmd_dar.guidance import Velocity
from dmd_dar.keys import key
from dmd_dar.methods.generate import SampleRange, few_step_generator, generate
from dmd_dar.methods.solvers import METHODS, Solver
from dmd_dar.models.denoiser import velocity_of
from dmd_dar.models.teachers import TeacherConfig, load_teacher


@dataclass(frozen=True)
class RestartsConfig(Solver):
    """python runs/restarts.py"""

    rungs: tuple[float, ...] = key((1.0, 0.5, 0.2, 0.08), "times at which the ODE starts anew", above=0, most=1)
    n: int = key(512, "images", least=1)
    seed: int = key(0, "of the noise")
    out: str = key("out/restarts", "folder for the images")
    teacher: TeacherConfig = key(factory=TeacherConfig)


def to_the_end(velocity: Velocity, rungs: tuple[float, ...], solver: Solver) -> Velocity:
    """The velocity of a student whose estimate of x0 at a rung is where the ODE ends from there."""
    grid, positions = flow.time_grid(rungs, solver.solver_steps, solver.solver_grid)
    starts = dict(zip(rungs, positions, strict=True))

    def exact(x_t: torch.Tensor, t: torch.Tensor, cond: torch.Tensor) -> torch.Tensor:
        start = min(rungs, key=lambda rung: abs(rung - t[0].item()))
        end = METHODS[solver.solver](velocity, cond, grid[starts[start] :], x_t)[-1]
        return (x_t - end) / flow.expand_t(t, x_t)

    return exact


def restarts(cfg: RestartsConfig) -> None:
    teacher = load_teacher(cfg.teacher)
    network = teacher.network
    exact = to_the_end(velocity_of(network, teacher.prediction), cfg.rungs, cfg.ode)
    images, labels = generate(
        few_step_generator(exact, cfg.rungs),
        SampleRange(cfg.n, cfg.seed),
        shape=network.shape,
        num_classes=network.num_conditions,
    )
    out = make_folder(Path(cfg.out))
    np.save(out / "images.npy", to_pixels(images).numpy())
    names = {str(label): name for label, name in enumerate(teacher.label_names)}
    facts = {"names": names, "labels": labels.tolist()}
    write_atomic(out / "samples.json", json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    config.run_job(RestartsConfig, restarts, description=__doc__ or "")
