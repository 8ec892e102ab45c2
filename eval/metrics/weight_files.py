"""Pretrained weights that metrics need, where they are looked for and what each unlocks.

Order: an explicit path, $DMD_DAR_WEIGHTS_DIR, the library's own cache, a download where it is allowed. A file is held
against the SHA-256 that its publisher put into its name, or that the Hugging Face cache keeps it under.
"""

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from dmd_dar.errors import DamagedFileError, MissingWeightsError
from dmd_dar.models.perceptual import TRUNK, TRUNK_HASH

VARIABLE = "DMD_DAR_WEIGHTS_DIR"
CLIP_REPO = "laion/CLIP-ViT-B-32-laion2B-s34B-b79K"
CLIP_CONFIG = "open_clip_config.json"
CLIP_FILES = (  # in the order in which open_clip takes them
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
)
DINO_MODEL = "vit_large_patch14_dinov2.lvd142m"
TORCHVISION_INCEPTION = ("0cc3c7bd", "1a9a5a14")  # sha256 prefixes of inception_v3_google-*.pth


@dataclass(frozen=True)
class Weights:
    """A file that somebody else publishes. `url` is torch hub's, `repo` is on the Hugging Face hub; one is set."""

    file: str  # name below $DMD_DAR_WEIGHTS_DIR
    owner: str
    megabytes: int
    unlocks: str
    instead: str  # what works without it
    sha256: str = ""  # prefix; empty where the publisher names none
    url: str = ""
    repo: str = ""
    other_names: tuple[str, ...] = ()
    hub_names: tuple[str, ...] = ()  # in the repository, the preferred one first
    beside: str = ""  # a file of the repository that must lie beside it


@dataclass(frozen=True)
class Found:
    """Weights on this machine. `verified`: the hash was known and is right."""

    path: Path
    sha256: str
    verified: bool


INCEPTION = Weights(
    file="pt_inception-2015-12-05-6726825d.pth",
    owner="mseitzer/pytorch-fid on GitHub",
    megabytes=91,
    sha256="6726825d",
    unlocks="FID, patch-FID, KID, precision and recall on Inception features",
    instead="fd_wavelet, fd_pca and fd_classifier",
    url="https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
    other_names=("weights-inception-2015-12-05-6726825d.pth",),
)
ALEXNET = Weights(
    file=TRUNK,
    owner="torchvision",
    megabytes=233,
    sha256=TRUNK_HASH,
    unlocks="LPIPS with net=alex: diversity and paired distance",
    instead="the class diversity in pixels and in wavelet features",
    url=f"https://download.pytorch.org/models/{TRUNK}",
)
VGG16 = Weights(
    file="vgg16-397923af.pth",
    owner="torchvision",
    megabytes=528,
    sha256="397923af",
    unlocks="LPIPS with net=vgg",
    instead="LPIPS with net=alex, or the class diversity in pixels",
    url="https://download.pytorch.org/models/vgg16-397923af.pth",
)


def dinov2_weights(model: str = DINO_MODEL) -> Weights:
    """timm's file of a DINOv2 model; the published FD-DINOv2 is that of ViT-L/14."""
    return Weights(
        file=f"{model}.safetensors",
        owner=f"timm/{model} on the Hugging Face hub",
        megabytes=1161 if model == DINO_MODEL else 0,
        unlocks="FD-DINOv2, KID, precision and recall on DINOv2 features",
        instead="fd_wavelet, fd_pca and fd_classifier",
        repo=f"timm/{model}",
        hub_names=("model.safetensors",),
    )


def clip_weights(repo: str = CLIP_REPO) -> Weights:
    """open_clip's folder of a model, by the name of its repository."""
    folder = repo.rpartition("/")[2]
    return Weights(
        file=f"{folder}/{CLIP_FILES[0]}",
        owner=f"{repo} on the Hugging Face hub",
        megabytes=577 if repo == CLIP_REPO else 0,
        unlocks="CLIP score",
        instead="clip=local-dir:FOLDER with open_clip_config.json and weights",
        repo=repo,
        other_names=tuple(f"{folder}/{name}" for name in CLIP_FILES[1:]),
        hub_names=CLIP_FILES,
        beside=CLIP_CONFIG,
    )


def every_file() -> tuple[Weights, ...]:
    return INCEPTION, dinov2_weights(), clip_weights(), ALEXNET, VGG16


