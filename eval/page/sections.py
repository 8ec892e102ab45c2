"""The figures of a report's page, each with its text alternative and the numbers behind it as tables."""

from typing import Any

from ..metrics.power_map import DIRECTIONS, PEAK_DB
from .cells import NOTHING, Cell, Figure, Table, minus, number, span, the
from .figures import charted, forest_lines
from .grids import Row, magnification, row_name, zoom_factor


def chart_sections(result: dict[str, Any], drawn: dict[str, bytes]) -> list[Figure]:
    """Of the charts that were drawn, in the order in which they are read."""
    kinds = {
        "gain": gain,
        "bands": bands,
        "psd": psd,
        "maps": maps,
        "latent": latent,
        "forest": forest,
        "curves": curves,
    }
    return [section(result, drawn[name]) for name, section in kinds.items() if name in drawn]


def gain(result: dict[str, Any], png: bytes) -> Figure:
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
    data = Table.of("gain by frequency", ["cycles per pixel", *(row["name"] for row in rows)], cells)
    return Figure(png, "chart", f"Power against {the(result['teacher'])}", caption, (data,))


def bands(result: dict[str, Any], png: bytes) -> Figure:
    rows, names = charted(result), result["bands"]["names"]
    gains = [row["against"]["teacher"]["gain_db"] for row in rows]
    empty = [name for name in names if gains and all(one[name]["value"] is None for one in gains)]
    caption = (
        "The same pooled over bands, with 95 % bootstrap intervals over images. HF, shaded, decides the verdict."
        + (f" At this size no frequency falls in {', '.join(empty)}." if empty else "")
    )
    cells = [[row["name"], *(interval_cell(one[name]) for name in names)] for row, one in zip(rows, gains, strict=True)]
    return Figure(png, "chart", "Gain of each band", caption, (Table.of("gain of each band", ["set", *names], cells),))


def psd(result: dict[str, Any], png: bytes) -> Figure:
    rows = [row for row in result["sets"] if row["role"] != "null"]
    cells = [
        [number(f, 4), *(minus(f"{row['power'][i]:.3e}") for row in rows)] for i, f in enumerate(rows[0]["frequencies"])
    ]
    data = Table.of("power by frequency", ["cycles per pixel", *(row["name"] for row in rows)], cells)
    caption = "Luma in squared image units, periodic Hann window, both axes logarithmic. The bands are shaded in turn."
    return Figure(png, "chart", "Radial power spectrum", caption, (data,))


def maps(result: dict[str, Any], png: bytes) -> Figure:
    caption = (
        "Mean log power of luma over the plane of frequencies, and below the differences from"
        f" {the(result['teacher'])}: blue is lost, red is added. A bright point on an axis is a regular pattern of"
        " columns or rows."
    )
    rows = charted(result)
    names = rows[0]["against"]["teacher"]["map_sectors_db"] if rows else {}
    heads = ["set", *(f"{band}, {direction}" for band in names for direction in DIRECTIONS)]

    def cells(name: str, sectors: dict, digits: int, signed: bool) -> list[str]:
        values = [sectors[band][direction] for band in names for direction in DIRECTIONS]
        return [name, *(number(value, digits, signed) for value in values)]

    alone = [cells(row["name"], row["map_sectors_db"], 1, False) for row in result["sets"] if row["role"] != "null"]
    apart = [cells(row["name"], row["against"]["teacher"]["map_sectors_db"], 2, True) for row in rows]
    difference = (
        "Mean difference in dB over bands and directions: x within 22.5 degrees of the horizontal frequencies, y of the"
        " vertical ones."
    )
    tables = (
        Table.of("log power by band and direction", heads, alone, note="Mean log power in dB."),
        Table.of("difference by band and direction", heads, apart, note=difference),
        _grid_lines(rows),
    )
    return Figure(png, "chart", "Power over the plane of frequencies", caption, tables)


def _grid_lines(rows: list[dict]) -> Table:
    lines = rows[0]["against"]["teacher"]["grid_lines"] if rows else []
    used = [i for i, line in enumerate(lines) if line["height"]["value"] is not None]
    heads = ["set", *(f"{lines[i]['axis']}, period {lines[i]['period']}" for i in used)]
    cells = [[row["name"], *(_line_cell(row["against"]["teacher"]["grid_lines"][i]) for i in used)] for row in rows]
    note = (
        "Lines of the pixel grid against the reference, dB: height above their surroundings, with 95 % intervals;"
        f" called a peak or a notch where the whole interval is beyond {PEAK_DB:g} dB."
    )
    return Table.of("lines of the pixel grid", heads, cells, note=note)


