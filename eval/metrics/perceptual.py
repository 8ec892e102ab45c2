"""CLIP score of images against their prompts, and LPIPS within a condition and between paired images.

Legend: N images.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from dmd_dar.errors import DamagedFileError, MissingWeightsError, UserError
from dmd_dar.extras import needed
from dmd_dar.models.perceptual import SMALLEST, lpips_network

from ..samples.images import UnfitError
from .record import FLAT
from .weight_files import (
    ALEXNET,
    CLIP_CONFIG,
    CLIP_FILES,
    CLIP_REPO,
    VGG16,
    clip_weights,
    file_hash,
    load_state,
    locate,
)

LOCAL, HUB = "local-dir:", "hf-hub:"
BATCH = 64
PAIRS_PER_CLASS = 256
OVERSHOOT = 1e-3  # beyond [-1, 1], from resampling or rounding


@dataclass(frozen=True)
class Clip:
    """A CLIP network with the preprocessing and tokenizer that belong to it."""

    network: Any = field(repr=False)  # a torch module of open_clip's
    preprocess: Callable[[Image.Image], Tensor] = field(repr=False)
    tokenise: Callable[[list[str]], Tensor] = field(repr=False)
    prefix: str
    facts: dict[str, Any]  # JSON-able: model, architecture, tag, prefix, preprocess, sha256


@dataclass(frozen=True)
class ClipScore:
    """`value` is 100 times the mean cosine; it is neither rescaled nor clipped at 0."""

    value: float
    per_image: np.ndarray  # (N,)
    facts: dict[str, Any]


def load_clip(
    source: str = HUB + CLIP_REPO,
    prefix: str = "",
    allow_download: bool = False,
    device: torch.device | str = "cpu",
) -> Clip:
    """From `hf-hub:OWNER/NAME`, looked for as other weights are, or from `local-dir:FOLDER`.

    prefix: put before every prompt. UserError for a bare file, which would lose the preprocessing;
    MissingWeightsError, DamagedFileError naming the folder or file.
    """
    folder, weights = _clip_folder(source, allow_download)
    open_clip = needed("open_clip")
    try:
        config = json.loads((folder / CLIP_CONFIG).read_text())
        network, preprocess = open_clip.create_model_from_pretrained(f"{LOCAL}{folder}", device=device)
    except Exception as error:  # each format has its own errors
        raise DamagedFileError(f"{folder}: no CLIP of open_clip ({' '.join(str(error).split())[:160]})") from error
    facts = {
        "model": source,
        "architecture": _architecture(open_clip, config.get("model_cfg", {})),
        "tag": config.get("pretrained_tag") or folder.name,
        "prefix": prefix,
        "preprocess": config.get("preprocess_cfg", {}),
        "sha256": file_hash(weights),
    }
    tokeniser = open_clip.get_tokenizer(f"{LOCAL}{folder}")
    return Clip(network.eval().requires_grad_(False), preprocess, tokeniser, prefix, facts)


def _architecture(open_clip: Any, described: dict[str, Any]) -> str:
    """open_clip's name of the networks that a configuration describes; of one that it has no name for, their sizes."""
    parts = ("embed_dim", "vision_cfg", "text_cfg")
    for name in open_clip.list_models():
        known = open_clip.get_model_config(name) or {}
        if all(known.get(part) == described.get(part) for part in parts):
            return name
    image, text = (described.get(part) or {} for part in parts[1:])
    sizes = ", ".join(
        f"{name} {image[name]}" for name in ("layers", "width", "patch_size", "image_size") if name in image
    )
    return f"unnamed: image {sizes}; text layers {text.get('layers')}, width {text.get('width')}"


def _clip_folder(source: str, allow_download: bool) -> tuple[Path, Path]:
    """The folder that holds configuration and weights, and the weights."""
    if source.startswith(HUB):
        weights = locate(clip_weights(source.removeprefix(HUB)), allow_download=allow_download).path
    elif source.startswith(LOCAL):
        folder = Path(source.removeprefix(LOCAL))
        held = [folder / name for name in CLIP_FILES if (folder / name).is_file()]
        if not held:
            raise MissingWeightsError(f"{folder}: holds neither {' nor '.join(CLIP_FILES)}; name a folder of open_clip")
        weights = held[0]
    else:
        raise UserError(
            f"clip = {source}: give {LOCAL}FOLDER or {HUB}OWNER/NAME; a bare file or name loses the preprocessing"
        )
    if not (weights.parent / CLIP_CONFIG).is_file():
        raise MissingWeightsError(f"{weights.parent}: {CLIP_CONFIG} is missing beside {weights.name}; add it")
    return weights.parent, weights


@torch.no_grad()
def clip_score(clip: Clip, images: Tensor, prompts: Sequence[str]) -> ClipScore:
    """Of uint8 images (N, 3, H, W), each with its prompt. UnfitError where their numbers differ."""
    if images.dtype != torch.uint8 or images.ndim != 4 or len(images) != len(prompts) or not len(images):
        raise UnfitError(
            f"CLIP score: images {images.dtype} {tuple(images.shape)} and {len(prompts)} prompts; expected uint8"
            " (N, 3, H, W) and a prompt for each"
        )
    device = next(clip.network.parameters()).device
    cosines = []
    for start in range(0, len(images), BATCH):
        rows = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images[start : start + BATCH].cpu()]
        pixels = torch.stack([clip.preprocess(row) for row in rows]).to(device)
        texts = [clip.prefix + prompt for prompt in prompts[start : start + BATCH]]
        of_images = clip.network.encode_image(pixels, normalize=True)
        of_texts = clip.network.encode_text(clip.tokenise(texts).to(device), normalize=True)
        cosines.append((of_images.double() * of_texts.double()).sum(1))
    per_image = 100 * torch.cat(cosines).cpu().numpy()
    return ClipScore(float(per_image.mean()), per_image, {**clip.facts, "images": len(images)})


