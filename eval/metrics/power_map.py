"""Spectra in two dimensions: mean log power over the plane of frequencies, and the lines that a pixel grid leaves.

A lattice of columns with the period p (a checkerboard, the seams of a transformer's patches) is a peak at the
frequency 1 / p on the horizontal axis, rows likewise on the vertical one; nearest-neighbour enlargement is a notch.
Legend: N images, H x W pixels, K = W // 2 + 1. All in dB, 10 log10(P + q), with q the power of 8-bit rounding.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import reduce
from operator import add
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from dmd_dar import spectrum
from dmd_dar.spectrum import BAND_EDGES, PERIODS, Channel, Window, log_powers, modes

from ..samples.images import UnfitError
from .intervals import Interval, Sample, bootstrap
from .spectrum import as_floats

LineWord = Literal["peak", "notch", "none"]
AXES = ("x", "y")  # a lattice of columns shows on x, one of rows on y
PEAK_DB = 1.0  # a line is called a peak or a notch where its whole interval is beyond this
DIRECTIONS = ("x", "y", "diagonal")
HALF_ANGLE = torch.pi / 8  # of the sectors around the axes
REAL_MODE_DB = 10 * np.log10(2)  # random modes without an imaginary part (f = 1/2) have this less mean log power


@dataclass(frozen=True)
class MapSum:
    """Log power summed over images; sums of parts add up, whatever the split and the order."""

    images: int
    width: int
    total: Tensor  # (H, K) float64, dB

    def __add__(self, other: "MapSum") -> "MapSum":
        if (self.width, self.total.shape) != (other.width, other.total.shape):
            sizes = [f"{one.total.shape[0]}x{one.width}" for one in (self, other)]
            raise UnfitError(f"maps of {sizes[0]} and of {sizes[1]} px do not add up; give images of one size")
        return MapSum(self.images + other.images, self.width, self.total + other.total)

    @property
    def mean(self) -> Tensor:
        """(H, W) in dB over the whole plane, f = 0 at [H // 2, W // 2]."""
        return whole_plane(self.total / self.images, self.width)


def whole_plane(half: Tensor, width: int) -> Tensor:
    """A plane (H, K) of a one-sided transform of real images, whole: (H, W) with f = 0 at [H // 2, W // 2]."""
    height, columns = half.shape
    mirrored = half[-torch.arange(height) % height][:, -torch.arange(columns, width) % width]
    return torch.fft.fftshift(torch.cat([half, mirrored], dim=1))


def map_sum(images: Tensor, *, window: Window = "hann", channel: Channel = "y") -> MapSum:
    """The log power of one batch (N, C, H, W), uint8 or floats in [0, 1], ready to be added to that of others."""
    total = torch.stack([power.sum(0) for power in log_powers(as_floats(images), window, channel)]).sum(0)
    return MapSum(len(images), images.shape[-1], total)


def mean_log_map(images: Tensor | Iterable[Tensor], *, window: Window = "hann", channel: Channel = "y") -> Tensor:
    """Mean over images of 10 log10 P over the plane of frequencies, (H, W) in dB, f = 0 at [H // 2, W // 2].

    images: (N, C, H, W), uint8 or floats in [0, 1], or batches of them. The difference of two maps is the local gain.
    """
    batches = [images] if isinstance(images, Tensor) else images
    sums = [map_sum(batch, window=window, channel=channel) for batch in batches]
    if not sums:
        raise UnfitError("expected at least one batch of images, got none")
    return reduce(add, sums).mean


@dataclass(frozen=True)
class Directions:
    """A number for each direction in the plane of frequencies, None where no frequency falls into its sector.

    x: within 22.5 degrees of the horizontal axis (upright edges and columns), y: of the vertical one.
    """

    x: float | None
    y: float | None
    diagonal: float | None


def sector_means(plane: Tensor) -> dict[str, Directions]:
    """Mean of a map (H, W) over each band, by name, and direction. Corners beyond 1/2 are left out."""
    height, width = plane.shape
    rows = torch.fft.fftshift(torch.fft.fftfreq(height, dtype=torch.float64))[:, None]
    columns = torch.fft.fftshift(torch.fft.fftfreq(width, dtype=torch.float64))[None, :]
    angle = torch.atan2(rows.abs(), columns.abs())  # 0 on the horizontal axis, pi / 2 on the vertical one
    x, y = angle <= HALF_ANGLE, angle >= torch.pi / 2 - HALF_ANGLE
    inside = (x, y, ~(x | y))  # in the order of DIRECTIONS
    band = whole_plane(modes(height, width).band, width)
    return {f"B{b}": Directions(*(_mean(plane[(band == b) & part]) for part in inside)) for b in range(len(BAND_EDGES))}


def _mean(values: Tensor) -> float | None:
    return values.mean().item() if values.numel() else None


def grid_lines(images: Tensor, *, channel: Channel = "y") -> np.ndarray:
    """`spectrum.grid_lines` of uint8 images or floats in [0, 1], (N, 2, 4, 1 + 4) in dB."""
    return spectrum.grid_lines(as_floats(images), channel=channel).cpu().numpy()


def line_heights(lines: np.ndarray) -> np.ndarray:
    """`spectrum.line_heights`, (..., N, 2, 4, 5) -> (..., 2, 4) in dB."""
    return spectrum.line_heights(torch.from_numpy(lines)).numpy()


@dataclass(frozen=True)
class GridLine:
    """One line of the pixel grid: its height above its surroundings in dB, negative for a notch."""

    axis: str
    period: int  # pixels
    height: Interval
    against_reference: bool  # the height is the difference to that of a reference
    word: LineWord = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "word", line_word(self.height, self.period, self.against_reference))


def line_word(height: Interval, period: int, against_reference: bool) -> LineWord:
    """peak or notch where the whole interval of a line's height is beyond PEAK_DB, none otherwise.

    At f = 1/2, and without a reference, whose line has the same bias, REAL_MODE_DB less is no notch either.
    """
    if not height.defined:
        return "none"
    bias = REAL_MODE_DB if period == 2 and not against_reference else 0.0
    return "peak" if height.low > PEAK_DB else "notch" if height.high < -PEAK_DB - bias else "none"


def grid_peaks(
    student: Sample, reference: Sample | None = None, *, paired: bool = False, rng: np.random.Generator
) -> list[GridLine]:
    """grid_peak_db of every axis and period, from `grid_lines`: mean log power at the line minus its local median.

    With a reference, the difference of the two: detail that is periodic by itself, such as bricks, cancels.
    """

    def heights(*values: np.ndarray) -> np.ndarray:  # (R, N, 2, 4, 5) each -> (R, 2, 4)
        return line_heights(values[0]) - (line_heights(values[1]) if len(values) == 2 else 0.0)

    samples = [student] if reference is None else [student, reference]
    value, low, high = bootstrap(heights, *samples, paired=paired and len(samples) == 2, rng=rng)
    return [
        GridLine(axis, period, Interval(float(value[a, p]), float(low[a, p]), float(high[a, p])), len(samples) == 2)
        for a, axis in enumerate(AXES)
        for p, period in enumerate(PERIODS)
    ]
