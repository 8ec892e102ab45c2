"""VAE latents of images, ahead of training: python -m dmd_dar.encode codec=VAE out=DIR data.name=folder data.path=DIR

The same command continues what was stopped, and several of them share the work of one folder.
"""

import sys
from dataclasses import dataclass

import torch
from torch import Tensor

from dmd_dar import config
from dmd_dar.data.config import DataConfig
from dmd_dar.data.fixed import MiddleCrops, RandomCrops
from dmd_dar.data.images import to_model_range
from dmd_dar.data.latents import layout_of
from dmd_dar.errors import DivergedError
from dmd_dar.keys import key
from dmd_dar.models.codecs import Codec, load_codec
from dmd_dar.train.filling import Make, Work, fill_folder


@dataclass(frozen=True)
class EncodeConfig:
    """python -m dmd_dar.encode"""

    out: str = key("", "folder for the shards and their manifest")
    codec: str = key("", "the VAE: its folder, a pipeline's folder or a hub id")
    codec_revision: str = key("", "branch, tag, commit or refs/pr/N of a hub id; empty: its default branch")
    n: int = key(0, "random crops of the data; 0: the middle of each image of a folder, and with data.flip its mirror")
    seed: int = key(0, "of random crops; crop i depends on seed and i alone", least=0)
    held_out: bool = key(False, "encode the images that training leaves out, in the place of the others")
    shard_size: int = key(256, "images in a file, which is written whole or not at all", least=1)
    batch_size: int = key(32, "images at a time; changes none of them beyond rounding", least=1)
    workers: int = key(0, "processes of this machine; 0: one for each GPU, one without", least=0)
    threads: int = key(0, "CPU threads of each process; 0 shares out torch's choice", least=0)
    cpu: bool = key(False, "compute on the CPU although a GPU is there")
    data: DataConfig = key(factory=DataConfig)

    def __post_init__(self) -> None:
        if not self.out:
            raise ValueError("out is empty: name the folder to write to, out=FOLDER")
        if not self.codec:
            raise ValueError("codec is empty: name the VAE, codec=FOLDER or a hub id")
        if self.data.name == "latents":
            raise ValueError("data.name latents are encoded already: name images")
        if self.n == 0 and self.data.name != "folder":
            raise ValueError(f"n is 0, but data.name {self.data.name} has no end: say how many random crops, n=2048")


def prepare(cfg: EncodeConfig, device: torch.device) -> Work:
    """The latents of `cfg`, for `fill_folder`."""
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
    layout = layout_of(content, images.label_names, images.counts, (codec.channels, side, side), cfg.shard_size)
    return Work(layout, latents_maker(cfg, images, codec, device), "images", images.check)


def latents_maker(cfg: EncodeConfig, images: MiddleCrops | RandomCrops, codec: Codec, device: torch.device) -> Make:
    """make(first, stop) -> the tensors of `data.latents.layout_of`; raises DivergedError where one is not finite."""

    @torch.no_grad()
    def make(first: int, stop: int) -> dict[str, Tensor]:
        parts = []
        for start in range(first, stop, cfg.batch_size):
            pixels, labels = images.images(start, min(start + cfg.batch_size, stop))
            parts.append((*codec.encode(to_model_range(pixels.to(device))), labels))
        mean, std, cond = (torch.cat(kind).cpu() for kind in zip(*parts, strict=True))
        broken = (~(mean.isfinite() & std.isfinite()).flatten(1).all(1)).nonzero().flatten()
        if len(broken):
            raise DivergedError(f"codec = {cfg.codec}: its latents of image {first + int(broken[0])} are not finite")
        return {"mean": mean, "std": std, "cond": cond}

    return make


def encode(cfg: EncodeConfig) -> None:
    """Make what is missing of the folder, see `fill_folder`."""
    fill_folder(cfg, prepare)


if __name__ == "__main__":
    config.run_job(EncodeConfig, encode, sys.argv[1:], description=__doc__ or "")
