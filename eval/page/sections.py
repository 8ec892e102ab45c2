"""The figures of a report's page, each with its text alternative and the numbers behind it as a table.

Cells and headings are HTML when they come here; `text` escapes what comes from outside.
"""

import base64
import html
import re
from collections.abc import Sequence
from typing import Any

from ..metrics.power_map import PEAK_DB
from ..metrics.sectors import DIRECTIONS
from .figures import charted, forest_lines
from .grids import Row, magnification, row_name, zoom_factor

NOTHING = "–"
JOINT = re.compile(r"(?<=_)(?![^<]*>)|(?<=\.)(?=[A-Za-z])(?![^<]*>)")  # where a name may break, outside of tags


def text(value: Any) -> str:
    return html.escape(str(value))


def number(value: float | None, digits: int = 2, signed: bool = False) -> str:
    if value is None:
        return NOTHING
    return minus(f"{round(value, digits) + 0.0:{'+' if signed else ''}.{digits}f}")  # + 0.0 turns -0.0 into 0.0


def the(name: str) -> str:
    """A set in a sentence."""
    return f"the {name}" if name == "teacher" else name


def minus(words: str) -> str:
    """A hyphen before a digit, or between two numbers, becomes a minus sign."""
    return re.sub(r"-(?= ?\d)", "−", words)


def span(interval: dict, digits: int = 2, signed: bool = False) -> str:
    """low to high, nothing where the interval is not defined."""
    ends = [interval.get(end) for end in ("low", "high")]
    if ends == [None, None]:
        return ""
    low, high = (number(end, digits, signed) if end is not None else "unbounded" for end in ends)
    return f"{low} to {high}"


