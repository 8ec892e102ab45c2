"""Two levels, seeds and images: known variances come back, intervals hold what they should, and sizes are textbook."""

import dataclasses
import math

import numpy as np
import pytest

from eval.metrics.intervals import UNDEFINED, Interval, Sample, bootstrap_interval
from eval.study import endpoint as seeds
from eval.study.endpoint import Arms, Components, ImageSpread, choose, endpoint, image_spread, power, simulated_coverage

CLASSES = 7


def arms(
    gains: np.ndarray, images: int = 700, *, own: float = 0.3, shared: float = 0.3, seed: int = 0, exact: bool = True
) -> Arms:
    """Two arms of the given gains in dB (2, K). `own` and `shared` are log-standard deviations over images.

    `shared` noise multiplies all students of an image alike, the reference not. `exact` makes the gains those of the
    finite sample.
    """
    rng, labels = np.random.default_rng(seed), np.arange(images) % CLASSES
    base = np.exp(rng.standard_normal(images)) * (1 + labels)
    common = np.exp(shared * rng.standard_normal(images) - shared**2 / 2)
    each = np.exp(own * rng.standard_normal((*gains.shape, images)) - own**2 / 2)
    energies = base * common * each * 10 ** (gains[..., None] / 10)
    if exact:
        energies *= base.mean() / energies.mean(-1, keepdims=True) * 10 ** (gains[..., None] / 10)
    return Arms(energies[0], energies[1], base, labels)


def drawn(spread: float, count: int, seed: int = 0, mean: tuple[float, float] = (-1.5, -0.5)) -> np.ndarray:
    return np.array(mean)[:, None] + spread * np.random.default_rng(seed).standard_normal((2, count))


def test_a_difference_above_zero_says_that_the_routed_arm_is_nearer_on_either_side():
    gains = np.array([[-2.0, 2.0, -1.0], [1.0, -0.5, -1.5]])
    measured = arms(gains)
    assert measured.gains == pytest.approx(gains)
    assert seeds.differences(measured.gains) == pytest.approx([1.0, 1.5, -0.5])
    result = endpoint(measured, 0)
    assert result.difference.value == pytest.approx(2 / 3)
    assert [one.value for one in result.per_seed] == pytest.approx([1.0, 1.5, -0.5])


def test_the_interval_of_one_seed_is_that_of_a_bootstrap_over_images():
    measured = arms(np.array([[-2.0, 1.0], [1.0, -1.5]]))
    labels = measured.labels

    def difference(ours, theirs, reference):  # (R, N) -> (R,)
        gains = [10 * np.log10(one.mean(1) / reference.mean(1)) for one in (ours, theirs)]
        return np.abs(gains[0]) - np.abs(gains[1])

    for seed, ours in enumerate(seeds.image_intervals(measured)):
        samples = [Sample(x, labels) for x in (measured.baseline[seed], measured.routed[seed], measured.reference)]
        direct = bootstrap_interval(difference, *samples, paired=True, rng=np.random.default_rng(0), resamples=4000)
        assert ours.half_width == pytest.approx(direct.half_width, rel=0.06)


@pytest.mark.parametrize("classes", [700, 600, 100])
def test_intervals_over_images_of_many_small_classes_are_those_of_one_class(classes):
    pooled = dataclasses.replace(arms(np.array([[-2.0, 1.0], [1.0, -1.5]])), labels=np.zeros(700, dtype=int))
    small = dataclasses.replace(pooled, labels=np.arange(700) % classes)
    for ours, expected in zip(seeds.image_intervals(small), seeds.image_intervals(pooled), strict=True):
        assert ours.half_width == pytest.approx(expected.half_width, rel=1e-12)
    ours, expected = image_spread(small), image_spread(pooled)
    assert ours.own == pytest.approx(expected.own) and ours.shared == pytest.approx(expected.shared)
    widths = [seeds.two_level_bootstrap(one, np.random.default_rng(0)).half_width for one in (small, pooled)]
    assert widths[0] == widths[1]


def test_shared_and_own_variance_of_images_are_told_apart():
    """For log-normal factors on equal energies, 10 / ln 10 times a standard deviation near that of the logarithm."""
    rng, images, count = np.random.default_rng(0), 20_000, 5
    common, each = 1 + 0.2 * rng.standard_normal(images), 1 + 0.1 * rng.standard_normal((2, count, images))
    energies = common * each
    spread = image_spread(Arms(energies[0], energies[1], np.ones(images), np.zeros(images, dtype=int)))
    unit = (10 / math.log(10)) ** 2
    assert spread.shared == pytest.approx(np.full((2, 2), unit * 0.04), rel=0.04)
    assert np.diag(spread.own) == pytest.approx([unit * 0.01 * 1.04] * 2, rel=0.04)
    assert abs(spread.own[0, 1]) < 0.02 * spread.own[0, 0]
    same_side, other_side = (spread.of_difference(np.array([[-1.0] * 5, [g] * 5])) for g in (-1.0, 1.0))
    assert same_side[0] < 0.02 * spread.shared[0, 0]  # what all students share cancels
    assert other_side[0] == pytest.approx(4 * spread.shared[0, 0], rel=0.02)  # unless they stand on either side
    assert same_side[1] == pytest.approx(2 * spread.own[0, 0], rel=0.05)


