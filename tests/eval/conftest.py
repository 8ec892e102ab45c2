"""Crops of the vendored photographs, and ways to spoil them whose effect is known."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from dmd_dar.spectrum import band_energies, modes

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
    return lambda images: (images.clamp(0, 1) * 255).round().to(torch.uint8)


@pytest.fixture(scope="session")
def blur() -> Callable[[Tensor, float], Tensor]:
    """Gaussian blur of `sigma` pixels, exact in Fourier space."""

    def apply(images: Tensor, sigma: float) -> Tensor:
        transfer = torch.exp(-2 * math.pi**2 * sigma**2 * modes(*images.shape[-2:]).radius.square())
        return torch.fft.irfft2(torch.fft.rfft2(images) * transfer, s=images.shape[-2:])

    return apply


@pytest.fixture(scope="session")
def shaped_noise(blur, eight_bit) -> Callable[[Tensor, float], Tensor]:
    """Blur, then fill each image's own lost power with noise; at last every band gets the energy it had before."""

    def apply(images: Tensor, sigma: float) -> Tensor:
        shape = images.shape[-2:]
        blurred = blur(images, sigma)
        lost = torch.fft.rfft2(images).abs().square() - torch.fft.rfft2(blurred).abs().square()
        phase = torch.fft.rfft2(torch.randn(len(images), 1, *shape, generator=torch.Generator().manual_seed(0)))
        noise = torch.fft.irfft2(lost.clamp(min=0).sqrt() * phase / phase.abs(), s=shape)
        result, target = blurred + noise, band_energies(images).mean(0)
        for _ in range(8):  # clipping and rounding move the bands again
            energy = band_energies(eight_bit(result).double() / 255).mean(0)
            ratio = torch.where(energy > 0, target / energy, 1.0).sqrt()  # B0 is empty at 32 px
            gains = torch.cat([ratio, ratio.new_ones(1)])[modes(*shape).band]
            result = torch.fft.irfft2(torch.fft.rfft2(result) * gains, s=shape)
        return result

    return apply
