"""Features that need no weights: what they see, that their nulls are right, and that streams and processes agree."""

import numpy as np
import pytest
import torch

from eval.measure import suite as distances
from eval.metrics import frechet
from eval.metrics.classifier import fit_classifier, modes
from eval.metrics.features import Extractor, Features, compare_features, extract, extract_moments, fit_pca, wavelet
from eval.metrics.frechet import feature_distance, standardise
from eval.metrics.moments import Gaussian, merged
from eval.metrics.wavelet import fd_null, fd_wavelet, wavelet_features
from eval.samples.images import UnfitError, open_images


@pytest.fixture(scope="module")
def real(crops):
    """Three independent sets of labelled crops, 448 images of 32 px each."""
    return [crops(32, 64, seed) for seed in range(3)]


def of(extractor, images, name="set"):
    return extract(open_images(images, name), extractor)


def test_blur_is_seen_by_wavelets_and_not_by_pixels(real, blur, eight_bit):
    (images, _), (again, _), _ = real
    blurred = eight_bit(blur(again.double() / 255, 0.5))
    pca = fit_pca(images)
    for extractor, seen in ((wavelet(), True), (pca, False)):
        result = compare_features(of(extractor, blurred), of(extractor, images), second=of(extractor, again))
        assert (result.value > 3 * result.null) == seen
        assert result.value < 1.3 * result.null or seen
        assert not result.comparable_to_published and not result.upsampled
        assert (result.images, result.reference_images, result.null_images) == (448, 448, 448)
        assert result.excess == pytest.approx(result.value - result.null)
    assert result.facts["components"] == 32 and result.facts["fitted_on"] == 224


def test_a_dropped_mode_is_seen_by_pixels(crops, real):
    images, labels = real[0]
    pca = fit_pca(images)
    reference, others = of(pca, images), [crops(32, 64, seed)[0] for seed in range(1, 7)]

    def values(keep):
        return np.array([compare_features(of(pca, other[keep]), reference).value for other in others])

    null = values(labels >= 0)
    halves = compare_features(of(pca, others[0]), reference).null
    assert halves == pytest.approx(null.mean(), rel=0.4)
    z = [(values(labels != label).mean() - null.mean()) / null.std(ddof=1) for label in range(7)]
    assert min(z) > 3 and max(z) > 8


def test_pca_depends_on_its_seed_alone_and_averages_large_images(real):
    images = real[0][0]
    first, again, other = (fit_pca(images, seed=seed) for seed in (0, 0, 1))
    values = [extractor.extract(images) for extractor in (first, again, other)]
    assert torch.equal(values[0], values[1]) and not torch.allclose(values[0].abs(), values[2].abs())
    large = images.repeat_interleave(2, -1).repeat_interleave(2, -2)
    assert torch.allclose(fit_pca(large).extract(large).abs(), values[0].abs(), atol=1e-9)
    half = np.random.default_rng(0).permutation(448)[:224]
    variances = values[0][half].var(0)
    assert (variances.diff() <= 1e-12).all() and torch.allclose(values[0][half].mean(0), torch.zeros(()).double())
    with pytest.raises(UnfitError, match="fitted on 3 images"):
        fit_pca(images[:3])


def test_the_number_is_that_of_the_wavelet_distance(real):
    (images, _), (again, _), _ = real
    a, b = (wavelet_features(x.float() / 255) for x in (again, images))
    direct = fd_wavelet(a, b, 0.0, ("a", "b")).value
    result = compare_features(of(wavelet(), again), of(wavelet(), images))
    assert result.value == pytest.approx(direct, rel=1e-12)
    assert result.null == pytest.approx(fd_null(b, len(a), np.random.default_rng(0)), rel=1e-12)
    assert result.null == pytest.approx(direct, rel=0.5)


def test_neither_batches_nor_processes_change_a_number(real):
    images, pca = real[0][0], fit_pca(real[0][0])
    whole = of(pca, images).values
    stream = open_images(images, "set")
    for batch_size, world in ((1, 1), (7, 3), (1000, 2)):
        values = [extract(stream, pca, batch_size, rank=rank, world=world).values for rank in range(world)]
        assert torch.allclose(torch.cat(values), whole, rtol=0, atol=1e-9)
        parts = [extract_moments(stream, pca, batch_size, rank=rank, world=world) for rank in reversed(range(world))]
        mean, covariance = frechet.statistics(whole)
        joined = merged(parts).gaussian()
        assert torch.allclose(joined.mean, mean, rtol=0, atol=1e-9)
        assert torch.allclose(joined.covariance, covariance, rtol=0, atol=1e-9)


def test_statistics_of_a_file_have_the_null_of_the_second_real_set(real):
    (images, _), (again, _), (third, _) = real
    pca, ledger = fit_pca(images), distances.Ledger()
    suite = distances.Suite(statistics=Gaussian(*frechet.statistics(of(pca, images).values), 448))
    told = distances.against_statistics(of(pca, again), suite, ledger, of(pca, third))
    expected = distances.against_statistics(of(pca, third), suite, ledger)
    assert told.null == expected.value and expected.null is None
    assert told.excess == told.value - told.null


