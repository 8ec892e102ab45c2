"""The student that is exact at every rung: python runs/restarts.py [run=RUN] [n=512]

A student that re-noises between calls starts the teacher's ODE anew at every rung. If the teacher were the exact score
of some data, the samples would have the teacher's distribution; what they differ by is the teacher's own error, and no
student of these rungs and this sampler that has learned the ODE's map is nearer. Measured against the teacher of RUN,
at its rungs, into docs/results/restarts.json.
"""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from dmd_dar import config, flow
from dmd_dar.atomic import make_folder, write_atomic
from dmd_dar.data.images import to_pixels
from dmd_dar.distillation.config import DistillConfig
from dmd_dar.guidance import Velocity
from dmd_dar.keys import key
from dmd_dar.methods.generate import SampleRange, few_step_generator, generate
from dmd_dar.methods.solvers import METHODS, Solver
from dmd_dar.models.denoiser import velocity_of
from dmd_dar.models.teachers import load_teacher

KEPT = Path(__file__).parents[1] / "docs" / "results" / "restarts.json"


@dataclass(frozen=True)
class RestartsConfig(Solver):
    """python runs/restarts.py"""

    run: str = key("out/ablations/bands_regression/residual_seed0", "whose teacher, rungs and report are taken")
    n: int = key(512, "images", least=64)
    seed: int = key(0, "of the noise", least=0)
    out: str = key("out/restarts", "folder for the images and the report")


def to_the_end(velocity: Velocity, rungs: tuple[float, ...], solver: Solver) -> Velocity:
    """The velocity of a student whose estimate of x0 at a rung is where the ODE ends from there."""
    grid, positions = flow.time_grid(rungs, solver.solver_steps, solver.solver_grid)

    def exact(x_t: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        nearest = min(range(len(rungs)), key=lambda rung: abs(rungs[rung] - t[0].item()))
        end = METHODS[solver.solver](velocity, cond, grid[positions[nearest] :], x_t)[-1]
        return (x_t - end) / flow.expand_t(t, x_t)

    return exact


def restarts(cfg: RestartsConfig) -> None:
    run, out = config.load(DistillConfig, [f"config={cfg.run}/config.yaml"]), make_folder(Path(cfg.out))
    teacher = load_teacher(run.teacher)
    network = teacher.network
    exact = to_the_end(velocity_of(network, teacher.prediction), run.rungs, cfg.ode)
    images, labels = generate(
        few_step_generator(exact, run.rungs),
        SampleRange(cfg.n, cfg.seed),
        shape=network.shape,
        num_classes=network.num_conditions,
    )
    np.save(out / "images.npy", to_pixels(images).numpy())
    facts = {"names": dict(enumerate(teacher.label_names)), "labels": labels.tolist()}
    write_atomic(out / "samples.json", json.dumps(facts, indent=1) + "\n")
    words = ["-m", "eval.report", f"runs=[{cfg.run}]", f"images=[{out}]", f"out={out}/report", f"n={cfg.n}"]
    subprocess.run([sys.executable, *words, "metrics=[offline]"], check=True)
    report = json.loads((out / "report" / "report.json").read_text())
    (one,) = (one for one in report["sets"] if one["role"] == "images")
    against = one["against"]["teacher"]
    names = ("verdict", "gain_db", "hf_kurtosis_ratio", "flat_noise_db", "fd_wavelet")
    kept = {"rungs": run.rungs, "images": one["images"], **{name: against[name] for name in names}}
    write_atomic(KEPT, json.dumps(kept, indent=1) + "\n")
    print(KEPT)


if __name__ == "__main__":
    config.run_job(RestartsConfig, restarts, description=__doc__ or "")
