"""What the charts share: colours that say what a set is, markers, how a name is written, a figure as PNG bytes."""

import io
from collections.abc import Iterable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

REAL, TEACHER, RESIDUAL, DAR = "#000000", "#0072B2", "#D55E00", "#009E73"
VERMILIONS, GREENS = (RESIDUAL, "#7A2600", "#E8604C"), (DAR, "#00543D", "#3C9D4E")  # of residual kinds, of DAR's
UNDISTILLED = ("#404040", "#7A7A7A", "#A6761D")
FURTHER = ("#882255", "#6A3D9A", "#B8417F", "#5B6C00")  # kinds of students; dark enough for thin lines on white paper
DASHES = ("--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 2)))
MARKERS = "osD^vPX"
BAND_GREY = "0.93"
MOST_COLUMNS, LINE_OF_NAMES, SAMPLE_OF_LINE = 4, 100, 7  # of a legend: letters that fit beside each other, its samples


def plain(name: str) -> str:
    """A name as matplotlib shall show it: no mathematics, not hidden by a leading underscore."""
    return name.replace("$", r"\$") if not name.startswith("_") else " " + name.replace("$", r"\$")


def kind_colours(kinds: Iterable[str]) -> dict[str, str]:
    """Of sets that are alike but for their steps: residual vermilion, DAR green, undistilled grey and brown, up to
    three kinds of each; FURTHER for more.
    """
    free = {"residual": list(VERMILIONS), "DAR": list(GREENS), "undistilled": list(UNDISTILLED)}
    others, chosen = list(FURTHER), {}
    for index, kind in enumerate(sorted(set(kinds))):
        own = free.get(kind.split(",")[0]) or others
        chosen[kind] = own.pop(0) if own else FURTHER[index % len(FURTHER)]
    return chosen


def finished(figure: Figure, axes: Axes) -> bytes:
    """The figure with the legend of `axes` above it."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        columns = legend_columns(labels)
        figure.legend(handles, labels, loc="outside upper left", ncols=columns, frameon=False, handlelength=3)
    return png_of(figure)


def legend_columns(labels: Sequence[str]) -> int:
    """As many as fit beside each other, MOST_COLUMNS at most; names run down each column in turn."""
    for columns in range(min(MOST_COLUMNS, len(labels)), 1, -1):
        widths = [max(map(len, part)) for part in np.array_split(np.array(labels, dtype=object), columns)]
        if sum(widths) + SAMPLE_OF_LINE * columns <= LINE_OF_NAMES:
            return columns
    return 1


def png_of(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, metadata={"Software": None})
    return buffer.getvalue()
