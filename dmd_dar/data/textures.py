"""`textures`: procedural grey images whose covariance, and so whose power spectrum, is known in closed form.

    dead leaves    discs of radius r ~ r^-3 in [2, 16] px hide each other, each of one grey level of variance s^2:
                   C(h) = s^2 g(h) / (2 g(0) - g(h)), g(h) = E |X and X + h| of a random disc X (Matheron;
                   Bordenave, Gousseau, Roueff 2006)
    fields         Gaussian, P(f) ~ 1 / f^a on a torus of 4 times the side, cropped
    gratings       a cosine of amplitude A at frequency f, any direction and phase: C(h) = A^2 / 2 J_0(2 pi f |h|)

Image i of a batch is a function of its `Draws` alone. Legend: B images of side S, L leaves, h = (dy, dx) in pixels.
"""

import hashlib
import math

import torch
from torch import Tensor

from dmd_dar import spectrum
from dmd_dar.data.images import to_model_range
from dmd_dar.draws import Draws

EXPONENTS = {"field_1": 1.0, "field_2": 2.0, "field_3": 3.0}
FREQUENCIES = {"grating_coarse": 3 / 32, "grating_fine": 5 / 16}  # cycles per pixel
NAMES = ("leaves", *EXPONENTS, *FREQUENCIES)
LEAST_RADIUS, MOST_RADIUS = 2.0, 16.0
LEAF_RANGE = 0.6  # grey levels are uniform over 0.5 +- half of it
DEVIATION = 0.1  # of a field; the 8-bit range ends at 5 deviations
AMPLITUDE = 0.25  # of a grating
TORUS = 4  # side of a field's torus over that of the crop
LEAVES_PER_ROUND, PIXELS_AT_ONCE = 64, 1 << 12
RADIUS_STEPS = 20_000  # of the integral over radii


def data_hash() -> str:
    """SHA-256 over everything that determines the images but the draws."""
    laws = (NAMES, EXPONENTS, FREQUENCIES, LEAST_RADIUS, MOST_RADIUS, LEAF_RANGE, DEVIATION, AMPLITUDE, TORUS)
    return hashlib.sha256(repr(laws).encode()).hexdigest()


class Textures:
    """Squares of side `size`, on `device`; the class is the kind of texture, see NAMES. Every image is a fresh one."""

    num_classes = len(NAMES)
    label_names = NAMES
    colour_labels: tuple[int, ...] = ()

    def __init__(self, size: int, device: torch.device | str = "cpu"):
        if size < spectrum.MIN_SIZE:
            raise ValueError(f"size must be at least {spectrum.MIN_SIZE}, got {size}")
        self.size, self.shape, self.device = size, (3, size, size), torch.device(device)
        self.hash = data_hash()

    def planes(self, labels: Tensor, draws: Draws) -> Tensor:
        """Grey levels before quantisation: labels (B,) -> float64 (B, S, S), mean 0.5."""
        planes = torch.empty(len(labels), self.size, self.size, dtype=torch.float64, device=self.device)
        for label, name in enumerate(NAMES):
            rows = (labels == label).nonzero().flatten()
            if len(rows):
                some = Draws(draws.seed, draws.phase, draws.step, draws.samples[rows])
                planes[rows] = _draw(name, self.size, some)
        return planes

    def crops(self, labels: Tensor, draws: Draws) -> Tensor:
        """One random texture of each label: labels (B,) -> uint8 (B, 3, S, S), three equal channels."""
        grey = (self.planes(labels, draws).clamp(0, 1) * 255).round().to(torch.uint8)
        return grey[:, None].expand(-1, 3, -1, -1).contiguous()

    def batch(self, draws: Draws) -> tuple[Tensor, Tensor]:
        """x0 (B, 3, S, S) float32 in [-1, 1] and labels (B,), classes uniform."""
        labels = draws.integers("label", self.num_classes)
        return to_model_range(self.crops(labels, draws)), labels


def _draw(name: str, size: int, draws: Draws) -> Tensor:
    if name in EXPONENTS:
        return 0.5 + _field(EXPONENTS[name], size, draws)
    if name in FREQUENCIES:
        return 0.5 + _grating(FREQUENCIES[name], size, draws)
    return _leaves(size, draws)


def _field(exponent: float, size: int, draws: Draws) -> Tensor:
    """White noise on the torus, shaped; (B, S, S)."""
    side = TORUS * size
    white = draws.normal("field", side, side, dtype=torch.float64)
    amplitude = _field_power(exponent, side, white.device).sqrt()
    return torch.fft.irfft2(torch.fft.rfft2(white) * amplitude, s=(side, side))[:, :size, :size]


def _field_power(exponent: float, side: int, device: torch.device | str = "cpu") -> Tensor:
    """P of the modes of the torus, (side, side // 2 + 1) float64, for the variance DEVIATION^2; 0 at f = 0."""
    grid = spectrum.modes(side, side, device)
    power = torch.where(grid.radius > 0, grid.radius, torch.inf) ** -exponent
    return power * (DEVIATION**2 * side**2 / (power * grid.multiplicity).sum())


