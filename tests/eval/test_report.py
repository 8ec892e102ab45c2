"""Measuring sets: signs, nulls, independence of the other sets and of batches, what is skipped and why."""

import csv
import io
import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from eval.measure import pair
from eval.measure import suite as distances
from eval.measure.ledger import Ledger
from eval.measure.pair import Compared, ImageSet, jsonable
from eval.measure.results import Against, Report
from eval.measure.suite import Sources, Suite, prepare
from eval.metrics import features, perceptual
from eval.metrics.power_map import Directions, sector_means
from eval.page.columns import terminal_table
from eval.page.csv import as_csv, numbers
from eval.samples import sets as sets_module
from eval.samples.cost import SamplingCost
from eval.samples.facts import SetFacts
from eval.samples.images import UnfitError
from eval.samples.parallel import torch_threads
from eval.samples.sets import read_set

HOSTILE = "<script>alert('x')</script>"


def measure(compared: Compared, *how, **named) -> dict:
    """What report.json holds of it."""
    return jsonable(pair.measure(compared, *how, **named))


@pytest.fixture(scope="module")
def sets(crops, blur, eight_bit):
    images, labels = crops(32, 16, 0)
    other, other_labels = crops(32, 12, 1)
    clean = images.double() / 255
    known, unknown = (SamplingCost(12.5, (12.0, 13.0), 5, 16, 1.0, "", flops) for flops in (1.0, float("nan")))
    return {
        "real": ImageSet("real", other, other_labels, "real", False),
        "teacher": ImageSet("teacher", images, labels, "teacher", True, SetFacts(cost=known)),
        "residual": ImageSet("residual", eight_bit(blur(clean, 0.7)), labels, "student", True, SetFacts(cost=unknown)),
        "hostile": ImageSet(HOSTILE, eight_bit(blur(clean, 0.3)), labels, "student", True, SetFacts(folder=HOSTILE)),
    }


@pytest.fixture(scope="module")
def suite(crops):
    images, labels = crops(32, 10, 7)
    return prepare(("offline",), (images, labels), 0, Ledger(), Sources(), "{}")


@pytest.fixture(scope="module")
def report(sets, suite) -> Report:
    others = [sets["residual"], sets["hostile"]]
    compared = Compared(others, sets["teacher"], sets["real"], {0, 3, 4}, {6: HOSTILE})
    return Report(**vars(pair.measure(compared, 0, suite)))


@pytest.fixture(scope="module")
def result(report) -> dict:
    return jsonable(report)


def row(result: dict, name: str) -> dict:
    return next(one for one in result["sets"] if one["name"] == name)


def test_comparisons_side_by_side_find_what_one_after_the_other_finds(sets, suite):
    """Numbers bit for bit, and what was skipped in the same order: here what needs sets of equal size."""
    one, found = sets["residual"], []
    fewer = replace(one, name="fewer", images=one.images[:50], labels=one.labels[:50], paired=False)
    others = [one, fewer, sets["hostile"]]
    for threads in (1, 2):
        ledger = Ledger()
        with torch_threads(threads):
            result = measure(Compared(others, sets["teacher"], sets["real"], {0, 3, 4}), 0, suite, ledger)
        found.append((result, ledger.skipped))
    assert found[0] == found[1] and "fewer" in {skipped.name for skipped in found[0][1]}


def test_result_is_strict_json_and_signed_rightly(result):
    json.dumps(result, allow_nan=False)
    assert result["schema_version"] == 3
    residual = row(result, "residual")["against"]
    for key in ("teacher", "real"):
        against = residual[key]
        assert against["gain_db"]["HF"]["high"] < -3 and against["lsd_signed"] < -1 < 1 < against["lsd"]
        distance = against["fd_wavelet"]
        assert distance["excess"] == pytest.approx(distance["value"] - distance["null"])
        assert distance["comparable_to_published"] is False
        assert against["hf_gain_class_median"] < -3
    assert residual["teacher"]["gain_db_median"]["HF"] < -3 and residual["real"]["gain_db_median"] is None
    assert residual["teacher"]["chroma"]["cb"]["HF"]["value"] < -3
    assert row(result, "teacher")["against"]["teacher"] is None
    assert row(result, "residual")["facts"]["gflops_per_image"] is None


def test_result_does_not_depend_on_the_other_sets(sets, result, suite):
    alone = measure(Compared([sets["hostile"]], sets["teacher"], sets["real"], {0, 3, 4}), 0, suite)
    assert row(alone, HOSTILE) == row(result, HOSTILE)