def test_trailing_axes_are_measured_side_by_side():
    one, other = arms(drawn(0.5, 4), seed=1), arms(drawn(0.5, 4, seed=2), seed=2)
    both = Arms(
        *(np.stack([getattr(x, n) for x in (one, other)], -1) for n in ("baseline", "routed", "reference")), one.labels
    )
    for index, single in enumerate((one, other)):
        assert both.gains[..., index] == pytest.approx(single.gains)
        for whole, part in zip(
            image_spread(both).of_difference(both.gains), image_spread(single).of_difference(single.gains), strict=True
        ):
            assert whole[index] == pytest.approx(float(part))


def test_two_levels_see_the_spread_over_seeds_that_images_alone_do_not():
    measured = arms(drawn(0.8, 8), images=1400, own=0.2)
    naive = np.sqrt(np.mean([one.half_width**2 for one in seeds.image_intervals(measured)]) / 8)
    whole = seeds.two_level_bootstrap(measured, np.random.default_rng(0)).half_width
    between = 1.96 * seeds.differences(measured.gains).std() / 8**0.5
    assert whole > 8 * naive and whole == pytest.approx(between, rel=0.15)


def test_two_levels_are_as_wide_as_one_where_seeds_agree_and_images_are_shared():
    """Eight equal students on either side of the teacher: one set of noises, so its error does not fall with K."""
    measured = arms(np.array([[-1.0] * 8, [1.0] * 8]), own=0.0, shared=0.5)
    single = seeds.image_intervals(measured)[0].half_width
    assert seeds.two_level_bootstrap(measured, np.random.default_rng(0)).half_width == pytest.approx(single, rel=0.08)
    result = endpoint(measured, 0)
    t = result.intervals["Student-t"]
    assert t.half_width == pytest.approx(single, rel=0.02)


def test_folded_mean_is_the_mean_of_the_absolute_value():
    draws = np.abs(0.3 + 0.5 * np.random.default_rng(0).standard_normal(400_000))
    assert seeds.folded_mean(np.array(0.3), np.array(0.5)) == pytest.approx(draws.mean(), rel=5e-3)
    assert seeds.folded_mean(np.array(-0.7), np.array(0.0)) == pytest.approx(0.7)


def model(mean: tuple[float, float], seed: float, own: float = 0.0, shared: float = 0.0) -> Components:
    eye = np.eye(2)
    return Components(np.array(mean), seed**2 * eye, ImageSpread(shared**2 * eye, own**2 * eye))


def coverage(components: Components, count: int, images: int = 1000) -> dict[str, float]:
    return simulated_coverage(components, count, images, np.random.default_rng(0), runs=2000)


def test_a_percentile_bootstrap_of_few_seeds_covers_too_little_and_the_exact_intervals_do_not():
    """For three seeds the percentile interval is nearly their range, which misses the median twice in eight times."""
    three, eight = (coverage(model((-3.0, 1.5), 0.3), count) for count in (3, 8))
    assert three["two-level bootstrap"] == pytest.approx(0.77, abs=0.04)
    assert 0.86 < eight["two-level bootstrap"] < 0.92
    assert three["Student-t"] == pytest.approx(0.95, abs=0.015) and eight["Student-t"] == pytest.approx(0.95, abs=0.015)
    assert three["inverted sign-flip"] == 1.0 and eight["inverted sign-flip"] == pytest.approx(0.953, abs=0.015)


def test_where_only_images_vary_the_bootstrap_covers_and_shared_noise_is_in_students_t():
    only_shared = coverage(model((-3.0, 1.5), 0.01, shared=6.0), 6)
    assert only_shared["two-level bootstrap"] > 0.92 and only_shared["Student-t"] == pytest.approx(0.95, abs=0.02)
    assert only_shared["inverted sign-flip"] < 0.3  # it knows of no error but that between seeds


def test_the_bias_of_an_absolute_gain_near_zero_costs_coverage():
    near, far = (coverage(model((gain, -3.0), 0.02, own=10.0), 8)["Student-t"] for gain in (0.0, 2.0))
    assert near < 0.8 < 0.93 < far


def test_an_interval_of_low_coverage_is_replaced_and_it_is_said():
    here, bounded, nowhere = Interval(0.0, -1.0, 1.0), Interval(0.0, -2.0, 2.0), Interval(0.0, -np.inf, np.inf)
    intervals = {"two-level bootstrap": here, "Student-t": here, "inverted sign-flip": bounded}

    def pick(bootstrap, t, flip, sign_flip=bounded):
        cover = {"two-level bootstrap": bootstrap, "Student-t": t, "inverted sign-flip": flip}
        return choose(cover, {**intervals, "inverted sign-flip": sign_flip})

    assert pick(0.93, 0.95, 0.97)[0] == "two-level bootstrap"
    method, reason = pick(0.88, 0.95, 0.97)
    assert method == "Student-t" and "bootstrap covers 88.0 %" in reason and "95.0 %" in reason
    assert pick(0.88, 0.90, 0.97)[0] == "inverted sign-flip"
    method, reason = pick(0.88, 0.91, 1.0, nowhere)
    assert method == "Student-t" and "unbounded" in reason and "none reaches 92.0 %" in reason
    assert not UNDEFINED.defined


