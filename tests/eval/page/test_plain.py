"""The page's opening: what a newcomer reads of a student follows its verdicts, and its words are explained."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from eval.metrics.colour import ColourComparison, Placed, colour_verdict_of
from eval.metrics.intervals import Interval
from eval.metrics.power_map import GridLine
from eval.metrics.verdict import verdict_of
from eval.page import grids
from eval.page.plain import sentence
from eval.page.terms import TERMS, explained, terms_of
from eval.samples.facts import NetworkFacts, SetFacts
from eval.samples.sets import ImageSet

RIGHT, SOUND, QUIET = Interval(0.1, -0.1, 0.3), Interval(1.0, 0.9, 1.1), Interval(0.0, -0.2, 0.2)
TAMED, NOISY = Interval(0.45, 0.4, 0.5), Interval(2.1, 1.8, 2.4)
ROW = SimpleNamespace(name="dar", facts=SetFacts(network=NetworkFacts(4, 1000, 0, "digest")))


def told(gain=RIGHT, kurtosis=SOUND, noise=QUIET, measures=None, lines=()) -> str:
    colour = None
    if measures is not None:
        placed = {name: Placed(**vars(one), null=0.1) for name, one in measures.items()}
        colour = ColourComparison(verdict=colour_verdict_of(placed, lines), measures=placed)
    against = SimpleNamespace(
        verdict=verdict_of(gain, kurtosis, noise),
        gain_db={"HF": gain},
        hf_kurtosis_ratio=kurtosis,
        flat_noise_db=noise,
        colour=colour,
        grid_lines=lines,
    )
    return sentence(ROW, against, "the teacher")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "part"),
    [
        ({}, "At 4 calls, dar has as much fine detail as the teacher (+0.1 dB), with its edges"),
        (
            {"kurtosis": TAMED},
            "has as much fine detail as the teacher (+0.1 dB), but part of it is noise: edges stand out less (0.45",
        ),
        ({"noise": NOISY}, "but part of it is noise: smooth areas are rougher (+2.1 dB)"),
        ({"kurtosis": Interval(1.6, 1.4, 1.8)}, "but single spots stand out more"),
        (
            {"gain": Interval(-2, -2.2, -1.8)},
            "has lost fine detail against the teacher (−2.0 dB): its pictures are softer.",
        ),
        (
            {"gain": Interval(2, 1.8, 2.2)},
            "has more fine detail than the teacher (+2.0 dB): its pictures",
        ),
        ({"gain": Interval(2, 1.8, 2.2), "noise": NOISY}, "(+2.0 dB): part of it is noise: smooth areas are rougher"),
        ({"gain": Interval(0.1, -0.9, 1.1)}, "may have kept its fine detail or not (between −0.9 and +1.1 dB against"),
        ({"gain": Interval(0.1, -0.9, 1.1), "kurtosis": TAMED}, "tell; part of it is noise: edges stand out less"),
        ({"kurtosis": Interval(0.8, 0.7, 0.9)}, "(+0.1 dB); whether part of it is noise, more images are needed"),
    ],
)
def test_detail_in_plain_words(given, part):
    assert part in told(**given)


def test_a_blur_is_not_called_noise():
    assert "noise" not in told(gain=Interval(-2, -2.2, -1.8), kurtosis=TAMED)


@pytest.mark.parametrize(
    ("measures", "part"),
    [
        (
            {"saturation_ratio.colour": Interval(1.2, 1.15, 1.25)},
            "too strong (saturation 1.20 of the ref",
        ),
        (
            {"contrast_ratio": Interval(0.7, 0.65, 0.75)},
            "too pale (contrast 0.70 of the ref",
        ),
        (
            {"drift_y": Interval(-12, -13, -11)},
            "they have drifted (brightness by −12 of 255 levels)",
        ),
        ({"speckle_db.grey": Interval(4, 3, 5)}, "they are speckled (+4.0 dB of fine noise of colour on grey classes)"),
        (  # the drift of brightness is inside its margin
            {"drift_y": Interval(6, 5, 7), "drift_cr": Interval(4, 3.5, 4.5)},
            "they have drifted (red by +4 of 255 levels)",
        ),
        (
            {"drift_y": Interval(-4, -5, -3), "saturation_ratio.grey": Interval(1.3, 1.25, 1.35)},
            "they have drifted (saturation 1.30 of the reference's on grey classes)",
        ),
        (
            {"contrast_ratio": Interval(1.2, 1.17, 1.23), "saturation_ratio": Interval(0.7, 0.65, 0.75)},
            "too strong (contrast 1.20 of the reference's); they are too pale (saturation 0.70 of the reference's)",
        ),
        (
            {"speckle_db.colour": Interval(-9, -10, -8), "speckle_db.grey": Interval(4, 3, 5)},
            "they are speckled (+4.0 dB of fine noise of colour on grey classes)",
        ),
        (  # both at fault: 1.5 margins of brightness, 2 of red; 2 margins of contrast, 2.5 of saturation
            {"drift_y": Interval(-12, -13, -11), "drift_cr": Interval(-6, -7, -5)},
            "they have drifted (red by −6 of 255 levels)",
        ),
        (
            {"contrast_ratio": Interval(0.7, 0.65, 0.75), "saturation_ratio": Interval(0.75, 0.7, 0.8)},
            "too pale (saturation 0.75 of the ref",
        ),
        ({"drift_y": QUIET}, "Its colours are right."),
        ({"drift_y": Interval(0, -9, 9)}, "Whether its colours are right, more images are needed to tell."),
    ],
)
def test_colour_in_plain_words(measures, part):
    assert part in told(measures=measures)


def test_every_fault_is_told():
    line = GridLine("y", 2, Interval(3.0, 2.5, 3.5), against_reference=True)
    all_told = told(measures={"saturation_ratio": Interval(1.2, 1.15, 1.25)}, lines=[line])
    assert "too strong" in all_told and "a grid of pixels shows (every 2 px, +3.0 dB)" in all_told
    assert told() + " Its colours are right." == told(measures={"drift_y": QUIET})  # of a file of before: no word of it


def test_terms_are_explained_and_all_else_is_escaped():
    text = explained("<b> HF gain of flat noise")
    assert text.startswith("&lt;b&gt; <abbr title=") and text.count("<abbr") == 2
    assert str(explained("annulled HF gains")) == "annulled HF gains"
    assert list(terms_of(["kurtosis ratio", "HF gain, dB", "n", "HF gain"])) == ["kurtosis ratio", "HF gain"]
    assert all(meaning in explained(term) for term, meaning in TERMS.items() if "'" not in meaning)


def test_the_opening_shows_each_picture_above_its_centre():
    images = torch.arange(3 * 3 * 32 * 32).reshape(3, 3, 32, 32).remainder(251).to(torch.uint8)
    (tile, *_) = grids.opening_tiles(images)
    assert tile.shape == (128 + grids.GAP + 128, 128, 3)
    whole, centre = tile[:128:4, ::4], tile[128 + grids.GAP :: 8, ::8]
    assert (whole == images[0].permute(1, 2, 0).numpy()).all()
    assert (centre == images[0, :, 8:24, 8:24].permute(1, 2, 0).numpy()).all()
    assert grids.opening_tiles(images[..., :31]).shape[2] == 4 * 31

    def one(name: str, role: str) -> ImageSet:
        return ImageSet(name, images, None, role, False)  # type: ignore[arg-type]

    teacher, real, students = one("t", "teacher"), one("r", "real"), [one(f"s{i}", "student") for i in range(9)]
    found = grids.opening_sets(teacher, [real, teacher, *students])
    assert [s.name for s in found] == ["t", *(f"s{i}" for i in range(5))]
    assert [s.name for s in grids.opening_sets(teacher, [real, teacher])] == ["t", "r"]
    rows = [grids.Row(label, {}) for label in range(7)]
    assert [row.label for row in grids.opening_rows(rows)] == [0, 3] and grids.opening_rows(rows[:1]) == rows[:1]


def test_at_one_call():
    one = SimpleNamespace(name="dar", facts=replace(ROW.facts, network=NetworkFacts(1, 1000, 0, "digest")))
    against = SimpleNamespace(
        verdict=verdict_of(RIGHT, SOUND, QUIET), gain_db={"HF": RIGHT}, hf_kurtosis_ratio=SOUND, flat_noise_db=QUIET
    )
    against.colour = None
    assert sentence(one, against, "x").startswith("At 1 call, dar has")  # type: ignore[arg-type]
    bare = SimpleNamespace(name="folder", facts=SetFacts())
    assert sentence(bare, against, "x").startswith("folder has as much")  # type: ignore[arg-type]