def test_a_second_real_set_is_the_null_of_the_others_and_not_of_itself(crops, sets):
    images, labels = crops(32, 16, 2)
    second = ImageSet("second", images, labels, "null", False)
    measured = measure(Compared([second], sets["teacher"], sets["real"], set()))
    own = row(measured, "second")["against"]["real"]["fd_wavelet"]
    assert row(measured, "teacher")["against"]["real"]["fd_wavelet"]["null"] == pytest.approx(own["value"])
    assert own["null"] != pytest.approx(own["value"], rel=1e-3)


def test_every_distance_stands_beside_its_null(report, result):
    """Also against the teacher, of which there is one set alone: its halves tell what another would read."""
    for name in ("residual", HOSTILE):
        against = row(result, name)["against"]["teacher"]
        distances = [against[key] for key in ("fd_wavelet", "fd_pca", "fd_classifier")] + against["sliced_wasserstein"]
        assert all(one["null"] > 0 for one in distances) and against["modes"]["null"] > 0
        for near in against["neighbours"].values():
            assert abs(near["null"]["kid"]) < 3 * near["null"]["kid_std"] and near["null"]["images"] == 56
        assert 0 < against["lsd_null"] < against["lsd"] / (3 if name == "residual" else 1)  # the other hardly differs
    metrics = {one.metric: one for one in numbers(report) if one.name == "residual" and one.against == "teacher"}
    assert metrics["lsd"].null > 0 and metrics["kid.fd_wavelet"].null is not None
    assert metrics["recall.fd_wavelet"].null is None  # that of half as many images is no null


def test_the_null_of_a_spectrum_is_what_a_second_set_reads(crops, sets):
    images, labels = crops(32, 16, 5)
    second = ImageSet("second", images, labels, "null", False)
    measured = measure(Compared([second], sets["teacher"], sets["real"], set()))
    halves, own = row(measured, "second")["against"]["teacher"], row(measured, "second")["against"]["real"]
    assert row(measured, "teacher")["against"]["real"]["lsd_null"] == pytest.approx(own["lsd"])
    assert halves["lsd_null"] == pytest.approx(halves["lsd"], rel=0.6)  # both are the noise of two real sets


def test_grey_classes_stay_out_of_chroma(sets):
    none = measure(Compared([], sets["teacher"], sets["real"], set()))
    assert row(none, "teacher")["against"]["real"]["chroma"] is None


def test_metrics_beside_the_spectrum_are_signed_rightly(result):
    against = row(result, "residual")["against"]["teacher"]
    assert against["slope_hf_difference"] < -1 and against["hfer_difference"]["high"] < 0  # blurred: steeper
    assert against["map_sectors_db"]["B4"]["x"] < -3 > against["map_sectors_db"]["B4"]["y"]
    assert against["sliced_wasserstein"][0]["excess"] > 0.05 > against["sliced_wasserstein"][-1]["excess"]
    assert against["fd_pca"]["excess"] < 0.05 * against["fd_wavelet"]["excess"]  # blind to blur, each in its units
    assert np.array(against["wavelet_kurtosis_ratio"]).shape == (3, 3)
    near = against["neighbours"]
    assert (
        near["fd_wavelet"]["recall"] < near["fd_pca"]["recall"]
        and near["fd_wavelet"]["kid"] > 10 * near["fd_pca"]["kid"]
    )
    assert against["modes"]["least_share_ratio"] > 0 and against["modes"]["agreement"] > 0.5
    assert against["fd_classifier"]["comparable_to_published"] is False


def test_a_lattice_is_found_on_its_line_and_side(crops):
    images, labels = crops(32, 12, 3)
    lattice = images.clone().int()
    lattice[..., ::4] += 12  # columns of period 4
    spoiled = ImageSet("lattice", lattice.clamp(0, 255).to(torch.uint8), labels, "student", True)
    measured = measure(Compared([spoiled], ImageSet("teacher", images, labels, "teacher", True)))
    lines = row(measured, "lattice")["against"]["teacher"]["grid_lines"]
    words = {(line["axis"], line["period"]): line["word"] for line in lines}
    assert words["x", 4] == "peak" and words["y", 4] == "none" and words["y", 2] == "none"
    sectors = row(measured, "lattice")["against"]["teacher"]["map_sectors_db"]
    assert sectors["B2"]["x"] > sectors["B2"]["y"] + 0.3


