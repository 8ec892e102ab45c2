"""A report on disk: report.html, which needs nothing else, report.json, report.csv and the figures as PNG."""

import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from dmd_dar.atomic import make_folder, write_atomic

from ..measure.pair import jsonable
from ..metrics.power_map import mean_log_map
from ..samples.sets import ImageSet
from . import sections as panels
from .columns import COLUMNS, HF_GAIN, STRUCTURE, Column, compared, fact
from .csv import Number, as_csv, numbers
from .figures import charts
from .grids import Row, grids
from .sections import NOTHING, folded, minus, number, span, table, text, the
from .style import GLOSSARY, STYLE

# Nothing may be fetched and no script may run, whatever a name holds.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def write_report(
    result: dict,
    sets: Sequence[ImageSet],
    out_dir: str | Path,
    title: str,
    provenance: dict[str, Any],
    planes: dict[str, Tensor] | None = None,
) -> None:
    """Writes report.html, report.json, report.csv and one PNG per figure into `out_dir`, each atomically.

    sets: those to show in the grids, in this order. provenance: JSON-able facts about the run, printed last. planes:
    `measured.mean_plane` of each set by name, where it is known.
    """
    out_dir = make_folder(out_dir)
    whole = {**result, "title": title, "provenance": jsonable(provenance)}
    measured = {row["name"] for row in result["sets"]}
    sets = [one for one in sets if one.name in measured]
    drawn, rows = grids(whole, sets)
    if planes is None:
        planes = {one.name: mean_log_map(one.batches()) for one in sets}
    drawn |= charts(whole, {one.name: planes[one.name] for one in sets})
    for name, png in drawn.items():
        write_atomic(out_dir / f"{name}.png", png)
    write_atomic(out_dir / "report.json", json.dumps(whole, indent=1, allow_nan=False))
    write_atomic(out_dir / "report.csv", as_csv(whole))
    write_atomic(out_dir / "report.html", page(whole, drawn, rows))


def page(result: dict, drawn: dict[str, bytes], rows: list[Row]) -> str:
    """The whole HTML document; every text that comes from outside is escaped."""
    title = text(result["title"])
    sections = [
        f"<h1>{title}</h1>",
        _verdicts(result),
        _conclusions(result),
        panels.gain(result, drawn["gain"]),
        panels.bands(result, drawn["bands"]),
        panels.psd(result, drawn["psd"]),
        panels.maps(result, drawn["maps"]),
        panels.latent(result, drawn["latent"]) if "latent" in drawn else "",
        panels.forest(result, drawn["forest"]) if "forest" in drawn else "",
        panels.curves(result, drawn["curves"]) if "curves" in drawn else "",
        _structure(result),
        panels.samples(result, drawn, rows),
        *_tables(result),
        _cost(result),
        _skipped(result),
        _facts(result),
        _glossary(),
        _provenance(result),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{STYLE}</style></head>\n<body>\n<main>\n"
        + "\n".join(filter(None, sections))
        + "\n</main>\n</body></html>\n"
    )


def _badge(against: dict) -> str:
    word = against["verdict"]["word"]
    return f'<span class="verdict {word.replace(" ", "-")}">{word}</span>'


def _verdicts(result: dict) -> str:
    """One line for each student or folder, then the numbers of all sets."""
    told = [pair for pair in compared(result, "teacher") if pair[0]["role"] in ("student", "images")]
    answers = [
        f"<li><b>{text(row['name'])}</b> {_badge(against)}<small>{_answer(row, against)}</small></li>"
        for row, against in told or compared(result, "teacher")
    ]
    return (
        f"<h2>Verdict</h2><p class='soft'>What happened to fine detail, against {text(the(result['teacher']))}.</p>"
        f"<ul class='answers'>{''.join(answers)}</ul>" + _summary(result, "teacher")
    )


def _answer(row: dict, against: dict) -> str:
    """The gain, unless the reason tells it, and the reason."""
    note, gain = _note(against, row["images"]), against["gain_db"]["HF"]
    told = (
        "" if note.startswith("HF gain") else f"HF gain {number(gain['value'], 2, True)} dB ({span(gain, 2, True)}); "
    )
    return text(told + minus(note))


def _conclusions(result: dict) -> str:
    """The first sentence of a comparison over seeds, then those that the report's command adds; empty without any."""
    seeds = (result.get("forest") or {"conclusion": ""})["conclusion"].partition(". ")
    told = [seeds[0] + seeds[1].strip()] if seeds[0] else []
    items = "".join(f"<li>{text(minus(sentence))}</li>" for sentence in told + result.get("conclusions", []))
    return f"<h2>What was found</h2><ul>{items}</ul>" if items else ""


