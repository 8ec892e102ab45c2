"""A map over the plane of frequencies in a few numbers: its mean over bands and directions.

Legend: H x W pixels; f = 0 at [H // 2, W // 2].
"""

import torch
from torch import Tensor

from dmd_dar.spectrum import BAND_EDGES, modes

from .power_map import whole_plane

DIRECTIONS = ("x", "y", "diagonal")
HALF_ANGLE = torch.pi / 8  # of the sectors around the axes


def sector_means(plane: Tensor) -> dict[str, dict[str, float | None]]:
    """Mean of a map (H, W) over each band and direction; None where no frequency falls into a sector.

    x holds the frequencies within 22.5 degrees of the horizontal axis (upright edges and columns), y those of the
    vertical one. Corners beyond 1/2 are left out.
    """
    height, width = plane.shape
    rows = torch.fft.fftshift(torch.fft.fftfreq(height, dtype=torch.float64))[:, None]
    columns = torch.fft.fftshift(torch.fft.fftfreq(width, dtype=torch.float64))[None, :]
    angle = torch.atan2(rows.abs(), columns.abs())  # 0 on the horizontal axis, pi / 2 on the vertical one
    inside = {"x": angle <= HALF_ANGLE, "y": angle >= torch.pi / 2 - HALF_ANGLE}
    inside["diagonal"] = ~(inside["x"] | inside["y"])
    band = whole_plane(modes(height, width).band, width)
    return {
        f"B{b}": {name: _mean(plane[(band == b) & inside[name]]) for name in DIRECTIONS} for b in range(len(BAND_EDGES))
    }


def _mean(values: Tensor) -> float | None:
    return values.mean().item() if values.numel() else None
