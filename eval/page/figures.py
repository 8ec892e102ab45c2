"""The charts of a report, as PNG bytes.

Real is black, the teacher blue, residual vermilion, DAR green, three kinds of either at most in shades of it; each line
has a style of its own besides.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from torch import Tensor

from ..measure.results import Bands, Forest, ForestComparison, LatentResult, Report, SeedCurves, SetRow
from ..metrics.intervals import Interval
from . import over_calls
from .cells import finite
from .columns import charted
from .drawing import BAND_GREY, DAR, DASHES, MARKERS, REAL, RESIDUAL, TEACHER, finished, kind_colours, plain, png_of

OTHERS = ("#CC79A7", "#E69F00", "#56B4E9", "#7A7A7A", "#B8A800")  # Okabe-Ito; grey and a darker yellow for white paper
BY_CALLS = ("-", "--", "-.", (0, (5, 1, 1, 1, 1, 1)), ":")  # from most calls to fewest
NEAR_DB, MOST_SPAN_DB = 2.0, 25.0
MAP_COLUMNS = 4
LEAST_MAP_SPAN_DB = 2.0  # of the colour scale of differences


@dataclass(frozen=True)
class Style:
    colour: str
    dash: str | tuple
    marker: str


def styles(rows: Sequence[SetRow]) -> dict[str, Style]:
    """Colour, line style and marker of each set of a result, by role and by what its name says it is.

    Students of one arm that were trained from different seeds share its colour. Where sets differ in their steps, the
    colour says the kind and the dash the number of calls.
    """
    free, chosen, owner = list(OTHERS), {}, {}
    kinds = kind_colours(row.facts.kind for row in rows if row.facts.kind)
    calls = sorted({_calls(row) for row in rows if row.facts.kind}, reverse=True)
    for index, row in enumerate(rows):
        marker = MARKERS[index % len(MARKERS)]
        if row.facts.kind:
            dash = BY_CALLS[min(calls.index(_calls(row)), len(BY_CALLS) - 1)]
            chosen[row.name] = Style(kinds[row.facts.kind], dash, marker)
            continue
        colour, seed = _own_colour(row), row.facts.seed
        if colour is None or (colour in owner and seed in owner[colour]):
            colour = free.pop(0) if free else OTHERS[index % len(OTHERS)]
        owner.setdefault(colour, []).append(seed)
        named = {REAL: "-", TEACHER: "-", RESIDUAL: "--", DAR: "-."}
        dash = named[colour] if colour in named else DASHES[index % len(DASHES)]
        chosen[row.name] = Style(colour, dash, marker)
    return chosen


def _calls(row: SetRow) -> int:
    return row.facts.network.evaluations if row.facts.network else 0


def _own_colour(row: SetRow) -> str | None:
    if row.role != "student":
        return {"real": REAL, "teacher": TEACHER}.get(row.role)
    words = row.name.lower()
    return RESIDUAL if "residual" in words else DAR if "dar" in words else None


def charts(report: Report, planes: dict[str, Tensor]) -> dict[str, bytes]:
    """All charts of the report by name: gain, bands, psd, maps; calls where there are several steps; forest and curves
    where there are several seeds.

    planes: each set's mean log power, (H, W) in dB, by name.
    """
    with matplotlib.rc_context({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False}):
        drawn = {"gain": gain_figure(report), "bands": band_figure(report), "psd": psd_figure(report)}
        drawn["maps"] = map_figure(report, planes)
        if over_calls.lines(report):
            drawn["calls"] = over_calls.drawn(report)
        if report.latent:
            drawn["latent"] = latent_figure(report, report.latent)
        if report.forest:
            drawn["forest"] = forest_figure(report.forest)
            if report.forest.curve:
                drawn["curves"] = seed_curves_figure(report, report.forest.curve)
    return drawn


def gain_figure(report: Report) -> bytes:
    """10 log10(R / R_teacher) of every set over frequency, with the margin within which detail counts as preserved.

    Where a curve leaves +-NEAR_DB, a second panel below shows the surroundings of the margin enlarged.
    """
    curves = [GainCurve(row.name, row.frequencies, against.gain_curve_db) for row, against in charted(report)]
    values = [value for curve in curves for value in curve.gain_db]
    low, high = min(values, default=0.0), max(values, default=0.0)
    wide = low < -NEAR_DB or high > NEAR_DB
    figure = Figure(figsize=(9, 7.6 if wide else 4.8), layout="constrained")
    panels = figure.subplots(2 if wide else 1, squeeze=False, sharex=True)[:, 0]
    for axes in panels:
        _gain_panel(axes, report, report.bands, curves)
    if wide:
        panels[0].set_ylim(max(1.08 * low, -MOST_SPAN_DB) - 0.5, min(1.08 * high, MOST_SPAN_DB) + 0.5)
        panels[1].set_title("the same, enlarged", fontsize=10, loc="left", pad=18)
    panels[-1].set_ylim(-NEAR_DB, NEAR_DB)
    panels[-1].set_xlabel("frequency (cycles per pixel; 0.5 is the finest)")
    return finished(figure, panels[0])


@dataclass(frozen=True)
class GainCurve:
    """A set's gain over frequency against the teacher."""

    name: str
    frequencies: Sequence[float]
    gain_db: Sequence[float]


