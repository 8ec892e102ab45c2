"""FID (arXiv:1706.08500) and patch-FID: the Inception network of 2015 with its own pooling, on clean input.

It differs from torchvision's Inception in its weights, its 1008 classes, in average pools that leave the padding out,
and in a max pool in the last block.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from dmd_dar.errors import DamagedFileError

from .features import Extractor
from .weight_files import INCEPTION, load_state, locate

SIDE = 299
CLASSES = 1008


def inside_average(x: Tensor) -> Tensor:
    """3 x 3 mean over the pixels inside the image."""
    return F.avg_pool2d(x, kernel_size=3, stride=1, padding=1, count_include_pad=False)


def maximum(x: Tensor) -> Tensor:
    return F.max_pool2d(x, kernel_size=3, stride=1, padding=1)


def pool_with(block: Any, pool: Callable[[Tensor], Tensor]) -> None:
    """Replace the pooling of the last branch of `block`, one of torchvision's Inception."""
    branches = block._forward
    block._forward = lambda x: [*branches(x)[:-1], block.branch_pool(pool(x))]


def fid_inception(state: dict[str, Tensor], name: str = INCEPTION.file) -> nn.Module:
    """(n, 3, 299, 299) about [-1, 1] -> (n, 2048), frozen. DamagedFileError naming the file that does not fit."""
    from torchvision.models import inception

    network = inception.Inception3(num_classes=CLASSES, aux_logits=False, init_weights=False)
    for label, block in network.named_children():
        if isinstance(block, inception.InceptionA | inception.InceptionC | inception.InceptionE):
            pool_with(block, maximum if label == "Mixed_7c" else inside_average)
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:160]
        raise DamagedFileError(f"{name}: not the weights of FID's Inception ({reason})") from error
    network.add_module("fc", nn.Identity())
    return network.eval().requires_grad_(False)


def clean_resize(images: Tensor, side: int) -> Tensor:
    """uint8 (n, 3, H, W) -> float32 (n, 3, side, side) in [0, 255]: PIL's bicubic, each channel in float.

    arXiv:2104.11222. Images of that size stay as they are.
    """
    if tuple(images.shape[2:]) == (side, side):
        return images.float()
    planes = images.cpu().float().numpy().reshape(-1, *images.shape[2:])
    resized = [np.asarray(Image.fromarray(plane).resize((side, side), Image.Resampling.BICUBIC)) for plane in planes]
    return torch.from_numpy(np.stack(resized)).clamp(0, 255).reshape(len(images), 3, side, side)


def centre_crop(images: Tensor) -> Tensor:
    """The central 299 x 299 pixels."""
    top, left = ((length - SIDE) // 2 for length in images.shape[2:])
    return images[:, :, top : top + SIDE, left : left + SIDE].float()


def _load(path: str | Path | None, allow_download: bool, device: torch.device | str) -> tuple[Callable, dict[str, str]]:
    """(n, 3, 299, 299) in [0, 255] -> (n, 2048), and what a reader must know of it."""
    file = locate(INCEPTION, path, allow_download)
    network = fid_inception(load_state(file.path), str(file.path)).to(device)
    facts = {"weights": INCEPTION.file, "sha256": file.sha256, "input": "(x - 128) / 128"}
    return lambda pixels: network((pixels.to(device) - 128) / 128), facts


def fid(path: str | Path | None = None, allow_download: bool = False, device: torch.device | str = "cpu") -> Extractor:
    """FID's 2048 pool features of cleanly resized images. MissingWeightsError, DamagedFileError as `locate`."""
    pooled, facts = _load(path, allow_download, device)
    return Extractor(
        "fid",
        lambda images: pooled(clean_resize(images, SIDE)),
        comparable_to_published=True,
        native_size=SIDE,
        facts={**facts, "resize": "PIL bicubic, each channel in float"},
    )


def patch_fid(
    path: str | Path | None = None, allow_download: bool = False, device: torch.device | str = "cpu"
) -> Extractor:
    """The same of the central 299 x 299 pixels, never resized: the one that sees texture (arXiv:2402.13929)."""
    pooled, facts = _load(path, allow_download, device)
    return Extractor(
        "patch_fid",
        lambda images: pooled(centre_crop(images)),
        comparable_to_published=True,
        least_size=SIDE,
        facts={**facts, "resize": "none, central crop"},
    )