def table(label: str, headings: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "") -> str:
    """A table that scrolls by itself; the first cell of a row heads it, and may break within a long name."""
    head = "".join(f'<th scope="col">{heading}</th>' for heading in headings)
    body = "".join(
        f'<tr><th scope="row">{JOINT.sub("<wbr>", row[0])}</th>'
        + "".join(f"<td>{cell}</td>" for cell in row[1:])
        + "</tr>"
        for row in rows
    )
    return (
        f'<div class="wide" role="region" tabindex="0" aria-label="{text(label)}"><table class="{kind}">'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def folded(summary: str, body: str) -> str:
    """Opens without a script."""
    return f"<details><summary>{text(summary)}</summary>{body}</details>"


def figure(png: bytes, kind: str, heading: str, caption: str, data: str) -> str:
    """A figure with its caption as the alternative text, then its numbers."""
    source = base64.b64encode(png).decode("ascii")
    return (
        f'<h2>{text(heading)}</h2><figure class="{kind}"><figcaption>{text(caption)}</figcaption>'
        f'<div class="wide" role="region" tabindex="0" aria-label="{text(heading)}">'
        f'<img alt="{text(heading)}. {text(caption)}" src="data:image/png;base64,{source}"></div></figure>'
        + folded("The numbers of this figure", data)
    )


def gain(result: dict[str, Any], png: bytes) -> str:
    caption = (
        f"Radial power of luma in dB against {the(result['teacher'])}. Inside the blue strip, within"
        f" {result['margins']['gain_db']:g} dB, a frequency counts as preserved; below it detail is lost, above it"
        " something was added."
    )
    rows = charted(result)
    curves = [row["against"]["teacher"]["gain_curve_db"] for row in rows]
    cells = [
        [number(f, 4), *(number(curve[i], signed=True) for curve in curves)]
        for i, f in enumerate(rows[0]["frequencies"] if rows else [])
    ]
    data = table("gain by frequency", ["cycles per pixel", *(text(row["name"]) for row in rows)], cells)
    return figure(png, "chart", f"Power against {the(result['teacher'])}", caption, data)


def bands(result: dict[str, Any], png: bytes) -> str:
    sets = charted(result)
    empty = [name for name in result["bands"]["names"] if sets and all(_gain(row, name) is None for row in sets)]
    caption = (
        "The same pooled over bands, with 95 % bootstrap intervals over images. HF, shaded, decides the verdict."
        + (f" At this size no frequency falls in {', '.join(empty)}." if empty else "")
    )
    rows = [[text(row["name"]), *(_gain_cell(row, name) for name in result["bands"]["names"])] for row in sets]
    data = table("gain of each band", ["set", *map(text, result["bands"]["names"])], rows)
    return figure(png, "chart", "Gain of each band", caption, data)


def _gain(row: dict, band: str) -> float | None:
    return row["against"]["teacher"]["gain_db"][band]["value"]


def _gain_cell(row: dict, band: str) -> str:
    return _interval(row["against"]["teacher"]["gain_db"][band])


def psd(result: dict[str, Any], png: bytes) -> str:
    rows = [row for row in result["sets"] if row["role"] != "null"]
    cells = [
        [number(f, 4), *(minus(f"{row['power'][i]:.3e}") for row in rows)] for i, f in enumerate(rows[0]["frequencies"])
    ]
    data = table("power by frequency", ["cycles per pixel", *(text(row["name"]) for row in rows)], cells)
    caption = "Luma in squared image units, periodic Hann window, both axes logarithmic. The bands are shaded in turn."
    return figure(png, "chart", "Radial power spectrum", caption, data)


def maps(result: dict[str, Any], png: bytes) -> str:
    caption = (
        "Mean log power of luma over the plane of frequencies, and below the differences from"
        f" {the(result['teacher'])}: blue is lost, red is added. A bright point on an axis is a regular pattern of"
        " columns or rows."
    )
    rows = charted(result)
    sectors = []
    for row in rows:
        means = row["against"]["teacher"]["map_sectors_db"]
        cells = [number(means[band][d], signed=True) for band in means for d in DIRECTIONS]
        sectors.append([text(row["name"]), *cells])
    names = rows[0]["against"]["teacher"]["map_sectors_db"] if rows else {}
    heads = ["set", *(f"{band}, {d}" for band in names for d in DIRECTIONS)]
    every = [row for row in result["sets"] if row["role"] != "null"]
    alone = [
        [text(row["name"]), *(number(row["map_sectors_db"][band][d], 1) for band in names for d in DIRECTIONS)]
        for row in every
    ]
    data = (
        f"<p class='soft'>Mean log power in dB.</p>{table('log power by band and direction', heads, alone)}"
        "<p class='soft'>Mean difference in dB over bands and directions: x within 22.5 degrees of the horizontal"
        f" frequencies, y of the vertical ones.</p>{table('difference by band and direction', heads, sectors)}"
        "<p class='soft'>Lines of the pixel grid against the reference, dB: height above their surroundings, with"
        f" 95 % intervals; called a peak or a notch where the whole interval is beyond {PEAK_DB:g} dB.</p>"
        + _grid_lines(rows)
    )
    return figure(png, "chart", "Power over the plane of frequencies", caption, data)


def _grid_lines(rows: list[dict]) -> str:
    lines = rows[0]["against"]["teacher"]["grid_lines"] if rows else []
    used = [i for i, line in enumerate(lines) if line["height"]["value"] is not None]
    heads = ["set", *(f"{lines[i]['axis']}, period {lines[i]['period']}" for i in used)]
    body = []
    for row in rows:
        found = row["against"]["teacher"]["grid_lines"]
        body.append([text(row["name"]), *(_line_cell(found[i]) for i in used)])
    return table("lines of the pixel grid", heads, body)


def _line_cell(line: dict) -> str:
    word = "" if line["word"] == "none" else f"{text(line['word'])}, "
    height = line["height"]
    return f"{number(height['value'], signed=True)}<small>{word}{span(height, signed=True)}</small>"


def latent(result: dict[str, Any], png: bytes) -> str:
    told = result["latent"]
    caption = (
        f"The {told['channels']} channels of the latents, before they are decoded, against {the(result['teacher'])}:"
        " gain over frequency of all channels together, and the gain of the upper half of frequencies of each channel"
        " with 95 % intervals."
    )
    parts = []
    for key in ("teacher", "real"):
        rows = [(row, row["against"][key]) for row in told["sets"] if row["against"][key]]
        cells = [
            [
                text(row["name"]),
                _interval(against["gain_db"]["HF"]),
                f"{number(against['lsd'])}<small>null {number(against['lsd_null'])}</small>",
                *map(_interval, against["hf_gain_db_by_channel"]),
            ]
            for row, against in rows
        ]
        heads = ["set", "HF gain, dB", "LSD, dB", *(f"channel {c}" for c in range(told["channels"]))]
        if rows:
            parts.append(f"<p class='soft'>Against {text(the(told[key]))}</p>" + table(f"latents, {key}", heads, cells))
    return figure(png, "chart", "Latent space", caption, "".join(parts))


def _interval(interval: dict) -> str:
    return f"{number(interval['value'], signed=True)}<small>{span(interval, signed=True)}</small>"


def forest(result: dict[str, Any], png: bytes) -> str:
    told = result["forest"]
    caption = (
        "Left, the signed HF gain of DAR and of the arm that is named, for every training seed. Right, by how much DAR"
        " is nearer to the reference, with 95 % intervals: over images for a seed, over seeds and images for all. From"
        f" {told['source']}." + (f" {told['label'].capitalize()}." if told["label"] else "")
    )
    rows = []
    for one in told["comparisons"]:
        for line in forest_lines(one):
            gains = line["gain_db"]
            cells = [
                text(line["title"]),
                number(gains[one["baseline"]], signed=True),
                number(gains["dar"], signed=True),
            ]
            rows.append([*cells, f"{number(line['value'], signed=True)}<small>{span(line, signed=True)}</small>"])
        rows[-1][0] += f"<small>{text(one['method'])}, p = {one['p']:.3g}</small>"
    heads = ["", "HF gain of the baseline, dB", "HF gain of DAR, dB", "difference of the distances, dB"]
    words = f"<p>{text(minus(told['conclusion']))}</p>" if told["conclusion"] else ""
    return figure(png, "chart", "Seed by seed", caption, table("gains by seed", heads, rows)) + words


def curves(result: dict[str, Any], png: bytes) -> str:
    told = result["forest"]["curve"]
    arms = [name for name in told if name not in ("frequencies", "difference")]
    caption = (
        "Above, the gain of both arms against the teacher over frequency, means over training seeds. Below, by how much"
        " DAR is nearer to the teacher; above 0 favours DAR. The bands hold the whole curve in 95 % of such experiments"
        " (max-t over frequencies, over seeds and images)."
    )
    cells = [
        [number(f, 4), *(_curve_cell(told[name], i) for name in (*arms, "difference"))]
        for i, f in enumerate(told["frequencies"])
    ]
    heads = ["cycles per pixel", *(f"{text(arm)}, dB" for arm in arms), "difference of the distances, dB"]
    return figure(png, "chart", "Gain over training seeds", caption, table("gain over seeds", heads, cells))


def _curve_cell(curve: dict[str, list[float | None]], i: int) -> str:
    ends = {end: curve[end][i] for end in ("low", "high")}
    return f"{number(curve['value'][i], signed=True)}<small>{span(ends, signed=True)}</small>"


def samples(result: dict[str, Any], drawn: dict[str, bytes], rows: list[Row]) -> str:
    """The three grids; one table says which images they show."""
    side = result["image_size"][1]
    heads = ["row", *(text(name) for name in (rows[0].images if rows else {}))]
    cells = [
        [text(row_name(result, row, i)), *(NOTHING if image is None else str(image) for image in row.images.values())]
        for i, row in enumerate(rows)
    ]
    told = "<p class='soft'>The numbers of the images shown, counted from 0 in each set. Equal numbers in sampled"
    data = told + " sets are equal noise.</p>" + table("images shown", heads, cells)
    same = "A row is one noise seed in all sampled sets; real images in it are of the same class. Pixels are enlarged"
    captions = {
        "samples": ("Samples", f"{same} {magnification(side)} times, without interpolation."),
        "zoom": ("The centre of the same samples", f"{same} {zoom_factor(side)} times, without interpolation."),
        "detail": (
            "Fine detail of the same samples",
            "High-pass view: luma without its coarse wavelet approximation, around mid-grey; one amplification for all"
            " sets, so flat grey is lost detail. Rows as above.",
        ),
    }
    return "".join(figure(drawn[name], "grid", *captions[name], data) for name in captions)
