"""A report on disk: report.html (self-contained), report.json and the figures as PNG; and the table of a terminal."""

import base64
import html
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dmd_dar.atomic import write_atomic
from eval.figures import figures
from eval.measure import CHROMA, ImageSet, jsonable

NOTHING = "–"
ALONE = {  # heading and digits
    "slope": ("slope", 2),
    "slope_hf": ("slope above 0.2", 2),
    "hfer": ("energy above 1/4", 4),
    "hf_kurtosis": ("HH kurtosis", 2),
    "parent_child_corr": ("parent-child correlation", 3),
}

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #57606a; --line: #d5dae0; --paper: #fff; --tint: #f4f6f8; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ed; --soft: #9aa4af; --line: #3a414a; --paper: #15181c; --tint: #1f242a; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem clamp(1rem, 4vw, 3rem) 4rem; max-width: 84rem; color: var(--ink);
  background: var(--paper); font: 1rem/1.55 system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: .5rem 0; }
h2 { font-size: 1.2rem; margin: 2.6rem 0 .6rem; }
p, li { max-width: 46rem; }
.soft, figcaption { color: var(--soft); font-size: .92rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem; }
th, td { padding: .4rem 0 .4rem 1.1rem; text-align: right; border-bottom: 1px solid var(--line); vertical-align: top;
  white-space: nowrap; }
