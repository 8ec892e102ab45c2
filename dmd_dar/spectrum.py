"""Radially averaged power spectra of images: the one definition that training and evaluation share.

Legend: N images of C channels, H x W pixels, S = min(H, W), K = W // 2 + 1 columns of a one-sided transform,
F radial bins.
Frequencies are in cycles per pixel (Nyquist 0.5); powers are in squared image units (images in [0, 1]).

    x' = (x - mean_w(x)) w          mean_w(x) = sum(w x) / sum(w), w separable periodic Hann (or 1)
    P  = |rfft2(x')|^2 / sum(w^2)   white noise of variance s^2 reads s^2 everywhere
    R(f_b) = sum m P / sum m        over the modes with rint(f S) = b and f <= 1/2, m the one-sided multiplicity
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache, reduce
from operator import add
from typing import Literal

import torch
from torch import Tensor

Channel = Literal["y", "cb", "cr", "all"] | int
Window = Literal["hann"] | None

MIN_SIZE = 32  # of an image's shorter side
LEAST_CELLS = (
    16  # of latents': B2 and above hold modes, in radial bins that the window does not spoil; B0 and B1 do not
)
BAND_NAMES = ("B0", "B1", "B2", "B3", "B4", "HF")
BAND_EDGES = (1 / 16, 1 / 8, 1 / 4, 3 / 8, 1 / 2)  # upper edges of B0..B4; B0 starts at 1.5 / S; HF = B3 + B4
HF_EDGE = 1 / 4
HIGHEST_FIT = 0.45  # slopes and distances stop here: the last bins feel the corners of the square
LUMA = (0.299, 0.587, 0.114)  # BT.601, with the chroma factors below as in kornia.color.rgb_to_ycbcr
CB_FACTOR, CR_FACTOR = 0.564, 0.713
COLOURS = {
    "y": LUMA,
    "cb": (-CB_FACTOR * LUMA[0], -CB_FACTOR * LUMA[1], CB_FACTOR * (1 - LUMA[2])),
    "cr": (CR_FACTOR * (1 - LUMA[0]), -CR_FACTOR * LUMA[1], -CR_FACTOR * LUMA[2]),
}
QUANTISATION_POWER = (1 / 255) ** 2 / 12  # power of 8-bit rounding noise for images in [0, 1]
POWER_FLOOR = 1e-9  # a thousandth of the power of 8-bit rounding in a single mode: nothing is compared below it
PERIODS = (2, 4, 8, 16)  # pixels, of the lattices that grid_lines looks for
OFFSETS = (-3, -2, 2, 3)  # modes beside a line, whose median is its surroundings; Hann spreads a line by 1
LEAST_PERIODS = 8  # of a line in a side: below, its surroundings reach over an octave of a falling spectrum
PIXELS_PER_CHUNK = 1 << 19  # what is transformed at once: few enough to stay in a processor's cache


@dataclass(frozen=True)
class Modes:
    """The modes of a one-sided (H, K) transform and the groups that are summed over; the last of each is left out."""

    size: int  # S
    radius: Tensor  # (H, K) float64, cycles per pixel
    multiplicity: Tensor  # (H, K) float64: 2, but 1 on column 0 and, for even W, on column W / 2
    radial_bin: Tensor  # (H, K) int64, rint(f S); corners f > 1/2 fall in bin S // 2 + 1
    band: Tensor  # (H, K) int64, 0..4 for B0..B4, 5 for everything outside
    part: Tensor  # (H, K) int64, 0 where f > 1/4 (corners included), 1 where 0 < f <= 1/4, 2 for f = 0


@lru_cache(maxsize=32)
@torch.inference_mode(False)  # what is kept must serve a later backward pass as well
def modes(height: int, width: int, device: torch.device | str = "cpu") -> Modes:
    """Frequencies, multiplicities, radial bins and bands of an (H, W) plane. ValueError when S < 16."""
    size = min(height, width)
    if size < LEAST_CELLS:
        raise ValueError(f"a spectrum needs at least {LEAST_CELLS} px or latent cells a side, got {height}x{width}")
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
    part = (radius <= HF_EDGE).long() + (radius == 0).long()
    return Modes(size, radius, multiplicity, radial_bin, band, part)


def to_channel(images: Tensor, channel: Literal["y", "cb", "cr"] = "y") -> Tensor:
    """RGB (N, 3, H, W) to one BT.601 channel (N, H, W); Cb and Cr are centred on 0. At least float32."""
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"expected RGB images of shape (N, 3, H, W), got {tuple(images.shape)}")
    if channel not in COLOURS:
        raise ValueError(f"channel must be 'y', 'cb', 'cr', 'all' or an index, got {channel!r}")
    images = _floats(images)
    weights = torch.tensor([COLOURS[channel]], dtype=torch.float64, device=images.device).to(images.dtype)
    return (weights @ images.flatten(2)).unflatten(-1, images.shape[-2:])[:, 0]


def to_planes(images: Tensor, channel: Channel = "y") -> Tensor:
    """(N, C, H, W) to the planes that are measured: one, or for "all" every one of any C, as for latents."""
    if channel != "all" and not isinstance(channel, int):
        return to_channel(images, channel)[:, None]
    if images.ndim != 4:
        raise ValueError(f"expected images of shape (N, C, H, W), got {tuple(images.shape)}")
    if isinstance(channel, int):
        if not 0 <= channel < images.shape[1]:
            raise ValueError(f"channel must be below the {images.shape[1]} of the images, got {channel}")
        images = images[:, channel : channel + 1]
    return _floats(images)


def _floats(images: Tensor) -> Tensor:
    if not images.is_floating_point():
        raise TypeError(f"expected float images, got {images.dtype}: map uint8 to [0, 1] first")
    return images.to(torch.promote_types(images.dtype, torch.float32))


def window_2d(height: int, width: int, window: Window, like: Tensor) -> Tensor:
    """Separable periodic Hann window (H, W), or ones for None."""
    if window is None:
        return like.new_ones(height, width)
    if window != "hann":
        raise ValueError(f"window must be 'hann' or None, got {window!r}")
    row, column = (torch.hann_window(n, periodic=True, dtype=like.dtype, device=like.device) for n in (height, width))
    return row[:, None] * column[None, :]


@lru_cache(maxsize=32)
@torch.inference_mode(False)
def _kept_window(
    height: int, width: int, window: Window, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """w (H, W), its sum, and the sum of its square in float64."""
    w = window_2d(height, width, window, torch.empty(0, dtype=dtype, device=device))
    return w, w.sum(), w.double().square().sum()


def _raw_power(images: Tensor, window: Window, channel: Channel) -> tuple[Tensor, Tensor]:
    """sum(w^2) P of each plane (n, C, H, K) in the dtype of the transform, and sum(w^2)."""
    planes = to_planes(images, channel)
    w, total, norm = _kept_window(*planes.shape[-2:], window, planes.dtype, planes.device)
    windowed = planes * w
    mean = windowed.sum((-2, -1), keepdim=True) / total
    transform = torch.fft.rfft2(windowed.addcmul_(mean, w, value=-1))
    return transform.real.square().addcmul_(transform.imag, transform.imag), norm


def power_spectrum(images: Tensor, *, window: Window = "hann", channel: Channel = "y") -> Tensor:
    """One-sided periodogram P of each image, (N, C, H, W) -> (N, H, K) float64; the mean over planes for "all".

    The transform runs in float32 (float64 for float64 input), sums over it belong in float64.
    """
    power, norm = _raw_power(images, window, channel)
    return power.mean(1, dtype=torch.float64) / norm


def _modes_of(images: Tensor, channel: Channel) -> Modes:
    """ValueError where a side is too small: below MIN_SIZE for colours, below LEAST_CELLS for planes as they are."""
    height, width = images.shape[-2:]
    if channel in COLOURS and min(height, width) < MIN_SIZE:
        raise ValueError(f"a spectrum needs images of at least {MIN_SIZE} px, got {height}x{width}")
    return modes(height, width, images.device)


def _chunks(images: Tensor) -> Iterator[Tensor]:
    if images.ndim != 4 or len(images) == 0:
        raise ValueError(f"expected at least one image of shape (N, C, H, W), got {tuple(images.shape)}")
    return iter(images.split(max(1, PIXELS_PER_CHUNK // (images.shape[-1] * images.shape[-2]))))


@dataclass(frozen=True)
class Energies:
    """Sums of m P of N images over groups of modes, all from one transform; float64."""

    radial: Tensor  # (N, S // 2 + 1)
    bands: Tensor  # (N, 5)
    parts: Tensor  # (N, 2): f > 1/4 and 0 < f <= 1/4


def energies(images: Tensor, *, window: Window = "hann", channel: Channel = "y") -> Energies:
    """Everything radial about each image (N, C, H, W). Differentiable. Arguments and errors as for `radial_psd`."""
    grid = _modes_of(images, channel)
    groups = ((grid.radial_bin, grid.size // 2 + 1), (grid.band, 5), (grid.part, 2))
    chunks = []
    for chunk in _chunks(images):
        power, norm = _raw_power(chunk, window, channel)
        weighted = (power * (grid.multiplicity / (norm * power.shape[1]))).sum(1).flatten(1)  # (n, H K)
        chunks.append([_sum_groups(weighted, index.flatten(), count) for index, count in groups])
    return Energies(*(torch.cat(parts) for parts in zip(*chunks, strict=True)))


def _sum_groups(values: Tensor, index: Tensor, count: int) -> Tensor:
    """(n, M) summed over columns of equal index, (n, count); the index `count` is left out."""
    return values.new_zeros(len(values), count + 1).index_add(1, index, values)[:, :count]


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
    low, _ = _bin_range(min(images.shape[-2:]), window)
    sums = energies(images, window=window, channel=channel).radial[:, low:]
    return frequencies.to(images.device), sums / counts.to(images.device)


@dataclass(frozen=True)
class PowerSum:
    """Radial power summed over images; sums of parts add up, whatever the split and the order."""

    frequencies: Tensor  # (F,) cycles per pixel
    images: int
    total: Tensor  # (F,) float64

    def __add__(self, other: "PowerSum") -> "PowerSum":
        if not torch.equal(self.frequencies, other.frequencies):
            sizes = [round(1 / (f[1] - f[0]).item()) for f in (self.frequencies, other.frequencies)]
            raise ValueError(f"images whose shorter sides are {sizes[0]} and {sizes[1]} px have no common spectrum")
        return PowerSum(self.frequencies, self.images + other.images, self.total + other.total)

    @property
    def power(self) -> Tensor:
        """R, (F,)."""
        return self.total / self.images


def power_sum(images: Tensor, *, window: Window = "hann", channel: Channel = "y") -> PowerSum:
    """The radial power of one batch, ready to be added to that of others. Arguments and errors as for `radial_psd`."""
    grid = _modes_of(images, channel)
    frequencies, counts = radial_frequencies(*images.shape[-2:], window=window)
    low, high = _bin_range(grid.size, window)
    parts = []
    for chunk in _chunks(images):  # modes first, bins once: the sum over images is the cheap one
        power, norm = _raw_power(chunk, window, channel)
        parts.append(power.sum((0, 1), dtype=torch.float64) / (norm * power.shape[1]))
    weighted = (torch.stack(parts).sum(0) * grid.multiplicity).flatten()[None]
    sums = _sum_groups(weighted, grid.radial_bin.flatten(), high + 1)[0, low:]
    return PowerSum(frequencies.to(images.device), len(images), sums / counts.to(images.device))


def radial_psd(
    images: Tensor | Iterable[Tensor], *, window: Window = "hann", channel: Channel = "y"
) -> tuple[Tensor, Tensor]:
    """Radially averaged power spectrum, pooled over images: R(f_b) = sum m P / sum m.

    images: float (N, 3, H, W), RGB, usually in [0, 1], or batches of them; S = min(H, W) >= 32, else ValueError
    naming the size. window: None keeps the bin 1 / S, which Hann drops. channel: "y", "cb" or "cr" (BT.601) of RGB;
    an index or "all" (the mean over channels) of any number of channels, as of latents, where S >= 16 will do.
    Returns frequencies (F,) in cycles per pixel and power (F,) in squared image units, both float64. Differentiable.
    """
    batches = [images] if isinstance(images, Tensor) else images
    sums = [power_sum(batch, window=window, channel=channel) for batch in batches]
    if not sums:
        raise ValueError("expected at least one batch of images, got none")
    whole = reduce(add, sums)
    return whole.frequencies, whole.power


def log_radial_psd(
    images: Tensor, *, window: Window = "hann", channel: Channel = "y", floor: float = QUANTISATION_POWER
) -> tuple[Tensor, Tensor]:
    """Natural log of the pooled radial power, (F,) and (F,) float64: differentiable, for use in a loss.

    `floor` is added to the power; the default is the noise of 8-bit rounding, below which nothing is visible.
    """
    frequencies, power = radial_psd(images, window=window, channel=channel)
    return frequencies, (power + floor).log()


def band_energies(images: Tensor, *, window: Window = "hann", channel: Channel = "y") -> Tensor:
    """Energies sum m P of the bands B0..B4 for each image, (N, C, H, W) -> (N, 5) float64. HF is B3 + B4."""
    return energies(images, window=window, channel=channel).bands


def with_hf(energies: Tensor) -> Tensor:
    """Appends HF = B3 + B4: (N, 5) -> (N, 6), columns named by BAND_NAMES."""
    return torch.cat([energies, energies[:, 3:5].sum(1, keepdim=True)], dim=1)


def compared_powers(images: Tensor, *, window: Window = "hann", channel: Channel = "y") -> Energies:
    """`energies` as sets are compared by them, on the CPU: radial power R (N, F), bands (N, 6) of BAND_NAMES, parts.

    Radial power and B0..B4 are held above POWER_FLOOR, image by image, so that images without any detail read a large
    loss and not minus infinity; HF is the sum of B3 and B4 so held. A band without a mode (B0 of a 32-px image) is NaN.
    """
    counts = radial_frequencies(*images.shape[-2:], window=window)[1]
    sums = energies(images, window=window, channel=channel)
    radial = sums.radial[:, -len(counts) :].cpu() / counts
    empty = torch.bincount(modes(*images.shape[-2:]).band.flatten(), minlength=6)[:5] == 0
    bands = sums.bands.cpu().clamp(min=POWER_FLOOR).masked_fill(empty, torch.nan)
    return Energies(radial.clamp(min=POWER_FLOOR), with_hf(bands), sums.parts.cpu())


def hfer(images: Tensor, *, window: Window = "hann", channel: Channel = "y") -> tuple[Tensor, Tensor]:
    """High-frequency energy ratio: energy at f > 1/4 over energy at f > 0, corners included.

    Returns the pooled ratio (scalar) and the ratio of each image (N,), which goes to 0 with the image's variation
    once all of it is below the power of 8-bit rounding in one mode.
    """
    return hfer_of(energies(images, window=window, channel=channel).parts)


def hfer_of(parts: Tensor) -> tuple[Tensor, Tensor]:
    """`hfer` from the energies (N, 2) at f > 1/4 and at 0 < f <= 1/4."""
    high, total = parts[:, 0], parts.sum(1)
    return high.sum() / total.sum(), high / total.clamp(min=QUANTISATION_POWER)


def band_edges(height: int, width: int) -> list[float]:
    """The six edges of B0..B4 in cycles per pixel; equal ones bound a band without a mode, of a small plane."""
    lowest = 1.5 / min(height, width)
    return [max(lowest, edge) for edge in (0.0, *BAND_EDGES)]


def _fit_range(frequencies: Tensor, low: float | None, high: float) -> Tensor:
    step = frequencies[1] - frequencies[0]  # 1 / S
    least = 2.5 * step if low is None else low
    return (frequencies >= least - 1e-9) & (frequencies <= high + 1e-9)


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


def log_powers(images: Tensor, window: Window = "hann", channel: Channel = "y") -> Iterator[Tensor]:
    """10 log10(P + q) of chunks of images in [0, 1], (n, H, K) float64, q the power of 8-bit rounding."""
    for chunk in _chunks(images):
        power = power_spectrum(chunk, window=window, channel=channel)
        yield 10 * torch.log10(power + QUANTISATION_POWER)


def grid_lines(images: Tensor, *, channel: Channel = "y") -> Tensor:
    """Log power at the lines of a pixel grid and beside them, (N, 2, 4, 1 + 4) float64, dB: axes x and y, PERIODS, the
    line and its OFFSETS. A lattice of columns with the period p is a line at f = 1 / p on x, one of rows on y.

    With a Hann window, so that borders do not cover a line; at f = 1/2 without, or it would fill a notch from beside.
    NaN where a side is no multiple of the period or holds fewer than LEAST_PERIODS of it.
    """

    def lines(window: Window) -> Tensor:
        return torch.cat([_lines_of(power, images.shape[-1]) for power in log_powers(images, window, channel)])

    highest = torch.tensor(PERIODS, device=images.device) == 2
    return torch.where(highest[:, None], lines(None), lines("hann"))


def _lines_of(power: Tensor, width: int) -> Tensor:
    """(n, H, K) -> (n, 2, 4, 5)."""
    lines = power.new_full((len(power), 2, len(PERIODS), 1 + len(OFFSETS)), math.nan)
    for axis, (along, side) in enumerate(((power[:, 0, :], width), (power[:, :, 0], power.shape[1]))):
        for place, period in enumerate(PERIODS):
            modes_at = [side // period + offset for offset in (0, *OFFSETS)]
            if side % period == 0 and side // period >= LEAST_PERIODS:
                lines[:, axis, place] = along[:, [side - mode if 2 * mode > side else mode for mode in modes_at]]
    return lines


def line_heights(lines: Tensor) -> Tensor:
    """Mean log power at each line minus the median beside it, `grid_lines` (..., N, 2, 4, 5) -> (..., 2, 4) in dB."""
    mean = lines.mean(-4)
    return mean[..., 0] - mean[..., 1:].quantile(0.5, dim=-1)