def _grating(frequency: float, size: int, draws: Draws) -> Tensor:
    angle, phase = (2 * math.pi * draws.uniform(name, 1, 1) for name in ("angle", "phase"))
    axis = torch.arange(size, dtype=torch.float64, device=phase.device)
    across = axis * angle.cos() + axis[:, None] * angle.sin()
    return AMPLITUDE * torch.cos(2 * math.pi * frequency * across + phase)


def _leaves(size: int, draws: Draws) -> Tensor:
    """Leaves laid from the front until every pixel is covered, which samples the process exactly; (B, S, S)."""
    device, step = draws.samples.device, 0
    planes = torch.full((len(draws.samples), size * size), torch.nan, dtype=torch.float64, device=device)
    while (uncovered := planes.isnan().nonzero()).numel():  # (M, 2)
        y, x, radius, grey = draws.uniform(f"leaves {step}", 4, LEAVES_PER_ROUND).unbind(1)  # (B, L) each
        y, x = ((size - 1 + 2 * MOST_RADIUS) * centre - MOST_RADIUS for centre in (y, x))
        y, x, reach = y.float(), x.float(), _radius(radius).square().float()
        for row, pixel in (part.unbind(1) for part in uncovered.split(PIXELS_AT_ONCE)):
            across = (y[row] - (pixel // size)[:, None]).square() + (x[row] - (pixel % size)[:, None]).square()
            inside = across < reach[row]  # (m, L)
            shade = 0.5 + LEAF_RANGE * (grey[row, inside.to(torch.uint8).argmax(1)] - 0.5)  # of the leaf in front
            planes[row, pixel] = torch.where(inside.any(1), shade, torch.nan)
        step += 1
    return planes.reshape(-1, size, size)


def _radius(u: Tensor) -> Tensor:
    """Quantiles of the density ~ r^-3 on [LEAST_RADIUS, MOST_RADIUS]."""
    return (LEAST_RADIUS**-2 + u * (MOST_RADIUS**-2 - LEAST_RADIUS**-2)) ** -0.5


def _leaf_covariance(distance: Tensor) -> Tensor:
    """C at distances in pixels, any shape."""
    radius = _radius((torch.arange(RADIUS_STEPS, dtype=torch.float64) + 0.5) / RADIUS_STEPS)
    some, place = distance.unique(return_inverse=True)
    halves = [(h / (2 * radius)).clamp(max=1) for h in some]  # the area common to a disc and its shift by h
    shared = [(2 * radius**2 * (half.arccos() - half * (1 - half**2).sqrt())).mean() for half in halves]
    shared = torch.stack(shared)[place]
    whole = math.pi * (radius**2).mean()
    return LEAF_RANGE**2 / 12 * shared / (2 * whole - shared)


def covariance(name: str, size: int) -> Tensor:
    """C(dy, dx) of the texture `name` before quantisation for |dy|, |dx| < size: (2 size - 1, 2 size - 1) float64."""
    if name in EXPONENTS:
        side = TORUS * size
        torus = torch.fft.irfft2(_field_power(EXPONENTS[name], side).to(torch.complex128), s=(side, side))
        shift = torch.arange(1 - size, size) % side
        return torus[shift][:, shift]
    shift = torch.arange(1 - size, size, dtype=torch.float64)
    distance = torch.hypot(shift[:, None], shift[None, :])
    if name in FREQUENCIES:
        return AMPLITUDE**2 / 2 * torch.special.bessel_j0(2 * math.pi * FREQUENCIES[name] * distance)
    if name == "leaves":
        return _leaf_covariance(distance)
    raise ValueError(f"texture must be one of {', '.join(NAMES)}, got {name!r}")


def expected_psd(name: str, size: int, *, window: spectrum.Window = "hann") -> tuple[Tensor, Tensor]:
    """What `spectrum.radial_psd` of 8-bit squares of the texture `name` reads on average: frequencies (F,), power (F,).

    E P(k) = sum_h C(h) a(h) cos(2 pi k h / S) / sum(w^2), with a the autocorrelation of the window, and 8-bit rounding
    as white noise. Exact from the second bin on: the removed mean reaches the first.
    """
    window_values = spectrum.window_2d(size, size, window, torch.empty(0, dtype=torch.float64))
    padded = torch.fft.rfft2(window_values, s=(2 * size, 2 * size)).abs().square()
    overlap = torch.fft.irfft2(padded, s=(2 * size, 2 * size))
    shift = torch.arange(1 - size, size) % (2 * size)
    weighted = covariance(name, size) * overlap[shift][:, shift]  # (2 S - 1, 2 S - 1)
    folded = torch.zeros(size, size, dtype=torch.float64)
    place = torch.arange(1 - size, size) % size
    folded.index_put_((place[:, None], place[None, :]), weighted, accumulate=True)
    power = torch.fft.rfft2(folded).real / window_values.square().sum() + spectrum.QUANTISATION_POWER
    grid = spectrum.modes(size, size)
    frequencies, counts = spectrum.radial_frequencies(size, size, window=window)
    sums = torch.zeros(grid.size // 2 + 2, dtype=torch.float64)
    sums.index_add_(0, grid.radial_bin.flatten(), (power * grid.multiplicity).flatten())
    return frequencies, sums[-1 - len(counts) : -1] / counts
