"""The figures of a report's page, each with its text alternative and the numbers behind it as tables."""

from collections.abc import Mapping

from ..measure.results import Comparison, Forest, LatentResult, Report, SeedCurves, SetRow
from ..metrics.intervals import Interval
from ..metrics.power_map import DIRECTIONS, PEAK_DB, Directions, GridLine
from . import over_calls
from .cells import NOTHING, Cell, Figure, Table, finite, interval_cell, minus, number, the
from .columns import REFERENCES, charted
from .figures import forest_lines
from .grids import Row, magnification, one_of_each, row_name, zoom_factor


def chart_sections(report: Report, drawn: Mapping[str, bytes]) -> list[Figure]:
    """Of the charts that were drawn, in the order in which they are read. drawn: by name, as `figures.charts` does."""
    charts = [
        gain(report, drawn["gain"]),
        bands(report, drawn["bands"]),
        psd(report, drawn["psd"]),
        maps(report, drawn["maps"]),
    ]
    if "calls" in drawn:
        charts.insert(0, over_calls.section(report, drawn["calls"]))
    if report.latent:
        charts.append(latent(report.latent, the(report.teacher), drawn["latent"]))
    if report.forest:
        charts.append(forest(report.forest, drawn["forest"]))
        if report.forest.curve:
            charts.append(curves(report.forest.curve, drawn["curves"]))
    return charts


def gain(report: Report, png: bytes) -> Figure:
    caption = (
        f"Radial power of luma in dB against {the(report.teacher)}. Inside the blue strip, within"
        f" {report.margins.gain_db:g} dB, a frequency counts as preserved; below it detail is lost, above it something"
        " was added."
    )
    rows = charted(report)
    cells = [
        [number(f, 4), *(number(against.gain_curve_db[i], signed=True) for _, against in rows)]
        for i, f in enumerate(rows[0][0].frequencies if rows else [])
    ]
    data = Table.of("gain by frequency", ["cycles per pixel", *(row.name for row, _ in rows)], cells)
    return Figure(png, "chart", f"Power against {the(report.teacher)}", caption, (data,))


def bands(report: Report, png: bytes) -> Figure:
    rows, names = charted(report), report.bands.names
    empty = [name for name in names if rows and all(finite(against.gain_db[name].value) is None for _, against in rows)]
    caption = (
        "The same pooled over bands, with 95 % bootstrap intervals over images. HF, shaded, decides the verdict."
        + (f" At this size no frequency falls in {', '.join(empty)}." if empty else "")
    )
    cells = [[row.name, *(interval_cell(against.gain_db[name]) for name in names)] for row, against in rows]
    return Figure(png, "chart", "Gain of each band", caption, (Table.of("gain of each band", ["set", *names], cells),))


def psd(report: Report, png: bytes) -> Figure:
    rows = [row for row in report.sets if row.role != "null"]
    cells = [[number(f, 4), *(minus(f"{row.power[i]:.3e}") for row in rows)] for i, f in enumerate(rows[0].frequencies)]
    data = Table.of("power by frequency", ["cycles per pixel", *(row.name for row in rows)], cells)
    caption = "Luma in squared image units, periodic Hann window, both axes logarithmic. The bands are shaded in turn."
    return Figure(png, "chart", "Radial power spectrum", caption, (data,))


def maps(report: Report, png: bytes) -> Figure:
    caption = (
        "Mean log power of luma over the plane of frequencies, and below the differences from"
        f" {the(report.teacher)}: blue is lost, red is added. A bright point on an axis is a regular pattern of"
        " columns or rows."
    )
    rows = charted(report)
    names = list(rows[0][1].map_sectors_db) if rows else []
    heads = ["set", *(f"{band}, {direction}" for band in names for direction in DIRECTIONS)]

    def cells(name: str, sectors: Mapping[str, Directions], digits: int, signed: bool) -> list[str]:
        values = [getattr(sectors[band], direction) for band in names for direction in DIRECTIONS]
        return [name, *(number(value, digits, signed) for value in values)]

    alone = [cells(row.name, row.map_sectors_db, 1, False) for row in report.sets if row.role != "null"]
    apart = [cells(row.name, against.map_sectors_db, 2, True) for row, against in rows]
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


def _grid_lines(rows: list[tuple[SetRow, Comparison]]) -> Table:
    lines = rows[0][1].grid_lines if rows else []
    used = [i for i, line in enumerate(lines) if finite(line.height.value) is not None]
    heads = ["set", *(f"{lines[i].axis}, period {lines[i].period}" for i in used)]
    cells = [[row.name, *(_line_cell(against.grid_lines[i]) for i in used)] for row, against in rows]
    note = (
        "Lines of the pixel grid against the reference, dB: height above their surroundings, with 95 % intervals;"
        f" called a peak or a notch where the whole interval is beyond {PEAK_DB:g} dB."
    )
    return Table.of("lines of the pixel grid", heads, cells, note=note)


