"""Structure statistics tell detail from noise of the same spectrum."""

import numpy as np
import pytest
import torch

from eval.stats import Sample
from eval.structure import (
    details,
    excess_kurtosis,
    flat_noise_db,
    flat_patch_energy,
    hf_kurtosis,
    kurtosis_ratio,
    parent_child_corr,
)

RNG = 0


def randomised(images: torch.Tensor) -> torch.Tensor:
    """The same amplitudes with the phases of white noise."""
    shape = images.shape[-2:]
    noise = torch.randn(len(images), 1, *shape, generator=torch.Generator().manual_seed(RNG), dtype=images.dtype)
    phase = torch.fft.rfft2(noise)
    return torch.fft.irfft2(torch.fft.rfft2(images).abs() * phase / phase.abs(), s=shape)


def test_kurtosis_of_known_distributions():
    rng = np.random.default_rng(RNG)
    assert excess_kurtosis(rng.standard_normal((1, 1000, 1000))) == pytest.approx(0.0, abs=0.02)
    assert excess_kurtosis(rng.uniform(size=(1, 1000, 1000))) == pytest.approx(-1.2, abs=0.02)
    assert excess_kurtosis(rng.laplace(size=(1, 1000, 1000))) == pytest.approx(3.0, abs=0.2)
    assert excess_kurtosis(np.full((1, 8, 8), 0.3)).tolist() == [0.0]


def test_bands_are_orthonormal_inside_and_the_finest_comes_first():
    levels = details(np.random.default_rng(RNG).standard_normal((32, 128, 128)), 3)
    assert [level[0].shape[-1] for level in levels] == [65, 34, 18]
    for level in levels:
        for band in level:
            assert band[:, 3:-3, 3:-3].var() == pytest.approx(1.0, rel=0.08)


def test_phases_carry_the_structure(crops):
    images = crops(128, 12, 0)[0].double() / 255
    noise = randomised(images)
    assert np.median(hf_kurtosis(images)) > 4
    assert abs(np.median(hf_kurtosis(noise))) < 0.2
    assert np.median(parent_child_corr(images)) > 0.25
    assert abs(np.median(parent_child_corr(noise))) < 0.05


def test_parent_child_corr_is_blind_to_contrast(crops):
    images = crops(64, 4, 0)[0].double() / 255
    turned = parent_child_corr(images.transpose(-1, -2))
    assert np.allclose(turned, parent_child_corr(images))


def test_kurtosis_ratio_has_its_numerator_first():
    labels = np.zeros(50, dtype=int)
    reference = Sample(np.linspace(3.0, 5.0, 50), labels)
    half = Sample(np.linspace(1.5, 2.5, 50), labels)
    ratio = kurtosis_ratio(half, reference, paired=True, rng=np.random.default_rng(RNG))
    assert ratio.value == pytest.approx(0.5)
    assert ratio.low == pytest.approx(0.5) and ratio.high == pytest.approx(0.5)
    gaussian = Sample(np.zeros(50), labels)
    assert not kurtosis_ratio(half, gaussian, paired=True, rng=np.random.default_rng(RNG)).defined


def test_flat_noise_of_a_known_variance():
    """Flat patches with noise of 2 LSB against 1 LSB: the ratio of the variances, rounding noise on both."""
    ramp = torch.linspace(0.3, 0.7, 64, dtype=torch.float64).expand(200, 3, 64, 64)
    labels = np.zeros(200, dtype=int)
    samples = []
    for level in (2, 1):
        noise = torch.randn(200, 1, 64, 64, generator=torch.Generator().manual_seed(level), dtype=torch.float64)
        samples.append(Sample(flat_patch_energy(ramp + level / 255 * noise), labels))
    gain = flat_noise_db(*samples, paired=False, rng=np.random.default_rng(RNG))
    assert gain.value == pytest.approx(10 * np.log10((4 + 1 / 12) / (1 + 1 / 12)), abs=0.1)


def test_flat_noise_looks_at_flat_patches_only(crops):
    images, labels = crops(64, 12, 0)
    clean = images.double() / 255
    energy = flat_patch_energy(clean)
    patches = len(clean) * 8 * 8
    assert energy[:, 1].sum() == pytest.approx(0.1 * patches, rel=0.02)
    noisy = clean + 4 / 255 * torch.randn(clean.shape[0], 1, 64, 64, generator=torch.Generator().manual_seed(RNG))
    samples = [Sample(flat_patch_energy(x), labels.numpy()) for x in (noisy, clean)]
    assert flat_noise_db(*samples, paired=True, rng=np.random.default_rng(RNG)).low > 3
