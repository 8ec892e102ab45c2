"""Images from a trained student: python -m dmd_dar.sample student=RUN/student n=64 seed=0 out=DIR"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from dmd_dar import config
from dmd_dar.atomic import make_folder, write_atomic
from dmd_dar.data.images import png_bytes, tile, to_pixels
from dmd_dar.keys import key
from dmd_dar.methods.generate import few_step_generator, generate
from dmd_dar.models.denoiser import velocity_of
from dmd_dar.models.teachers import Teacher, TeacherConfig, codec_of, load_teacher

GRID_LIMIT = 64  # images shown in grid.png


@dataclass(frozen=True)
class SampleConfig:
    """python -m dmd_dar.sample"""

    student: str = key("", "folder of a student, RUN/student", path=True)
    out: str = key("out/samples", "folder for 000000.png ..., grid.png and samples.json")
    n: int = key(64, "images", least=1)
    seed: int = key(0, "of the noise; that of image i depends on seed and i alone", least=0)
    label: int = key(-1, "class or prompt of all images; -1 takes them in turn", least=-1)
    prompts: str = key("", "folder of encoded prompts; empty: those that the student was trained on", path=True)
    steps: int = key(0, "network calls; 0 takes the student's own", least=0)
    rungs: tuple[float, ...] = key((), "times of the calls; empty takes the student's own", above=0, most=1)
    sampler: Literal["auto", "stochastic", "deterministic"] = key(
        "auto", "between calls: re-noise, or follow the ODE; auto: as the student was trained"
    )
    batch_size: int = key(64, "images at a time; changes no image beyond rounding", least=1)
    cpu: bool = key(False, "compute on the CPU although a GPU is there")

    def __post_init__(self) -> None:
        if not self.student:
            raise ValueError("student is empty: name the folder of a student, student=RUN/student")


def checked_rungs(cfg: SampleConfig, student: Teacher) -> tuple[float, ...]:
    """The rungs the student was trained on; a ConfigError if it has none or the request asks for others."""
    trained = student.rungs
    if not trained:
        raise config.ConfigError(f"student = {cfg.student}: a many-step network, no few-step student; distil it")
    if cfg.steps not in (0, len(trained)) or cfg.rungs not in ((), trained):
        asked = f"rungs = {list(cfg.rungs)}" if cfg.rungs not in ((), trained) else f"steps = {cfg.steps}"
        raise config.ConfigError(
            f"{asked}: {cfg.student} was trained for {len(trained)} steps at rungs {list(trained)} and knows no others;"
            " leave steps and rungs out, or distil a student for these"
        )
    return trained


def refuse_other_images(out: Path, facts: dict[str, Any]) -> None:
    """A ConfigError where `out` holds the images of another request, which this one would mix with its own."""
    kept = out / "samples.json"
    if kept.is_file():
        old = json.loads(kept.read_text())
        if any(old.get(name) != facts[name] for name in ("n", "seed", "label", "rungs", "sampler", "network")):
            raise config.ConfigError(f"out = {out}: it holds the images of another request; name another folder")


def sample(cfg: SampleConfig) -> None:
    """Write the images, a grid of the first ones, and what they were made with."""
    device = torch.device("cuda" if torch.cuda.is_available() and not cfg.cpu else "cpu")
    student = load_teacher(TeacherConfig(cfg.student, prompts=cfg.prompts), device)
    rungs, shape = checked_rungs(cfg, student), student.network.config
    codec = codec_of(student, device)
    if cfg.label >= shape.num_classes:
        raise config.ConfigError(f"label = {cfg.label}: the student knows the classes 0 to {shape.num_classes - 1}")
    out = make_folder(cfg.out)
    sampler = student.sampler if cfg.sampler == "auto" else cfg.sampler
    facts = {**config.to_dict(cfg), "rungs": list(rungs), "sampler": sampler, "network": student.digest}
    refuse_other_images(out, facts)
    x0, labels = generate(
        few_step_generator(velocity_of(student.network, student.prediction), rungs, sampler),
        cfg.n,
        seed=cfg.seed,
        shape=(shape.in_channels, shape.input_size, shape.input_size),
        num_classes=shape.num_classes,
        batch_size=cfg.batch_size,
        device=device,
        label=None if cfg.label < 0 else cfg.label,
    )
    if codec is not None:
        x0 = torch.cat([codec.decode(latents) for latents in x0.split(cfg.batch_size)])
    images = to_pixels(x0)
    for i, image in enumerate(images):
        write_atomic(out / f"{i:06d}.png", png_bytes(image))
    write_atomic(out / "grid.png", png_bytes(tile(images[:GRID_LIMIT])))
    write_atomic(out / "samples.json", json.dumps({**facts, "labels": labels.tolist()}, indent=1))
    print(f"{cfg.n} images in {out}, the first of them in {out / 'grid.png'}")


if __name__ == "__main__":
    config.run_job(SampleConfig, sample, sys.argv[1:], description=__doc__ or "")
