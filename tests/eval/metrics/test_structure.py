"""Structure statistics tell detail from noise of the same spectrum."""

import numpy as np
import pytest
import torch

from dmd_dar.data.photos import read_photos
from dmd_dar.draws import Draws, sample_range
from dmd_dar.spectrum import band_energies
from eval.metrics import spoil
from eval.metrics.intervals import Sample
from eval.metrics.structure import (
    details,
    excess_kurtosis,
    flat_noise_db,
    flat_patch_energy,
    gradient_kurtosis,
    hf_kurtosis,
    kurtosis_ratio,
    parent_child_corr,
    parent_child_difference,
    structure_of,
    wavelet_statistics,
)

RNG = 0


def draws(images: torch.Tensor) -> Draws:
    return Draws(RNG, "spoil", 0, sample_range(0, len(images)))


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
    noise = spoil.phase_scrambled(images, draws(images))
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


def ways_to_spoil(images: torch.Tensor, place: int) -> dict[str, torch.Tensor]:
    draws = Draws(RNG, "spoil", 0, sample_range(place, place + 1))
    return {
        "real": images,
        "blur": spoil.blurred(images, 0.7),
        "shaped": spoil.with_shaped_noise(images, 0.7, draws),
        "scrambled": spoil.phase_scrambled(images, draws, above=0.25),
        "noisy": spoil.with_white_noise(images, 4, draws),
    }


@pytest.fixture(scope="module")
def spoiled_photographs():
    """Means over the whole photographs, before rounding, which is noise as well: {way to spoil: {statistic: mean}}."""
    found = []
    for place, photograph in enumerate(read_photos()):
        images = photograph.permute(2, 0, 1)[None].double() / 255
        rows = {}
        for name, one in ways_to_spoil(images, place).items():
            statistics = {key: values.sum(0) for key, values in vars(structure_of(one)).items()}
            rows[name] = statistics | {"energies": band_energies(one).sum(0).numpy()}
        found.append(rows)
    return {
        name: {key: np.mean([rows[name][key] for rows in found], axis=0) for key in found[0][name]} for name in found[0]
    }


def test_energy_cannot_tell_noise_from_detail(spoiled_photographs):
    hf = {name: one["energies"][3:].sum() for name, one in spoiled_photographs.items()}
    gain = {name: 10 * np.log10(energy / hf["real"]) for name, energy in hf.items()}
    assert gain["blur"] < -3 and 0 < gain["noisy"] < 1.5
    assert abs(gain["shaped"]) < 0.2 and abs(gain["scrambled"]) < 1.5


def test_structure_can(spoiled_photographs):
    kurtosis, gradient, agreement = (
        {name: one[key] for name, one in spoiled_photographs.items()}
        for key in ("kurtosis", "gradient_kurtosis", "parent_child")
    )
    assert kurtosis["real"] > kurtosis["blur"] > kurtosis["noisy"] > 1
    assert max(abs(kurtosis["shaped"]), abs(kurtosis["scrambled"])) < 0.2
    assert gradient["real"] > gradient["blur"] > gradient["noisy"] > 3 * gradient["scrambled"]
    assert gradient["scrambled"] > gradient["shaped"]
    assert agreement["blur"] > agreement["real"] > 2 * agreement["noisy"] > 0.1
    assert max(abs(agreement["shaped"]), abs(agreement["scrambled"])) < 0.05
    flat = {name: 10 * np.log10(np.divide(*one["flat"])) for name, one in spoiled_photographs.items()}
    assert flat["blur"] < flat["real"] < min(flat[name] for name in ("shaped", "scrambled", "noisy")) - 1


def test_wavelet_statistics_tell_level_orientation_and_tails():
    rows, columns = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    waves = {  # frequency in the middle of a level's band, down and across
        (0, "LH"): torch.cos(0.75 * np.pi * rows),
        (0, "HL"): torch.cos(0.75 * np.pi * columns),
        (0, "HH"): torch.cos(0.75 * np.pi * rows) * torch.cos(0.75 * np.pi * columns),
        (1, "LH"): torch.cos(0.375 * np.pi * rows),
        (2, "HL"): torch.cos(0.1875 * np.pi * columns),
    }
    for (level, band), wave in waves.items():
        energy, _ = wavelet_statistics((0.5 + 0.1 * wave).expand(1, 3, 64, 64))
        assert energy.shape == (1, 3, 3)
        assert np.unravel_index(energy[0].argmax(), (3, 3)) == (level, ("LH", "HL", "HH").index(band))
    generator = torch.Generator().manual_seed(RNG)
    noise = 0.1 * torch.randn(4, 1, 512, 512, generator=generator, dtype=torch.float64).expand(-1, 3, -1, -1)
    energy, kurtosis = wavelet_statistics(noise)
    assert np.allclose(energy[:, 0], np.log(0.01), atol=0.05) and np.abs(kurtosis[:, 0]).max() < 0.1
    louder, same = wavelet_statistics(3 * noise)
    assert np.allclose(louder - energy, 2 * np.log(3), atol=0.01) and np.allclose(same, kurtosis)


def test_gradient_kurtosis_of_a_difference_of_two_uniform_variates():
    images = torch.rand(2, 1, 600, 600, generator=torch.Generator().manual_seed(RNG)).expand(-1, 3, -1, -1)
    assert gradient_kurtosis(images) == pytest.approx(-0.6, abs=0.02)  # -1.2 / 2
    assert gradient_kurtosis(images.transpose(-1, -2)) == pytest.approx(gradient_kurtosis(images))


def test_parent_child_difference_is_signed():
    labels = np.zeros(50, dtype=int)
    reference, lower = Sample(np.linspace(0.2, 0.4, 50), labels), Sample(np.linspace(0.1, 0.3, 50), labels)
    difference = parent_child_difference(lower, reference, paired=True, rng=np.random.default_rng(RNG))
    assert (difference.value, difference.low, difference.high) == pytest.approx((-0.1, -0.1, -0.1))


def test_structure_of_a_stream_is_that_of_the_whole(crops):
    images = crops(32, 3, 0)[0]
    whole = structure_of(images)
    for stream in (images.split(5), [images[:4].float() / 255, images[4:]]):
        parts = structure_of(stream)
        for name, values in vars(whole).items():
            assert np.allclose(getattr(parts, name), values, rtol=1e-6), name
    assert np.allclose(whole.flat, flat_patch_energy(images.float() / 255))