def _line_cell(line: GridLine) -> Cell:
    word, cell = "" if line.word == "none" else f"{line.word}, ", interval_cell(line.height)
    return Cell(cell.text, word + cell.small)


def latent(latents: LatentResult, reference: str, png: bytes) -> Figure:
    caption = (
        f"The {latents.channels} channels of the latents, before they are decoded, against {reference}: gain over"
        " frequency of all channels together, and the gain of the upper half of frequencies of each channel with 95 %"
        " intervals."
    )
    heads = ["set", "HF gain, dB", "LSD, dB", *(f"channel {c}" for c in range(latents.channels))]
    tables = []
    for key, name in zip(REFERENCES, (latents.teacher, latents.real), strict=True):
        cells = [
            [
                row.name,
                interval_cell(against.gain_db["HF"]),
                Cell(number(against.lsd), f"null {number(against.lsd_null)}"),
                *map(interval_cell, against.hf_gain_db_by_channel),
            ]
            for row in latents.sets
            if (against := row.against.of(key))
        ]
        if name and cells:
            tables.append(Table.of(f"latents, {key}", heads, cells, note=f"Against {the(name)}"))
    return Figure(png, "chart", "Latent space", caption, tuple(tables))


def forest(seeds: Forest, png: bytes) -> Figure:
    caption = (
        "Left, the signed HF gain of DAR and of the arm that is named, for every training seed. Right, by how much DAR"
        " is nearer to the reference, with 95 % intervals: over images for a seed, over seeds and images for all. From"
        f" {seeds.source}." + (f" {seeds.label.capitalize()}." if seeds.label else "")
    )
    cells = []
    for one in seeds.comparisons:
        test = f"{one.method}, p = {one.p:.3g}" + ("" if one.p_holm is None else f", {one.p_holm:.3g} after Holm")
        for line in forest_lines(one):
            gains = [number(line.gain_db[arm], signed=True) for arm in (one.baseline, "dar")]
            cells.append([Cell(line.title, test if line.of_all else ""), *gains, interval_cell(line.difference_db)])
    heads = ["", "HF gain of the baseline, dB", "HF gain of DAR, dB", "difference of the distances, dB"]
    data = Table.of("gains by seed", heads, cells)
    return Figure(png, "chart", "Seed by seed", caption, (data,), minus(seeds.conclusion))


def curves(seeds: SeedCurves, png: bytes) -> Figure:
    caption = (
        "Above, the gain of both arms against the teacher over frequency, means over training seeds. Below, by how much"
        " DAR is nearer to the teacher; above 0 favours DAR. The bands hold the whole curve in 95 % of such experiments"
        " (max-t over frequencies, over seeds and images)."
    )
    arms = [name for name in seeds.curves if name != "difference"]
    shown = [seeds.curves[name] for name in (*arms, "difference")]
    cells = [
        [number(f, 4), *(interval_cell(Interval(one.value[i], one.low[i], one.high[i])) for one in shown)]
        for i, f in enumerate(seeds.frequencies)
    ]
    heads = ["cycles per pixel", *(f"{arm}, dB" for arm in arms), "difference of the distances, dB"]
    return Figure(png, "chart", "Gain over training seeds", caption, (Table.of("gain over seeds", heads, cells),))


def opening(report: Report, png: bytes, rows: list[Row]) -> Figure:
    """What the page begins with."""
    side = report.image_size[1]
    caption = (
        f"A column is {the(report.teacher)} or what is compared with it; each picture, {magnification(side)} times"
        f" enlarged, has its centre below it, {zoom_factor(side)} times. Sampled pictures side by side began as the"
        " same noise."
    )
    return Figure(png, "opening", "Pictures", caption, (_shown(report, rows),), rows=_named(report, rows))


def _named(report: Report, rows: list[Row]) -> str:
    """What the rows of a grid are, with their prompts whole, which the picture may cut."""
    names = [row_name(report.class_names, row, i) for i, row in enumerate(rows)]
    return "Rows from above: " + "; ".join(f"{i}. {name}" for i, name in enumerate(names, 1)) + "."


def _shown(report: Report, rows: list[Row]) -> Table:
    cells = [
        [
            row_name(report.class_names, row, i),
            *(NOTHING if image is None else str(image) for image in row.images.values()),
        ]
        for i, row in enumerate(rows)
    ]
    note = "The numbers of the images shown, counted from 0 in each set. Equal numbers in sampled sets are equal noise."
    return Table.of("images shown", ["row", *(rows[0].images if rows else ())], cells, note=note)


def grid_sections(report: Report, drawn: Mapping[str, bytes], rows: list[Row]) -> list[Figure]:
    """The three grids; one table says which images they show."""
    side = report.image_size[1]
    data = _shown(report, rows)
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
    of_all, of_each = _named(report, rows), _named(report, one_of_each(rows))
    return [
        Figure(drawn[name], "grid", *words, (data,), rows=of_all if name == "samples" else of_each)
        for name, words in captions.items()
    ]
