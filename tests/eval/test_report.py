"""The report: complete, self-contained, escaped, and the same for any order of the sets."""

import json
import re

import pytest
import torch
from PIL import Image

from eval.figures import GAP, HEADER, ROW_LABEL
from eval.measure import ImageSet, measure
from eval.page import terminal_table, write_report

HOSTILE = "<script>alert('x')</script>"


@pytest.fixture(scope="module")
def sets(crops, blur, eight_bit):
    images, labels = crops(32, 16, 0)
    other, other_labels = crops(32, 12, 1)
    clean = images.double() / 255
    return {
        "real": ImageSet("real", other, other_labels, "real", False),
        "teacher": ImageSet("teacher", images, labels, "teacher", True, {"steps": 30, "latency_ms_per_image": 12.5}),
        "residual": ImageSet("residual", eight_bit(blur(clean, 0.7)), labels, "student", True, {"loss": float("nan")}),
        "hostile": ImageSet(HOSTILE, eight_bit(blur(clean, 0.3)), labels, "student", True, {HOSTILE: HOSTILE}),
    }


@pytest.fixture(scope="module")
def result(sets):
    others = [sets["residual"], sets["hostile"]]
    return measure(others, sets["teacher"], sets["real"], {0, 3, 4}, 0, class_names={6: HOSTILE})


def row(result: dict, name: str) -> dict:
    return next(one for one in result["sets"] if one["name"] == name)


def test_result_is_strict_json_and_signed_rightly(result):
    json.dumps(result, allow_nan=False)
    assert result["schema_version"] == 1
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
    assert row(result, "residual")["facts"]["loss"] is None


def test_result_does_not_depend_on_the_other_sets(sets, result):
    alone = measure([sets["hostile"]], sets["teacher"], sets["real"], {0, 3, 4}, 0)
    assert row(alone, HOSTILE) == row(result, HOSTILE)


def test_a_second_real_set_is_the_null_of_the_others_and_not_of_itself(crops, sets):
    images, labels = crops(32, 16, 2)
    second = ImageSet("second", images, labels, "null", False)
    measured = measure([second], sets["teacher"], sets["real"], set(), 0)
    own = row(measured, "second")["against"]["real"]["fd_wavelet"]
    assert row(measured, "teacher")["against"]["real"]["fd_wavelet"]["null"] == pytest.approx(own["value"])
    assert own["null"] != pytest.approx(own["value"], rel=1e-3)


def test_grey_classes_stay_out_of_chroma(sets):
    none = measure([], sets["teacher"], sets["real"], set(), 0)
    assert row(none, "teacher")["against"]["real"]["chroma"] is None


def test_report_on_disk(tmp_path, sets, result):
    title = f"Title {HOSTILE} & more"
    write_report(result, list(sets.values()), tmp_path, title, {"command": HOSTILE, "dirty": False})
    names = {path.name for path in tmp_path.iterdir()}
    pictures = {"gain.png", "bands.png", "psd.png", "samples.png", "detail.png"}
    assert names == pictures | {"report.json", "report.html"}
    for name in pictures:
        assert min(Image.open(tmp_path / name).size) > 200
    page = (tmp_path / "report.html").read_text()
    assert "<script" not in page and "&lt;script&gt;" in page
    assert not re.search(r'(?:src|href)="(?!data:image/png;base64,)', page) and "http" not in page
    assert page.count("<img ") == page.count('<img alt="') == 5
    assert page.index("Verdict</h2>") < page.index("<figure") < page.index("Provenance</h2>")
    assert json.loads((tmp_path / "report.json").read_text())["provenance"]["dirty"] is False


def test_samples_are_enlarged_without_interpolation(tmp_path, sets, result):
    write_report(result, [sets["teacher"]], tmp_path, "grid", {})
    grid = Image.open(tmp_path / "samples.png").convert("RGB")
    first = sets["teacher"].images[0]
    box = (ROW_LABEL, HEADER, ROW_LABEL + 128, HEADER + 128)
    shown = torch.tensor(list(grid.crop(box).resize((32, 32), Image.Resampling.NEAREST).tobytes())).reshape(32, 32, 3)
    assert torch.equal(shown.permute(2, 0, 1).to(torch.uint8), first)
    assert grid.getpixel((ROW_LABEL + 128 + GAP // 2, HEADER + 5)) == (255, 255, 255)


def test_terminal_table(result):
    table = terminal_table(result)
    assert "against teacher" in table and "against real" in table
    line = next(line for line in table.splitlines() if line.startswith("residual"))
    gain = row(result, "residual")["against"]["teacher"]["gain_db"]["HF"]["value"]
    assert line.split()[1:3] == ["reduced", f"{gain:+.2f}"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.zeros(8, 3, 32, 32)}, "odd: expected uint8"),
        ({"images": torch.zeros(8, 3, 48, 48, dtype=torch.uint8)}, "odd: images"),
        ({"labels": torch.zeros(7)}, "odd: 8 images"),
        ({"name": "teacher"}, "two sets are called 'teacher'"),
    ],
)
def test_sets_that_do_not_fit(sets, change, message):
    images = torch.zeros(8, 3, 32, 32, dtype=torch.uint8)
    fields = {"name": "odd", "images": images, "labels": torch.zeros(8), "role": "student", "paired": False} | change
    with pytest.raises(ValueError, match=re.escape(message)):
        measure([ImageSet(**fields)], sets["teacher"], sets["real"], set(), 0)
