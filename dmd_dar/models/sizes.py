"""Sizes of images, in pixels, as shapes of what a network computes on."""

from dataclasses import dataclass
from typing import Protocol

from dmd_dar.errors import UserError

Pixels = tuple[int, int]  # height, width


@dataclass(frozen=True)
class Limits:
    """What sizes a network takes, in its own cells: pixels, or cells of latents."""

    cells: int  # on a side of a token: height and width are multiples of it
    square: bool = False  # whether it knows square images alone
    most: int = 0  # cells on a side at most, as far as it has positions; 0: any number


class Sized(Protocol):
    """A network that says its sizes."""

    @property
    def shape(self) -> tuple[int, int, int]: ...
    @property
    def limits(self) -> Limits: ...


def shape_at(network: Sized, factor: int, height: int = 0, width: int = 0) -> tuple[int, int, int]:
    """(C, H, W) of what the network computes on, for an image of height x width pixels; 0: the network's own.

    factor: pixels for each of its cells along one side, 1 where it makes pixels. Raises UserError for a size that VAE
    or network cannot make, naming the nearest that they can.
    """
    channels, *own = network.shape
    wanted = {"height": height or own[0] * factor, "width": width or own[1] * factor}
    limits = network.limits
    step, most = limits.cells * factor, limits.most * factor
    for name, pixels in wanted.items():
        if pixels % step or (most and pixels > most):
            raise UserError(f"{name} = {pixels}: {_why(limits, factor)}; the nearest {_nearest(pixels, step, most)}")
    rows, columns = (pixels // factor for pixels in wanted.values())
    if limits.square and rows != columns:
        raise UserError(
            f"height x width = {wanted['height']} x {wanted['width']}: the network knows square images alone; the"
            f" nearest are {wanted['height']} x {wanted['height']} and {wanted['width']} x {wanted['width']}"
        )
    return channels, rows, columns


def _why(limits: Limits, factor: int) -> str:
    parts = [f"the network reads {limits.cells} x {limits.cells} cells a token"] * (limits.cells > 1)
    parts += [f"a cell is {factor} x {factor} pixels"] * (factor > 1)
    bound = f", and at most {limits.most * factor}" if limits.most else ""
    return f"{' and '.join(parts)}{', so ' if parts else ''}it must be a multiple of {limits.cells * factor}{bound}"


def _nearest(pixels: int, step: int, most: int) -> str:
    below, above = max(step, pixels // step * step), (pixels // step + 1) * step
    fitting = sorted({min(size, most // step * step) if most else size for size in (below, above)})
    return f"{'is' if len(fitting) == 1 else 'are'} {' and '.join(map(str, fitting))}"


def pixels_of(shape: tuple[int, ...], factor: int) -> Pixels:
    """The inverse of `shape_at`."""
    return shape[-2] * factor, shape[-1] * factor
