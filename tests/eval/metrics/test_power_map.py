"""Maps of known truth, and a pixel grid that is found where it is and nowhere else."""

import math

import numpy as np
import pytest
import torch

from dmd_dar.data.photos import Photos
from dmd_dar.draws import Draws, sample_range
from eval.metrics import spoil
from eval.metrics.intervals import Sample
from eval.metrics.power_map import AXES, PERIODS, grid_lines, grid_peaks, line_heights, map_sum, mean_log_map
from eval.samples.images import UnfitError

SIZE = 128


@pytest.fixture(scope="module")
def photographs(crops):
    """100 crops, uint8, of all photographs."""
    return crops(SIZE, 15, 0)[0][torch.randperm(105, generator=torch.Generator().manual_seed(0))[:100]]


def sample(images: torch.Tensor) -> Sample:
    return Sample(grid_lines(images), np.zeros(len(images), dtype=int))


def words(images: torch.Tensor, reference: torch.Tensor | None = None) -> dict[tuple[str, int], str]:
    """What is said of each line, where it is not "none"."""
    other = None if reference is None else sample(reference)
    lines = grid_peaks(sample(images), other, paired=reference is not None, rng=np.random.default_rng(0))
    assert [(line.axis, line.period) for line in lines] == [(axis, period) for axis in AXES for period in PERIODS]
    return {(line.axis, line.period): line.word for line in lines if line.word != "none"}


def lattice(images: torch.Tensor, period: int) -> torch.Tensor:
    """Half of the columns of each period raised, half lowered, by 2 levels of 255."""
    sign = torch.where(torch.arange(images.shape[-1]) % period < period / 2, 1, -1)
    return (images.int() + 2 * sign).clamp(0, 255).to(torch.uint8)


def test_clean_photographs_have_no_grid(photographs):
    assert words(photographs) == {}


@pytest.mark.parametrize("period", [2, 4, 8, 16])
def test_a_lattice_of_columns_is_a_peak_at_its_line(photographs, period):
    spoiled = lattice(photographs, period)
    assert words(spoiled) == {("x", period): "peak"}
    assert words(spoiled.transpose(-1, -2), photographs.transpose(-1, -2)) == {("y", period): "peak"}


@pytest.mark.parametrize("period", [2, 4, 8, 16])
def test_a_lattice_of_a_single_level_each_way_is_seen(photographs, period):
    raised = (torch.arange(SIZE) % period < period / 2).int()
    faint = (photographs.int() + 2 * raised).clamp(0, 255).to(torch.uint8)
    assert words(faint) == {("x", period): "peak"}


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_other_draws_of_clean_photographs_have_no_grid_either(seed):
    assert words(Photos(SIZE).crops(torch.arange(100) % 7, Draws(seed, "clean", 0, sample_range(0, 100)))) == {}


def test_nearest_enlargement_is_a_notch(photographs):
    small = torch.nn.functional.avg_pool2d(photographs.float() / 255, 2)
    nearest = spoil.eight_bit(small.repeat_interleave(2, -1).repeat_interleave(2, -2))
    for reference in (None, photographs):
        found = words(nearest, reference)
        assert found[("x", 2)] == found[("y", 2)] == "notch" and "peak" not in found.values()
    assert line_heights(grid_lines(nearest))[:, 0].max() < -10


def test_white_noise_has_no_line_and_short_sides_have_none_to_measure():
    noise = torch.randn(2000, 1, 64, 32, generator=torch.Generator().manual_seed(0)).expand(-1, 3, -1, -1)
    heights = line_heights(grid_lines(noise))
    assert np.isfinite(heights).tolist() == [
        [True, True, False, False],
        [True, True, True, False],
    ]  # 8 periods at least
    spread = 5.57 / 2000**0.5  # standard error of the mean of 10 log10 of an exponential variate
    assert np.nanmax(np.abs(heights[:, 1:])) < 4 * spread
    assert heights[:, 0] == pytest.approx(-10 * math.log10(2), abs=8 * spread)
    assert words(noise) == {}
    assert not np.isfinite(line_heights(grid_lines(noise[:4, :, :, :31]))[0]).any()


def test_a_wave_stands_at_its_frequency_and_at_its_mirror_image():
    rows, columns = torch.arange(48, dtype=torch.float64)[:, None], torch.arange(64, dtype=torch.float64)
    wave = torch.cos(2 * math.pi * (6 * rows / 48 - 10 * columns / 64))
    power = mean_log_map((0.5 + 0.1 * wave).expand(1, 3, 48, 64))
    assert power.shape == (48, 64)
    places = {tuple(place) for place in (power > power.max() - 0.1).nonzero().tolist()}
    assert places == {(24 + 6, 32 - 10), (24 - 6, 32 + 10)}


@pytest.mark.parametrize("shape", [(32, 40), (33, 35)])
def test_a_map_is_that_of_the_whole_transform(shape):
    images = torch.rand(5, 3, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    plane = images[:, 0]
    plane = plane - plane.mean((-2, -1), keepdim=True)
    power = torch.fft.fft2(plane).abs().square() / plane[0].numel()
    expected = torch.fft.fftshift(10 * torch.log10(power + (1 / 255) ** 2 / 12).mean(0))
    assert torch.allclose(mean_log_map(images, window=None, channel=0), expected, rtol=0, atol=1e-9)


def test_the_difference_of_two_maps_is_the_local_gain():
    images = torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gain = (mean_log_map(0.5 * images) - mean_log_map(images)).flatten()
    assert gain.median().item() == pytest.approx(20 * math.log10(0.5), abs=0.01)


def test_maps_add_up_for_any_split_and_order():
    images = torch.randint(0, 256, (13, 3, 32, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    whole = mean_log_map(images)
    for cuts in ([1, 12], [6, 2, 5]):
        assert torch.allclose(mean_log_map(reversed(images.split(cuts))), whole, rtol=1e-9, atol=0)
    with pytest.raises(UnfitError, match="32x40 and of 32x41"):
        map_sum(images) + map_sum(torch.zeros(1, 3, 32, 41, dtype=torch.uint8))
