"""Quality over what sampling costs: the chart of a report whose students take several numbers of steps."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas

from ..measure.results import Comparison, Report, SetRow
from .cells import Cell, Figure, Table, finite, interval_cell, number, the
from .columns import LATENCY, charted
from .drawing import DAR, DASHES, MARKERS, RESIDUAL, TEACHER, finished, kind_colours, plain

HEADING = "Quality over calls and time"
MOST_TICKS = 9


@dataclass(frozen=True)
class Point:
    """A student or an undistilled teacher: what it costs and what became of the images, against the teacher."""

    row: SetRow
    against: Comparison

    @property
    def calls(self) -> float:
        return self.row.facts.network.evaluations if self.row.facts.network else math.nan

    @property
    def milliseconds(self) -> float:
        return self.row.facts.cost.latency_ms_per_image if self.row.facts.cost else math.nan

    @property
    def quality(self) -> tuple[float, float, float]:
        """|HF gain| in dB, kurtosis ratio, fd_wavelet above its null."""
        excess = self.against.distances["fd_wavelet"].excess if "fd_wavelet" in self.against.distances else None
        gain, kurtosis = self.against.gain_db["HF"].value, self.against.hf_kurtosis_ratio.value
        return abs(gain), kurtosis, math.nan if excess is None else excess


@dataclass(frozen=True)
class Line:
    """Sets that are alike but for their steps."""

    kind: str
    points: tuple[Point, ...]

    def means(self) -> np.ndarray:
        """(number of calls, 5): calls, ms and the three qualities, means over the sets of equal calls."""
        values = np.array([(one.calls, one.milliseconds, *one.quality) for one in self.points])
        return np.stack([values[values[:, 0] == calls].mean(0) for calls in np.unique(values[:, 0])])


def lines(report: Report) -> list[Line]:
    """By kind, those of students first; empty where the students do not take several numbers of calls.

    A single step, which knows no sampler, is the start of the line of every sampler.
    """
    kinds: dict[tuple[str, str], list[Point]] = {}
    for row, against in charted(report):
        if row.facts.kind:
            kinds.setdefault((row.role, row.facts.kind), []).append(Point(row, against))
    if len({one.calls for (role, _), points in kinds.items() if role == "student" for one in points}) < 2:
        return []
    starts = {key: (key[0], _of_any_sampler(points[0].row)) for key, points in kinds.items()}
    begun = {start for key, start in starts.items() if start != key}
    return [
        Line(key[1], (*(kinds.get(starts[key], []) if starts[key] != key else ()), *kinds[key]))
        for key in sorted(kinds)
        if key not in begun
    ]


def _of_any_sampler(row: SetRow) -> str:
    """Its kind without its sampler."""
    return ", ".join(word for word in (row.facts.kind or "").split(", ") if word != row.facts.sampler)


def drawn(report: Report) -> bytes:
    """|HF gain|, kurtosis ratio and fd_wavelet above its null, against calls and against ms per image."""
    figure = Canvas(figsize=(9, 9.2), layout="constrained")
    panels = figure.subplots(3, 2, sharex="col", sharey="row")
    shown = lines(report)
    for line, look in zip(shown, _looks(shown), strict=True):
        means = line.means()
        values = np.array([(one.calls, one.milliseconds, *one.quality) for one in line.points])
        for (place, cost), axes in np.ndenumerate(panels):
            axes.plot(means[:, cost], means[:, 2 + place], lw=2, label=plain(line.kind), **look, markevery=[])
            axes.plot(values[:, cost], values[:, 2 + place], look["marker"], color=look["color"], ms=6)
    _scales(panels, report, shown)
    return finished(figure, panels[0, 0])


def _looks(shown: Sequence[Line]) -> list[dict]:
    """The colour of its kind, as in the other charts, and a dash and a marker besides."""
    colours = kind_colours(one.row.facts.kind or "" for line in shown for one in line.points)
    looks = []
    for index, line in enumerate(shown):
        dash = {RESIDUAL: "--", DAR: "-."}.get(colours[line.kind], DASHES[(index + 2) % len(DASHES)])
        looks.append({"color": colours[line.kind], "ls": dash, "marker": MARKERS[index % len(MARKERS)]})
    return looks


def _scales(panels: np.ndarray, report: Report, shown: Sequence[Line]) -> None:
    """Axes, what is best in each row, and the verdict's margins as strips."""
    points = [one for line in shown for one in line.points]
    low, high = report.margins.kurtosis
    rows = (
        ("|HF gain| (dB)", 0.0, (0.0, report.margins.gain_db)),
        ("kurtosis ratio", 1.0, (low, high)),
        ("fd_wavelet above its null", 0.0, None),
    )
    for place, (title, best, margins) in enumerate(rows):
        for axes in panels[place]:
            axes.axhline(best, color="0.35", lw=1)
            axes.grid(color="0.9")
            axes.set_axisbelow(True)
            if margins:
                axes.axhspan(*margins, color=TEACHER, alpha=0.14, lw=0)
        panels[place, 0].set_ylabel(title)
        if place != 1:
            _compressed(panels[place, 0], [v for one in points if (v := finite(one.quality[place])) is not None])
    calls = sorted({one.calls for one in points})
    panels[2, 0].set_xscale("log", base=2)
    panels[2, 0].set_xticks(calls, [f"{count:g}" for count in calls])
    panels[2, 0].minorticks_off()
    panels[2, 1].set_xlim(left=0)
    panels[2, 0].set_xlabel("calls of the network for an image")
    panels[2, 1].set_xlabel("ms per image")


def _compressed(axes: Axes, values: Sequence[float]) -> None:
    """Linear up to 1 and logarithmic above, since an undistilled step is far off where students are near."""
    least, most = min([0.0, *values]), max([1.0, *values])
    axes.set_yscale("symlog", linthresh=1, linscale=0.8)
    ticks = [0.0, 0.5] + [digit * 10.0**power for power in range(12) for digit in (1, 2, 5)]
    ticks = [tick for tick in ticks if tick <= 1.4 * most]
    if len(ticks) > MOST_TICKS:
        ticks = [tick for tick in ticks if f"{tick:g}"[0] in "01"]
    axes.set_yticks(ticks, [f"{tick:,g}" if tick < 1e5 else f"{tick:.0e}" for tick in ticks])
    axes.set_ylim(1.4 * least - 0.1, 1.4 * most)
    axes.minorticks_off()


def section(report: Report, png: bytes) -> Figure:
    """The chart with its caption and numbers."""
    shown = lines(report)
    caption = (
        f"Students and the undistilled teacher against {the(report.teacher)}, over the calls of the network for an"
        " image and over the time that these take. A point is a set; a line joins those that are alike but for their"
        " steps, through the mean of equal calls. 0 is best above and below, 1 in the middle; the strips are the"
        " verdict's margins. The upper and lower scales are linear up to 1 and logarithmic above."
    )
    heads = ["set", "line", "calls", LATENCY.heading, "HF gain, dB", "kurtosis ratio", "fd_wavelet over null"]
    cells = [_cells(line.kind, one) for line in shown for one in sorted(line.points, key=lambda one: one.calls)]
    return Figure(png, "chart", HEADING, caption, (Table.of("quality over calls", heads, cells),))


def _cells(kind: str, one: Point) -> list[Cell | str]:
    return [
        one.row.name,
        kind,
        f"{one.calls:g}",
        LATENCY.cell(one.row, one.against),
        interval_cell(one.against.gain_db["HF"]),
        interval_cell(one.against.hf_kurtosis_ratio, signed=False),
        number(one.quality[2]),
    ]