def _summary(result: dict, key: str, columns: Sequence[Column] = COLUMNS) -> str:
    rows = []
    for row, against in compared(result, key):
        label = row["facts"].get("label")
        name = text(row["name"]) + (f"<small>{text(label)}</small>" if label else "")
        rows.append([name, _badge(against), *(column.cell(row, against) for column in columns)])
    heads = ["set", "verdict", *(text(column.heading) for column in columns)]
    small = f"<p class='soft'>Each set against {text(the(result[key]))}; small print: 95 % intervals and parts.</p>"
    return small + table(f"against {result[key]}", heads, rows, kind="verdicts")


def _note(against: dict, images: int) -> str:
    note = against["verdict"]["reason"]
    if (against["images_for_quarter_db"] or 0) > images:
        note += f"; about {against['images_for_quarter_db']} images would bring the gain's interval to ±0.25 dB"
    if (against["class_share_gap"] or 0) > 0.02:
        note += f"; class shares differ by up to {100 * against['class_share_gap']:.0f} %"
    return note + "."


def _structure(result: dict) -> str:
    """Whether what has the right energy is detail."""
    told = (
        "Shaped noise can have the right spectrum; it has no edges, its scales do not agree, and it fills flat areas."
    )
    rows = [
        [text(row["name"]), *(column.cell(row, against) for column in STRUCTURE)]
        for row, against in compared(result, "teacher")
    ]
    heads = ["set", *(text(column.heading) for column in STRUCTURE)]
    return f"<h2>Structure of fine detail</h2><p class='soft'>{told}</p>" + table("structure", heads, rows)


def _tables(result: dict) -> list[str]:
    """Against real images, by class, each set by itself, and every number there is."""
    sections = ["<h2>All numbers</h2>"]
    if result["real"]:
        sections.append("<h3>Against real images</h3>" + _summary(result, "real"))
        for row, against in compared(result, "real"):
            if row["role"] == "null":
                sections.append(_resolution(row, against))
    sections += [_classes(result), _modes(result)]
    every = numbers(result)
    for key, heading in (("teacher", result["teacher"]), ("real", result["real"]), ("", None)):
        chosen = [one for one in every if one.against == key]
        if chosen:
            title = f"Every number against {the(heading)}" if heading else "Every number of a set by itself"
            sections.append(folded(f"{title} ({len({one.metric for one in chosen})} metrics)", _every(chosen, title)))
    return [section for section in sections if section]


def _resolution(row: dict, against: dict) -> str:
    """What the verdict's margin is worth at this number of images."""
    gain, needed = against["gain_db"]["HF"], against["images_for_quarter_db"]
    if gain["low"] is None:
        return ""
    half = (gain["high"] - gain["low"]) / 2
    return (
        f"<p class='soft'>{text(row['name'])} is the null of an unpaired comparison: at {row['images']} images its HF"
        f" gain is known to ±{half:.2f} dB; about {needed} images bring that to ±0.25 dB.</p>"
    )


def _every(chosen: list[Number], label: str) -> str:
    """Metrics down, sets across."""
    names = list(dict.fromkeys(one.name for one in chosen))
    metrics = list(dict.fromkeys(one.metric for one in chosen))
    cells = {(one.metric, one.name): one for one in chosen}
    counts = {one.name: one.images for one in chosen}
    heads = ["metric", *(f"{text(name)}<small>n {counts[name]}</small>" for name in names)]
    rows = [[f"<code>{text(m)}</code>", *(_number_cell(cells.get((m, name))) for name in names)] for m in metrics]
    return table(label, heads, rows)


def _number_cell(one: Number | None) -> str:
    if one is None or one.value is None:
        return NOTHING
    notes = span({"low": one.low, "high": one.high}, 3)
    if one.null is not None:
        notes = f"null {_short(one.null)}"
    return _short(one.value) + (f"<small>{notes}</small>" if notes else "")


def _short(value: float) -> str:
    return minus(f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}")


def _class_names(result: dict, labels: Sequence[str]) -> list[str]:
    return [text(result["class_names"].get(label, f"class {label}")) for label in labels]


def _classes(result: dict) -> str:
    """HF gain against the teacher of each class, and its median; nothing where classes are not known."""
    rows = [pair for pair in compared(result, "teacher") if pair[1]["hf_gain_by_class"]]
    labels = sorted({label for _, against in rows for label in against["hf_gain_by_class"]}, key=int)
    if not rows:
        return ""
    cells = []
    for row, against in rows:
        gains = [number(against["hf_gain_by_class"].get(label), signed=True) for label in labels]
        cells.append([text(row["name"]), *gains, number(against["hf_gain_class_median"], signed=True)])
    heading = f"HF gain of each class against {text(the(result['teacher']))}, dB"
    heads = ["set", *_class_names(result, labels), "median"]
    return f"<h3>{heading}</h3>" + table("HF gain of each class", heads, cells)


