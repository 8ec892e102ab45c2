"""Frechet distance: closed form, three routes, and what the wavelet features see."""

import numpy as np
import pytest
import scipy.linalg
import torch

from eval.metrics import frechet
from eval.metrics.diversity import class_diversity, diversity_ratio
from eval.metrics.frechet import (
    centred_root,
    feature_distance,
    frechet_distance,
    null_distance,
    statistics,
    symmetric_root,
    trace_term_eigh,
    trace_term_nuclear,
)
from eval.metrics.moments import Gaussian
from eval.metrics.wavelet import fd_null, fd_wavelet, wavelet_features
from eval.samples.images import UnfitError


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("rotated", [False, True])
def test_closed_form(rotated):
    """Commuting covariances: |mu_1 - mu_2|^2 + sum (sigma_1 - sigma_2)^2."""
    mean, other_mean = draw(2, 12)
    sigma, other_sigma = draw(2, 12, seed=1).abs() + 0.1
    turn = torch.linalg.qr(draw(12, 12, seed=2))[0] if rotated else torch.eye(12, dtype=torch.float64)
    first, second = (turn @ torch.diag(s**2) @ turn.T for s in (sigma, other_sigma))
    expected = (mean - other_mean).square().sum() + (sigma - other_sigma).square().sum()
    assert frechet_distance(mean, first, other_mean, second) == pytest.approx(expected.item(), abs=1e-10)


@pytest.mark.parametrize("size", [64, 256])
def test_three_routes_agree(size):
    a, b = draw(2 * size, size), draw(3 * size, size, seed=1) @ draw(size, size, seed=2) * 0.2
    (_, first), (_, second) = statistics(a), statistics(b)
    root = scipy.linalg.sqrtm(first.numpy() @ second.numpy())
    expected = np.trace(root.real)
    assert trace_term_eigh(first, second) == pytest.approx(expected, rel=1e-6)
    assert trace_term_nuclear(centred_root(a), centred_root(b)) == pytest.approx(expected, rel=1e-6)
    assert trace_term_nuclear(centred_root(a), symmetric_root(second)) == pytest.approx(expected, rel=1e-6)


def test_routes_agree_where_the_covariances_are_rank_deficient():
    """12 and 30 images of 40 features: the distance is a number, and the same one by each route."""
    a, b = draw(12, 40), draw(30, 40, seed=1) + 0.5
    by_eigh = frechet_distance(*statistics(a), *statistics(b))
    assert feature_distance(a, b) == pytest.approx(by_eigh, abs=1e-3)
    assert feature_distance(a, Gaussian(*statistics(b))) == pytest.approx(by_eigh, abs=1e-3)
    assert feature_distance(a, Gaussian(*statistics(a))) == pytest.approx(0.0, abs=1e-3)
    assert by_eigh > 40 * 0.25
    (mean, first), (other, second) = statistics(a), statistics(b)
    root = scipy.linalg.sqrtm(first.numpy() @ second.numpy()).real
    by_root = (mean - other).square().sum() + first.trace() + second.trace() - 2 * np.trace(root)
    assert by_eigh == pytest.approx(by_root.item(), abs=1e-3)


def test_a_gaussian_reference_is_as_good_as_its_features():
    a, b = draw(100, 8), 1.5 * draw(300, 8, seed=1)
    assert feature_distance(a, Gaussian(*statistics(b))) == pytest.approx(feature_distance(a, b), rel=1e-12)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda m, s: (m, s[:3]), r"\(3, 4\).*expected"),
        (lambda m, s: (m[:3], s), r"\(3,\), \(4, 4\)"),
        (lambda m, s: (m * torch.nan, s), "not finite"),
    ],
)
def test_statistics_that_do_not_fit_are_named(spoil, said):
    mean, covariance = torch.zeros(4), torch.eye(4)
    with pytest.raises(UnfitError, match=said):
        frechet_distance(mean, covariance, *spoil(mean, covariance))


def test_sets_of_one_image_or_of_other_features_are_named():
    with pytest.raises(UnfitError, match=r"student: expected features \(N >= 2, D\), got \(1, 4\)"):
        feature_distance(draw(1, 4), draw(9, 4), ("student", "teacher"))
    with pytest.raises(UnfitError, match="student: 4 features, but 5 in teacher"):
        feature_distance(draw(9, 4), draw(9, 5), ("student", "teacher"))


@pytest.mark.parametrize("count", [200, 12])
def test_a_set_is_at_no_distance_from_itself_and_a_shift_at_its_square(count):
    features = draw(count, 20)
    assert feature_distance(features, features.flip(0)) == pytest.approx(0.0, abs=1e-3)
    assert feature_distance(features + 2.0, features) == pytest.approx(80.0, abs=1e-3)


def test_statistics_are_those_of_numpy():
    features = draw(50, 6)
    mean, covariance = statistics(features)
    assert np.allclose(mean, features.mean(0)) and np.allclose(covariance, np.cov(features.numpy().T))


def test_a_feature_that_is_not_finite_names_its_set():
    broken = draw(10, 4)
    broken[3, 2] = torch.nan
    with pytest.raises(ValueError, match="student: 1 of 40"):
        feature_distance(draw(10, 4), broken, ("teacher", "student"))


