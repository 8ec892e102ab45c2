"""The page: complete, self-contained, escaped, readable, and no wider than the screen."""

import html
import io
import json
import math
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from eval.measure.pair import Compared, measure
from eval.measure.provenance import provenance
from eval.measure.results import (
    Bands,
    CodeState,
    Curve,
    Forest,
    ForestComparison,
    Origin,
    Report,
    SeedCurves,
    SeedDifference,
    Skipped,
    jsonable,
)
from eval.metrics.intervals import Interval
from eval.page import grids, sections, style
from eval.page.figures import DAR, REAL, RESIDUAL, TEACHER, _shortened, styles
from eval.page.html import breakable, templates, write_report
from eval.page.summaries import findings
from eval.samples.cost import SamplingCost
from eval.samples.facts import NetworkFacts, SetFacts
from eval.samples.images import UnfitError
from eval.samples.sets import ImageSet
from eval.study.forest import from_file

HOSTILE = "<script>alert('x')</script>\"><img src=http://x.test/a.png onerror=alert(1)>"
CHROMIUM = shutil.which("chromium")
FIGURES = {"gain", "bands", "psd", "maps", "forest", "curves", "opening", "samples", "zoom", "detail"}


def forest() -> Forest:
    gains, unbounded = {"residual": -1.0, "dar": 0.5}, Interval(0.5, -math.inf, math.inf)
    comparison = ForestComparison(
        baseline="residual",
        method=HOSTILE,
        pilot=True,
        p=0.5,
        seeds=[0, 1],
        per_seed=[SeedDifference(seed, gains, Interval(0.5, 0.2, 0.8)) for seed in (0, 1)],
        gain_db=gains,
        difference_db=unbounded,
    )
    return Forest(source=HOSTILE, label="pilot", conclusion=HOSTILE, curve=seed_curves(), comparisons=[comparison])


def seed_curves() -> SeedCurves:
    """Over two frequencies; the band of the difference is unbounded."""
    band = Curve([-0.25, -4.125], [-1.0, -5.0], [0.5, -3.0])
    bare = Curve([0.75, 3.5], [-math.inf] * 2, [math.inf] * 2)
    return SeedCurves([0.1, 0.45], {"residual": band, "dar": band, "difference": bare})


@pytest.fixture(scope="module")
def sets(crops, blur, eight_bit) -> list[ImageSet]:
    images, labels = crops(32, 4, 0)
    other, other_labels = crops(32, 4, 1)
    clean = images.double() / 255
    cost = SamplingCost(2.0, (1.5, 2.5), 5, 16, 1.0, HOSTILE, 1.0)
    facts = SetFacts(network=NetworkFacts(4, 1000, 0, "digest"), cost=cost)
    hostile = SetFacts(folder=HOSTILE, left_out=HOSTILE)
    return [
        ImageSet("real", other, other_labels, "real", False),
        ImageSet("teacher", images, labels, "teacher", True, facts),
        ImageSet("residual", eight_bit(blur(clean, 0.7)), labels, "student", True, facts),
        ImageSet(HOSTILE, eight_bit(blur(clean, 0.3)), labels, "student", True, hostile),
    ]


@pytest.fixture(scope="module")
def folder(sets, tmp_path_factory):
    measurements = measure(Compared(sets[2:], sets[1], sets[0], {0, 3, 4}, {6: HOSTILE}))
    report = replace(
        Report(**vars(measurements)),
        forest=forest(),
        conclusions=[HOSTILE],
        skipped=[Skipped("fid", HOSTILE, HOSTILE)],
        title=f"Title {HOSTILE}",
        provenance=replace(provenance(torch.device("cpu"), 1.0, Origin(HOSTILE)), git=CodeState("a", True)),
    )
    out = tmp_path_factory.mktemp("report")
    write_report(report, sets, out)
    return out


@pytest.fixture(scope="module")
def page(folder) -> str:
    return (folder / "report.html").read_text()


def test_everything_is_written(folder):
    names = {path.name for path in folder.iterdir()}
    assert names == {f"{name}.png" for name in FIGURES} | {"report.json", "report.csv", "report.html"}
    for name in FIGURES:
        assert min(Image.open(folder / f"{name}.png").size) > 200
    result = json.loads((folder / "report.json").read_text())
    assert result["provenance"]["git"]["dirty"] is True and result["schema_version"] == 3


