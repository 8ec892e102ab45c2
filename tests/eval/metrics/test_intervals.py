"""Bootstrap: coverage, strata, pairing. Tests over seeds: exact p-values, their inversion, Holm, simultaneous bands."""

import itertools
import math

import numpy as np
import pytest
import scipy.stats

from eval.metrics.intervals import (
    Interval,
    Sample,
    bootstrap,
    bootstrap_interval,
    holm,
    images_for_half_width,
    max_t_band,
    resample,
    sign_flip_interval,
    sign_flip_p,
    strata,
    student_t,
)


def mean(values: np.ndarray) -> np.ndarray:
    return values.mean(axis=1)


def test_coverage_of_a_known_mean():
    rng = np.random.default_rng(0)
    labels, hits, runs = np.zeros(200, dtype=int), 0, 2000
    for _ in range(runs):
        interval = bootstrap_interval(mean, Sample(rng.standard_normal(200) + 3.0, labels), rng=rng, resamples=500)
        hits += interval.low <= 3.0 <= interval.high
    assert 0.935 <= hits / runs <= 0.965


def test_every_class_keeps_its_share():
    labels = np.array([0, 1, 1, 2, 2, 2, 0, 1]).repeat(8)
    indices = resample(labels, 50, np.random.default_rng(0))
    assert (labels[indices] == labels).all()
    assert len(np.unique(indices[:, 24])) > 16  # of the 24 images of class 2


def test_classes_of_fewer_than_eight_images_are_one_stratum():
    labels = np.array([5] * 8 + [9] * 7 + [2] * 30 + [1])
    assert strata(labels).tolist() == [2] * 8 + [-1] * 7 + [1] * 30 + [-1]
    indices = resample(labels, 200, np.random.default_rng(0))
    small = np.isin(labels, (9, 1))
    assert (np.isin(labels[indices], (9, 1)) == small).all()
    assert set(indices[:, -1]) == set(np.flatnonzero(small))


@pytest.mark.parametrize("classes", [1000, 500, 300])
def test_many_small_classes_do_not_narrow_the_interval(classes):
    """1024 images of 1000 classes: within each class there is hardly a second image to draw."""
    rng = np.random.default_rng(0)
    values = rng.standard_normal(1024)
    ours = bootstrap_interval(mean, Sample(values, np.arange(1024) % classes), rng=rng, resamples=2000)
    pooled = bootstrap_interval(mean, Sample(values, np.zeros(1024, dtype=int)), rng=rng, resamples=2000)
    assert ours.half_width == pytest.approx(pooled.half_width, rel=0.1)


def test_seven_large_classes_are_drawn_as_ever():
    labels, rng = np.arange(1024) % 7, np.random.default_rng(3)
    expected = np.empty((5, 1024), dtype=int)
    for label in range(7):
        rows = np.flatnonzero(labels == label)
        expected[:, rows] = rows[rng.integers(0, len(rows), size=(5, len(rows)))]
    assert np.array_equal(resample(labels, 5, np.random.default_rng(3)), expected)


def test_differences_between_classes_do_not_widen_the_interval():
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1], 100)
    values = 100.0 * labels + rng.standard_normal(200)
    stratified = bootstrap_interval(mean, Sample(values, labels), rng=rng)
    assert stratified.half_width == pytest.approx(1.96 / 200**0.5, rel=0.15)


def test_pairing_removes_what_two_samples_share():
    rng = np.random.default_rng(0)
    labels = np.zeros(100, dtype=int)
    base = rng.standard_normal(100)
    ours, theirs = Sample(base + 0.1, labels), Sample(base, labels)

    def difference(a, b):
        return mean(a) - mean(b)

    paired = bootstrap_interval(difference, ours, theirs, rng=rng, paired=True)
    assert paired.half_width < 1e-12
    unpaired = bootstrap_interval(difference, ours, theirs, rng=rng)
    assert unpaired.half_width == pytest.approx(1.96 * base.std() * (2 / 100) ** 0.5, rel=0.15)


