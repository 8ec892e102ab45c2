"""Two Euler steps of a teacher as this project asks and guides it, beside those of diffusers' own pipeline."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dmd_dar import config, load_pipeline
from dmd_dar.distillation import job as distill
from dmd_dar.distillation.config import DistillConfig
from dmd_dar.encode import EncodeConfig, encode
from dmd_dar.models.guided import guided_velocity
from dmd_dar.models.teachers import Teacher, TeacherConfig, load_teacher
from dmd_dar.plan import plan_of

ROOT = Path(__file__).parents[3]
TEXTS = ["a red cat", "two dogs on the green grass", "x"]  # of different length


def encoded(folder: Path, *more: str) -> Path:
    """The prompts of TEXTS, encoded for the pipeline in `folder`, beside it."""
    (folder.parent / "prompts.txt").write_text("\n".join(TEXTS) + "\n")
    given = [f"prompts={folder.parent / 'prompts.txt'}", f"pipeline={folder}", f"out={folder}_prompts"]
    encode(config.load(EncodeConfig, [*given, "batch_size=2", "cpu=true", "dtype=float32", *more]))
    return Path(f"{folder}_prompts")


def load(folder: Path, **given: Any) -> Teacher:
    return load_teacher(TeacherConfig(str(folder), prompts=f"{folder}_prompts", **given))


@torch.no_grad()
def two_steps(teacher: Teacher, x: Tensor, sigmas: Tensor, guidance_scale: float, cond: list[int]) -> Tensor:
    """x (B, C, H, W) after Euler steps from each of `sigmas` to the next."""
    velocity = guided_velocity(teacher.network, teacher.prediction, guidance_scale)
    for t, following in zip(sigmas[:-1], sigmas[1:], strict=True):
        # times in float64: of 1000 t in float32 the last digits move the fastest of its sines by 1e-4
        v = velocity(x, t.double().expand(len(x)), torch.tensor(cond))
        x = x + (following - t).to(x.dtype) * v
    return x


def pipeline_of(folder: Path) -> Any:
    """diffusers' own pipeline from the disk; its scheduler keeps the noise levels of the last call."""
    import diffusers

    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def distance(ours: Tensor, theirs: Tensor, start: Tensor) -> float:
    """Largest difference, relative to the largest of what the steps added to `start`."""
    return float((ours - theirs).abs().max() / (theirs - start).abs().max())


FRESH = """
import json, sys
from safetensors.torch import load_file, save_file
from tests.models.families.euler import Path, load, two_steps
folder, file, scale, cond, given = json.loads(sys.argv[1])
held = load_file(file)
save_file({"x": two_steps(load(Path(folder), **given), held["x"], held["sigmas"], scale, cond)}, file + ".out")
"""


def in_a_fresh_process(folder: Path, x: Tensor, sigmas: Tensor, how: tuple[float, list[int]], **given: Any) -> Tensor:
    file = folder.parent / "start.safetensors"
    save_file({"x": x, "sigmas": sigmas}, file)
    arguments = json.dumps([str(folder), str(file), *how, given])
    subprocess.run([sys.executable, "-c", FRESH, arguments], cwd=ROOT, check=True, timeout=300)
    return load_file(f"{file}.out")["x"]


def distilled(folder: Path, out: Path, query: str, weights: str, **teacher: Any) -> Path:
    """The folder of a student of two steps, sampled from once; the teacher is guided with its family's own form."""
    given = [f"teacher.path={folder}", f"teacher.prompts={folder}_prompts", f"out_dir={out / 'run'}"]
    given += [f"regression.cache={out}/pairs", f"student.routing.query={query}", f"weights={weights}", "lora.rank=2"]
    given += [*RUN.split(), *(f"teacher.{name}={value}" for name, value in teacher.items())]
    plan = plan_of(config.load(DistillConfig, given))
    assert plan.trained["student"] > 0 and plan.activations > 0
    distill.main(given)
    student = out / "run" / "student"
    pipeline = load_pipeline(str(student))
    images, network = pipeline([0, 1], seed=3), pipeline.student.network
    assert images.isfinite().all() and images[0].std() > 0 and network.routing.query == query
    start = load(folder, **teacher).network.state_dict()
    now = network.state_dict()
    assert any(not torch.equal(now[name], value) for name, value in start.items())
    routers = [value for name, value in now.items() if ".dar." in name and name.endswith("query")]
    assert bool(routers) == (query != "residual") and any(value.any() for value in routers) == bool(routers)
    return student


RUN = "steps=2 batch_size=2 rungs=[1.0,0.5] fake_score.updates=1 guidance_scale=3.0 preflight=false"
RUN += " regression.weight=1 regression.solver_steps=2 regression.count=2 log.every=1 log.wandb=disabled"
RUN += " launch.cpu=true log.health_samples=2 gan.weight=0"