def test_few_seeds_fall_back_to_students_t_and_six_are_no_pilot():
    five, six = (endpoint(arms(drawn(0.5, count), own=0.1, shared=0.1), 0) for count in (5, 6))
    assert five.pilot and not six.pilot
    for result in (five, six):
        assert result.method == "Student-t" and "two-level bootstrap covers" in result.reason
        assert result.difference == result.intervals["Student-t"]
    assert not five.intervals["inverted sign-flip"].defined and six.intervals["inverted sign-flip"].defined


def seeds_for(deviation: float, target: float) -> int | None:
    """Of a difference whose seeds deviate by exactly `deviation`, with images that hardly vary."""
    differences = np.array([-1.0, 1.0, -1.0, 1.0]) * deviation * math.sqrt(3 / 4)
    return power(arms(np.stack([differences - 5, np.full(4, 4.0)]), own=1e-4, shared=0.0), target).seeds


def test_seeds_that_resolve_a_difference_are_the_textbook_sizes_of_a_paired_t_test():
    assert [seeds_for(1.0, effect) for effect in (0.5, 0.8, 1.0)] == [34, 15, 10]


def test_images_that_resolve_a_difference_for_given_networks():
    measured = arms(np.array([[-2.0] * 4, [-1.0] * 4]), images=3500, own=0.4, shared=0.0)
    images = power(measured).images
    shared, own = image_spread(measured).of_difference(measured.gains)
    error = math.sqrt((own / 4 + shared) / images)
    assert 0.5 / error == pytest.approx(1.96 + 0.8416, rel=0.02)
    fewer = power(arms(np.array([[-2.0] * 4, [-1.0] * 4]), images=3500, own=0.2, shared=0.0)).images
    assert images / fewer == pytest.approx((math.exp(0.16) - 1) / (math.exp(0.04) - 1), rel=0.15)


def test_no_number_of_seeds_makes_up_for_too_few_images():
    measured = arms(np.array([[-1.0] * 4, [1.0] * 4]), images=70, own=0.1, shared=1.0)
    result = power(measured)
    assert result.seeds is None and result.seeds_at_most is None and result.images > 70


def test_a_wide_spread_may_be_wider_still():
    result = power(arms(drawn(1.0, 3, seed=1), own=0.05, shared=0.0))
    assert result.seeds_at_most == pytest.approx(9.49 * result.seeds, rel=0.15)  # 2 / chi2 of 2 at 10 % is 9.49


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"routed": np.ones((2, 9))}, "do not fit"),
        ({"labels": np.zeros(9, dtype=int)}, "do not fit"),
        ({"baseline": np.ones((1, 10)), "routed": np.ones((1, 10))}, "at least two"),
        ({"reference": np.full(10, np.nan)}, "reference: energies"),
        ({"routed": np.zeros((2, 10))}, "routed: energies"),
    ],
)
def test_arms_that_do_not_fit_are_refused(change, message):
    good = {"baseline": np.ones((2, 10)), "routed": np.ones((2, 10)), "reference": np.ones(10), "labels": np.zeros(10)}
    Arms(**good)
    with pytest.raises(ValueError, match=message):
        Arms(**{**good, **change})


def experiment(count: int, seed: int) -> Arms:
    """Gains scatter over seeds by 0.4 dB, and the images' noise is as in a run of the demo: D is 1 dB in truth."""
    return arms(drawn(0.4, count, seed), images=210, own=0.5, shared=0.3, seed=seed + 10_000, exact=False)


@pytest.mark.slow
def test_the_reported_interval_covers_over_whole_experiments():
    """Not the simulation that chooses the method, but the energies of images made anew; bootstrap and t as used."""
    runs, hits = 400, {}
    for seed in range(runs):
        measured = experiment(6, seed)
        shared, _ = image_spread(measured).of_difference(measured.gains)
        each = seeds.differences(measured.gains)
        ends = {
            "Student-t": seeds.student_t(each, shared / 210),
            "inverted sign-flip": seeds.sign_flip_interval(each),
            "two-level bootstrap": dataclasses.astuple(
                seeds.two_level_bootstrap(measured, np.random.default_rng(seed), 500)
            )[1:],
        }
        for name, (low, high) in ends.items():
            hits[name] = hits.get(name, 0) + (low <= 1.0 <= high)
    rates = {name: count / runs for name, count in hits.items()}
    assert 0.92 <= rates["Student-t"] <= 0.98 and rates["inverted sign-flip"] >= 0.93
    simulated = simulated_coverage(
        seeds.components(arms(drawn(0.4, 60), 210, own=0.5)), 6, 210, np.random.default_rng(0)
    )
    assert rates["two-level bootstrap"] == pytest.approx(simulated["two-level bootstrap"], abs=0.05)