def test_a_seed_gives_the_same_interval_again():
    sample = Sample(np.arange(20.0).reshape(10, 2), np.zeros(10, dtype=int))
    first, second = (bootstrap(mean, sample, rng=np.random.default_rng(4)) for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
    assert first[0].tolist() == [9.0, 10.0]


def test_pairs_of_different_classes_are_refused():
    with pytest.raises(ValueError, match="row by row"):
        bootstrap(
            lambda a, b: mean(a),
            Sample(np.ones(2), np.array([0, 1])),
            Sample(np.ones(2), np.array([1, 0])),
            rng=np.random.default_rng(0),
            paired=True,
        )


def test_images_needed():
    assert images_for_half_width(Interval(0.0, -0.5, 0.5), 400, 0.25) == 1600


def enumerated_p(differences: np.ndarray) -> float:
    flipped = [
        abs(sum(s * d for s, d in zip(signs, differences, strict=True)))
        for signs in itertools.product((1, -1), repeat=len(differences))
    ]
    return float(np.mean([total >= abs(sum(differences)) - 1e-9 for total in flipped]))


@pytest.mark.parametrize(("seeds", "p"), [(3, 0.25), (5, 0.0625), (6, 0.03125), (8, 0.0078125)])
def test_sign_flip_of_pairs_that_agree(seeds, p):
    assert sign_flip_p(0.1 + np.arange(seeds)) == sign_flip_p(-0.1 - np.arange(seeds)) == p


@pytest.mark.parametrize("seeds", range(2, 9))
def test_sign_flip_is_the_brute_force_p_value(seeds):
    differences = np.random.default_rng(seeds).standard_normal(seeds) + 0.5
    assert sign_flip_p(differences) == enumerated_p(differences)
    tied = np.array([0.3, -0.1, 0.2, 0.0, 0.1, -0.1][:seeds])
    assert sign_flip_p(tied) == enumerated_p(tied)


@pytest.mark.parametrize("seeds", [6, 7, 9])
def test_the_inverted_test_holds_what_the_test_does_not_reject(seeds):
    differences = np.random.default_rng(seeds).standard_normal(seeds)
    low, high = sign_flip_interval(differences)
    for end, inward in ((low, 1e-6), (high, -1e-6)):
        assert sign_flip_p(differences - end - inward) > 0.05 >= sign_flip_p(differences - end + inward)


def test_the_inverted_test_of_six_is_their_range_and_of_five_unbounded():
    differences = np.array([0.4, -0.1, 0.9, 0.2, 0.3, 0.5])
    assert sign_flip_interval(differences) == (-0.1, 0.9)
    assert sign_flip_interval(differences[:5]) == (-np.inf, np.inf)
    both = sign_flip_interval(np.stack([differences, 2 * differences]))
    assert np.allclose(both, [[-0.1, -0.2], [0.9, 1.8]])


def test_more_seeds_than_can_be_enumerated_are_refused():
    with pytest.raises(ValueError, match="17 seeds"):
        sign_flip_p(np.ones(17))


def test_student_t_is_scipys_and_adds_a_shared_variance():
    values = np.random.default_rng(0).standard_normal((2, 7))
    low, high = student_t(values)
    for row, ends in zip(values, zip(low, high, strict=True), strict=True):
        assert ends == pytest.approx(tuple(scipy.stats.ttest_1samp(row, 0).confidence_interval()))
    low, high = student_t(values[0], extra_variance=0.3)
    spread = values[0].var(ddof=1) / 7
    freedom = 6 * ((spread + 0.3) / spread) ** 2
    expected = scipy.stats.t.ppf(0.975, freedom) * math.sqrt(spread + 0.3)
    assert (high - low) / 2 == pytest.approx(expected)
    low, high = student_t(np.full(5, 2.0), extra_variance=0.25)
    assert (low, high) == (pytest.approx(2 - 0.98, abs=1e-3), pytest.approx(2 + 0.98, abs=1e-3))
    with pytest.raises(ValueError, match="at least two"):
        student_t(np.ones(1))


def test_holm_by_hand():
    adjusted = holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005})
    assert adjusted == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02})
    assert list(adjusted) == ["a", "b", "c", "d"]
    assert holm({"a": 0.6, "b": 0.7}) == {"a": 1.0, "b": 1.0} and holm({}) == {}


def test_a_band_at_one_point_is_student_t():
    values = np.random.default_rng(0).standard_normal((6, 1))
    value, low, high = max_t_band(values, np.random.default_rng(1), draws=40_000)
    expected = np.subtract(*student_t(values[:, 0])[::-1]) / 2
    assert value == pytest.approx(values.mean()) and (high - low) / 2 == pytest.approx(expected, rel=0.03)


def test_a_band_widens_by_a_shared_variance_and_closes_where_nothing_varies():
    curves = np.random.default_rng(0).standard_normal((6, 4)) * [1.0, 1.0, 3.0, 0.0] + 5
    bands = [max_t_band(curves, np.random.default_rng(1), extra) for extra in (0.0, np.array([0.5, 0.0, 0.0, 0.5]))]
    (_, low, high), (_, low_wide, high_wide) = bands
    ratio = (high_wide - low_wide)[:3] / (high - low)[:3]
    assert ratio == pytest.approx([math.sqrt(1 + 0.5 / (curves[:, 0].var(ddof=1) / 6)), 1.0, 1.0])
    assert low[3] == high[3] == 5.0 and low_wide[3] < 5 < high_wide[3]


def simultaneous_coverage(seeds: int, points: int, runs: int, correlation: float = 0.8) -> tuple[float, float]:
    """How often a max-t band, and pointwise Student-t intervals, hold all points of a curve of zeros."""
    rng, hits = np.random.default_rng(0), np.zeros(2)
    distance = np.abs(np.subtract.outer(np.arange(points), np.arange(points)))
    root = np.linalg.cholesky(correlation**distance)
    for _ in range(runs):
        curves = rng.standard_normal((seeds, points)) @ root.T
        _, low, high = max_t_band(curves, rng, draws=1000)
        point_low, point_high = student_t(curves.T)
        hits += ((low <= 0) & (high >= 0)).all(), ((point_low <= 0) & (point_high >= 0)).all()
    return tuple(hits / runs)


def test_a_band_covers_the_whole_curve():
    band, pointwise = simultaneous_coverage(seeds=6, points=15, runs=500)
    assert 0.92 <= band <= 0.98
    assert pointwise < 0.8


@pytest.mark.slow
@pytest.mark.parametrize(("seeds", "points"), [(3, 15), (6, 15), (8, 30)])
def test_a_band_covers_the_whole_curve_in_many_runs(seeds, points):
    band, _ = simultaneous_coverage(seeds, points, runs=2000)
    assert 0.935 <= band <= 0.965
