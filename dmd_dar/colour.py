"""Colour of images beside the spectrum of their luma: the one definition that training and evaluation share.

Legend: N images of H x W pixels, RGB in [0, 1]; Y, Cb and Cr are BT.601 as in spectrum.py. All in 8-bit levels, 1 / 255
of the range. Contrast and saturation are of means over blocks, so that noise and fine detail hardly enter them.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from dmd_dar.spectrum import BAND_NAMES, compared_powers, modes, to_channel

BLOCK = 8  # pixels
CONTRAST_FLOOR = 1.0  # levels, added to both sides of a ratio: flat images have one, too
SATURATION_FLOOR = 10.0  # levels, likewise: against images without colour, a level of it reads 1.1
SPECKLE_FLOOR = 1.0  # levels^2, likewise: noise that nobody sees is no speckle
LEVELS = 255.0


@dataclass(frozen=True)
class Colours:
    """What is said of each image by itself; all but `mean` are (N,), float64."""

    mean: Tensor  # (N, 3) of Y, Cb and Cr, levels
    contrast: Tensor  # standard deviation of Y over blocks, levels
    saturation: Tensor  # mean of |(Cb, Cr)| over blocks, levels


def colours(images: Tensor) -> Colours:
    """Of images (N, 3, H, W) in [0, 1] of at least one block a side; what a block does not fill is left out."""
    planes = torch.stack([to_channel(images, channel) for channel in ("y", "cb", "cr")], 1).double() * LEVELS
    blocks = avg_pool2d(planes, BLOCK).flatten(2)  # (N, 3, blocks)
    saturation = torch.hypot(blocks[:, 1], blocks[:, 2]).mean(1)
    return Colours(planes.mean((-2, -1)), blocks[:, 0].std(1, correction=0), saturation)


def speckle(energy: Tensor, height: int, width: int) -> Tensor:
    """Mean power of a mode of the band HF, levels^2, from the band's energies of Cb and Cr together (N,).

    White noise of s levels in each of the two reads 2 s^2.
    """
    grid = modes(height, width)
    count = grid.multiplicity[(grid.band == 3) | (grid.band == 4)].sum()
    return energy * LEVELS**2 / count


def speckle_of(images: Tensor) -> Tensor:
    """`speckle` of images (N, 3, H, W) in [0, 1] of at least spectrum.MIN_SIZE a side, (N,)."""
    hf = BAND_NAMES.index("HF")
    energy = sum(compared_powers(images, channel=channel).bands[:, hf] for channel in ("cb", "cr"))
    return speckle(torch.as_tensor(energy), *images.shape[-2:])


def contrast_ratio(contrast: Tensor, reference: Tensor) -> Tensor:
    """Of mean contrasts over images, each with CONTRAST_FLOOR; 1: as in the reference."""
    return (contrast + CONTRAST_FLOOR) / (reference + CONTRAST_FLOOR)


def saturation_ratio(saturation: Tensor, reference: Tensor) -> Tensor:
    """Of mean saturations over images, each with SATURATION_FLOOR; 1: as in the reference."""
    return (saturation + SATURATION_FLOOR) / (reference + SATURATION_FLOOR)


def speckle_db(power: Tensor, reference: Tensor, saturation: Tensor) -> Tensor:
    """Mean speckle against the reference's in dB, each with SPECKLE_FLOOR.

    What the `saturation` ratio explains is taken off: stronger colours have stronger detail of colour.
    """
    own = power / saturation.clamp(min=1).square()
    return 10 * torch.log10((own + SPECKLE_FLOOR) / (reference + SPECKLE_FLOOR))