def test_sectors_divide_the_plane():
    size = 32
    f = torch.fft.fftshift(torch.fft.fftfreq(size, dtype=torch.float64))
    means = sector_means(f.abs()[None, :].expand(size, size))  # the horizontal frequency itself
    assert means["B0"] == Directions(None, None, None)
    assert means["B3"].x > 0.25 > means["B3"].diagonal > means["B3"].y >= 0
    assert means["B3"].y < 0.5 * math.sin(math.pi / 8)


def test_every_number_is_in_the_csv(report):
    rows = list(csv.DictReader(io.StringIO(as_csv(report))))
    assert len(rows) == len(numbers(report))
    (gain,) = [r for r in rows if (r["set"], r["against"], r["metric"]) == ("residual", "teacher", "gain_db.y.HF")]
    assert float(gain["low"]) < float(gain["value"]) < float(gain["high"]) < -3 and gain["images"] == "112"
    (distance,) = [r for r in rows if (r["set"], r["against"], r["metric"]) == ("residual", "real", "fd_pca")]
    assert distance["null"] and distance["comparable_to_published"] == "False" and distance["low"] == ""
    metrics = {r["metric"] for r in rows}
    assert {"grid_peak_db.x.2", "sliced_wasserstein.1", "kid.fd_pca", "recall.fd_classifier", "slope"} <= metrics
    assert not any(r["metric"].startswith("gain_db.y.B0") for r in rows)  # empty at 32 px


def test_batches_do_not_change_the_result(sets, monkeypatch):
    both = sets["residual"], sets["teacher"]
    whole = measure(Compared(both[:1], both[1]))
    monkeypatch.setattr(sets_module, "BATCH", 17)
    split = measure(Compared(both[:1], both[1]))
    ours, theirs = (row(r, "residual")["against"]["teacher"] for r in (split, whole))
    assert ours["gain_db"]["HF"]["value"] == pytest.approx(theirs["gain_db"]["HF"]["value"], abs=1e-9)
    assert ours["flat_noise_db"]["value"] == pytest.approx(theirs["flat_noise_db"]["value"], abs=1e-9)
    assert ours["fd_wavelet"]["value"] == pytest.approx(theirs["fd_wavelet"]["value"], rel=1e-9)


def test_a_folder_that_does_not_fit_in_memory_reads_the_same(tmp_path, sets, monkeypatch):
    np.save(tmp_path / "all.npy", sets["residual"].images.numpy())
    held = read_set(str(tmp_path))
    monkeypatch.setattr(sets_module, "IN_MEMORY", 0)
    streamed = read_set(str(tmp_path))
    assert isinstance(held.images, torch.Tensor) and not isinstance(streamed.images, torch.Tensor)
    ours, theirs = (measure(Compared([one], sets["teacher"])) for one in (held, streamed))
    ours, theirs = (row(r, tmp_path.name) for r in (ours, theirs))
    assert ours == theirs
    assert ours["against"]["teacher"]["hf_gain_by_class"] == {}  # classes are not known
    gain = ours["against"]["teacher"]["gain_db"]["HF"]
    assert gain["value"] == pytest.approx(
        row(measure(Compared([sets["residual"]], sets["teacher"])), "residual")["against"]["teacher"]["gain_db"]["HF"][
            "value"
        ]
    )


def test_labels_beside_a_folder(tmp_path, sets):
    np.save(tmp_path / "all.npy", sets["residual"].images[:8].numpy())
    (tmp_path / "samples.json").write_text(json.dumps({"labels": list(range(8))}))
    assert read_set(str(tmp_path)).labels.tolist() == list(range(8))
    (tmp_path / "samples.json").write_text(json.dumps({"labels": [1, 2]}))
    with pytest.raises(UnfitError, match="2 labels for 8 images"):
        read_set(str(tmp_path))
    for said in ({}, {"labels": 3}, {"labels": [10**30] * 8}, {"labels": ["a"] * 8}, {"labels": [0.5] * 8}, []):
        (tmp_path / "samples.json").write_text(json.dumps(said))
        with pytest.raises(UnfitError, match="no list of labels"):
            read_set(str(tmp_path))
    (tmp_path / "samples.json").write_text(json.dumps({"labels": list(range(8))}), encoding="utf-8-sig")
    assert read_set(str(tmp_path)).labels.tolist() == list(range(8))


