"""Gains with intervals, on spectra whose ratio is known."""

from dataclasses import astuple

import numpy as np
import pytest
import torch

from eval.metrics.intervals import Sample
from eval.metrics.spectrum import (
    BAND_NAMES,
    band_gain_db,
    band_gains,
    gain_curve,
    hf_gain_by_class,
    hfer,
    median_gains,
    spectrum_of,
)
from eval.samples.images import UnfitError


@pytest.fixture
def spectra():
    images = torch.rand(40, 3, 64, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = np.repeat([3, 7], 20)
    scale = torch.where(torch.from_numpy(labels) == 3, 0.5, 2.0)[:, None, None, None]
    return spectrum_of(images), spectrum_of(images * scale), labels


def test_pooled_gain_weighs_by_energy_and_the_median_by_pairs(spectra):
    reference, student, labels = spectra
    samples = Sample(student.energies, labels), Sample(reference.energies, labels)
    gains = band_gains(*samples, paired=True, rng=np.random.default_rng(0))
    halves = [reference.energies[labels == label, 5].sum() for label in (3, 7)]
    expected = 10 * np.log10((0.25 * halves[0] + 4 * halves[1]) / sum(halves))
    assert gains["HF"].value == pytest.approx(expected)
    assert gains["HF"].low < expected < gains["HF"].high
    assert median_gains(*samples)["HF"] == pytest.approx(0.0, abs=1e-9)  # half the pairs at -6.02, half at +6.02
    by_class = hf_gain_by_class(*samples)
    assert by_class == pytest.approx({3: 20 * np.log10(0.5), 7: 20 * np.log10(2.0)})


def test_gain_curve_is_student_over_reference():
    images = torch.rand(4, 3, 64, 64, dtype=torch.float64)
    curve, distance, signed = gain_curve(spectrum_of(0.5 * images), spectrum_of(images))
    assert torch.allclose(curve, torch.full_like(curve, 20 * np.log10(0.5)))
    assert (distance, signed) == pytest.approx((-20 * np.log10(0.5), 20 * np.log10(0.5)))


def test_an_empty_band_has_no_gain_and_a_flat_set_a_large_loss():
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    reference, flat = spectrum_of(images), spectrum_of(torch.full_like(images, 0.5))
    labels = np.zeros(4, dtype=int)
    gains = band_gains(
        Sample(flat.energies, labels), Sample(reference.energies, labels), paired=True, rng=np.random.default_rng(0)
    )
    assert not gains["B0"].defined
    assert gains["HF"].high < -50


@pytest.mark.parametrize("channel", ["y", "cb", 2])
def test_band_gain_of_a_scaled_set(channel):
    images = torch.rand(12, 3, 64, 96, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ours, theirs = (spectrum_of(x, channel=channel) for x in (0.7 * images, images))
    gains = band_gain_db(ours, theirs, paired=True)
    assert tuple(gains) == BAND_NAMES
    for gain in gains.values():
        assert astuple(gain) == pytest.approx((20 * np.log10(0.7),) * 3, abs=1e-5)


def test_band_gain_is_signed_and_its_interval_is_near_the_truth():
    generator = torch.Generator().manual_seed(0)
    noise, other = torch.randn(2, 400, 1, 64, 64, generator=generator, dtype=torch.float64).expand(-1, -1, 3, -1, -1)
    transform = torch.fft.rfft2(other)
    radius = torch.hypot(torch.fft.fftfreq(64)[:, None], torch.fft.rfftfreq(64)[None])
    spoiled = torch.fft.irfft2(transform * torch.where(radius < 0.18, 0.5, 2.0), s=(64, 64))  # inside B2
    gains = band_gain_db(spoiled, noise)
    for band, factor in (("B1", 0.5), ("B3", 2.0), ("B4", 2.0), ("HF", 2.0)):
        value, low, high = astuple(gains[band])
        assert low < value < high and high - low < 0.3, band
        assert abs(value - 20 * np.log10(factor)) < high - low, band  # about four standard errors


def test_a_stream_of_bytes_reads_as_the_whole():
    images = torch.randint(0, 256, (11, 3, 32, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    whole, stream = spectrum_of(images), spectrum_of(images.split(4))
    assert torch.allclose(stream.per_image, whole.per_image, rtol=1e-9, atol=0)
    assert np.allclose(stream.energies, whole.energies, rtol=1e-9, atol=0, equal_nan=True)
    pooled, each = hfer(images.float() / 255)
    assert whole.hfer == pytest.approx(pooled.item()) == pytest.approx(stream.hfer)
    assert whole.hfer_per_image == pytest.approx(each.numpy())
    gains = [band_gain_db(x, images.flip(0) // 2) for x in (images, iter(images.split(3)))]
    assert astuple(gains[0]["HF"]) == pytest.approx(astuple(gains[1]["HF"]), rel=1e-9)


def test_what_cannot_be_compared_is_named():
    images = torch.rand(4, 3, 64, 64)
    with pytest.raises(UnfitError, match="64x64 px, the reference 64x128 px"):
        band_gain_db(images, torch.rand(4, 3, 64, 128))
    with pytest.raises(UnfitError, match="32x64 px, the first 64x64 px"):
        band_gain_db([images, images[:, :, :32]], images)
    with pytest.raises(UnfitError, match="no|none"):
        spectrum_of([])
    images[2, 1, 0, 0] = float("inf")
    with pytest.raises(UnfitError, match="image 2: holds NaN or infinity"):
        spectrum_of([images[:1], images[1:]])
    with pytest.raises(ValueError, match="classes row by row"):
        band_gain_db(
            images[:2], images[:2], labels=torch.tensor([0, 1]), reference_labels=torch.tensor([1, 0]), paired=True
        )