def _line_cell(line: dict) -> Cell:
    word, cell = "" if line["word"] == "none" else f"{line['word']}, ", interval_cell(line["height"])
    return Cell(cell.text, word + cell.small)


def latent(result: dict[str, Any], png: bytes) -> Figure:
    latents = result["latent"]
    caption = (
        f"The {latents['channels']} channels of the latents, before they are decoded, against"
        f" {the(result['teacher'])}: gain over frequency of all channels together, and the gain of the upper half of"
        " frequencies of each channel with 95 % intervals."
    )
    heads = ["set", "HF gain, dB", "LSD, dB", *(f"channel {c}" for c in range(latents["channels"]))]
    tables = []
    for key in ("teacher", "real"):
        cells = [
            [
                row["name"],
                interval_cell(against["gain_db"]["HF"]),
                Cell(number(against["lsd"]), f"null {number(against['lsd_null'])}"),
                *map(interval_cell, against["hf_gain_db_by_channel"]),
            ]
            for row in latents["sets"]
            if (against := row["against"][key])
        ]
        if cells:
            tables.append(Table.of(f"latents, {key}", heads, cells, note=f"Against {the(latents[key])}"))
    return Figure(png, "chart", "Latent space", caption, tuple(tables))


def interval_cell(interval: dict) -> Cell:
    """A signed number with its interval as small print."""
    return Cell(number(interval["value"], signed=True), span(interval["low"], interval["high"], signed=True))


def forest(result: dict[str, Any], png: bytes) -> Figure:
    seeds = result["forest"]
    caption = (
        "Left, the signed HF gain of DAR and of the arm that is named, for every training seed. Right, by how much DAR"
        " is nearer to the reference, with 95 % intervals: over images for a seed, over seeds and images for all. From"
        f" {seeds['source']}." + (f" {seeds['label'].capitalize()}." if seeds["label"] else "")
    )
    cells = []
    for one in seeds["comparisons"]:
        test = f"{one['method']}, p = {one['p']:.3g}"
        for line in forest_lines(one):
            gains = [number(line["gain_db"][arm], signed=True) for arm in (one["baseline"], "dar")]
            cells.append([Cell(line["title"], test if line["all"] else ""), *gains, interval_cell(line)])
    heads = ["", "HF gain of the baseline, dB", "HF gain of DAR, dB", "difference of the distances, dB"]
    data = Table.of("gains by seed", heads, cells)
    return Figure(png, "chart", "Seed by seed", caption, (data,), minus(seeds["conclusion"]))


def curves(result: dict[str, Any], png: bytes) -> Figure:
    curve = result["forest"]["curve"]
    arms = [name for name in curve if name not in ("frequencies", "difference")]
    caption = (
        "Above, the gain of both arms against the teacher over frequency, means over training seeds. Below, by how much"
        " DAR is nearer to the teacher; above 0 favours DAR. The bands hold the whole curve in 95 % of such experiments"
        " (max-t over frequencies, over seeds and images)."
    )
    cells = [
        [number(f, 4), *(_curve_cell(curve[name], i) for name in (*arms, "difference"))]
        for i, f in enumerate(curve["frequencies"])
    ]
    heads = ["cycles per pixel", *(f"{arm}, dB" for arm in arms), "difference of the distances, dB"]
    return Figure(png, "chart", "Gain over training seeds", caption, (Table.of("gain over seeds", heads, cells),))


def _curve_cell(curve: dict[str, list[float | None]], i: int) -> Cell:
    return interval_cell({end: values[i] for end, values in curve.items()})


def grid_sections(result: dict[str, Any], drawn: dict[str, bytes], rows: list[Row]) -> list[Figure]:
    """The three grids; one table says which images they show."""
    side = result["image_size"][1]
    cells = [
        [row_name(result, row, i), *(NOTHING if image is None else str(image) for image in row.images.values())]
        for i, row in enumerate(rows)
    ]
    note = "The numbers of the images shown, counted from 0 in each set. Equal numbers in sampled sets are equal noise."
    data = Table.of("images shown", ["row", *(rows[0].images if rows else ())], cells, note=note)
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
    return [Figure(drawn[name], "grid", *words, (data,)) for name, words in captions.items()]