def test_a_metric_that_fails_leaves_the_others(sets):
    def broken(images):
        out = images.float().mean((1, 2, 3))[:, None].repeat(1, 2)
        out[0] = float("nan")
        return out

    ledger = Ledger()
    bad = Suite((features.wavelet(), features.Extractor("fd_broken", broken)))
    small = ImageSet("small", sets["residual"].images[:40], sets["residual"].labels[:40], "student", False)
    measured = measure(Compared([small], sets["teacher"], sets["real"], set()), 0, bad, ledger)
    assert row(measured, "small")["against"]["teacher"]["fd_wavelet"]["value"] > 0
    told = {(one.metric, one.name): one.reason for one in ledger.skipped}
    assert "not finite" in told["fd_broken", "small"] and "not finite" in told["fd_broken", "teacher"]
    unequal = [one.reason for one in ledger.skipped if (one.metric, one.name) == ("precision and recall", "small")]
    assert any("40 images in small, 112 in teacher; take the first 40" in reason for reason in unequal)
    near = row(measured, "small")["against"]["teacher"]["neighbours"]["fd_wavelet"]
    assert near["precision"] is None and near["kid"] > 0 and near["kid_subset_size"] == 20
    assert "fd_broken" not in row(measured, "small")["against"]["teacher"]


@pytest.mark.parametrize("metrics, requested", [(("fid", "lpips", "clip"), True), (("auto",), False)])
def test_weights_that_are_missing_are_told(sets, tmp_path, monkeypatch, metrics, requested):
    monkeypatch.setenv("DMD_DAR_WEIGHTS_DIR", str(tmp_path))
    monkeypatch.setattr(distances, "find", lambda weights: None)
    monkeypatch.setattr("eval.metrics.weight_files.find", lambda weights: None)
    ledger = Ledger()
    suite = prepare(metrics, (sets["real"].images, None), 0, ledger, Sources(), "{}")
    told = {one.metric: one for one in ledger.skipped if one.metric != "fd_classifier"}
    assert {"fid", "lpips", "clip"} <= told.keys()
    assert all(one.requested is requested and "DMD_DAR_WEIGHTS_DIR" in one.reason for one in told.values())
    assert [one.name for one in suite.extractors] == ["fd_wavelet", "fd_pca"]


def test_metrics_with_weights_stand_beside_the_others(sets, tmp_path, monkeypatch):
    """Networks of a few numbers in place of the real ones: what is asked for reaches its row, its null and the CSV."""

    def means(images):
        return images.double().mean((2, 3)) / 255

    fake = features.Extractor("fid", means, comparable_to_published=True, native_size=32)
    monkeypatch.setattr(distances.inception, "fid", lambda path, download, device: fake)
    metric = perceptual.Lpips(lambda a, b: (a - b).abs().mean((1, 2, 3)), "cpu", {})
    monkeypatch.setattr(perceptual, "load_lpips", lambda allow_download, device: metric)
    monkeypatch.setattr(perceptual, "load_clip", lambda allow_download, device: "clip")
    monkeypatch.setattr(perceptual, "clip_score", scored)
    np.savez(tmp_path / "known.npz", mu=np.full(3, 0.5), sigma=0.01 * np.eye(3))
    ledger, known = Ledger(), str(tmp_path / "known.npz")
    fit = sets["real"].images, None
    asked = prepare(("fid", "lpips", "clip"), fit, 0, ledger, Sources(statistics=known), "a photo of {}")
    compared = Compared([sets["residual"]], sets["teacher"], sets["real"], set(), NAMES)
    report = Report(**vars(pair.measure(compared, 0, asked, ledger)))
    measured = jsonable(report)
    assert {one.metric for one in ledger.skipped if one.requested} == {"precision and recall"} and not asked.small
    one = row(measured, "residual")
    assert one["against"]["real"]["fid"]["comparable_to_published"]
    assert not one["against"]["teacher"]["fid"]["comparable_to_published"]  # published ones are against real images
    known_mean = means(sets["residual"].images).mean(0)
    assert one["fid_npz"]["value"] > float((known_mean - 0.5).square().sum()) and one["fid_npz"]["null"] is None
    assert one["against"]["teacher"]["lpips_paired"]["value"] > 0 and one["against"]["real"]["lpips_paired"] is None
    assert one["lpips_diversity"]["value"] < row(measured, "teacher")["lpips_diversity"]["value"]  # blurred
    assert one["clip"]["value"] == 1.0 and one["clip"]["standard_error"] == 0.0
    metrics = {number.metric for number in numbers(report) if number.name == "residual"}
    assert {"fid", "fid_npz", "kid.fid", "lpips_paired", "lpips_diversity", "clip"} <= metrics