def _modes(result: dict) -> str:
    """The share of each class that a small classifier sees in each set."""
    rows = [(row, against["modes"]) for row, against in compared(result, "teacher") if against["modes"]]
    if not rows:
        return ""
    labels = list(rows[0][1]["shares"])
    cells = [
        [
            text(row["name"]),
            *(number(100 * modes["shares"][label], 1) for label in labels),
            f"{number(modes['total_variation'], 3)}<small>null {number(modes['null'], 3)}</small>",
            number(None if modes["agreement"] is None else 100 * modes["agreement"], 1),
        ]
        for row, modes in rows
    ]
    told = rows[0][1]
    note = (
        f"<p class='soft'>By a small classifier trained on {told['trained_on']} images"
        f" ({text(result.get('fitted_to') or 'not among those compared')}), right for"
        f" {100 * told['accuracy']:.1f} % of those it was not trained on. Total variation is against"
        f" {text(the(result['teacher']))}.</p>"
    )
    heads = ["set", *_class_names(result, labels), "total variation", "taken for their own class, %"]
    return "<h3>Classes that are there, %</h3>" + note + table("classes that are there", heads, cells)


def _cost(result: dict) -> str:
    """Time and memory of every network beside what it keeps."""
    rows = [row for row in result["sets"] if "latency_ms_per_image" in row["facts"]]
    if not rows:
        return ""
    base = next((row for row in rows if row["role"] == "teacher"), rows[0])
    cells = []
    for row in rows:
        facts, against = row["facts"], row["against"]["teacher"]
        low, high = facts.get("latency_ms_range", (None, None))
        share = facts["latency_ms_per_image"] / base["facts"]["latency_ms_per_image"]
        cells.append(
            [
                text(row["name"]),
                fact(facts.get("evaluations")),
                f"{fact(facts['latency_ms_per_image'])}<small>{span({'low': low, 'high': high})}</small>",
                number(share, 3),
                number(facts.get("peak_memory_mb"), 1),
                f"{facts['parameters']:,}" if "parameters" in facts else NOTHING,
                HF_GAIN.cell(row, against) if against else NOTHING,
            ]
        )
    facts, rounds = base["facts"], max(row["facts"].get("latency_runs", 0) for row in rows) or NOTHING
    note = (
        f"<p class='soft'>Median over up to {rounds} rounds in which the networks take turns,"
        f" {facts.get('cost_batch', NOTHING)} images at a time; small print: least and most. Peak memory is of one such"
        f" batch above the weights: {text(facts.get('peak_memory_method', NOTHING))}.</p>"
    )
    heads = [
        "set",
        "calls",
        "ms per image",
        f"of the time of {text(the(base['name']))}",
        "peak memory, MB",
        "parameters",
    ]
    return "<h2>Cost of sampling</h2>" + note + table("cost of sampling", [*heads, "HF gain, dB"], cells)


def _skipped(result: dict) -> str:
    if not result["skipped"]:
        return ""
    items = []
    for one in result["skipped"]:
        asked = "" if one["requested"] else " (not asked for)"
        items.append(f"<dt>{text(one['metric'])}, {text(one['name'] or 'all sets')}{asked}</dt>")
        items.append(f"<dd>{text(one['reason'])}</dd>")
    return f"<h2>What was not measured</h2><dl>{''.join(items)}</dl>"


def _facts(result: dict) -> str:
    """What came with the sets, a column for each set that brought something."""
    facts = {row["name"]: _shown_facts(row["facts"]) for row in result["sets"] if row["facts"]}
    if not facts:
        return ""
    keys = dict.fromkeys(key for one in facts.values() for key in one)
    rows = [[text(key), *(text(fact(one.get(key))) for one in facts.values())] for key in keys]
    body = table("facts about the sets", ["", *map(text, facts)], rows, kind="texts")
    return "<h2>Facts about the sets</h2>" + folded(f"{len(keys)} facts", body)


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


def _glossary() -> str:
    terms = "".join(f"<dt>{text(term)}</dt><dd>{text(told)}</dd>" for term, told in GLOSSARY)
    return f"<h2>How to read the numbers</h2><dl>{terms}</dl>"


def _provenance(result: dict) -> str:
    """The facts that a reader looks for as a table, all of it as JSON."""
    facts = result["provenance"]
    rows = [[text(key), text(fact(value))] for key, value in _flat_facts(facts)]
    whole = f"<pre>{html.escape(json.dumps(facts, indent=1, ensure_ascii=False))}</pre>"
    body = table("provenance", ["", ""], rows, kind="texts") if rows else ""
    return "<h2>Provenance</h2>" + body + folded("All of it, with every run's configuration", whole)


def _flat_facts(facts: dict) -> list[tuple[str, Any]]:
    """All but the long configurations."""
    short = {key: value for key, value in facts.items() if key not in ("runs", "report", "contract")}
    return list(_flat(short).items())
