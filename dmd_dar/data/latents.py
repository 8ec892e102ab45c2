"""`latents`: what `python -m dmd_dar.encode` made of images: their VAE latents' means and deviations, in shards.

B images; C channels of S x S latent cells. The images of a class stand together, so that labels need no reading.
"""

import itertools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dmd_dar.data.shards import MANIFEST, Form, Layout, Shards
from dmd_dar.draws import Draws
from dmd_dar.errors import DamagedFileError, UserError

KIND = "latents"


def layout_of(
    content: dict[str, Any], label_names: tuple[str, ...], counts: tuple[int, ...], shape: tuple[int, ...], size: int
) -> Layout:
    """A folder of latents (C, S, S) = `shape`, float32, of counts[c] images of class c, `size` to a shard.

    `content` is what else decides their values: "codec", the digest of the VAE, and "held_out" at least.
    """
    facts = {"kind": KIND, **content, "label_names": list(label_names), "counts": list(counts)}
    tensors = {"mean": Form("F32", shape), "std": Form("F32", shape), "cond": Form("I64", ())}
    return Layout(facts, sum(counts), size, tensors)


class Latents:
    """The latents in the folder `path`, on `device`; a batch is a pure function of its `Draws`.

    Raises UserError where the folder holds something else, is not complete, or was made of the other side of the split
    than `held_out` asks for; DamagedFileError where its manifest contradicts itself.
    """

    colour_labels: tuple[int, ...] = ()

    def __init__(self, path: str, device: torch.device | str = "cpu", held_out: bool = False):
        self.path, self.device = path, torch.device(device)
        self.shards = Shards(path)
        self.hash = self.shards.hash
        layout, content = self.shards.layout, self.shards.layout.content
        if content.get("kind") != KIND:
            raise UserError(
                f"data.path = {path}: it holds no latents; name a folder that dmd_dar.encode made of images"
            )
        try:
            self.label_names, self.codec = tuple(content["label_names"]), str(content["codec"])
            self.shape = layout.tensors["mean"].shape
            counts = tuple(content["counts"])
            if layout != layout_of(content, self.label_names, counts, self.shape, layout.shard_size):
                raise ValueError("counts and label_names do not fit the latents")
            if len(counts) != len(self.label_names) or any(type(n) is not int or n < 1 for n in counts):
                raise ValueError("counts must be a number from 1 for each of label_names")
        except (KeyError, TypeError, ValueError) as error:
            raise DamagedFileError(
                f"{Path(path) / MANIFEST} describes no latents: {error!r}; make them anew"
            ) from error
        if content.get("held_out") is not held_out:
            sides = ("images of training", "images that training leaves out")
            raise UserError(
                f"data.path = {path}: it holds latents of the {sides[not held_out]}, not of the {sides[held_out]}:"
                f" name a folder made by dmd_dar.encode with held_out={str(held_out).lower()}"
            )
        self.size, self.num_classes = self.shape[-1], len(counts)
        self.counts = torch.tensor(counts, device=device)
        self.start = torch.tensor([0, *itertools.accumulate(counts)][:-1], device=device)

    def moments(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation (B, C, S, S) of the images `index` (B,), in the denoiser's units."""
        return tuple(self.shards.rows(name, index).to(self.device) for name in ("mean", "std"))  # type: ignore[return-value]

    def batch(self, draws: Draws) -> tuple[Tensor, Tensor]:
        """x0 = mean + std eps (B, C, S, S) float32 and labels (B,), classes uniform."""
        labels = draws.integers("label", self.num_classes)
        return self.latents(labels, draws), labels

    def latents(self, labels: Tensor, draws: Draws) -> Tensor:
        """Of one image of each label: labels (B,) -> mean + std eps (B, C, S, S) float32."""
        mean, std = self.moments(self.start[labels] + draws.integers("image", self.counts[labels]))
        return mean + std * draws.normal("latent", *self.shape)

    def require(self, codec: str, shape: tuple[int, ...]) -> None:
        """Raises UserError unless they are latents of the codec of that digest, of that shape."""
        if codec != self.codec:
            raise UserError(
                f"data.path = {self.path}: its latents are those of another VAE ({self.codec[:12]}) than the codec"
                f" ({codec[:12] or 'none'}): name the codec that they were encoded with, or encode the images again"
            )
        if tuple(shape) != self.shape:
            raise UserError(
                f"data.path = {self.path}: its latents are {list(self.shape)}, the network's {list(shape)}: encode the"
                " images at the network's size, or name another network"
            )
