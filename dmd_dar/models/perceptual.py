"""LPIPS (arXiv:1801.03924): the network over given weights, and the training loss by weights on this machine.

Nothing is downloaded here.
"""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from dmd_dar.errors import DamagedFileError, MissingWeightsError
from dmd_dar.extras import needed

TRUNK = "alexnet-owt-7be5be79.pth"  # torchvision's AlexNet, 233 MB; the linear heads come with the lpips package
TRUNK_HASH = "7be5be79"  # first digits of its SHA-256
SMALLEST = 64  # pixels; smaller images are enlarged, since AlexNet's last layers would see a single cell


def trunk_path() -> Path:
    """Where the trunk lies: $DMD_DAR_WEIGHTS_DIR, else torch's hub cache. Raises MissingWeightsError naming both."""
    folders = [Path(torch.hub.get_dir()) / "checkpoints"]
    if os.environ.get("DMD_DAR_WEIGHTS_DIR"):
        folders.insert(0, Path(os.environ["DMD_DAR_WEIGHTS_DIR"]))
    for folder in folders:
        if (folder / TRUNK).is_file():
            return folder / TRUNK
    raise MissingWeightsError(
        f"LPIPS needs torchvision's AlexNet weights {TRUNK}, not found in {' or '.join(map(str, folders))}:"
        " put the file there or name its folder in DMD_DAR_WEIGHTS_DIR, or use regression.metric=mse"
    )


def trunk_weights() -> dict[str, Tensor]:
    """The trunk's tensors by name. Raises DamagedFileError where the file is another than its name says."""
    path = trunk_path()
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if not digest.startswith(TRUNK_HASH):
        raise DamagedFileError(f"{path}: sha256 {digest[:8]}..., not {TRUNK_HASH}...; delete it and fetch it again")
    return torch.load(path, map_location="cpu", weights_only=True)


def lpips_loss(device: torch.device | str) -> Callable[[Tensor, Tensor], Tensor]:
    """(x, target), both (B, 3, S, S) in about [-1, 1] -> scalar mean LPIPS, in float32."""
    metric = lpips_network(trunk_weights()).to(device)

    def loss(x: Tensor, target: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            x, target = x.float(), target.float().clamp(-1, 1)  # x unclamped: overshoot must get a gradient
            if x.shape[-1] < SMALLEST:
                x, target = (F.interpolate(image, size=SMALLEST, mode="bilinear") for image in (x, target))
            return metric(x, target).mean()

    return loss


def lpips_network(trunk: dict[str, Tensor], net: str = "alex") -> torch.nn.Module:
    """The frozen metric over torchvision's AlexNet ("alex") or VGG16 ("vgg"), whose weights are `trunk`.

    trunk: by torchvision's names, features.N.weight and .bias. Raises MissingPackageError where the package lpips is
    not installed.
    """
    metric = needed("lpips").LPIPS(net=net, pnet_rand=True, verbose=False)
    for part in metric.net.children():
        for index, layer in part.named_children():
            if list(layer.parameters()):
                layer.load_state_dict({name: trunk[f"features.{index}.{name}"] for name in ("weight", "bias")})
    return metric.eval().requires_grad_(False)
