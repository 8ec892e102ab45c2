"""Gains with intervals, on spectra whose ratio is known."""

import numpy as np
import pytest
import torch

from eval.spectrum import band_gains, gain_curve, hf_gain_by_class, median_gains, spectrum_of
from eval.stats import Sample


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