def test_features_do_not_depend_on_the_split(crops):
    images = crops(32, 6, 0)[0].float() / 255
    whole = wavelet_features(images)
    split = torch.cat([wavelet_features(part) for part in images.split([1, 10, len(images) - 11])])
    assert whole.shape == (len(images), 20)
    assert torch.allclose(whole, split, rtol=0, atol=1e-9)
    assert torch.isfinite(wavelet_features(torch.zeros(2, 3, 32, 32))).all()


def test_energies_are_logarithmic_and_luma_moments_come_last(crops):
    images = crops(64, 3, 0)[0].double() / 255
    brighter, doubled = wavelet_features(images + 0.1), wavelet_features(2 * images)
    whole = wavelet_features(images)
    assert torch.allclose(brighter[:, 18] - whole[:, 18], torch.tensor(0.1, dtype=torch.float64))
    assert torch.allclose(brighter[:, :18], whole[:, :18], atol=1e-6)
    assert (doubled - whole)[:, 0].median().item() == pytest.approx(np.log(4), abs=0.02)


def test_weak_gaussian_detail_has_the_kurtosis_of_a_gaussian():
    weak = 0.5 + 1 / 255 / 12**0.5 * draw(64, 1, 64, 64).expand(-1, 3, -1, -1)
    kurtosis = wavelet_features(weak)[:, 5].mean().item()  # HH of the finest level
    assert kurtosis == pytest.approx(np.log(3), abs=0.01)
    assert wavelet_features(weak)[:, 4].mean().item() == pytest.approx(np.log(2 / 12 / 255**2), abs=0.02)


def test_blur_is_seen_and_the_null_is_right(crops, blur):
    draws = [wavelet_features(crops(32, 64, seed)[0].double() / 255) for seed in range(16)]
    count = len(draws[0])
    pairs = list(zip(draws[::2], draws[1::2], strict=True))
    direct = np.mean([fd_wavelet(a, b, 0.0, ("a", "b")).value for a, b in pairs])
    nulls = [fd_null(b, count, np.random.default_rng(0)) for _, b in pairs]
    given = np.mean([fd_null(b, count, np.random.default_rng(0), a) for a, b in pairs])
    assert np.mean(nulls) == pytest.approx(direct, rel=0.25) and given == pytest.approx(direct)
    blurred = wavelet_features(blur(crops(32, 64, 0)[0].double() / 255, 0.5))
    spoiled = fd_wavelet(blurred, draws[1], nulls[0], ("blurred", "draw"))
    assert spoiled.value > 3 * nulls[0] and spoiled.excess == spoiled.value - nulls[0]
    assert not spoiled.comparable_to_published


def test_null_is_for_the_sizes_that_were_compared():
    """For a Gaussian source the distance of two draws falls as (1/N + 1/M)."""
    features = draw(4000, 5)
    null = fd_null(features[:1000], 3000, np.random.default_rng(0))
    direct = np.mean([feature_distance(draw(3000, 5, seed=s), draw(1000, 5, seed=s + 50)) for s in range(20)])
    assert null == pytest.approx(direct, rel=0.35)


def test_without_a_law_for_the_bias_the_null_says_what_it_holds_for():
    """Below D images the bias does not fall as 1/N: the value is left as it was measured, and its size is told."""
    features = draw(60, 100)
    null, images = null_distance(features, 500, np.random.default_rng(0))
    order = torch.from_numpy(np.random.default_rng(0).permutation(60))
    one = feature_distance(features[order[:30]], features[order[30:]])
    assert images == 30 and null == pytest.approx(one, rel=0.1)
    second = draw(50, 100, seed=1)
    given = null_distance(features, 500, np.random.default_rng(0), second)
    assert given == (pytest.approx(feature_distance(second, features)), 50)
    with pytest.raises(UnfitError, match="3 images are too few"):
        null_distance(features[:3], 10, np.random.default_rng(0))


def test_distance_does_not_depend_on_the_unit_of_a_feature():
    a, b = draw(200, 6), draw(200, 6, seed=1) + 0.3
    unit = torch.tensor([1.0, 1e3, 1e-3, 1.0, 50.0, 1.0], dtype=torch.float64)
    plain, scaled = (fd_wavelet(a * u, b * u, 0.0, ("a", "b")).value for u in (1.0, unit))
    assert scaled == pytest.approx(plain)


def test_diversity_is_within_classes():
    features = torch.tensor([[0.0], [1.0], [100.0], [104.0], [7.0]])
    labels = torch.tensor([0, 0, 1, 1, 2])
    spread = class_diversity(features, labels)
    assert spread == pytest.approx({0: 1.0, 1: 4.0})
    assert diversity_ratio(spread, {0: 2.0, 1: 4.0, 2: 1.0}) == pytest.approx({0: 0.5, 1: 1.0})


def test_routes_are_chosen_by_size(monkeypatch):
    monkeypatch.setattr(frechet, "trace_term_eigh", lambda *_: pytest.fail("a D x D root for N < D"))
    feature_distance(draw(5, 20), draw(50, 20, seed=1))
