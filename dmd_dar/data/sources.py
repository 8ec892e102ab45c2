"""The data set that a configuration names."""

import torch

from dmd_dar.data import photos, textures
from dmd_dar.data.config import DataConfig
from dmd_dar.data.folder import Folder
from dmd_dar.data.latents import Latents
from dmd_dar.data.listing import list_images
from dmd_dar.data.photos import Photos
from dmd_dar.data.textures import Textures
from dmd_dar.errors import UserError

Images = Photos | Textures | Folder
Source = Images | Latents


def open_data(cfg: DataConfig, device: torch.device | str = "cpu", held_out: bool = False) -> Source:
    """The images for training, or those `held_out` from it; every texture is a fresh one, so none needs to be.

    Every source has batch(draws), shape, num_classes, label_names, colour_labels and hash, those of images also
    crops(labels, draws). Raises UserError where a folder cannot be used, see `Folder` and `Latents`.
    """
    return Latents(cfg.path, device, held_out) if cfg.name == "latents" else open_images(cfg, device, held_out)


def open_images(cfg: DataConfig, device: torch.device | str = "cpu", held_out: bool = False) -> Images:
    """`open_data` of images. Raises UserError for latents, of which no crop can be taken, too."""
    if cfg.name == "latents":
        raise UserError(f"data.name = latents: {cfg.path} holds no images; name images")
    if cfg.name == "folder":
        return Folder(cfg, device, held_out)
    return Textures(cfg.size, device) if cfg.name == "textures" else Photos(cfg.size, device, held_out)


def data_hash(cfg: DataConfig) -> str:
    """`open_data(cfg).hash` without decoding an image."""
    if cfg.name == "folder":
        return list_images(cfg.path).hash
    if cfg.name == "latents":
        return Latents(cfg.path).hash
    return textures.data_hash() if cfg.name == "textures" else photos.data_hash()
