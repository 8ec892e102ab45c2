"""Radially averaged power spectra of images: the one definition that training and evaluation share.

Legend: N images, H x W pixels, S = min(H, W), K = W // 2 + 1 columns of a one-sided transform, F radial bins.
Frequencies are in cycles per pixel (Nyquist 0.5); powers are in squared image units (images in [0, 1]).

    x' = (x - mean_w(x)) w          mean_w(x) = sum(w x) / sum(w), w separable periodic Hann (or 1)
    P  = |rfft2(x')|^2 / sum(w^2)   white noise of variance s^2 reads s^2 everywhere
    R(f_b) = sum m P / sum m        over the modes with rint(f S) = b and f <= 1/2, m the one-sided multiplicity
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

Channel = Literal["y", "cb", "cr"]
Window = Literal["hann"] | None

MIN_SIZE = 32
BAND_NAMES = ("B0", "B1", "B2", "B3", "B4", "HF")
BAND_EDGES = (1 / 16, 1 / 8, 1 / 4, 3 / 8, 1 / 2)  # upper edges of B0..B4; B0 starts at 1.5 / S; HF = B3 + B4
HF_EDGE = 1 / 4
HIGHEST_FIT = 0.45  # slopes and distances stop here: the last bins feel the corners of the square
LUMA = (0.299, 0.587, 0.114)  # BT.601, with the chroma factors below as in kornia.color.rgb_to_ycbcr
CB_FACTOR, CR_FACTOR = 0.564, 0.713
QUANTISATION_POWER = (1 / 255) ** 2 / 12  # power of 8-bit rounding noise for images in [0, 1]
MODES_PER_CHUNK = 1 << 24  # bounds the memory of the transforms to about 0.4 GB


@dataclass(frozen=True)
class Modes:
    """The modes of a one-sided (H, K) transform."""

    size: int  # S
    radius: Tensor  # (H, K) float64, cycles per pixel
    multiplicity: Tensor  # (H, K) float64: 2, but 1 on column 0 and, for even W, on column W / 2
    radial_bin: Tensor  # (H, K) int64, rint(f S); corners f > 1/2 fall in bin S // 2 + 1
    band: Tensor  # (H, K) int64, 0..4 for B0..B4, 5 for everything outside


@lru_cache(maxsize=32)
def modes(height: int, width: int, device: torch.device | str = "cpu") -> Modes:
    """Frequencies, multiplicities, radial bins and bands of an (H, W) image. ValueError when S < 32."""
    size = min(height, width)
    if size < MIN_SIZE:
        raise ValueError(f"a spectrum needs images of at least {MIN_SIZE} px, got {height}x{width}")
    rows = torch.fft.fftfreq(height, 1 / height, dtype=torch.float64, device=device)[:, None]  # integers
    columns = torch.arange(width // 2 + 1, dtype=torch.float64, device=device)[None, :]
    # Integer arithmetic under the root keeps modes that lie on a band edge exactly on it.
    radius = ((rows * width) ** 2 + (columns * height) ** 2).sqrt() / (height * width)  # (H, K)
    multiplicity = torch.full_like(radius, 2.0)
    multiplicity[:, 0] = 1.0
    if width % 2 == 0:
        multiplicity[:, -1] = 1.0
    outside = radius > 0.5
    radial_bin = torch.round(radius * size).long().masked_fill(outside, size // 2 + 1)
    upper = torch.tensor(BAND_EDGES, dtype=torch.float64, device=device)
    band = torch.bucketize(radius, upper, right=True).clamp_(max=4)
    band = band.masked_fill(outside | (radius < 1.5 / size), 5)
    return Modes(size, radius, multiplicity, radial_bin, band)


def to_channel(images: Tensor, channel: Channel = "y") -> Tensor:
    """RGB (N, 3, H, W) to one BT.601 channel (N, H, W); Cb and Cr are centred on 0. At least float32."""
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"expected images of shape (N, 3, H, W), got {tuple(images.shape)}")
    if not images.is_floating_point():
        raise TypeError(f"expected float images, got {images.dtype}: map uint8 to [0, 1] first")
    red, green, blue = images.to(torch.promote_types(images.dtype, torch.float32)).unbind(1)
    luma = LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue
    if channel == "y":
        return luma
    if channel == "cb":
        return CB_FACTOR * (blue - luma)
    if channel == "cr":
        return CR_FACTOR * (red - luma)
    raise ValueError(f"channel must be 'y', 'cb' or 'cr', got {channel!r}")


def window_2d(height: int, width: int, window: Window, like: Tensor) -> Tensor:
    """Separable periodic Hann window (H, W), or ones for None."""
    if window is None:
        return like.new_ones(height, width)
    if window != "hann":
        raise ValueError(f"window must be 'hann' or None, got {window!r}")
    row, column = (torch.hann_window(n, periodic=True, dtype=like.dtype, device=like.device) for n in (height, width))
    return row[:, None] * column[None, :]


def power_spectrum(images: Tensor, *, window: Window = "hann", channel: Channel = "y") -> Tensor:
    """One-sided periodogram P of each image, (N, 3, H, W) -> (N, H, K) float64.

    The transform runs in float32 (float64 for float64 input), sums over it belong in float64.
    """
    plane = to_channel(images, channel)  # (N, H, W)
    w = window_2d(*plane.shape[-2:], window, plane)
    mean = (plane * w).sum((-2, -1), keepdim=True) / w.sum()
    transform = torch.fft.rfft2((plane - mean) * w)  # (N, H, K)
    power = transform.real.double().square() + transform.imag.double().square()
    return power / w.double().square().sum()


def _chunks(images: Tensor) -> Iterator[Tensor]:
    if images.ndim != 4 or len(images) == 0:
        raise ValueError(f"expected at least one image of shape (N, 3, H, W), got {tuple(images.shape)}")
    return iter(images.split(max(1, MODES_PER_CHUNK // (images.shape[-1] * images.shape[-2]))))


def _grouped_energy(images: Tensor, group: Callable[[Modes], Tensor], count: int, window, channel) -> Tensor:
    """Sum of m P over each group of modes, (N, count); `group` gives (H, K) indices, those >= count are left out."""
    grid = modes(*images.shape[-2:], images.device)
    index = group(grid).clamp(max=count).flatten()
    sums = []
    for chunk in _chunks(images):
        weighted = power_spectrum(chunk, window=window, channel=channel) * grid.multiplicity  # (n, H, K)
        zeros = weighted.new_zeros(len(chunk), count + 1)
        sums.append(zeros.index_add(1, index, weighted.flatten(1))[:, :count])
    return torch.cat(sums)


def _bin_range(size: int, window: Window) -> tuple[int, int]:
    """Bins b of the radial curve: 1 .. S // 2; Hann drops the first, into which the removed mean leaks."""
    return (1 if window is None else 2), size // 2