def _gain_panel(axes: Axes, report: Report, bands: Bands, curves: Iterable[GainCurve]) -> None:
    look = styles(report.sets)
    _shade_bands(axes, bands)
    _margin_strip(axes, report)
    for one in curves:
        style = look[one.name]
        axes.plot(one.frequencies, one.gain_db, color=style.colour, ls=style.dash, lw=2, label=plain(one.name))
    axes.set_xlim(bands.edges[0], 0.5)
    axes.set_ylabel(f"against {plain(report.teacher)} (dB)")


def _margin_strip(axes: Axes, report: Report) -> None:
    margin = report.margins.gain_db
    axes.axhline(0, color=TEACHER, lw=1.5, label=f"{plain(report.teacher)}, ±{margin:g} dB")
    axes.axhspan(-margin, margin, color=TEACHER, alpha=0.16, lw=0)


def latent_figure(report: Report, latent: LatentResult) -> bytes:
    """Above, the gain of latents over frequency, all channels together; below, the HF gain of each channel."""
    rows = [(row, row.against.teacher) for row in latent.sets if row.against.teacher and row.role != "null"]
    figure = Figure(figsize=(9, 7.6), layout="constrained")
    over, each = figure.subplots(2)
    curves = [GainCurve(row.name, row.frequencies, against.gain_curve_db) for row, against in rows]
    _gain_panel(over, report, latent.bands, curves)
    over.set_xlabel("frequency (cycles per latent cell)")
    each.axhline(0, color="0.35", lw=1)
    look = styles(report.sets)
    for place, (row, against) in enumerate(rows):
        style, (low, value, high) = look[row.name], _ends(against.hf_gain_db_by_channel)
        x = np.arange(latent.channels) + 0.5 * ((place + 0.5) / len(rows) - 0.5)
        each.errorbar(x, value, (value - low, high - value), fmt=style.marker, color=style.colour, capsize=2, ms=5)
    each.set_xticks(range(latent.channels))
    each.set_xlabel("latent channel")
    each.set_ylabel("HF gain (dB)")
    return finished(figure, over)


def band_figure(report: Report) -> bytes:
    """Gain of each band against the teacher with its confidence interval, enlarged below where one is far off."""
    names = report.bands.names
    gains = [finite(against.gain_db[name].value) for _, against in charted(report) for name in names]
    wide = max((abs(gain) for gain in gains if gain is not None), default=0.0) > NEAR_DB
    figure = Figure(figsize=(9, 7.2 if wide else 4.2), layout="constrained")
    panels = figure.subplots(2 if wide else 1, squeeze=False, sharex=True)[:, 0]
    for axes in panels:
        _band_panel(axes, report)
    if wide:
        panels[0].autoscale(axis="y")
        panels[1].set_title("the same, enlarged", fontsize=10, loc="left")
    panels[-1].set_ylim(-NEAR_DB, NEAR_DB)
    panels[-1].set_xticks(range(len(names)), [_band_label(report.bands, name) for name in names])
    return finished(figure, panels[0])


def _band_panel(axes: Axes, report: Report) -> None:
    names, rows, look = report.bands.names, charted(report), styles(report.sets)
    _margin_strip(axes, report)
    axes.axvspan(len(names) - 1.5, len(names) - 0.5, color=BAND_GREY, zorder=0)
    for place, (row, against) in enumerate(rows):
        x = np.arange(len(names)) + 0.7 * ((place + 0.5) / len(rows) - 0.5)
        low, value, high = _ends([against.gain_db[name] for name in names])
        style, errors, label = look[row.name], np.clip([value - low, high - value], 0, None), plain(row.name)
        axes.errorbar(x, value, errors, fmt=style.marker, color=style.colour, label=label, capsize=3, ms=6, lw=1.6)
    axes.set_xlim(-0.5, len(names) - 0.5)
    axes.set_ylabel(f"gain against {plain(report.teacher)} (dB)")


def _ends(intervals: Sequence[Interval]) -> Iterator[np.ndarray]:
    """low, value and high of all of them; NaN, which matplotlib leaves out, where one is not finite."""
    for end in ("low", "value", "high"):
        yield _drawable(getattr(interval, end) for interval in intervals)


