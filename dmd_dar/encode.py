"""VAE latents of images, ahead of training: python -m dmd_dar.encode codec=VAE out=DIR data.name=folder data.path=DIR
or encoded prompts: python -m dmd_dar.encode prompts=FILE pipeline=DIR out=DIR

The same command continues what was stopped, and several of them share the work of one folder.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from dmd_dar import config, moved
from dmd_dar.atomic import write_atomic
from dmd_dar.data import latents
from dmd_dar.data.batches import Batches, Make
from dmd_dar.data.config import DataConfig
from dmd_dar.data.fixed import MiddleCrops, RandomCrops
from dmd_dar.data.images import to_model_range
from dmd_dar.data.manifest import LENGTH
from dmd_dar.data.prompt_files import copy_of, negative_of, read_entries
from dmd_dar.device import named_device
from dmd_dar.errors import DivergedError
from dmd_dar.keys import key
from dmd_dar.models import prompts
from dmd_dar.models.codecs import Codec, load_codec
from dmd_dar.models.text import load_text_encoder
from dmd_dar.train.processes.filling import Work, fill_folder
from dmd_dar.train.processes.world import launched

IMAGES_PER_SHARD, PROMPTS_PER_SHARD = 1024, 64  # tens to hundreds of megabytes


@dataclass(frozen=True)
class EncodeConfig:
    """python -m dmd_dar.encode"""

    out: str = key("", "folder for the shards and their manifest")
    codec: str = key("", "of images: the VAE, as its folder, a pipeline's folder or a hub id")
    codec_revision: str = key("", "branch, tag, commit or refs/pr/N of a hub id; empty: its default branch")
    n: int = key(
        0, "random crops of the data; 0: the middle of each image of a folder, and with data.flip its mirror", least=0
    )
    seed: int = key(0, "of random crops; crop i depends on seed and i alone", least=0)
    held_out: bool = key(False, "encode the images that training leaves out, in the place of the others")
    prompts: str = key(
        "",
        "file of prompts in the place of images: one a line, or JSON Lines, JSON, CSV, TSV or parquet whose entries"
        " have a prompt, caption or text; then the next keys",
        path=True,
    )
    column: str = key("", "field or column of the file that holds the prompt; empty: prompt, caption or text")
    pipeline: str = key("", "whose text encoder reads the prompts: a diffusers pipeline's folder or a hub id")
    pipeline_revision: str = key("", "as codec_revision, of the pipeline")
    negative: str | None = key(
        None,
        "prompt that guidance leads away from; none named: the column negative of the file, which must be the same in"
        " all, else the pipeline's own, empty or, of Qwen-Image, a blank",
    )
    tokens: int = key(0, "length of a prompt; 0: the pipeline's own", unit="tokens", least=0)
    dtype: Literal["float32", "bfloat16"] = key("bfloat16", "of the text encoder and of what is stored")
    device: str = key("", "of one process, such as cuda:1; empty: a GPU where there is one")
    shard_size: int = key(0, f"samples in a file; 0: {IMAGES_PER_SHARD} images or {PROMPTS_PER_SHARD} prompts", least=0)
    batch_size: int = key(32, "samples at a time; changes none of them beyond rounding", least=1)
    workers: int = key(0, "processes of this machine; 0: one for each GPU, one without", least=0)
    threads: int = key(0, "CPU threads of each process; 0 shares out torch's choice", least=0)
    cpu: bool = key(False, "compute on the CPU although a GPU is there")
    data: DataConfig = key(factory=DataConfig)

    def __post_init__(self) -> None:
        if not self.out:
            raise ValueError("out is empty: name the folder to write to, out=FOLDER")
        if self.device and (self.workers > 1 or self.cpu):
            raise ValueError(f"device = {self.device} is of one process: leave workers and cpu out, or device")
        if self.device:
            object.__setattr__(self, "workers", 1)  # where 0 would start one for each GPU
        if self.prompts:
            if self.codec or not self.pipeline:
                raise ValueError("prompts needs pipeline, whose text encoder reads them, and no codec")
            return
        if not self.codec or self.pipeline:
            raise ValueError("codec is needed for images, codec=FOLDER or a hub id, and pipeline for prompts only")
        if self.column:
            raise ValueError("column is of a file of prompts, and images have none: leave it out")
        if self.negative is not None:
            raise ValueError("negative is a prompt, and images have none: leave it out")
        if self.data.name == "latents":
            raise ValueError("data.name latents are encoded already: name images")
        if self.n == 0 and self.data.name != "folder":
            raise ValueError(f"n is 0, but data.name {self.data.name} has no end: say how many random crops, n=2048")


def prepare(cfg: EncodeConfig, device: torch.device) -> Work:
    """The latents or prompts of `cfg`, for `fill_folder`."""
    if cfg.device:
        world = launched()
        if world is not None and world.processes > 1:
            raise config.ConfigError(
                f"device = {cfg.device}: a launcher started {world.processes} processes, which all would compute there;"
                " leave device out, each takes a GPU of its own"
            )
        device = named_device(cfg.device)
    return prepare_prompts(cfg, device) if cfg.prompts else prepare_latents(cfg, device)


def prepare_latents(cfg: EncodeConfig, device: torch.device) -> Work:
    """The latents of the images of `cfg.data`."""
    codec = load_codec(cfg.codec, cfg.codec_revision).to(device)
    if cfg.data.size % codec.factor:
        raise config.ConfigError(
            f"data.size = {cfg.data.size}: the VAE {cfg.codec} needs a multiple of {codec.factor} pixels"
        )
    if cfg.n:
        images = RandomCrops(cfg.data, cfg.n, cfg.seed, device, cfg.held_out)
    else:
        images = MiddleCrops(cfg.data, cfg.held_out)
    content = {"codec": codec.digest(), "held_out": cfg.held_out, **images.content}
    side = cfg.data.size // codec.factor
    layout = latents.layout_of(
        content, images.label_names, images.counts, (codec.channels, side, side), cfg.shard_size or IMAGES_PER_SHARD
    )
    batches = Batches(latents_maker(cfg, images, codec, device), cfg.batch_size)
    return Work(layout, batches, "images", images.check)


def latents_maker(cfg: EncodeConfig, images: MiddleCrops | RandomCrops, codec: Codec, device: torch.device) -> Make:
    """make(first, stop) -> the tensors of `data.latents.layout_of`; raises DivergedError where one is not finite."""

    @torch.no_grad()
    def make(first: int, stop: int) -> dict[str, Tensor]:
        pixels, cond = images.images(first, stop)
        mean, std = codec.encode(to_model_range(pixels.to(device)))
        broken = (~(mean.isfinite() & std.isfinite()).flatten(1).all(1)).nonzero().flatten()
        if len(broken):
            raise DivergedError(f"codec = {cfg.codec}: its latents of image {first + int(broken[0])} are not finite")
        return {"mean": mean, "std": std, "cond": cond}

    return make


def prepare_prompts(cfg: EncodeConfig, device: torch.device) -> Work:
    """The prompts of `cfg.prompts`, and last what guidance leads away from."""
    entries = read_entries(cfg.prompts, cfg.column)
    texts = [entry.prompt for entry in entries]
    chosen = negative_of(cfg.prompts, entries) if cfg.negative is None else cfg.negative
    encoder = load_text_encoder(cfg.pipeline, cfg.pipeline_revision, cfg.tokens, getattr(torch, cfg.dtype), device)
    negative = encoder.prompting.negative if chosen is None else chosen
    row = {name: value[0] for name, value in encoder.encode([negative], negatives=1).items()}
    content = {"prompts": prompts.texts_hash(texts), "pipeline": encoder.name, "encoder": encoder.digest}
    content |= {"tokens": encoder.tokens, "dtype": cfg.dtype} | ({"negative": negative} if negative else {})
    filled = encoder.filled(texts, {name: value[None] for name, value in row.items()}, negative)
    layout = prompts.layout_of(content, len(texts), row, cfg.shard_size or PROMPTS_PER_SHARD, filled)

    def make(first: int, stop: int) -> dict[str, Tensor]:
        encoded = encoder.encode([*texts, negative][first:stop], negatives=int(stop > len(texts)))
        made = {name: encoded[name] for name in row}
        if not all(value.isfinite().all() for value in made.values()):
            raise DivergedError(f"pipeline = {cfg.pipeline}: its prompts {first} to {stop - 1} are not all finite")
        return made | {LENGTH: prompts.lengths_of(made)}

    return Work(layout, Batches(make, cfg.batch_size), "prompts")


def wanted_by(cfg: EncodeConfig) -> dict[str, Any]:
    """What of the folder's layout needs no look at codec, text encoder, images or prompts."""
    if cfg.prompts:
        wanted = {"kind": prompts.KIND, "dtype": cfg.dtype, "shard_size": cfg.shard_size or PROMPTS_PER_SHARD}
        wanted |= {"tokens": cfg.tokens} if cfg.tokens else {}
        return wanted | ({"negative": cfg.negative} if cfg.negative else {})
    wanted = {"kind": latents.KIND, "held_out": cfg.held_out, "shard_size": cfg.shard_size or IMAGES_PER_SHARD}
    if cfg.n:
        return {**wanted, "n": cfg.n, **RandomCrops.wanted_by(cfg.data, cfg.seed)}
    return {**wanted, **MiddleCrops.wanted_by(cfg.data, cfg.held_out)}


def encode(cfg: EncodeConfig) -> None:
    """Make what is missing of the folder, see `fill_folder`."""
    if held := fill_folder(cfg, prepare, wanted_by(cfg)):
        print(held)
    if cfg.prompts:
        name, text = copy_of(read_entries(cfg.prompts, cfg.column))  # for people, and for the CLIP score
        write_atomic(Path(cfg.out) / name, text)


def main(argv: Sequence[str] | None = None) -> None:
    config.run_job(EncodeConfig, encode, argv, description=__doc__ or "")


moved.keep_names(__name__)


if __name__ == "__main__":
    main()