class Tags(HTMLParser):
    """The tags of a page with their attributes, as a browser reads them."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.found.append((tag, dict(attrs)))


def test_nothing_is_fetched_and_nothing_runs(page):
    tags = Tags()
    tags.feed(page)
    names = {tag for tag, _ in tags.found}
    assert not names & {"script", "link", "iframe", "object", "embed", "form", "base", "a", "video", "audio", "source"}
    attributes = {name for _, attrs in tags.found for name in attrs}
    assert not attributes & {"href", "srcset", "action", "poster", "data", "style"}
    assert not any(name.startswith("on") for name in attributes)
    sources = [attrs["src"] for _, attrs in tags.found if "src" in attrs]
    assert len(sources) == len(FIGURES) and all(src.startswith("data:image/png;base64,") for src in sources)
    (css,) = re.findall(r"<style>(.*?)</style>", page, re.S)
    assert not re.search(r"url\(|@import", css)
    (policy,) = [attrs["content"] for _, attrs in tags.found if "http-equiv" in attrs]
    assert "default-src 'none'" in policy and "script" not in policy
    assert "<script" not in page and "&lt;script&gt;" in page


def test_every_figure_has_words_and_numbers(page):
    figures = re.findall(r"<figure.*?</figure><details>.*?</details>", page, re.S)
    assert len(figures) == len(FIGURES) == page.count("<img ")
    for figure in figures:
        (alternative,) = re.findall(r'<img alt="([^"]{40,})" src="data:image/png;base64,', figure)
        assert "<table" in figure.split("</figure>")[1] and "<td>" in figure and alternative


def test_the_order_of_the_page(page):
    order = [
        "Pictures</h2>",
        "residual has lost fine detail",
        '<abbr title="energy of the finest detail',
        '<dl class="terms">',
        "kurtosis ratio</dt>",
        "What was found",
        "Power against the teacher",
        "Gain of each band",
        "Radial power spectrum</h2>",
    ]
    order += ["plane of frequencies", "Seed by seed", "Structure of fine detail", "Samples</h2>", "The centre of"]
    order += ["Fine detail of the same", "All numbers", "Cost of sampling", "What was not measured", "Provenance</h2>"]
    places = [page.index(part) for part in order]
    assert places == sorted(places)
    assert page.index("<figure") < page.index("Verdict</h2>") < page.index("residual has lost fine detail")


def test_tables_hold_the_numbers(page, folder):
    result = json.loads((folder / "report.json").read_text())
    against = next(one for one in result["sets"] if one["name"] == "residual")["against"]["teacher"]
    gain = against["gain_db"]["HF"]
    shown = f"{gain['value']:+.2f}<small>{gain['low']:+.2f} to {gain['high']:+.2f}</small>".replace("-", "−")
    assert shown in page
    distance = against["fd_wavelet"]
    assert f"<small>{distance['value']:.2f}, null {distance['null']:.2f}</small>".replace("-", "−") in page
    assert f"{against['gain_curve_db'][-1]:+.2f}".replace("-", "−") in page
    assert "unbounded" not in page  # both ends missing: no interval is shown


def luminance(colour: str) -> float:
    values = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in values]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("ink, words", [(style.INK, style.WORDS), (style.INK_DARK, style.WORDS_DARK)])
def test_text_can_be_read(ink, words):
    assert contrast("#ffffff", "#000000") == pytest.approx(21) and contrast("#777777", "#ffffff") < 4.5
    texts = [ink["ink"], ink["soft"], *words.values()]
    assert min(contrast(text, ground) for text in texts for ground in (ink["paper"], ink["tint"])) >= 4.5
    css = templates().get_template("style.css").render(style=style)
    assert all(colour in css for colour in texts)


def test_colours_say_what_a_set_is():
    def row(name: str, role: str, seed: int | None = None) -> SimpleNamespace:
        return SimpleNamespace(name=name, role=role, facts=SetFacts(seed=seed))

    rows = [row("real", "real"), row("teacher", "teacher"), row("residual", "student", 0)]
    rows += [row("dar", "student", 0), row("dar_b", "student", 1), row("dar_c", "student", 1)]
    chosen = styles(rows)
    assert [chosen[r.name].colour for r in rows[:5]] == [REAL, TEACHER, RESIDUAL, DAR, DAR]
    assert chosen["dar_c"].colour not in (REAL, TEACHER, RESIDUAL, DAR)
    assert len({(one.colour, one.marker) for one in chosen.values()}) == len(rows)
    assert chosen["residual"].dash != chosen["dar"].dash


def tile(picture: Image.Image, column: int, row: int, zoom: int, side: int = 32) -> torch.Tensor:
    left = grids.ROW_LABEL + column * (128 + grids.GAP)
    top = grids.HEADER + row * (128 + grids.GAP)
    small = picture.crop((left, top, left + 128, top + 128)).resize((side, side), Image.Resampling.NEAREST)
    large = np.asarray(small.resize((128, 128), Image.Resampling.NEAREST))
    assert (large == np.asarray(picture.crop((left, top, left + 128, top + 128)))).all()  # no interpolation
    return torch.from_numpy(np.array(small)).permute(2, 0, 1)


def test_rows_share_their_noise_and_pixels_stay_pixels(folder, sets):
    picture = Image.open(folder / "samples.png").convert("RGB")
    rows = grids.chosen_rows(sets)
    assert len(rows) == 14 and [row.label for row in rows[:4]] == [0, 0, 1, 1]
    for place in (0, 3, 13):
        same = {rows[place].images[one.name] for one in sets if one.paired}
        assert len(same) == 1 and sets[0].labels[rows[place].images["real"]] == rows[place].label
        for column, one in enumerate(sets):
            assert torch.equal(tile(picture, column, place, 4), one.images[rows[place].images[one.name]])
    zoomed = Image.open(folder / "zoom.png").convert("RGB")
    first = sets[1].images[rows[0].images["teacher"]]
    assert torch.equal(tile(zoomed, 1, 0, 8, side=16), first[:, 8:24, 8:24])


def test_rows_without_classes_or_images(sets):
    plain = [
        ImageSet("a", sets[0].images, None, "teacher", False),
        ImageSet("b", sets[0].images[:5], None, "images", False),
    ]
    rows = grids.chosen_rows(plain)
    assert [row.images["a"] for row in rows] == list(range(14)) and rows[4].images["b"] == 4
    assert rows[5].images["b"] is None
    picture = Image.open(io.BytesIO(grids.grid({}, plain, rows, grids.whole_tiles, 4))).convert("RGB")
    assert torch.equal(tile(picture, 1, 4, 4), sets[0].images[4]) and (tile(picture, 1, 5, 4) == 255).all()


def test_a_comparison_file(tmp_path):
    path, known = tmp_path / "compare.json", jsonable(forest())
    (one,), curve = known["comparisons"], known["curve"]
    whole = {"primary": {**one, "curve": curve}, "controls": {"again": one}, "label": "pilot", "conclusion": "none"}
    path.write_text(json.dumps(whole))
    read = jsonable(from_file(path))
    assert read["comparisons"] == [one, one] and read["source"] == str(path) and read["label"] == "pilot"
    assert read["curve"] == curve
    curve["dar"]["low"] = [0.0]
    path.write_text(json.dumps(whole))
    with pytest.raises(UnfitError, match="a curve of 1 values over 2 frequencies"):
        from_file(path)
    curve["dar"]["low"] = [0.0, 1.0]
    one["per_seed"][0]["gain_db"] = "much"
    path.write_text(json.dumps(whole))
    with pytest.raises(UnfitError, match=r"no compare\.json"):
        from_file(path)
    for content in ("", "[]", '{"primary": {}}', '{"primary": {}, "controls": {}, "label": "", "conclusion": ""}'):
        path.write_text(content)
        with pytest.raises(UnfitError, match=r"compare\.json: no compare\.json of eval\.compare"):
            from_file(path)


def test_the_answer_over_seeds_is_told_first():
    def told(conclusion: str | None, *conclusions: str) -> list[str]:
        seeds = None if conclusion is None else replace(forest(), conclusion=conclusion)
        return findings(SimpleNamespace(forest=seeds, conclusions=list(conclusions), discretisation=None))

    assert told("No difference: D = -0.5 dB. More.", "one") == ["No difference: D = \u22120.5 dB.", "one"]
    assert told(None) == [] and told(None, "x.") == ["x."] and told("", "x.") == ["x."]


def browse(folder: Path, page: str, *flags: str, width: int = 1280) -> str:
    """Chromium on a page of our own that holds the report in a frame of this width, since a window may not be as
    narrow as a telephone. The report's own policy lets no script run in it."""
    frame = folder / "frame.html"
    frame.write_text(FRAME.format(width=width, page=html.escape(page, quote=True)))
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", *flags]
    command += [f"--user-data-dir={folder / 'profile'}", f"--window-size={max(width, 500)},900", frame.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed (Debian: chromium)")
FRAME = """<!doctype html><body style="margin:0"><iframe id="f" style="border:0;width:{width}px;height:900px"
 srcdoc="{page}"></iframe><p id="told"></p><script>document.getElementById('f').onload = function () {{
  const d = this.contentDocument, e = d.documentElement;
  const measure = () => [e.scrollWidth, e.clientWidth].join(' ');
  const folded = measure();
  d.querySelectorAll('details').forEach(one => one.open = true);
  document.getElementById('told').textContent = [folded, measure(), d.images.length,
   [...d.images].every(i => i.naturalWidth > 0), d.querySelectorAll('script').length].join(' ');
}};</script>"""


@needs_chromium
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_is_no_wider_than_the_screen(page, tmp_path, width):
    dom = browse(tmp_path, page, "--dump-dom", "--virtual-time-budget=10000", width=width)
    (told,) = re.findall('<p id="told">(.*?)</p>', dom)
    *widths, images, drawn, scripts = told.split()
    assert (images, drawn, scripts) == (str(len(FIGURES)), "true", "0")
    assert widths == [str(width)] * 4  # scroll and client width, folded and with every table open


@needs_chromium
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_is_shown(page, tmp_path, width):
    shot = tmp_path / "page.png"
    browse(tmp_path, page, f"--screenshot={shot}", width=width)
    picture = np.asarray(Image.open(shot).convert("RGB"))[:, :width]
    assert picture.shape == (900, width, 3)
    assert picture.std((1, 2)).astype(bool).mean() > 0.3  # lines with something on them


def test_runs_of_one_arm_are_told_apart_over_their_columns():
    assert grids.header_lines("teacher", 128) == ["teacher"]
    assert grids.header_lines("undistilled, re-noised", 128) == ["undistilled", "re-noised"]
    assert grids.header_lines("undistilled, 2 steps, re-noised", 128) == ["undistilled", "2 steps", "re-noised"]
    assert grids.header_lines("residual_seed0", 128) == ["residual_", "seed0"]
    longer = [grids.header_lines(f"residual_with_a_long_name_seed{seed}", 128) for seed in (0, 1)]
    assert longer[0] != longer[1] and all(len(lines) == 2 and lines[1].startswith("…") for lines in longer)
    assert [len(grids.header_lines(name, 128)) for name in ("x" * 90, "_", "a" * 40 + "_b", "")] == [1, 1, 1, 1]
    shortened = [_shortened(f"residual_with_a_long_name_seed{seed}", 24) for seed in (0, 1)]
    assert [len(one) for one in shortened] == [24, 24] and [one[-5:] for one in shortened] == ["seed0", "seed1"]


def test_a_name_may_break_at_its_joints_and_stays_escaped():
    assert breakable("x_y.least, 0.5") == "x_<wbr>y.<wbr>least, 0.5"
    assert breakable("<b class='a_b'>") == "&lt;b class=&#39;a_<wbr>b&#39;&gt;"


def test_bands_of_no_set_are_not_called_empty():
    report = SimpleNamespace(sets=[], bands=Bands(("B0", "HF"), (0.0, 0.5)))
    assert "no frequency" not in sections.bands(report, b"").caption
