"""FD-DINOv2 (arXiv:2306.04675): class tokens of a DINOv2 network from timm, on cleanly resized images."""

from pathlib import Path

import torch
from torch import Tensor

from dmd_dar.extras import needed

from .features import Extractor
from .inception import clean_resize
from .weight_files import DINO_MODEL, dinov2_weights, load_state, locate

SIDE = 224


def dinov2(
    path: str | Path | None = None,
    allow_download: bool = False,
    device: torch.device | str = "cpu",
    model: str = DINO_MODEL,
) -> Extractor:
    """The normalised class token, (n, 1024) for ViT-L/14. `path`: timm's safetensors file of `model`.

    Published values are those of ViT-L/14. MissingWeightsError, DamagedFileError as `locate`.
    """
    timm = needed("timm")
    weights = dinov2_weights(model)
    file = locate(weights, path, allow_download)
    overlay = {"state_dict": load_state(file.path)}
    shape = {"img_size": SIDE, "num_classes": 0, "weight_init": "skip"}
    network = timm.create_model(model, pretrained=True, pretrained_cfg_overlay=overlay, **shape)
    network = network.eval().requires_grad_(False).to(device)
    mean, std = (
        torch.tensor(network.pretrained_cfg[name], device=device)[:, None, None] * 255 for name in ("mean", "std")
    )

    def tokens(images: Tensor) -> Tensor:
        pixels = clean_resize(images, SIDE).to(device)
        return network.forward_features((pixels - mean) / std)[:, 0]

    return Extractor(
        "fd_dinov2",
        tokens,
        comparable_to_published=model == DINO_MODEL,
        native_size=SIDE,
        facts={"model": model, "sha256": file.sha256, "verified": file.verified},
    )