def radial_frequencies(height: int, width: int, *, window: Window = "hann") -> tuple[Tensor, Tensor]:
    """Bin frequencies b / S in cycles per pixel and mode counts sum m of the radial curve, both (F,) float64."""
    grid = modes(height, width)
    low, high = _bin_range(grid.size, window)
    counts = torch.zeros(grid.size // 2 + 2, dtype=torch.float64)
    counts.index_add_(0, grid.radial_bin.flatten(), grid.multiplicity.flatten())
    return torch.arange(low, high + 1, dtype=torch.float64) / grid.size, counts[low : high + 1]


def image_psd(images: Tensor, *, window: Window = "hann", channel: Channel = "y") -> tuple[Tensor, Tensor]:
    """Radial power of each image: frequencies (F,), power (N, F) float64. Differentiable. See `radial_psd`."""
    frequencies, counts = radial_frequencies(*images.shape[-2:], window=window)
    low, high = _bin_range(min(images.shape[-2:]), window)
    sums = _grouped_energy(images, lambda grid: grid.radial_bin, high + 1, window, channel)[:, low:]
    return frequencies.to(images.device), sums / counts.to(images.device)


def radial_psd(images: Tensor, *, window: Window = "hann", channel: Channel = "y") -> tuple[Tensor, Tensor]:
    """Radially averaged power spectrum, pooled over images: R(f_b) = sum m P / sum m.

    images: float (N, 3, H, W), RGB, usually in [0, 1]; S = min(H, W) >= 32, else ValueError naming the size.
    Returns frequencies (F,) in cycles per pixel and power (F,) in squared image units, both float64.
    """
    frequencies, power = image_psd(images, window=window, channel=channel)
    return frequencies, power.mean(0)


def log_radial_psd(
    images: Tensor, *, window: Window = "hann", channel: Channel = "y", floor: float = QUANTISATION_POWER
) -> tuple[Tensor, Tensor]:
    """Natural log of the pooled radial power, (F,) and (F,) float64: differentiable, for use in a loss.

    `floor` is added to the power; the default is the noise of 8-bit rounding, below which nothing is visible.
    """
    frequencies, power = radial_psd(images, window=window, channel=channel)
    return frequencies, (power + floor).log()


def band_energies(images: Tensor, *, window: Window = "hann", channel: Channel = "y") -> Tensor:
    """Energies sum m P of the bands B0..B4 for each image, (N, 3, H, W) -> (N, 5) float64. HF is B3 + B4."""
    return _grouped_energy(images, lambda grid: grid.band, 5, window, channel)


def with_hf(energies: Tensor) -> Tensor:
    """Appends HF = B3 + B4: (N, 5) -> (N, 6), columns named by BAND_NAMES."""
    return torch.cat([energies, energies[:, 3:5].sum(1, keepdim=True)], dim=1)


def hfer(images: Tensor, *, window: Window = "hann", channel: Channel = "y") -> tuple[Tensor, Tensor]:
    """High-frequency energy ratio: energy at f > 1/4 over energy at f > 0, corners included.

    Returns the pooled ratio (scalar) and the ratio of each image (N,), which goes to 0 with the image's variation
    once all of it is below the power of 8-bit rounding in one mode.
    """
    split = _grouped_energy(
        images, lambda grid: (grid.radius <= HF_EDGE).long() + 2 * (grid.radius == 0).long(), 2, window, channel
    )
    high, total = split[:, 0], split.sum(1)
    return high.sum() / total.sum(), high / total.clamp(min=QUANTISATION_POWER)


def _fit_range(frequencies: Tensor, low: float | None, high: float) -> Tensor:
    step = frequencies[1] - frequencies[0]  # 1 / S
    low = 2.5 * step if low is None else low
    return (frequencies >= low - 1e-9) & (frequencies <= high + 1e-9)


def slope(
    frequencies: Tensor, power: Tensor, counts: Tensor, *, low: float | None = None, high: float = HIGHEST_FIT
) -> Tensor:
    """Slope of log R on log f by least squares weighted with the mode counts; a field 1/f^a reads -a.

    All three (F,), from `radial_psd` and `radial_frequencies`. low=None means 2.5 / S; `slope_hf` is low=0.2.
    """
    inside = _fit_range(frequencies, low, high)
    x, y, weight = frequencies[inside].log(), power[inside].log(), counts[inside] / counts[inside].sum()
    x = x - (weight * x).sum()
    return (weight * x * y).sum() / (weight * x * x).sum()


def log_spectral_distance(frequencies: Tensor, power: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """Root mean square and signed mean, in dB, of 10 log10(R / R_ref) over f in [2.5 / S, 0.45].

    The mean is uniform in log f: a bin counts by its width log((f + 1/2S) / (f - 1/2S)). All inputs (F,).
    """
    inside = _fit_range(frequencies, None, HIGHEST_FIT)
    half_step = (frequencies[1] - frequencies[0]) / 2
    f = frequencies[inside]
    weight = ((f + half_step) / (f - half_step)).log()
    weight = weight / weight.sum()
    decibel = 10 / math.log(10) * (power[inside].log() - reference[inside].log())
    return (weight * decibel.square()).sum().sqrt(), (weight * decibel).sum()
