"""Ways to spoil images whose effect is known, to see what a metric sees.

Images are floats in [0, 1], (N, 3, H, W); results may leave that range until `eight_bit` clips and rounds them. What is
random depends on the `Draws` alone and is the same in all channels.
"""

import math

import torch
from torch import Tensor

from dmd_dar.draws import Draws
from dmd_dar.spectrum import band_energies, modes, to_channel

LEVEL = 1 / 255
MATCHING_ROUNDS = 8


def eight_bit(images: Tensor) -> Tensor:
    """Floats in [0, 1] to uint8: clipped, rounded once."""
    return (images.clamp(0, 1) * 255).round().to(torch.uint8)


def filtered(images: Tensor, transfer: Tensor) -> Tensor:
    """The transform of each plane times `transfer` (H, K), or one that broadcasts against it."""
    return torch.fft.irfft2(torch.fft.rfft2(images) * transfer, s=images.shape[-2:])


def blurred(images: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of `sigma` pixels, exact in Fourier space: gain exp(-4 pi^2 sigma^2 f^2) in power."""
    radius = modes(*images.shape[-2:], images.device).radius.to(images.dtype)
    return filtered(images, torch.exp(-2 * math.pi**2 * sigma**2 * radius.square()))


def with_white_noise(images: Tensor, levels: float, draws: Draws) -> Tensor:
    """Grey Gaussian noise of `levels` 8-bit levels."""
    return images + levels * LEVEL * draws.normal("white noise", 1, *images.shape[-2:], dtype=images.dtype)


def phase_scrambled(images: Tensor, draws: Draws, above: float = 0.0) -> Tensor:
    """The phases of white noise at frequencies above `above` cycles per pixel; every amplitude as it was."""
    transform = torch.fft.rfft2(images)
    chosen = modes(*images.shape[-2:], images.device).radius > above
    return torch.fft.irfft2(
        torch.where(chosen, transform.abs() * _phases(images, draws), transform), s=images.shape[-2:]
    )


def _phases(images: Tensor, draws: Draws) -> Tensor:
    """exp(i phi) of white noise, (N, 1, H, K); the mean, which has no phase, stays."""
    noise = torch.fft.rfft2(draws.normal("phases", 1, *images.shape[-2:], dtype=images.dtype))
    phases = noise / noise.abs()
    phases[..., 0, 0] = 1
    return phases


def with_shaped_noise(images: Tensor, sigma: float, draws: Draws) -> Tensor:
    """Blur, then fill each image's own lost power with noise; at last every band has the energy that it had before.

    The spectrum is right to a few hundredths of a dB after clipping and rounding, and all detail is gone.
    """
    blur = blurred(images, sigma)
    lost = torch.fft.rfft2(images).abs().square() - torch.fft.rfft2(blur).abs().square()
    noise = lost.clamp(min=0).sqrt() * _phases(images, draws)
    return band_matched(blur + torch.fft.irfft2(noise, s=images.shape[-2:]), images)


def band_matched(images: Tensor, reference: Tensor) -> Tensor:
    """`images` with each band of luma scaled so that, once clipped and rounded, it has the reference's mean energy."""
    grid, target = modes(*images.shape[-2:], images.device), band_energies(reference).mean(0)
    for _ in range(MATCHING_ROUNDS):
        energy = band_energies(eight_bit(images).float() / 255).mean(0)
        ratio = torch.where(energy > 0, target / energy, 1.0).sqrt()  # B0 is empty at 32 px
        images = filtered(images, torch.cat([ratio, ratio.new_ones(1)])[grid.band].to(images.dtype))
    return images


def brighter(images: Tensor, levels: float) -> Tensor:
    """Every value raised by `levels` 8-bit levels."""
    return images + levels * LEVEL


def saturated(images: Tensor, factor: float) -> Tensor:
    """Distance from each pixel's own luma times `factor`."""
    grey = to_channel(images)[:, None]
    return grey + factor * (images - grey)


def with_chroma_noise(images: Tensor, levels: float, draws: Draws) -> Tensor:
    """Gaussian noise of `levels` 8-bit levels in each of red, green and blue, without its luma."""
    noise = draws.normal("chroma noise", 3, *images.shape[-2:], dtype=images.dtype)
    return images + levels * LEVEL * (noise - to_channel(noise)[:, None])


def with_lattice(images: Tensor, levels: float, period: int) -> Tensor:
    """Every `period`-th column raised by `levels` 8-bit levels."""
    columns = torch.arange(images.shape[-1], device=images.device) % period == 0
    return images + levels * LEVEL * columns.to(images.dtype)


def contrast(images: Tensor, factor: float) -> Tensor:
    """Distance from each image's own mean times `factor`."""
    mean = images.mean((-2, -1), keepdim=True)
    return mean + factor * (images - mean)
