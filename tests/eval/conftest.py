"""Crops of the vendored photographs, and ways to spoil them whose effect is known."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from eval.metrics import spoil

PHOTOGRAPHS = sorted((Path(__file__).parents[2] / "dmd_dar" / "data" / "photos").glob("*.png"))


@pytest.fixture(scope="session")
def crops() -> Callable[[int, int, int], tuple[Tensor, Tensor]]:
    """(size, count per photograph, seed) -> uint8 (N, 3, size, size) and the photograph's number (N,)."""
    photographs = [np.asarray(Image.open(path).convert("RGB")) for path in PHOTOGRAPHS]

    def cut(size: int, count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
        rng, pieces = np.random.default_rng(seed), []
        for photograph in photographs:
            for _ in range(count):
                top, left = (rng.integers(length - size + 1) for length in photograph.shape[:2])
                pieces.append(photograph[top : top + size, left : left + size])
        images = torch.from_numpy(np.stack(pieces)).permute(0, 3, 1, 2)
        return images, torch.arange(len(photographs)).repeat_interleave(count)

    return cut


@pytest.fixture(scope="session")
def eight_bit() -> Callable[[Tensor], Tensor]:
    return spoil.eight_bit


@pytest.fixture(scope="session")
def blur() -> Callable[[Tensor, float], Tensor]:
    """Gaussian blur of `sigma` pixels, exact in Fourier space."""
    return spoil.blurred
