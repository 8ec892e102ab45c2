"""The gate: identity is preserved, a blur is reduced, a blur filled with shaped noise is energy only."""

import math

import pytest

from dmd_dar.draws import Draws, sample_range
from eval.metrics import spoil
from eval.metrics.intervals import UNDEFINED, Interval
from eval.metrics.spectrum import band_gain_db
from eval.metrics.structure import verdict
from eval.metrics.verdict import verdict_of
from eval.samples.images import UnfitError

RIGHT = Interval(0.1, -0.1, 0.3)
SOUND, QUIET = Interval(1.0, 0.9, 1.1), Interval(0.0, -0.2, 0.2)


@pytest.mark.parametrize(
    ("gain", "kurtosis", "noise", "word"),
    [
        (RIGHT, SOUND, QUIET, "preserved"),
        (Interval(-0.8, -1.0, -0.6), SOUND, QUIET, "reduced"),
        (Interval(0.8, 0.6, 1.0), SOUND, QUIET, "inflated"),
        (Interval(-0.5, -0.6, -0.4), SOUND, QUIET, "inconclusive"),
        (Interval(0.0, -0.6, 0.6), Interval(0.1, 0.0, 0.2), QUIET, "inconclusive"),
        (RIGHT, Interval(0.7, 0.6, 0.79), QUIET, "energy only"),
        (RIGHT, Interval(1.5, 1.3, 1.7), QUIET, "energy only"),
        (RIGHT, Interval(0.85, 0.7, 1.0), QUIET, "inconclusive"),
        (RIGHT, SOUND, Interval(0.8, 0.6, 1.0), "energy only"),
        (RIGHT, SOUND, Interval(0.3, 0.0, 0.6), "inconclusive"),
        (RIGHT, SOUND, Interval(-2.0, -3.0, -1.0), "preserved"),
        (RIGHT, Interval(0.85, 0.7, 1.0), Interval(0.8, 0.6, 1.0), "energy only"),
        (RIGHT, UNDEFINED, QUIET, "inconclusive"),
        (Interval(math.nan, 0.0, 0.0), SOUND, QUIET, "inconclusive"),
    ],
)
def test_words(gain, kurtosis, noise, word):
    assert verdict_of(gain, kurtosis, noise).word == word


@pytest.mark.parametrize("size", [32, 64])
def test_gate_on_photographs(size, crops):
    images, labels = crops(size, 60, 0)
    clean, draws = images.float() / 255, Draws(0, "spoil", 0, sample_range(0, len(images)))
    spoiled = {
        "preserved": images,
        "reduced": spoil.eight_bit(spoil.blurred(clean, 0.5)),
        "energy only": spoil.eight_bit(spoil.with_shaped_noise(clean, 0.7, draws)),
    }
    gains = band_gain_db(spoiled["energy only"], images, labels=labels, reference_labels=labels, paired=True)
    defined = [gain.value for gain in gains.values() if math.isfinite(gain.value)]
    assert max(map(abs, defined)) < 0.05 and len(defined) == (6 if size == 64 else 5)
    given = {"labels": labels, "reference_labels": labels, "paired": True}
    assert {word: verdict(one, images, **given).word for word, one in spoiled.items()} == {w: w for w in spoiled}


def test_verdicts_of_changes_on_either_side(crops):
    images, labels = crops(64, 40, 0)
    clean, draws = images.double() / 255, Draws(1, "spoil", 0, sample_range(0, len(images)))
    given = {"labels": labels, "reference_labels": labels, "paired": True}
    sharpened = spoil.eight_bit(2 * clean - spoil.blurred(clean, 0.5))
    assert verdict(sharpened, images, **given).word == "inflated"
    faint = verdict(spoil.eight_bit(spoil.with_white_noise(clean, 2, draws)), images, **given)
    assert faint.word == "energy only" and "kurtosis" in faint.reason
    few = crops(64, 2, 1)[0]
    assert verdict(few, crops(64, 2, 2)[0]).word == "inconclusive"  # 14 against 14 other images


def test_sets_that_do_not_compare_are_refused(crops):
    images = crops(64, 1, 0)[0]
    with pytest.raises(UnfitError, match="the images are 32x32 px, the reference 64x64 px"):
        verdict(images[..., :32, :32], images)
    broken = images.float() / 255
    broken[3, 0, 5, 5] = math.nan
    with pytest.raises(UnfitError, match="image 3: holds NaN"):
        verdict(broken, images)