NAMES = {0: "x", **{label: str(label) for label in range(1, 7)}}


def scored(clip, images, prompts):
    assert (
        clip == "clip" and len(images) == len(prompts) and {prompts[0], prompts[-1]} == {"a photo of x", "a photo of 6"}
    )
    return perceptual.ClipScore(1.0, np.ones(len(images)), {"model": "none"})


def test_statistics_without_fid_or_pickled_are_told(tmp_path, sets):
    np.savez(tmp_path / "good.npz", mu=np.zeros(3), sigma=np.eye(3))
    np.savez(tmp_path / "bad.npz", mu=np.array([{}], dtype=object), sigma=np.eye(3))
    for name, reason in (("good", "FID itself was not measured"), ("bad", "pickles are refused")):
        ledger = Ledger()
        prepare(("offline",), (sets["real"].images, None), 0, ledger, Sources(statistics=str(tmp_path / f"{name}.npz")))
        assert any(reason in one.reason for one in ledger.skipped)


def test_terminal_table(report, result):
    table = terminal_table(report)
    assert "against teacher" in table and "against real" in table
    line = next(line for line in table.splitlines() if line.startswith("residual"))
    gain = row(result, "residual")["against"]["teacher"]["gain_db"]["HF"]["value"]
    assert re.split("  +", line)[1:4] == ["reduced", "colour ok", f"{gain:+.2f}"]


def test_colour_stands_in_every_table(report, result):
    """Each measure with its interval and null, and a fault of its own name; a set of itself has none."""
    against = row(result, "residual")["against"]["teacher"]
    told = {one.metric: one for one in numbers(report) if one.name == "residual" and one.against == "teacher"}
    assert {name.partition(".")[2] for name in told if name.startswith("colour.")} == set(against["colour"]["measures"])
    for name, one in against["colour"]["measures"].items():
        number = told[f"colour.{name}"]
        assert (number.value, number.low, number.high, number.null) == tuple(
            pytest.approx(one[end]) for end in ("value", "low", "high", "null")
        )
    assert {one["null"] > 0 for name, one in against["colour"]["measures"].items() if "grey" not in name} == {True}
    assert told["colour_fault.grid"].value == 0
    faulty = replace(report.row("residual").against.teacher.colour.verdict, word="grid", faults=("grid",))
    changed = replace(report.row("residual").against.teacher.colour, verdict=faulty)
    student = report.row("residual")
    student = replace(student, against=Against(replace(student.against.teacher, colour=changed)))
    spoiled = replace(report, sets=[student])
    assert re.search(r"residual +reduced +grid ", terminal_table(spoiled))
    assert [one.value for one in numbers(spoiled) if one.metric == "colour_fault.grid"] == [1.0]
    old = replace(student, against=Against(replace(student.against.teacher, colour=None)))
    before = replace(report, sets=[old])
    assert re.search(r"residual +reduced +– ", terminal_table(before))
    assert not [one for one in numbers(before) if one.metric.startswith("colour")]


BLACK = torch.zeros(8, 3, 48, 48, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.zeros(8, 3, 32, 32)}, "odd: expected uint8"),
        ({"images": BLACK}, "odd: images of 48x48 px, but 32x32 px in"),
        ({"images": BLACK[:2, :, :32, :32], "labels": None}, "odd: 2 images are too few"),
        ({"labels": torch.zeros(7)}, "odd: 8 images and labels (7,)"),
        ({"name": "teacher"}, "two sets are called 'teacher'"),
    ],
)
def test_sets_that_do_not_fit_are_left_out_and_told(sets, change, message):
    images = torch.zeros(8, 3, 32, 32, dtype=torch.uint8)
    fields = {"name": "odd", "images": images, "labels": torch.zeros(8), "role": "student", "paired": False} | change
    ledger = Ledger()
    measured = measure(Compared([ImageSet(**fields), sets["residual"]], sets["teacher"], None, set()), ledger=ledger)
    assert [one["name"] for one in measured["sets"]] == ["teacher", "residual"]
    assert [one.reason[: len(message)] for one in ledger.skipped] == [message]
    assert measured["skipped"][0]["metric"] == "every metric" and measured["skipped"][0]["requested"]


def test_a_reference_that_does_not_fit_stops_the_report(sets):
    tiny = ImageSet("tiny", torch.zeros(8, 3, 16, 16, dtype=torch.uint8), None, "teacher", False)
    with pytest.raises(UnfitError, match="tiny: images of 16x16 px; spectra need 32 px"):
        measure(Compared([], tiny))
