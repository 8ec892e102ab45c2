"""Each known spoiling of colour is caught by its own word, and nothing else is said of it; other images of the same
source have no fault."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from dmd_dar import colour
from dmd_dar.data import photos, textures
from dmd_dar.draws import Draws, sample_range
from eval.metrics import spoil
from eval.metrics.colour import (
    COLUMNS,
    ColourVerdict,
    colour_values,
    colour_values_of,
    colour_verdict,
    colour_verdict_of,
    groups_of,
    halved_null,
)
from eval.metrics.intervals import Interval, Sample
from eval.metrics.power_map import GridLine

N, SIZE = 252, 32
COLOURED = set(photos.Photos.colour_labels)
DRAWS = Draws(0, "spoil", 0, sample_range(0, N))


def crops(name: str, count: int = N, data: type = photos.Photos) -> tuple[Tensor, Tensor]:
    samples, source = sample_range(0, count), data(SIZE)
    labels = samples % source.num_classes
    return source.crops(labels, Draws(0, name, 0, samples)), labels


@pytest.fixture(scope="module")
def photographs() -> tuple[Tensor, Tensor]:
    return crops("reference")


@pytest.fixture(scope="module")
def drawn() -> tuple[Tensor, Tensor]:
    """Textures, all grey."""
    return crops("reference", data=textures.Textures)


SPOILED = {
    "colour ok": lambda x: x,
    "over-saturated": lambda x: spoil.saturated(x, 1.2),
    "washed out": lambda x: spoil.saturated(x, 0.8),
    "colour drift": lambda x: spoil.brighter(x, 16),
    "colour speckle": lambda x: spoil.with_chroma_noise(x, 4, DRAWS),
    "grid": lambda x: spoil.with_lattice(x, 6, 4),
}


def paired(images: Tensor, reference: tuple[Tensor, Tensor], colour_labels: set[int] | None) -> ColourVerdict:
    theirs, labels = reference
    given = {"labels": labels, "reference_labels": labels, "colour_labels": colour_labels, "paired": True}
    return colour_verdict(images, theirs, **given)


@pytest.mark.parametrize("word", SPOILED)
def test_each_spoiling_has_its_own_word(photographs, word):
    images = spoil.eight_bit(SPOILED[word](photographs[0].float() / 255))
    found = paired(images, photographs, COLOURED)
    assert found.word == word and found.faults == (() if word == "colour ok" else (word,))


@pytest.mark.parametrize("word", ["colour drift", "colour speckle", "grid"])
def test_so_has_each_on_grey_textures(drawn, word):
    images = spoil.eight_bit(SPOILED[word](drawn[0].float() / 255))
    assert paired(images, drawn, set()).word == paired(images, drawn, None).word == word


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x: spoil.contrast(x, 1.2), ("over-saturated",)),
        (lambda x: spoil.contrast(x, 0.8), ("washed out",)),
        (lambda x: spoil.blurred(x, 1.0), ()),
        (lambda x: spoil.with_white_noise(x, 4, DRAWS), ()),
        (lambda x: spoil.with_lattice(spoil.with_chroma_noise(x, 8, DRAWS), 6, 4), ("colour speckle", "grid")),
    ],
)
def test_contrast_is_colour_and_detail_is_none(photographs, change, words):
    found = paired(spoil.eight_bit(change(photographs[0].float() / 255)), photographs, COLOURED)
    assert found.faults == words and found.word == (", ".join(words) or "colour ok")


def test_grey_that_is_tinted_is_drift_though_its_mean_stays(drawn):
    """Half of the images reddish, half of them bluish."""
    tint = torch.tensor([[8.0, 0.0, -8.0], [-8.0, 0.0, 8.0]])[torch.arange(N) // 5 % 2][:, :, None, None] / 255
    found = paired(spoil.eight_bit(drawn[0].float() / 255 + tint), drawn, set())
    assert found.faults == ("colour drift",) and "saturation ratio of grey classes" in found.reason


@pytest.mark.parametrize(("data", "count"), [(photos.Photos, 1024), (textures.Textures, 256)])
def test_the_null_passes(data, count):
    """Other images of the same source, unpaired, as many as a report has."""
    (ours, labels), (theirs, _) = (crops(name, count, data) for name in ("a", "b"))
    known = set(data.colour_labels)
    given = {"labels": labels, "reference_labels": labels, "colour_labels": known}
    assert colour_verdict(ours, theirs, **given).word == "colour ok"
    few = colour_verdict(ours[:28], theirs[:28], labels=labels[:28], reference_labels=labels[:28], colour_labels=known)
    assert few.faults == ()


def test_the_halves_of_a_set_are_its_null():
    """Their scatter is that of two sets of half the size."""
    labels = np.arange(400) % 4
    values = np.random.default_rng(0).normal(50, 10, (400, len(COLUMNS)))
    null = halved_null(Sample(values, labels), None, np.random.default_rng(1), 200)
    assert null["drift_cb"] == pytest.approx(10 * (1 / 200 + 1 / 200) ** 0.5, rel=0.15)
    assert null["saturation_ratio"] == pytest.approx(10 / 60 * 0.1, rel=0.15)


def test_levels_are_those_of_8_bits():
    """Red of 100 levels over a grey of 50, with noise in red of 3 levels."""
    noise = torch.randn(200, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    images = torch.full((200, 3, SIZE, SIZE), 50.0)
    images[:, :1] += 50 + 3 * noise
    read = colour.colours(images / 255)
    assert read.mean.mean(0).tolist() == pytest.approx([50 + 14.95, -0.564 * 14.95, 0.713 * 35.05], abs=0.05)
    assert read.saturation.mean().item() == pytest.approx(math.hypot(0.564 * 14.95, 0.713 * 35.05), rel=5e-3)
    assert read.contrast.mean().item() == pytest.approx(0.299 * 3 / colour.BLOCK, rel=0.1)
    power = (0.564 * 0.299 * 3) ** 2 + (0.713 * 0.701 * 3) ** 2
    assert colour.speckle_of(images / 255).mean().item() == pytest.approx(power, rel=0.02)


def test_what_saturation_explains_is_no_speckle(photographs):
    theirs = colour_values_of(photographs[0])
    ours = theirs * [1, 1, 1, 1, 1.5, 2.25]
    found = colour_values(ours, theirs, groups_of(None, None, None))
    mean = theirs.mean(0)
    ratio = (1.5 * mean[4] + 10) / (mean[4] + 10)
    assert found["saturation_ratio"] == pytest.approx(ratio)
    assert found["speckle_db"] == pytest.approx(10 * math.log10((2.25 * mean[5] / ratio**2 + 1) / (mean[5] + 1)))
    assert found["drift_y"] == 0 and found["contrast_ratio"] == 1


def test_classes_that_one_set_lacks_are_left_out():
    labels = np.array([0, 0, 1])
    assert set(groups_of(labels, labels, {0})) == {".colour", ".grey"}
    assert set(groups_of(labels, labels, {0, 1})) == {".colour"} and set(groups_of(labels, labels, set())) == {".grey"}
    assert set(groups_of(labels, labels[:2], {0})) == {".colour"} and set(groups_of(labels, None, {0})) == {""}


@pytest.mark.parametrize(
    ("name", "interval", "word"),
    [
        ("saturation_ratio.colour", Interval(1.2, 1.11, 1.3), "over-saturated"),
        ("saturation_ratio", Interval(1.1, 1.0, 1.2), "colour inconclusive"),
        ("saturation_ratio.grey", Interval(1.2, 1.11, 1.3), "colour drift"),
        ("contrast_ratio", Interval(0.8, 0.7, 0.84), "washed out"),
        ("drift_y", Interval(-9, -10, -8.1), "colour drift"),
        ("drift_cr", Interval(4, 3.1, 5), "colour drift"),
        ("drift_cr", Interval(0, -2.9, 2.9), "colour ok"),
        ("speckle_db.grey", Interval(2.5, 2.1, 3), "colour speckle"),
        ("speckle_db.grey", Interval(-9, -12, -6), "colour ok"),
        ("drift_cb", Interval(math.nan, 0, 0), "colour inconclusive"),
    ],
)
def test_words(name, interval, word):
    assert colour_verdict_of({name: interval}, []).word == word


def test_a_line_counts_against_the_reference_and_upwards():
    def found(low: float, high: float) -> ColourVerdict:
        line = GridLine("x", 4, Interval((low + high) / 2, low, high), against_reference=True)
        return colour_verdict_of({}, [line])

    assert [found(*ends).word for ends in ((1.1, 2), (0.5, 2), (-3, -2))] == ["grid", "colour ok", "colour ok"]
    assert "period 4 px on x stands out by +1.55 dB" in found(1.1, 2).reason