def test_a_gaussian_reference_takes_its_null_from_a_second_set(real):
    (images, _), (again, _), (third, _) = real
    pca = fit_pca(images)
    mean, covariance = frechet.statistics(of(pca, images).values)
    reference = Gaussian(mean, covariance, 448)
    ours, second = of(pca, again), of(pca, third)
    alone, beside = compare_features(ours, reference), compare_features(ours, reference, second=second)
    assert alone.null is None and alone.excess is None and alone.reference_images == 448
    features = compare_features(ours, of(pca, images), second=second)
    assert beside.value == pytest.approx(features.value) and beside.null == pytest.approx(features.null)
    with pytest.raises(UnfitError, match="fd_wavelet: measured in units of the reference's spread"):
        compare_features(of(wavelet(), again), reference)


def test_faults_name_the_metric_the_set_and_the_batch(real):
    images = real[0][0]
    broken = Extractor("fid", lambda x: x[:, 0, :2, 0].float().log())
    dark = images.clone()
    dark[70] = 0
    with pytest.raises(UnfitError, match="fid of student, images 64 to 127: .* not finite"):
        extract(open_images(dark.clamp(min=1).index_fill(0, torch.tensor(70), 0), "student"), broken)
    patches = Extractor("patch_fid", lambda x: x.flatten(1).float(), least_size=299)
    with pytest.raises(UnfitError, match="student: 32 x 32 images are too small for patch_fid.* 299"):
        of(patches, images, "student")
    with pytest.raises(UnfitError, match="no images for process 2 of 9"):
        extract(open_images(images[:1], "student"), wavelet(), rank=2, world=9)
    with pytest.raises(UnfitError, match="set: features of fd_pca, but fd_wavelet in set"):
        compare_features(of(fit_pca(images), images), of(wavelet(), images))
    enlarged = Extractor("fid", lambda x: x.flatten(1).float(), comparable_to_published=True, native_size=299)
    told = compare_features(of(enlarged, images[:8]), of(enlarged, images[8:16]))
    assert told.upsampled and not told.comparable_to_published


@pytest.fixture(scope="module")
def classifier(real):
    return fit_classifier(*real[0])


def test_the_classifier_knows_unseen_images(real, classifier):
    images, labels = real[1]
    assert (classifier.predict(images) == labels.numpy()).mean() > 0.75
    assert classifier.accuracy > 0.75 and classifier.classes == tuple(range(7))
    first, again, other = (fit_classifier(*real[0], seed=seed, steps=5).extractor() for seed in (0, 0, 1))
    assert torch.equal(first.extract(images[:9]), again.extract(images[:9]))
    assert not torch.allclose(first.extract(images[:9]), other.extract(images[:9]))


def test_modes_that_are_dropped_are_named(real, classifier):
    (images, _), (again, labels), _ = real
    whole, dropped = (modes(classifier, again[keep], images, labels[keep]) for keep in (labels >= 0, labels != 2))
    assert whole.total_variation < whole.null < 0.08 and whole.least_share_ratio > 0.6
    assert dropped.total_variation > 2 * dropped.null and dropped.least_share_ratio < 0.3
    assert min(dropped.shares, key=dropped.shares.get) == 2
    assert sum(whole.shares.values()) == pytest.approx(1) and whole.agreement > 0.75
    assert not whole.comparable_to_published and whole.facts["accuracy"] == classifier.accuracy


def test_classifier_features_see_every_dropped_mode(real, classifier):
    (images, _), (again, labels), (third, _) = real
    extractor = classifier.extractor()
    reference = of(extractor, images)
    nulls = [compare_features(of(extractor, other), reference) for other in (again, third)]
    null = max(result.value for result in nulls)
    dropped = [compare_features(of(extractor, third[labels != label]), reference).value for label in range(7)]
    assert nulls[0].dimensions == 32 and not nulls[0].comparable_to_published
    assert nulls[0].null == pytest.approx(null, rel=1.0) and min(dropped) > 2 * null


def test_a_classifier_of_too_few_images_says_so(real):
    with pytest.raises(UnfitError, match="at least two classes"):
        fit_classifier(real[0][0][:64], real[0][1][:64])
    with pytest.raises(UnfitError, match=r"\{0: 64, 1: 2\}"):
        fit_classifier(real[0][0][:66], real[0][1][:66])


def test_a_unit_that_the_reference_leaves_dead_does_not_rule_the_distance(real):
    """It counts on a twentieth of the typical spread: shifted by v, it adds (v / (0.05 rms))^2 and no more."""
    reference = torch.randn(400, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    reference[:, 3] = 0
    shifted = reference + torch.tensor([0, 0, 0, 0.1])
    rms = reference.std(0).square().mean().sqrt()
    pair = standardise(shifted, reference, 0.05), standardise(reference, reference, 0.05)
    expected = pytest.approx((0.1 / (0.05 * rms.item())) ** 2, rel=1e-6)
    assert feature_distance(*pair, ("a", "b")) == expected
    assert torch.equal(pair[1][:, :3], ((reference - reference.mean(0)) / reference.std(0))[:, :3])
    classifier = fit_classifier(*real[0], steps=1).extractor()
    assert (
        compare_features(*(Features("x", values, classifier, False) for values in (shifted, reference))).value
        == expected
    )