th { font-weight: 600; color: var(--soft); vertical-align: bottom; white-space: normal; line-height: 1.25; }
th:first-child, td:first-child { text-align: left; color: var(--ink); padding-left: 0; }
.facts td { white-space: normal; overflow-wrap: anywhere; max-width: 18rem; }
.facts td:first-child { white-space: nowrap; overflow-wrap: normal; max-width: none; }
.verdicts :is(th, td):nth-child(2) { text-align: left; }
td small { display: block; color: var(--soft); }
.verdict { display: inline-block; padding: 0 .55rem; border-radius: 1rem; border: 1.5px solid; font-weight: 600; }
.preserved { color: #00794f; } .reduced { color: #c04400; } .inflated { color: #a06a00; }
.energy-only { color: #a8437f; } .inconclusive { color: var(--soft); }
@media (prefers-color-scheme: dark) {
  .preserved { color: #3fd6a5; } .reduced { color: #ff8f4d; } .inflated { color: #f0b429; }
  .energy-only { color: #e79cc8; }
}
figure { margin: 1rem 0 2rem; }
figure img { display: block; width: 100%; height: auto; background: #fff; border-radius: 6px; }
figure.chart img { min-width: 36rem; max-width: 60rem; padding: .5rem; }
figure.grid img { width: auto; max-width: max(100%, 56rem); padding: .5rem; }
pre { background: var(--tint); padding: 1rem; border-radius: 6px; overflow-x: auto; font-size: .85rem; }
dt { font-weight: 600; } dd { margin: 0 0 .6rem; max-width: 46rem; color: var(--soft); }
"""

FIGURES = (
    (
        "gain",
        "Power against the teacher",
        "Radial power of luma in dB against the teacher's samples. Inside the blue strip a frequency counts as "
        "preserved; below it detail is lost, above it something was added.",
    ),
    (
        "bands",
        "Gain of each band",
        "The same pooled over bands, with 95 % bootstrap intervals over images. HF, shaded, decides the verdict. "
        "At 32 px no frequency falls in B0.",
    ),
    ("psd", "Radial power spectrum", "Luma, periodic Hann window, both axes logarithmic."),
    (
        "samples",
        "Samples",
        "A row is a class; the same place in two blocks is the same noise seed, except for real images. Pixels are "
        "enlarged without interpolation.",
    ),
    (
        "detail",
        "Fine detail of the same samples",
        "Luma without its coarse wavelet approximation, around mid-grey; one amplification for all sets, so flat grey "
        "is lost detail.",
    ),
)

GLOSSARY = (
    (
        "HF gain",
        "10 log10 of the energy above 1/4 cycle per pixel over the reference's, pooled over images. Pairwise "
        "median: the same for each pair of samples with equal noise and class.",
    ),
    (
        "Kurtosis ratio",
        "Ratio of the medians of the excess kurtosis of the finest diagonal wavelet band. Edges give "
        "heavy tails, noise does not: near 0 the energy is there but the structure is not.",
    ),
    ("Flat noise", "Fine energy in the flattest tenth of 8-px patches against the reference."),
    (
        "FD wavelet over null",
        "Squared Frechet distance over 20 wavelet statistics in units of the reference's spread, "
        "minus its null: what another set of the reference's source and this size would read. It is not an FID and "
        "comparable to no published number.",
    ),
    ("LSD", "Root mean square of the curve in dB over logarithmic frequency, and its signed mean."),
    ("Diversity", "Mean pixel distance within a class against the reference's, the least of the classes."),
    (
        "Verdict",
        "preserved: HF gain and structure within their margins. reduced, inflated: the gain is outside. energy "
        "only: the gain is right and the structure wrong. inconclusive: an interval straddles a margin.",
    ),
)


@dataclass(frozen=True)
class Column:
    """A column of the summary: a heading, the number and, for the page, a smaller line under it."""

    heading: str
    number: Callable[[dict, dict], str]
    detail: Callable[[dict, dict], str] = lambda row, against: ""


def _number(value: float | None, digits: int = 2, signed: bool = False) -> str:
    if value is None:
        return NOTHING
    return f"{round(value, digits) + 0.0:{'+' if signed else ''}.{digits}f}"  # + 0.0 turns -0.0 into 0.0


def _range(interval: dict, signed: bool = False) -> str:
    if interval["low"] is None:
        return ""
    return f"{_number(interval['low'], signed=signed)} to {_number(interval['high'], signed=signed)}"


def _interval_column(heading: str, key: Callable[[dict], dict], signed: bool) -> Column:
    return Column(
        heading,
        lambda row, against: _number(key(against)["value"], signed=signed),
        lambda row, against: _range(key(against), signed),
    )


COLUMNS = (
    _interval_column("HF gain, dB", lambda against: against["gain_db"]["HF"], True),
    _interval_column("kurtosis ratio", lambda against: against["hf_kurtosis_ratio"], False),
    _interval_column("flat noise, dB", lambda against: against["flat_noise_db"], True),
    Column(
        "FD wavelet over null",
        lambda row, against: _number(against["fd_wavelet"]["excess"]),
        lambda row, against: f"{_number(against['fd_wavelet']['value'])} - {_number(against['fd_wavelet']['null'])}",
    ),
    Column(
        "LSD, dB",
        lambda row, against: _number(against["lsd"]),
        lambda row, against: f"mean {_number(against['lsd_signed'], signed=True)}",
    ),
    Column(
        "diversity",
        lambda row, against: _number(against["diversity_ratio"]["pixels"]["least"]),
        lambda row, against: f"median {_number(against['diversity_ratio']['pixels']['median'])}",
    ),
    Column("ms per image", lambda row, against: _fact(row["facts"].get("latency_ms_per_image"))),
    Column("n", lambda row, against: str(row["images"])),
)


def _fact(value: Any) -> str:
    if value is None:
        return NOTHING
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) else json.dumps(value)


def terminal_table(result: dict) -> str:
    """The verdicts against the teacher, then against real images, as text in aligned columns."""
    tables = []
    for key in ("teacher", "real"):
        lines = [["against " + result[key], "verdict", *(column.heading for column in COLUMNS)]]
        for row in result["sets"]:
            against = row["against"][key]
            if against is not None:
                cells = [column.number(row, against) for column in COLUMNS]
                lines.append([row["name"], against["verdict"]["word"], *cells])
        widths = [max(len(line[place]) for line in lines) for place in range(len(lines[0]))]
        tables.append("\n".join(_aligned(line, widths) for line in lines))
    return "\n\n".join(tables)


def _aligned(cells: list[str], widths: list[int]) -> str:
    left = [cell.ljust(width) for cell, width in zip(cells[:2], widths[:2], strict=True)]
    right = [cell.rjust(width) for cell, width in zip(cells[2:], widths[2:], strict=True)]
    return "  ".join(left + right).rstrip()


def write_report(
    result: dict, sets: Sequence[ImageSet], out_dir: str | Path, title: str, provenance: dict[str, Any]
) -> None:
    """Writes report.html, report.json and one PNG per figure into `out_dir`, each atomically.

    sets: those to show in the grids, in this order. provenance: JSON-able facts about the run, printed last.
    """
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    drawn = figures(result, sets)
    for name, png in drawn.items():
        write_atomic(out_dir / f"{name}.png", png)
    whole = {**result, "title": title, "provenance": jsonable(provenance)}
    write_atomic(out_dir / "report.json", json.dumps(whole, indent=1, allow_nan=False))
    write_atomic(out_dir / "report.html", page(whole, drawn))


def page(result: dict, drawn: dict[str, bytes]) -> str:
    """The whole HTML document; every text that comes from outside is escaped."""
    title = html.escape(result["title"])
    sections = [
        f"<h1>{title}</h1>",
        _summary(result, "teacher"),
        _summary(result, "real"),
        _conclusions(result),
        *(_figure(drawn[name], name, heading, caption) for name, heading, caption in FIGURES),
        _bands(result),
        _classes(result),
        _alone(result),
        _facts(result),
        "<h2>How to read the numbers</h2><dl>"
        + "".join(f"<dt>{term}</dt><dd>{html.escape(text)}</dd>" for term, text in GLOSSARY)
        + "</dl>",
        f"<h2>Provenance</h2><pre>{html.escape(json.dumps(result['provenance'], indent=1, ensure_ascii=False))}</pre>",
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{STYLE}</style></head>\n<body>\n" + "\n".join(sections) + "\n</body></html>\n"
    )


def _conclusions(result: dict) -> str:
    """The sentences that the report's command adds; nothing where there are none."""
    items = "".join(f"<li>{html.escape(text)}</li>" for text in result.get("conclusions", []))
    return f"<h2>What was found</h2><ul>{items}</ul>" if items else ""


def _summary(result: dict, key: str) -> str:
    rows, notes = [], []
    for row in result["sets"]:
        against = row["against"][key]
        if against is None:
            continue
        word, name = against["verdict"]["word"], html.escape(row["name"])
        label = html.escape(str(row["facts"].get("label", "")))
        badge = f'<span class="verdict {word.replace(" ", "-")}">{word}</span>'
        cells = [f"{column.number(row, against)}<small>{column.detail(row, against)}</small>" for column in COLUMNS]
        rows.append([f"{name}<small>{label}</small>" if label else name, badge, *map(_minus, cells)])
        note = html.escape(_minus(_note(against, row["images"])))
        notes.append(f"<li>{name}: {note}</li>")
    heading = "Verdict" if key == "teacher" else "The same against real images"
    return (
        f"<h2>{heading}</h2><p class='soft'>Each set against {html.escape(result[key])}; "
        "small print: 95 % intervals and parts.</p>"
        + _table(["set", "verdict", *(column.heading for column in COLUMNS)], rows, kind="verdicts")
        + f"<ul class='soft'>{''.join(notes)}</ul>"
    )


def _note(against: dict, images: int) -> str:
    note = against["verdict"]["reason"]
    if (against["images_for_quarter_db"] or 0) > images:
        note += f"; about {against['images_for_quarter_db']} images would bring the gain's interval to ±0.25 dB"
    if against["class_share_gap"] > 0.02:
        note += f"; class shares differ by up to {100 * against['class_share_gap']:.0f} %"
    return note + "."


def _minus(text: str) -> str:
    """A hyphen before a digit, or between two numbers, becomes a minus sign."""
    return re.sub(r"-(?= ?\d)", "−", text)


def _table(headings: list[str], rows: list[list[str]], kind: str = "") -> str:
    """A table from cells that are HTML already."""
    head = "".join(f"<th>{heading}</th>" for heading in headings)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _figure(png: bytes, name: str, heading: str, caption: str) -> str:
    kind = "grid" if name in ("samples", "detail") else "chart"
    source = base64.b64encode(png).decode("ascii")
    return (
        f'<h2>{heading}</h2><figure class="{kind}"><figcaption>{caption}</figcaption><div class="wide">'
        f'<img alt="{heading}. {caption}" src="data:image/png;base64,{source}"></div></figure>'
    )


def _classes(result: dict) -> str:
    """HF gain against the teacher of each class, and its median."""
    compared = [row for row in result["sets"] if row["against"]["teacher"] is not None]
    labels = sorted({label for row in compared for label in row["against"]["teacher"]["hf_gain_by_class"]}, key=int)
    names = [html.escape(str(result["class_names"].get(label, f"class {label}"))) for label in labels]
    rows = []
    for row in compared:
        against = row["against"]["teacher"]
        gains = [_number(against["hf_gain_by_class"].get(label), signed=True) for label in labels]
        gains.append(_number(against["hf_gain_class_median"], signed=True))
        rows.append([html.escape(row["name"]), *map(_minus, gains)])
    return "<h2>HF gain of each class against the teacher, dB</h2>" + _table(["set", *names, "median"], rows)


def _bands(result: dict) -> str:
    """Gains against the teacher of every band of luma, the pairwise median of HF, and HF of the chroma."""
    names, rows = result["bands"]["names"], []
    for row in result["sets"]:
        against = row["against"]["teacher"]
        if against is not None:
            median, chroma = against["gain_db_median"] or {}, against["chroma"] or {}
            gains = [against["gain_db"][name]["value"] for name in names]
            gains += [median.get("HF"), *(chroma.get(channel, {}).get("HF", {}).get("value") for channel in CHROMA)]
            cells = [_number(gain, signed=True) for gain in gains]
            rows.append([html.escape(row["name"]), *map(_minus, cells)])
    headings = ["set", *names, "HF, pairwise median", *(f"HF of {channel.capitalize()}" for channel in CHROMA)]
    return "<h2>Gain of each band against the teacher, dB</h2>" + _table(headings, rows)


def _alone(result: dict) -> str:
    """What each set is by itself."""
    rows = []
    for row in result["sets"]:
        cells = [_number(row[key], digits) for key, (_, digits) in ALONE.items()]
        rows.append([html.escape(row["name"]), *map(_minus, cells)])
    return "<h2>Each set by itself</h2>" + _table(["set", *(heading for heading, _ in ALONE.values())], rows)


def _facts(result: dict) -> str:
    """What came with the sets, a column for each set that brought something."""
    facts = {row["name"]: _shown_facts(row["facts"]) for row in result["sets"] if row["facts"]}
    if not facts:
        return ""
    keys = dict.fromkeys(key for one in facts.values() for key in one)
    rows = [[html.escape(key), *(html.escape(_fact(one.get(key))) for one in facts.values())] for key in keys]
    return "<h2>Facts about the sets</h2>" + _table(["", *map(html.escape, facts)], rows, kind="facts")


def _shown_facts(facts: dict) -> dict:
    """All but what each router did; a network's hash by its first digits. report.json holds everything whole."""
    shown = {key: value for key, value in _flat(facts).items() if not key.startswith("routing.by_router")}
    return shown | {"network": shown["network"][:8]} if "network" in shown else shown


def _flat(facts: dict, prefix: str = "") -> dict:
    """Nested facts under one name each, joined by full stops."""
    flat = {}
    for key, value in facts.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
