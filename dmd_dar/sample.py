"""Images from a trained student: python -m dmd_dar.sample student=RUN/student n=64 seed=0 out=DIR"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from dmd_dar import config
from dmd_dar.atomic import make_folder, write_atomic
from dmd_dar.data.images import png_bytes, tile
from dmd_dar.device import chosen_device
from dmd_dar.keys import key
from dmd_dar.methods.generate import balanced_labels
from dmd_dar.pipeline import StudentPipeline, load_pipeline

GRID_LIMIT = 64  # images shown in grid.png


@dataclass(frozen=True)
class SampleConfig:
    """python -m dmd_dar.sample"""

    student: str = key("", "folder of a student, RUN/student", path=True)
    base: str = key("", "teacher of the adapter RUN/student/adapter, path or hub id; empty: student is no adapter")
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


def check_rungs(cfg: SampleConfig, trained: tuple[float, ...]) -> None:
    """A ConfigError where the request asks for other rungs than the student was trained on."""
    if cfg.steps not in (0, len(trained)) or cfg.rungs not in ((), trained):
        request = f"rungs = {list(cfg.rungs)}" if cfg.rungs not in ((), trained) else f"steps = {cfg.steps}"
        raise config.ConfigError(
            f"{request}: {cfg.student} was trained for {len(trained)} steps at rungs {list(trained)} and knows no"
            " others; leave steps and rungs out, or distil a student for these"
        )


def refuse_other_images(out: Path, facts: dict[str, Any]) -> None:
    """A ConfigError where `out` holds, or may hold, the images of another request, which this one would mix in."""
    kept = out / "samples.json"
    if kept.is_file():
        try:
            old = json.loads(kept.read_text())
            if not isinstance(old, dict):
                raise ValueError("it describes no request")
        except ValueError as error:
            fault = f"{kept} cannot be read ({error}), so whose images these are is unknown"
            raise config.ConfigError(f"out = {out}: {fault}; remove the folder, or name another") from error
        if any(old.get(name) != facts[name] for name in ("n", "seed", "label", "rungs", "sampler", "network")):
            raise config.ConfigError(f"out = {out}: it holds the images of another request; name another folder")


def names_of(pipe: StudentPipeline, labels: Tensor) -> dict[str, Any]:
    """What an evaluation reads of these labels: the names of the classes, or the prompts, as far as they are known."""
    prompts = pipe.student.network.prompts
    names = pipe.label_names if prompts is None else prompts.texts()
    shown = {label: names[label] for label in labels.unique().tolist()} if names else {}
    return {"names": shown, "prompted": prompts is not None}


def sample(cfg: SampleConfig) -> None:
    """Write the images, a grid of the first ones, and what they were made with."""
    device = chosen_device(cfg.cpu)
    pipe = load_pipeline(cfg.student, device, prompts=cfg.prompts, base=cfg.base)
    check_rungs(cfg, pipe.rungs)
    if cfg.label >= pipe.num_classes:
        raise config.ConfigError(f"label = {cfg.label}: the student knows the classes 0 to {pipe.num_classes - 1}")
    each = torch.arange(cfg.n)
    labels = balanced_labels(each, pipe.num_classes) if cfg.label < 0 else torch.full_like(each, cfg.label)
    sampler = pipe.student.sampler if cfg.sampler == "auto" else cfg.sampler
    out = make_folder(cfg.out)
    facts = {**config.to_dict(cfg), "rungs": list(pipe.rungs), "sampler": sampler, "network": pipe.student.digest}
    refuse_other_images(out, facts)
    described = json.dumps({**facts, **names_of(pipe, labels), "labels": labels.tolist()}, indent=1)
    write_atomic(out / "samples.json", described)  # first: what a killed run leaves is known to be of this request
    images = pipe(labels, seed=cfg.seed, sampler=sampler, batch_size=cfg.batch_size, output="uint8")
    for i, image in enumerate(images):
        write_atomic(out / f"{i:06d}.png", png_bytes(image))
    write_atomic(out / "grid.png", png_bytes(tile(images[:GRID_LIMIT])))
    print(f"{cfg.n} images in {out}, the first of them in {out / 'grid.png'}")


def main(argv: Sequence[str] | None = None) -> None:
    config.run_job(SampleConfig, sample, argv, description=__doc__ or "")


if __name__ == "__main__":
    main()
