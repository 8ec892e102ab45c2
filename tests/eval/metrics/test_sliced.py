"""Sliced Wasserstein distances whose value is known, and the lost contrast that self-normalised ones cannot see."""

import pytest
import torch

from eval.metrics import spoil
from eval.metrics.sliced import (
    PATCHES,
    Slices,
    level_distances,
    pyramid,
    sliced_patches,
    sliced_wasserstein,
    wasserstein,
)
from eval.samples.images import UnfitError


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def photographs(crops):
    return [Slices(sliced_patches(crops(64, 24, seed)[0])) for seed in (0, 1)]


def test_wasserstein_of_a_shift_and_of_a_scale():
    values = noise(4000, 3)
    assert wasserstein(values + 0.3, values) == pytest.approx(0.3, rel=1e-5)
    assert wasserstein(0.5 * values, values) == pytest.approx(0.5 * values.abs().mean().item(), rel=1e-5)
    assert wasserstein(values.flip(0), values) == 0
    fewer = wasserstein(noise(1500, 3, seed=1), 3 * noise(4000, 3, seed=2))
    assert fewer == pytest.approx(2 * (2 / torch.pi) ** 0.5, rel=0.05)  # (3 - 1) E|x|


def test_the_pyramid_keeps_everything_and_splits_by_frequency():
    planes = noise(3, 64, 96).double()
    levels = pyramid(planes)
    assert [tuple(level.shape[1:]) for level in levels] == [(64, 96), (32, 48), (16, 24)]
    flat = pyramid(torch.full((1, 64, 64), 0.4))
    assert all(level.abs().max() < 1e-6 for level in flat[:-1]) and (flat[-1] - 0.4).abs().max() < 1e-6
    axis = torch.arange(64, dtype=torch.float64)
    for waves, finest in ((26, 0), (8, 1), (1, 2)):
        energy = [
            level.square().mean().item() for level in pyramid(torch.cos(axis * waves * torch.pi / 32).expand(1, 64, 64))
        ]
        assert energy.index(max(energy)) == finest


def test_a_halved_level_is_as_far_as_it_looks(photographs):
    reference = photographs[0]
    for level in range(3):
        mean = reference.patches[level].mean()

        def changed(factor, level=level, mean=mean):
            return Slices([x if i != level else mean + factor * (x - mean) for i, x in enumerate(reference.patches)])

        found = sliced_wasserstein(changed(0.5), reference)
        assert found[level].value > 3 * found[level].null
        assert [one.value for i, one in enumerate(found) if i != level] == [0, 0]
        assert level_distances(changed(2), reference)[level] == pytest.approx(2 * found[level].value, rel=1e-3)


def test_a_set_of_the_same_source_reads_its_null(photographs):
    other, reference = photographs
    found = sliced_wasserstein(other, reference)
    assert [one.value for one in found] == level_distances(other, reference)
    for one in found:
        assert 0.4 < one.value / one.null < 1.6
    second = sliced_wasserstein(other, reference, second=other)
    assert [one.null for one in second] == pytest.approx([one.value for one in second])
    assert [one.value for one in sliced_wasserstein(reference, reference)] == [0, 0, 0]
    fewer = sliced_wasserstein(Slices([x[:40] for x in other.patches]), reference)
    assert all(
        a.null == pytest.approx(b.null * (0.5 + 168 / 80) ** 0.5, rel=1e-6) for a, b in zip(fewer, found, strict=True)
    )


def test_blur_and_noise_are_seen_at_the_level_where_they_are(crops):
    images = crops(64, 24, 0)[0]
    reference = Slices(sliced_patches(images))
    spoiled = Slices(sliced_patches(spoil.eight_bit(spoil.blurred(images.float() / 255, 0.7))))
    found = sliced_wasserstein(spoiled, reference)
    assert found[0].value > 3 * found[0].null and found[2].value < found[2].null


def test_patches_depend_on_the_image_and_its_place_alone():
    images = torch.randint(0, 256, (9, 3, 32, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    whole = sliced_patches(images, seed=3)
    assert [tuple(level.shape) for level in whole] == [(9, PATCHES, 49), (9, PATCHES, 49)]
    for stream in (images.split(4), [images[:1], images[1:].float() / 255]):
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(sliced_patches(stream, seed=3), whole, strict=True))
    assert not torch.equal(sliced_patches(images, seed=4)[0], whole[0])


def test_other_directions_do_not_compare(photographs):
    with pytest.raises(ValueError, match="seeds 1 and 0"):
        level_distances(Slices(photographs[0].patches, seed=1), photographs[0])


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(UnfitError, match="at least 32 px .* 31x64"):
        sliced_patches(torch.rand(1, 3, 31, 64))
    small, large = (Slices(sliced_patches(torch.rand(4, 3, size, size))) for size in (32, 64))
    with pytest.raises(UnfitError, match="2 and of 3 levels"):
        level_distances(small, large)