def _drawable(values: Iterable[float]) -> np.ndarray:
    """As an array, with NaN where a value is not finite: matplotlib leaves these out."""
    return np.array([finite(value) for value in values], dtype=float)


def psd_figure(report: Report) -> bytes:
    """Radially averaged power of luma, both axes logarithmic, with the bands shaded."""
    figure = Figure(figsize=(9, 4.8), layout="constrained")
    axes, look = figure.add_subplot(), styles(report.sets)
    axes.set_xscale("log")
    axes.set_yscale("log")
    for row in report.sets:
        if row.role != "null":
            style, label = look[row.name], plain(row.name)
            axes.plot(row.frequencies, row.power, color=style.colour, ls=style.dash, lw=1.8, label=label)
    axes.set_xlim(report.bands.edges[0], 0.5)
    _shade_bands(axes, report.bands)
    ticks = [tick for tick in (1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2) if tick >= axes.get_xlim()[0]]
    axes.set_xticks(ticks, [f"1/{round(1 / tick)}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("frequency (cycles per pixel)")
    axes.set_ylabel("power of luma (image units²)")
    return finished(figure, axes)


def map_figure(report: Report, means: dict[str, Tensor]) -> bytes:
    """Mean log power over the plane of frequencies of each set, and below the differences from the teacher's."""
    nulls = [row.name for row in report.sets if row.role == "null"]
    planes = {name: plane.numpy() for name, plane in means.items() if name not in nulls}
    base = planes[report.teacher]
    differences = {name: plane - base for name, plane in planes.items() if name != report.teacher}
    span = max([LEAST_MAP_SPAN_DB, *(float(np.quantile(np.abs(d), 0.995)) for d in differences.values())])
    low, high = (np.quantile(np.stack(list(planes.values())), q) for q in (0.005, 1))
    lines = [math.ceil(len(part) / MAP_COLUMNS) for part in (planes, differences)]
    figure = Figure(figsize=(9, 0.4 + 2.35 * sum(lines)), layout="constrained")
    parts = figure.subfigures(2, 1, height_ratios=[max(1, n) for n in lines], squeeze=False)[:, 0]
    _planes(parts[0], planes, "mean log power (dB)", cmap="viridis", vmin=low, vmax=high)
    if differences:
        label = f"minus {plain(report.teacher)} (dB)"
        _planes(parts[1], differences, label, cmap="RdBu_r", norm=TwoSlopeNorm(0.0, -span, span))
    return png_of(figure)


def _planes(part: Any, planes: dict[str, np.ndarray], label: str, **options: Any) -> None:
    axes = part.subplots(math.ceil(len(planes) / MAP_COLUMNS), MAP_COLUMNS, squeeze=False).flatten().tolist()
    image = None
    for panel, (name, plane) in zip(axes, planes.items(), strict=False):
        height, width = plane.shape  # f = 0 lies in the middle of pixel [H // 2, W // 2]
        ends = (-0.5 - 0.5 / width, 0.5 - 0.5 / width, 0.5 - 0.5 / height, -0.5 - 0.5 / height)
        image = panel.imshow(plane, extent=ends, interpolation="nearest", **options)
        panel.set_title(plain(_shortened(name, 24)), fontsize=10)
        panel.set_xticks([-0.5, 0, 0.5 - 1 / width], ["−½", "0", "½"], fontsize=8)
        panel.set_yticks([-0.5, 0, 0.5 - 1 / height], ["−½", "0", "½"], fontsize=8)
    for panel in axes[len(planes) :]:
        panel.set_visible(False)
    part.colorbar(image, ax=axes, label=label, shrink=0.85)


def _shortened(text: str, most: int) -> str:
    """Cut in the middle: runs of one arm differ at the end of their names."""
    kept = most - 1
    return text if len(text) <= most else f"{text[: kept - kept // 2]}…{text[-(kept // 2) :]}"


def forest_figure(forest: Forest) -> bytes:
    """Signed gains of both arms seed by seed, and their difference in distance from the teacher with its interval."""
    lines = [line for one in forest.comparisons for line in forest_lines(one)]
    figure = Figure(figsize=(9, 1.6 + 0.38 * len(lines)), layout="constrained")
    gains, difference = figure.subplots(1, 2, sharey=True)
    arms = list(dict.fromkeys(arm for line in lines for arm in line.gain_db))
    others = [arm for arm in arms if arm not in ("residual", "dar")]
    looks = {"residual": (RESIDUAL, "o"), "dar": (DAR, "D")}
    looks |= {arm: (OTHERS[i % len(OTHERS)], "s^v"[i % 3]) for i, arm in enumerate(others)}
    for y, line in enumerate(lines):
        for arm, gain in line.gain_db.items():
            colour, marker = looks[arm]
            gains.plot(gain, y, marker, color=colour, ms=7)
        _forest_bar(difference, y, line)
    for axes in (gains, difference):
        axes.axvline(0, color="0.35", lw=1)
        axes.grid(axis="y", color=BAND_GREY)
        axes.set_axisbelow(True)
    gains.set_yticks(range(len(lines)), [plain(line.title) for line in lines])
    gains.set_ylim(len(lines) - 0.5, -0.5)
    gains.set_xlabel("HF gain against the teacher (dB)")
    difference.set_xlabel("nearer by (dB); above 0 favours DAR")
    for arm, (colour, marker) in looks.items():
        gains.plot([], [], marker, color=colour, label=plain(arm))
    return finished(figure, gains)


def seed_curves_figure(report: Report, seeds: SeedCurves) -> bytes:
    """Gain over frequency of both arms, and how much nearer DAR is, with simultaneous bands over training seeds."""
    figure = Figure(figsize=(9, 7.2), layout="constrained")
    gains, difference = figure.subplots(2, sharex=True)
    _shade_bands(gains, report.bands)
    _shade_bands(difference, report.bands)
    _margin_strip(gains, report)
    difference.axhline(0, color="0.35", lw=1)
    looks = {"dar": (DAR, "-."), "difference": (TEACHER, "-")}
    for name, curve in seeds.curves.items():
        colour, dash = looks.get(name, (RESIDUAL, "--"))
        axes = difference if name == "difference" else gains
        value, low, high = (_drawable(part) for part in (curve.value, curve.low, curve.high))
        axes.fill_between(seeds.frequencies, low, high, color=colour, alpha=0.18, lw=0)
        label = None if axes is difference else plain(name)
        axes.plot(seeds.frequencies, value, color=colour, ls=dash, lw=2, label=label)
    gains.set_ylabel(f"against {plain(report.teacher)} (dB)")
    difference.set_ylabel("nearer by (dB)")
    difference.set_xlabel("frequency (cycles per pixel; 0.5 is the finest)")
    difference.set_xlim(report.bands.edges[0], 0.5)
    return finished(figure, gains)


@dataclass(frozen=True)
class ForestLine:
    """A line of the figure seed by seed: one training seed, or all of a comparison."""

    title: str
    gain_db: dict[str, float]  # of each arm
    difference_db: Interval
    of_all: bool


def forest_lines(one: ForestComparison) -> list[ForestLine]:
    """A line for each seed of a comparison and one for all of them."""
    name = ", ".join(filter(None, [one.baseline, one.steps]))
    lines = [ForestLine(f"{name}, seed {seed.seed}", seed.gain_db, seed.difference_db, False) for seed in one.per_seed]
    return [*lines, ForestLine(f"{name}, all seeds", one.gain_db, one.difference_db, True)]


def _forest_bar(axes: Axes, y: int, line: ForestLine) -> None:
    """The interval; an end that is unbounded is not drawn but marked by an arrow."""
    interval, colour = line.difference_db, TEACHER if line.of_all else "0.25"
    for end, arrow in ((interval.low, "<"), (interval.high, ">")):
        if finite(end) is None:
            axes.plot(interval.value, y, arrow, color=colour, ms=12, mfc="none")
        else:
            axes.plot([interval.value, end], [y, y], color=colour, lw=3 if line.of_all else 1.6)
    axes.plot(interval.value, y, "d" if line.of_all else "o", color=colour, ms=9 if line.of_all else 6)


def _band_label(bands: Bands, name: str) -> str:
    edges, place = bands.edges, bands.names.index(name)
    low, high = (edges[3], edges[5]) if name == "HF" else edges[place : place + 2]
    return f"{name}\n{low:.3g} to {high:.3g}"


def _shade_bands(axes: Axes, bands: Bands) -> None:
    """Every second band grey, each named above the axes; the names of B3 and B4 say that they make up HF."""
    edges = bands.edges
    logarithmic = axes.get_xscale() == "log"
    for b, (low, high) in enumerate(zip(edges, edges[1:], strict=False)):
        if low == high:  # latents too small for this band
            continue
        if b % 2 == 0:
            axes.axvspan(low, high, color=BAND_GREY, lw=0, zorder=0)
        axes.annotate(
            f"B{b} (HF)" if b >= 3 else f"B{b}",
            (math.sqrt(low * high) if logarithmic else (low + high) / 2, 1),
            xycoords=("data", "axes fraction"),
            xytext=(0, 4),
            textcoords="offset points",
            ha="center",
            fontsize=9,
            color="0.35",
        )
