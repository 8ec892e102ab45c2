"""A SiT small enough for tests, away from its adaLN-Zero start, and a teacher folder made of it."""

from pathlib import Path

import torch

from dmd_dar.data.photos import NAMES
from dmd_dar.models.saved import ModelCard, save_network
from dmd_dar.models.sit import SiT, SiTConfig

# Tests type the documented commands; where a GPU would answer, they keep to the CPU.
ON_CPU = ("launch.cpu=true",) if torch.cuda.is_available() else ()
TINY = SiTConfig(input_size=32, in_channels=3, patch=8, width=16, depth=2, heads=2, num_classes=len(NAMES))


def tiny_sit(config: SiTConfig = TINY, seed: int = 0) -> SiT:
    torch.manual_seed(seed)
    model = SiT(config)
    with torch.no_grad():
        for parameter in model.backbone_parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def tiny_teacher(folder: Path) -> Path:
    save_network(folder, tiny_sit(), ModelCard(label_names=NAMES))
    return folder
