"""The gate: identity is preserved, a blur is reduced, a blur filled with shaped noise is energy only."""

import math

import pytest

from eval.measure import ImageSet, measure
from eval.stats import UNDEFINED, Interval
from eval.verdict import verdict

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
    assert verdict(gain, kurtosis, noise).word == word


@pytest.mark.parametrize("size", [32, 64])
def test_gate_on_photographs(size, crops, blur, shaped_noise, eight_bit):
    images, labels = crops(size, 60, 0)
    clean = images.double() / 255
    spoiled = {"identity": clean, "blur": blur(clean, 0.5), "shaped": shaped_noise(clean, 0.7)}
    sets = [ImageSet(name, eight_bit(x), labels, "student", True) for name, x in spoiled.items()]
    teacher = ImageSet("teacher", images, labels, "teacher", True)
    real_images, real_labels = crops(size, 60, 1)
    result = measure(sets, teacher, ImageSet("real", real_images, real_labels, "real", False), set(), 0)
    against = {row["name"]: row["against"]["teacher"] for row in result["sets"]}
    gains = [gain["value"] for gain in against["shaped"]["gain_db"].values() if gain["value"] is not None]
    assert max(map(abs, gains)) < 0.05 and len(gains) >= 5
    words = {name: against[name]["verdict"]["word"] for name in spoiled}
    assert words == {"identity": "preserved", "blur": "reduced", "shaped": "energy only"}
