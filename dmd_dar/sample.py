"""Images from a trained student: python -m dmd_dar.sample student=RUN/student n=64 seed=0 out=DIR
or, of one that reads prompts, from words: python -m dmd_dar.sample student=RUN/student prompt="a cat in a hat" n=4
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from dmd_dar import config
from dmd_dar.atomic import make_folder, write_atomic
from dmd_dar.data.captions import captioned
from dmd_dar.data.images import png_bytes, tile
from dmd_dar.data.prompt_files import Entry, read_entries
from dmd_dar.device import chosen_device
from dmd_dar.keys import key
from dmd_dar.methods.generate import balanced_labels
from dmd_dar.models.codecs import Decoding
from dmd_dar.models.sizes import pixels_of
from dmd_dar.pipeline import StudentPipeline, load_pipeline

GRID_LIMIT = 64  # images shown in grid.png
DEFAULT = 64  # images where neither their number nor prompts are named
ENLARGED = 256  # pixels of a side up to which the grid shows each pixel as four
SAME = ("n", "seed", "label", "rungs", "sampler", "network")  # of a request that `out` already holds images of
ALSO = ("captions", "height", "width", "decode")  # the same, which requests of before lack


@dataclass(frozen=True)
class SampleConfig:
    """python -m dmd_dar.sample"""

    student: str = key("", "folder of a student, RUN/student", path=True)
    base: str = key("", "teacher of the adapter RUN/student/adapter, path or hub id; empty: student is no adapter")
    out: str = key("out/samples", "folder for 000000.png ..., grid.png and samples.json")
    n: int = key(0, f"images; 0: {DEFAULT}, or one for each prompt that is given in words", least=0)
    seed: int = key(0, "of the noise; that of image i depends on seed and i alone", least=0)
    label: int = key(-1, "class or prompt of all images; -1 takes them in turn", least=-1)
    prompt: str = key("", "what all images show, in words")
    prompts: str = key(
        "",
        "a file of prompts in words, as dmd_dar.encode reads it, taken in turn, or a folder of encoded ones; empty:"
        " those that the student was trained on",
        path=True,
    )
    column: str = key("", "field or column of the file that holds the prompt; empty: prompt, caption or text")
    text_encoder: str = key(
        "", "pipeline whose text encoder reads words, folder or hub id; empty: base, or the one that the card names"
    )
    steps: int = key(0, "network calls; 0 takes the student's own", least=0)
    rungs: tuple[float, ...] = key((), "times of the calls; empty takes the student's own", above=0, most=1)
    height: int = key(0, "of the images; 0: the first size that it was trained at", unit="pixels", least=0)
    width: int = key(0, "of the images; 0: the first size that it was trained at", unit="pixels", least=0)
    sampler: Literal["auto", "stochastic", "deterministic"] = key(
        "auto", "between calls: re-noise, or follow the ODE; auto: as the student was trained"
    )
    batch_size: int = key(64, "images at a time; changes no image beyond rounding", least=1)
    decode: Decoding = key("whole", "of latents: several images at a time, one (slices), or one in tiles: least memory")
    cpu: bool = key(False, "compute on the CPU although a GPU is there")

    def __post_init__(self) -> None:
        if not self.student:
            raise ValueError("student is empty: name the folder of a student, student=RUN/student")
        if self.prompt and self.prompts:
            raise ValueError("prompt and prompts both say what the images show: leave one of them out")
        if self.label >= 0 and (self.prompt or self.prompts_file):
            raise ValueError("label is a class or the number of an encoded prompt: leave it out, words say it")
        if self.column and not self.prompts_file:
            raise ValueError("column is of a file of prompts, prompts=FILE: leave it out")

    @property
    def prompts_file(self) -> str:
        """`prompts` where it is a file."""
        return self.prompts if Path(self.prompts or ".").is_file() else ""


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
        if any(old.get(name) != facts.get(name) for name in (*SAME, "seeds")) or any(
            name in old and old[name] != facts.get(name) for name in ALSO
        ):
            raise config.ConfigError(f"out = {out}: it holds the images of another request; name another folder")


@dataclass(frozen=True)
class Asked:
    """What each image shows: `labels` (n,) are classes or numbers of prompts, named by `names`."""

    labels: Tensor
    names: tuple[str, ...]  # of all classes, or the prompts; () where these are not known
    prompted: bool = False
    words: tuple[str, ...] = ()  # the prompt of each image, where it is given in words
    seeds: tuple[int, ...] = ()  # of each image, where the file of prompts says one

    def described(self) -> dict[str, Any]:
        """Of samples.json, for people and for an evaluation."""
        shown = {label: self.names[label] for label in self.labels.unique().tolist()} if self.names else {}
        facts = {"names": shown, "prompted": self.prompted, "labels": self.labels.tolist()}
        captions = [shown[label] for label in self.labels.tolist()] if self.prompted and shown else []
        return facts | ({"captions": captions} if captions else {}) | ({"seeds": [*self.seeds]} if self.seeds else {})


def asked_in_words(cfg: SampleConfig) -> Asked:
    """The prompts of the command or its file, in turn.

    Where the file has seeds, image i has its prompt's own, plus one for each time that the prompt came before, and
    where its prompt has none, seed + i.
    """
    entries = [Entry("prompt", cfg.prompt)] if cfg.prompt else read_entries(cfg.prompts, cfg.column)
    each = balanced_labels(torch.arange(cfg.n or len(entries)), len(entries)).tolist()
    names = tuple(dict.fromkeys(entry.prompt for entry in entries))
    words = tuple(entries[place].prompt for place in each)
    seeds: tuple[int, ...] = ()
    if any(entry.seed is not None for entry in entries):
        own = [entries[place].seed for place in each]
        seeds = tuple(cfg.seed + i if seed is None else seed + i // len(entries) for i, seed in enumerate(own))
    return Asked(torch.tensor([names.index(word) for word in words]), names, True, words, seeds)


def asked_by_label(cfg: SampleConfig, pipe: StudentPipeline) -> Asked:
    """The classes, or the encoded prompts, in turn, or the one of `label`."""
    if cfg.label >= pipe.num_classes:
        raise config.ConfigError(f"label = {cfg.label}: the student knows the classes 0 to {pipe.num_classes - 1}")
    each, prompts = torch.arange(cfg.n or DEFAULT), pipe.student.network.prompts
    if not pipe.num_classes:
        raise config.ConfigError(
            f"the prompts that {cfg.student} was trained on are not on this machine: say what the images show,"
            " prompt='a cat in a hat' or prompts=FILE"
        )
    labels = balanced_labels(each, pipe.num_classes) if cfg.label < 0 else torch.full_like(each, cfg.label)
    return Asked(labels, pipe.label_names if prompts is None else prompts.texts(), prompts is not None)


def grid(images: Tensor, captions: list[str]) -> Tensor:
    """The first images as one picture, each over its prompt if it is wide enough for words."""
    zoom = 2 if max(images.shape[-2:]) <= ENLARGED else 1
    shown = images[:GRID_LIMIT].repeat_interleave(zoom, -1).repeat_interleave(zoom, -2)
    return tile(captioned(shown, captions[:GRID_LIMIT]) if captions else shown, zoom=1)


def sample(cfg: SampleConfig) -> None:
    """Write the images, a grid of the first ones, and what they were made with."""
    device = chosen_device(cfg.cpu)
    in_words = asked_in_words(cfg) if cfg.prompt or cfg.prompts_file else None
    encoded = "" if in_words else cfg.prompts
    pipe = load_pipeline(
        cfg.student, device, prompts=encoded, base=cfg.base, text_encoder=cfg.text_encoder, decode=cfg.decode
    )
    check_rungs(cfg, pipe.rungs)
    if in_words is not None and pipe.words is None:
        raise config.ConfigError(f"{cfg.student} reads class labels: leave prompt and prompts out")
    asked = in_words or asked_by_label(cfg, pipe)
    sampler = pipe.student.sampler if cfg.sampler == "auto" else cfg.sampler
    out = make_folder(cfg.out)
    described = {**config.to_dict(cfg), "n": len(asked.labels), "rungs": list(pipe.rungs), "sampler": sampler}
    described |= dict(
        zip(("height", "width"), pixels_of(pipe.shape_at(cfg.height, cfg.width), pipe.factor), strict=True)
    )
    described |= {"network": pipe.student.digest, **asked.described()}
    refuse_other_images(out, described)
    text = json.dumps(described, indent=1)
    write_atomic(out / "samples.json", text)  # first: what a killed run leaves is known to be of this request
    images = pipe(
        list(asked.words) or asked.labels,
        seed=list(asked.seeds) or cfg.seed,
        sampler=sampler,
        height=cfg.height,
        width=cfg.width,
        batch_size=cfg.batch_size,
        output="uint8",
    )
    for i, image in enumerate(images):
        write_atomic(out / f"{i:06d}.png", png_bytes(image))
    write_atomic(out / "grid.png", png_bytes(grid(images, described.get("captions", []))))
    print(f"{len(images)} images in {out}, the first of them in {out / 'grid.png'}")


def main(argv: Sequence[str] | None = None) -> None:
    config.run_job(SampleConfig, sample, argv, description=__doc__ or "")


if __name__ == "__main__":
    main()
