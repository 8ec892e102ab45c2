"""Bootstrap: coverage, strata, pairing."""

import numpy as np
import pytest

from eval.stats import Interval, Sample, bootstrap, bootstrap_interval, images_for_half_width, resample


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
    labels = np.array([0, 1, 1, 2, 2, 2, 0, 1])
    indices = resample(labels, 50, np.random.default_rng(0))
    assert (labels[indices] == labels).all()
    assert len(np.unique(indices[:, 3])) == 3


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
