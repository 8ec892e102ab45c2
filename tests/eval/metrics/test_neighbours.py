"""KID, precision and recall against what they are by definition."""

import numpy as np
import pytest
import torch

from eval.metrics import neighbours
from eval.metrics.features import Extractor, Features
from eval.metrics.neighbours import (
    compare_neighbours,
    kid,
    polynomial_kernel,
    precision_recall,
    squared_radii,
    unbiased_mmd,
)
from eval.samples.images import UnfitError


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_mmd_is_that_of_its_definition():
    """Sums over pairs of distinct rows, one by one."""
    a, b = draw(4, 3), draw(5, 3, seed=1)

    def mean(rows, others, distinct):
        values = [
            (float(x @ y) / 3 + 1) ** 3
            for i, x in enumerate(rows)
            for j, y in enumerate(others)
            if not (distinct and i == j)
        ]
        return np.mean(values)

    expected = mean(a, a, True) + mean(b, b, True) - 2 * mean(a, b, False)
    assert unbiased_mmd(a, b) == pytest.approx(expected, rel=1e-12)


def kept_diagonal(rows):
    """What counting each row as its own neighbour adds to the mean of the kernel."""
    kernel = polynomial_kernel(rows, rows)
    return (kernel.mean() - (kernel.sum() - kernel.trace()) / (len(rows) * (len(rows) - 1))).item()


def test_the_null_of_kid_has_mean_zero_and_a_shift_does_not():
    pairs = [(draw(60, 8, seed=2 * s), draw(60, 8, seed=2 * s + 1)) for s in range(150)]
    values = np.array([kid(a, b, subset_size=40, subsets=4).value for a, b in pairs])
    error = values.std(ddof=1) / len(values) ** 0.5
    assert abs(values.mean()) < 3 * error
    biased = np.mean([unbiased_mmd(a, b) + kept_diagonal(a) + kept_diagonal(b) for a, b in pairs])
    assert biased > 10 * error  # a mean over all pairs, equal ones too, would be told apart
    shifted = kid(draw(60, 8) + 0.5, draw(60, 8, seed=1), subset_size=40, subsets=4)
    assert shifted.value > 5 * values.std(ddof=1) and shifted.std > 0


def test_subsets_are_seeded_and_their_size_is_told():
    a, b = draw(50, 4), draw(70, 4, seed=1)
    first = kid(a, b, subset_size=20, subsets=5, seed=3)
    assert first == kid(a, b, subset_size=20, subsets=5, seed=3) != kid(a, b, subset_size=20, subsets=5, seed=4)
    assert (first.subset_size, first.subsets) == (20, 5)
    whole = kid(a, b[:50], subset_size=50)
    assert whole.value == unbiased_mmd(a, b[:50]) and whole.subsets == 1 and np.isnan(whole.std)


def test_kid_of_too_few_images_names_the_set():
    with pytest.raises(UnfitError, match="student: KID of 10 images, subset_size = 1000"):
        kid(draw(10, 4), draw(2000, 4), names=("student", "real"))


@pytest.mark.parametrize("tile", [4, 1024])
def test_radii_are_distances_to_the_kth_other(monkeypatch, tile):
    monkeypatch.setattr(neighbours, "TILE", tile)
    rows = torch.cat([draw(9, 5), draw(9, 5)[:2]])  # with two copies
    distances = torch.cdist(rows, rows).square()
    expected = distances.sort(1).values[:, 3]
    assert torch.allclose(squared_radii(rows, 3), expected, atol=1e-9)


@pytest.mark.parametrize("tile", [16, 1024])
def test_precision_falls_for_outliers_and_recall_for_a_dropped_mode(monkeypatch, tile):
    monkeypatch.setattr(neighbours, "TILE", tile)
    centre = torch.zeros(200, 4, dtype=torch.float64)
    centre[:100, 0] = 100.0  # two modes
    real, again = centre + draw(200, 4), centre + draw(200, 4, seed=1)
    same = precision_recall(again, real)
    assert same.precision > 0.85 and same.recall > 0.85 and (same.neighbours, same.images) == (3, 200)
    one_mode = precision_recall(draw(200, 4, seed=2), real)
    assert one_mode.precision > 0.85 and one_mode.recall < 0.55
    outliers = again.clone()
    outliers[:50] += 1000.0
    spoiled = precision_recall(outliers, real)
    assert spoiled.precision == pytest.approx(same.precision - 0.25, abs=0.05) and spoiled.recall > 0.75
    itself = precision_recall(real, real)
    assert (itself.precision, itself.recall) == (1.0, 1.0)


@pytest.mark.parametrize(
    ("ours", "theirs", "said"),
    [
        (draw(10, 4), draw(12, 4), "10 images in student, 12 in real; take the first 10 of both"),
        (draw(3, 4), draw(3, 4), "3 images for 3 neighbours; give at least 4"),
        (draw(9, 4), draw(9, 5), "student: 4 features, but 5 in real"),
        (draw(9, 4) * torch.nan, draw(9, 4), "student: 36 of 36"),
    ],
)
def test_sets_that_do_not_fit_are_named(ours, theirs, said):
    with pytest.raises(UnfitError, match=said):
        precision_recall(ours, theirs, names=("student", "real"))


def test_the_comparison_is_in_the_units_of_the_reference():
    unit = torch.tensor([1.0, 1e4, 1e-4, 1.0], dtype=torch.float64)
    plain, standardised = (Extractor("fd", lambda x: x, standardised=flag) for flag in (False, True))

    def result(extractor, scale):
        sets = [Features(name, values * scale, extractor, False) for name, values in zip("abc", rows, strict=True)]
        return [compare_neighbours(one, sets[1]) for one in (sets[0], sets[2])]

    rows = draw(80, 4) + 1.0, draw(80, 4, seed=1), draw(80, 4, seed=2)
    (one, null), (other, _) = result(standardised, 1.0), result(standardised, unit)
    assert other.kid == pytest.approx(one.kid) and other.precision == one.precision
    assert result(plain, unit)[0].kid != pytest.approx(one.kid, rel=0.5)
    assert one.kid > 5 * abs(null.kid) and one.precision < null.precision
    assert (one.kid_subset_size, one.images, one.features) == (40, 80, "fd")
    assert result(plain, 1.0)[0].recall == precision_recall(rows[0], rows[1]).recall


def test_a_reference_has_a_null_of_its_own():
    """KID of disjoint subsets of one set is 0 on average, of the size and number that a comparison takes."""
    reference = Features("teacher", draw(120, 6), Extractor("fd", lambda x: x, standardised=True), False)
    nulls = [neighbours.halved(reference, seed, subset_size=40, subsets=30) for seed in range(12)]
    values = np.array([null.kid for null in nulls])
    assert abs(values.mean()) < 3 * nulls[0].kid_std / 30**0.5 and nulls[0].kid_std > 0
    assert nulls[0] == neighbours.halved(reference, 0, subset_size=40, subsets=30) and nulls[0].images == 60
    assert 0.4 < nulls[0].precision <= 1 and 0.4 < nulls[0].recall <= 1
    shifted = Features("student", reference.values + 0.5, reference.extractor, False)
    assert compare_neighbours(shifted, reference, subset_size=40).kid > 5 * values.std()
