"""Textures: the spectra are the ones that are stated, and image i is a function of its draws alone."""

import math

import numpy as np
import pytest
import torch

from dmd_dar.data.images import to_pixels
from dmd_dar.data.textures import (
    AMPLITUDE,
    DEVIATION,
    EXPONENTS,
    FREQUENCIES,
    LEAF_RANGE,
    NAMES,
    Textures,
    covariance,
    data_hash,
    expected_psd,
)
from dmd_dar.draws import Draws, sample_range
from dmd_dar.spectrum import image_psd, radial_frequencies, slope

COUNT = 256
VARIANCES = {
    "leaves": LEAF_RANGE**2 / 12,
    **dict.fromkeys(EXPONENTS, DEVIATION**2),
    **dict.fromkeys(FREQUENCIES, AMPLITUDE**2 / 2),
}


def draws(start: int = 0, stop: int = COUNT, step: int = 0) -> Draws:
    return Draws(0, "pretrain", step, sample_range(start, stop))


def textures(name: str, size: int = 32, count: int = COUNT) -> torch.Tensor:
    return Textures(size).crops(torch.full((count,), NAMES.index(name)), draws(0, count))


@pytest.mark.parametrize("window", ["hann", None])
@pytest.mark.parametrize("name", NAMES)
def test_the_spectrum_is_the_stated_one(name, window):
    frequencies, power = image_psd(textures(name).double() / 255, window=window)
    expected_frequencies, expected = expected_psd(name, 32, window=window)
    assert torch.equal(frequencies, expected_frequencies)
    error = power.std(0) / COUNT**0.5
    strong = expected > 0.01 * expected.max() if name in FREQUENCIES else expected > 0  # the rest are side lobes
    assert ((power.mean(0) - expected).abs() < 4.5 * error + 1e-3 * expected)[strong].all()
    assert (error[strong] < 0.1 * expected[strong]).all()  # a factor of two would be seen


@pytest.mark.parametrize("name", NAMES)
def test_the_covariance_is_that_of_the_pixels(name):
    planes = Textures(32).planes(torch.full((COUNT,), NAMES.index(name)), draws()) - 0.5
    stated = covariance(name, 32)
    assert stated.shape == (63, 63) and stated[31, 31].item() == pytest.approx(VARIANCES[name], rel=1e-3)
    assert torch.allclose(stated, stated.flip(0, 1)) and torch.allclose(stated, stated.T)
    for dy, dx in ((0, 0), (1, 0), (0, 2), (3, 4), (0, 15)):
        product = (planes[:, dy:, dx:] * planes[:, : 32 - dy, : 32 - dx]).mean((1, 2))
        error = (product.std() / COUNT**0.5).item()
        assert product.mean().item() == pytest.approx(stated[31 + dy, 31 + dx].item(), abs=4.5 * error + 1e-6)


def test_power_laws_have_their_slopes_and_gratings_their_frequency():
    frequencies, counts = radial_frequencies(64, 64)
    for name, exponent in EXPONENTS.items():
        assert -slope(frequencies, expected_psd(name, 64)[1], counts).item() == pytest.approx(exponent, abs=0.06)
    for name, frequency in FREQUENCIES.items():
        power = expected_psd(name, 64)[1]
        assert frequencies[power.argmax()].item() == pytest.approx(frequency, abs=1 / 64)
        assert ((power * counts).sum() / 64**2).item() == pytest.approx(AMPLITUDE**2 / 2, rel=1e-3)


def test_leaves_hide_each_other_and_leave_no_gap():
    planes = Textures(48).planes(torch.zeros(20, dtype=torch.long), draws(0, 20))
    assert torch.isfinite(planes).all() and planes.min() >= 0.2 and planes.max() <= 0.8
    steps = planes.diff(dim=-1) == 0
    assert 0.5 < steps.double().mean() < 0.9  # flat inside a leaf, edges of any height between
    levels = [len(plane.unique()) for plane in planes]
    assert min(levels) > 20 and max(levels) < 400


def test_a_batch_is_a_function_of_its_draws_and_of_no_split():
    data = Textures(32)
    x0, labels = data.batch(draws(0, 48))
    assert x0.shape == (48, *data.shape) and x0.dtype == torch.float32 and -1 <= x0.min() < 0 < x0.max() <= 1
    assert torch.equal(to_pixels(x0), data.crops(labels, draws(0, 48)))
    assert torch.equal(x0[:, 0], x0[:, 1]) and torch.equal(x0[:, 0], x0[:, 2])
    assert sorted(labels.unique().tolist()) == list(range(data.num_classes)) and data.colour_labels == ()
    parts = [data.batch(draws(*ends)) for ends in ((0, 1), (1, 40), (40, 48))]
    assert torch.equal(torch.cat([part[0] for part in parts]), x0)
    assert torch.equal(torch.cat([part[1] for part in parts]), labels)
    assert not torch.equal(data.batch(draws(0, 48, step=1))[0], x0)
    same = data.crops(torch.zeros(8, dtype=torch.long), draws(0, 8)).flatten(1)
    assert len(same.unique(dim=0)) == 8


def test_what_is_refused_and_what_names_the_images():
    with pytest.raises(ValueError, match="at least 32, got 31"):
        Textures(31)
    with pytest.raises(ValueError, match="leaves, .* got 'bricks'"):
        covariance("bricks", 32)
    assert len(data_hash()) == 64 and data_hash() == data_hash()


def test_the_covariance_of_leaves_in_closed_form():
    """Two points of one leaf agree: C(h) / C(0) is the chance that no edge lies between them."""
    planes = Textures(32).planes(torch.zeros(400, dtype=torch.long), draws(0, 400))
    agree = (planes[:, :, 1:] == planes[:, :, :-1]).double().mean((1, 2))
    stated = (covariance("leaves", 32)[31, 32] / covariance("leaves", 32)[31, 31]).item()
    assert agree.mean().item() == pytest.approx(stated, abs=4 * agree.std().item() / 20)
    assert np.isclose(covariance("leaves", 40)[39, 39 + 33].item(), 0) and math.isclose(stated, 0.8, abs_tol=0.1)