def own_folder() -> Path | None:
    return Path(os.environ[VARIABLE]) if os.environ.get(VARIABLE) else None


def cache_folder(weights: Weights) -> Path:
    """Where the library that publishes the file keeps its downloads."""
    if weights.repo:
        from huggingface_hub import constants

        return Path(constants.HF_HUB_CACHE)
    return Path(torch.hub.get_dir()) / "checkpoints"


def find(weights: Weights) -> Path | None:
    """The file in $DMD_DAR_WEIGHTS_DIR or the cache, unverified."""
    names = (weights.file, *weights.other_names)
    folders = [folder for folder in (own_folder(), None if weights.repo else cache_folder(weights)) if folder]
    for folder in folders:
        for name in names:
            if (folder / name).is_file():
                return folder / name
    return _in_hub_cache(weights) if weights.repo else None


def _in_hub_cache(weights: Weights) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    for name in weights.hub_names:
        kept = try_to_load_from_cache(weights.repo, name, cache_dir=cache_folder(weights))
        if isinstance(kept, str):
            return Path(kept)
    return None


def locate(weights: Weights, path: str | Path | None = None, allow_download: bool = False) -> Found:
    """The file, verified.

    MissingWeightsError where it is in no place that is looked in, DamagedFileError where its hash is another's.
    """
    if path is not None:
        if not Path(path).is_file():
            raise MissingWeightsError(f"{path}: no such file; {_wanted(weights)}")
        return verify(Path(path), weights)
    file = find(weights) or (download(weights) if allow_download else None)
    if file is None:
        raise MissingWeightsError(missing_message(weights))
    return verify(file, weights)


def missing_message(weights: Weights) -> str:
    """What is missing, where it was looked for, and each way out."""
    own = own_folder()
    places = ([f"{VARIABLE}={own}"] if own else [f"{VARIABLE} (not set)"]) + [str(cache_folder(weights))]
    return (
        f"{_wanted(weights)}, found in none of {', '.join(places)}: put it into the folder that {VARIABLE} names,"
        f" give its path, or allow the download (allow_download); without it: {weights.instead}"
    )


def _wanted(weights: Weights) -> str:
    size = f"{weights.megabytes} MB, " if weights.megabytes else ""
    digest = f"sha256 {weights.sha256}..." if weights.sha256 else "sha256 not published"
    return f"{weights.unlocks} needs {weights.file} ({weights.owner}, {size}{digest})"


def verify(path: Path, weights: Weights) -> Found:
    """Found, or DamagedFileError naming both hashes; torchvision's Inception is told apart by its own."""
    digest = file_hash(path)
    if weights.file == INCEPTION.file and digest.startswith(TORCHVISION_INCEPTION):
        raise DamagedFileError(
            f"{path} is torchvision's Inception, which is not the network of FID (other weights, other pooling);"
            f" take {INCEPTION.file} of {INCEPTION.owner}"
        )
    blob = path.resolve().name
    expected = weights.sha256 or (blob if re.fullmatch("[0-9a-f]{64}", blob) else "")
    if not digest.startswith(expected):
        raise DamagedFileError(
            f"{path}: sha256 {digest[:8]}..., not {expected[:8]}... of {weights.file}; delete it and fetch it again"
        )
    return Found(path, digest, verified=bool(expected))


def file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def download(weights: Weights) -> Path:
    """Into the library's cache. MissingWeightsError with the reason where that fails."""
    try:
        if weights.repo:
            return _download_from_hub(weights)
        target = cache_folder(weights) / weights.file
        target.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(weights.url, str(target), hash_prefix=weights.sha256)
        return target
    except (OSError, RuntimeError) as error:  # no network, no space, another hash
        reason = " ".join(str(error).split())[:200]
        raise MissingWeightsError(f"{missing_message(weights)} (the download failed: {reason})") from error


def _download_from_hub(weights: Weights) -> Path:
    from huggingface_hub import hf_hub_download

    if weights.beside:
        hf_hub_download(weights.repo, weights.beside)
    return Path(hf_hub_download(weights.repo, weights.hub_names[0]))


def load_state(path: Path) -> dict[str, Tensor]:
    """Tensors by name, from safetensors or a torch file that holds nothing else. DamagedFileError otherwise."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # each format has its own errors
        raise DamagedFileError(f"{path} holds no plain weights and is not loaded: {str(error)[:120]}") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise DamagedFileError(f"{path}: expected tensors by name, got {type(state).__name__}")
    return state