@dataclass(frozen=True)
class Lpips:
    """LPIPS (arXiv:1801.03924). Images below SMALLEST pixels are enlarged to it."""

    network: torch.nn.Module = field(repr=False)
    device: torch.device | str
    facts: dict[str, Any]

    @torch.no_grad()
    def distance(self, first: Tensor, second: Tensor) -> Tensor:
        """(N,) for floats (N, 3, H, W) in [-1, 1]. UnfitError outside of the range or where the shapes differ."""
        if first.shape != second.shape:
            raise UnfitError(f"LPIPS: {tuple(first.shape)} against {tuple(second.shape)}; expected equal shapes")
        pair = [in_model_range(images).to(self.device) for images in (first, second)]
        if min(first.shape[2:]) < SMALLEST:
            pair = [F.interpolate(images, size=(SMALLEST, SMALLEST), mode="bilinear") for images in pair]
        return self.network(*pair).flatten().cpu()


@dataclass(frozen=True, kw_only=True)
class LpipsPaired:
    """Mean LPIPS between images of equal noise and condition."""

    value: float
    images: int
    upsampled: bool
    facts: dict[str, Any] = field(default_factory=dict, metadata=FLAT)  # net, weights, sha256


@dataclass(frozen=True, kw_only=True)
class LpipsDiversity:
    """Mean LPIPS over `pairs` of images of one class, by class and as the mean over classes."""

    value: float
    by_class: dict[int, float]
    pairs: int
    images: int
    upsampled: bool
    facts: dict[str, Any] = field(default_factory=dict, metadata=FLAT)  # net, weights, sha256


def in_model_range(images: Tensor) -> Tensor:
    """The images, in float32. UnfitError where they are integers or leave [-1, 1]."""
    if not images.is_floating_point():
        raise UnfitError(f"LPIPS: images of {images.dtype}; expected floats in [-1, 1]")
    low, high = images.min().item(), images.max().item()
    if not torch.isfinite(images).all() or low < -1 - OVERSHOOT or high > 1 + OVERSHOOT:
        raise UnfitError(f"LPIPS: values from {low:.4g} to {high:.4g}; expected [-1, 1]")
    return images.float()


def load_lpips(
    net: str = "alex", path: str | Path | None = None, allow_download: bool = False, device: torch.device | str = "cpu"
) -> Lpips:
    """The metric over torchvision's AlexNet ("alex") or VGG16 ("vgg"); errors as `weights.locate`."""
    trunks = {"alex": ALEXNET, "vgg": VGG16}
    if net not in trunks:
        raise UserError(f"LPIPS: net = {net}; choose one of {', '.join(trunks)}")
    file = locate(trunks[net], path, allow_download)
    network = lpips_network(load_state(file.path), net).to(device)
    return Lpips(network, device, {"net": net, "weights": trunks[net].file, "sha256": file.sha256})


def paired_distances(metric: Lpips, images: Tensor, reference: Tensor) -> np.ndarray:
    """(N,) distances of uint8 images (N, 3, H, W) from others that share their noise and condition."""
    return _between(metric, images, reference, np.arange(len(images)), np.arange(len(reference)))


def lpips_paired(metric: Lpips, images: Tensor, reference: Tensor) -> LpipsPaired:
    """The mean of `paired_distances`."""
    value = float(paired_distances(metric, images, reference).mean())
    return LpipsPaired(value=value, images=len(images), upsampled=_enlarged(images), facts=metric.facts)


def lpips_diversity(
    metric: Lpips, images: Tensor, labels: Tensor, seed: int = 0, pairs_per_class: int = PAIRS_PER_CLASS
) -> LpipsDiversity:
    """Mean distance over the pairs of each class, at most `pairs_per_class` of them drawn by `seed`.

    `value` is the mean over classes. UnfitError where no class has two images.
    """
    rng, by_class, pairs = np.random.default_rng(seed), {}, 0
    for label in labels.unique().tolist():
        rows = np.flatnonzero(labels.numpy() == label)
        both = np.array(list(combinations(rows, 2))).reshape(-1, 2)
        if len(both) > pairs_per_class:
            both = both[np.sort(rng.choice(len(both), pairs_per_class, replace=False))]
        if len(both):
            by_class[int(label)] = float(_between(metric, images, images, both[:, 0], both[:, 1]).mean())
            pairs += len(both)
    if not by_class:
        raise UnfitError("LPIPS diversity: no class has two images; give more images of a condition")
    return LpipsDiversity(
        value=float(np.mean(list(by_class.values()))),
        by_class=by_class,
        pairs=pairs,
        images=len(images),
        upsampled=_enlarged(images),
        facts=metric.facts,
    )


def _between(metric: Lpips, first: Tensor, second: Tensor, rows: np.ndarray, others: np.ndarray) -> np.ndarray:
    if first.dtype != torch.uint8 or first.dtype != second.dtype or len(rows) != len(others):
        shapes = f"{first.dtype} {tuple(first.shape)} and {second.dtype} {tuple(second.shape)}"
        raise UnfitError(f"LPIPS: {shapes}; expected uint8 images, equally many")
    parts = []
    for start in range(0, len(rows), BATCH):
        ours, theirs = (torch.from_numpy(index[start : start + BATCH]) for index in (rows, others))
        parts.append(metric.distance(first[ours].float() / 127.5 - 1, second[theirs].float() / 127.5 - 1))
    return torch.cat(parts).double().numpy()


def _enlarged(images: Tensor) -> bool:
    return min(images.shape[2:]) < SMALLEST
