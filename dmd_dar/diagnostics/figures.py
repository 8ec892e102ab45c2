"""The figures of dmd_dar.diagnostics as PNG bytes, drawn from diagnostics.json's content alone.

Residual is vermilion, DAR green (Okabe-Ito); a second network of the same kind is dashed and of another colour.
"""

import io
from collections.abc import Sequence
from typing import Any, cast

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

COLOURS = {"residual": "#D55E00", "DAR": "#009E73"}
SECOND = {"residual": "#E69F00", "DAR": "#0072B2"}
NO_SOURCE, DIVERGING = "0.85", "PuOr_r"
LEAST_RATIO, MOST_RATIO = 1.25, 8.0  # least and most that the colours of the mixing reach, over and under equal weights
STYLE: dict[Any, Any] = {"font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 11}

Facts = dict[str, Any]


def figures(result: Facts) -> dict[str, bytes]:
    """By name: `symptoms` over blocks, `mixing` over routers and sources, `routers` with what sums the mixing up."""
    drawers = {"symptoms": symptoms_figure, "mixing": mixing_figure, "routers": routers_figure}
    with matplotlib.rc_context(STYLE):
        return {name: _png(draw(result)) for name, draw in drawers.items()}


def symptoms_figure(result: Facts) -> Figure:
    """Three statistics (columns) at the first, the middle and the last t (rows)."""
    columns = (
        ("forward_rms", "Forward magnitude", "RMS of block output $z_k$"),
        ("gradient_rms", "Backward gradient", r"RMS of $\partial$ loss / $\partial z_k$"),
        ("block_cosine", "Similarity of blocks", r"mean cos($z_k$, $z_{k+1}$)"),
    )
    rows = shown_times(result["times"])
    figure = Figure(figsize=(12, 2.9 * len(rows) + 0.6), layout="constrained")
    grid = figure.subplots(len(rows), 3, squeeze=False, sharex="col", sharey="col")
    for place, index in enumerate(rows):
        for axes, (fact, title, label) in zip(grid[place], columns, strict=True):
            for model, look in zip(result["models"], looks(result["models"]), strict=True):
                values = model["symptoms"][fact][index]
                blocks = range(1, len(values) + 1)
                axes.plot(blocks, values, **look, marker="o", ms=4, label=model["name"], clip_on=False)
                if fact == "gradient_rms" and model["kind"] == "residual":
                    alone = model["symptoms"]["sublayer_gradient_rms"][index]
                    caption = f"{model['name']}, through the next sublayer alone"
                    axes.plot(blocks, alone, color=look["color"], ls=":", lw=1.5, label=caption)
            axes.set_title(f"{title} at {time_in_words(result['times'][index])}", loc="left")
            axes.set_ylabel(label)
            axes.grid(axis="y", which="major", color="0.9")
            _whole_numbers(axes)
    for axes, label in zip(grid[-1], ("block k", "block k", "block k, against block k + 1"), strict=True):
        axes.set_xlabel(label)
    for axes in (grid[0, 0], grid[0, 1]):
        _logarithmic(axes)
    grid[0, 2].set_ylim(top=1)
    return _with_legend(figure, grid[0, 1])


def mixing_figure(result: Facts) -> Figure:
    """One map per network (rows) and t (columns): each source's weight over equal weights, n alpha, for each router.

    For a residual network the weights are shares of the gate gradients; dots mark the gates that are clear of 0.
    """
    shown, models = shown_times(result["times"]), result["models"]
    figure = Figure(figsize=(12, 4.2 * len(models)), layout="constrained")
    grid = figure.subplots(len(models), len(shown), squeeze=False)
    for row, model in zip(grid, models, strict=True):
        routers, alpha = model["mixing"]["routers"], model["mixing"]["kind"] == "alpha"
        maps = [weight_map(routers, index) for index in shown]
        most = min(MOST_RATIO, max(LEAST_RATIO, *(np.nanmax(np.maximum(one, 1 / one.clip(1e-9))) for one in maps)))
        for axes, one, index in zip(row, maps, shown, strict=True):
            name = model["name"] if axes is row[0] else ""
            edges = [-0.5, one.shape[1] - 0.5, len(one) + 1.5, 1.5]  # routers 2 .. L + 1 downwards
            norm = LogNorm(vmin=1 / most, vmax=most, clip=True)
            image = axes.imshow(one, cmap=DIVERGING, norm=norm, extent=edges, interpolation="nearest", aspect="auto")
            if not alpha:
                axes.plot(*clear_gates(routers, index), "o", color="black", mec="white", ms=4, mew=0.6)
            axes.set_facecolor(NO_SOURCE)
            axes.set_title(f"{name}\n{time_in_words(result['times'][index])}", loc="left")
            axes.set_xlabel(f"source: output of {unit_of(model['mixing'])} i (0: the input)")
            axes.set_ylabel("router l")
            _whole_numbers(axes)
        meaning = r"$n\,\alpha$" if alpha else r"$n$ x share of |$\partial$ loss / $\partial$ gate|"
        note = "1: equal weights" if alpha else "dot: over two standard errors from 0"
        bar = figure.colorbar(image, ax=row, label=f"{meaning}\n{note}", format="%.2g", shrink=0.9)
        bar.set_ticks([most**power for power in (-1, -0.5, 0, 0.5, 1)])
        bar.minorticks_off()
    return figure


def clear_gates(routers: Sequence[Facts], time_index: int) -> tuple[list[int], list[int]]:
    """Sources i and routers l of the gates whose gradient is more than two standard errors from 0."""
    gates = [
        (i, row["router"])
        for row in routers
        for i, gradient in enumerate(row["gate_gradient"][time_index])
        if abs(gradient) > 2 * row["standard_error"][time_index][i]
    ]
    return [i for i, _ in gates], [router for _, router in gates]


def weight_map(routers: Sequence[Facts], time_index: int) -> np.ndarray:
    """(L, L + 1): row l - 2, column i holds n times the weight of v_i in router l of n sources, NaN without.

    A summary fills the columns of all the sublayers, or blocks, that it stands for.
    """
    weights = np.full((len(routers), max(last for row in routers for _, last in row["sources"]) + 1), np.nan)
    for place, row in enumerate(routers):
        for (first, last), weight in zip(row["sources"], row["weights"][time_index], strict=True):
            weights[place, first : last + 1] = weight * len(row["sources"])
    return weights


def routers_figure(result: Facts) -> Figure:
    """Lines are means over t, bands run from the least to the most over t."""
    figure = Figure(figsize=(12, 8), layout="constrained")
    grid = figure.subplots(2, 2)
    unit = " or ".join(dict.fromkeys(unit_of(model["mixing"]) for model in result["models"]))
    panels = (
        ("effective_sources", "Sources that a router uses (dotted: all it has)", "effective number, exp(entropy)"),
        ("share_v0", "Share of the embedded input", r"weight on $v_0$"),
        ("distance_back", "How far back a router reaches", f"mean distance $l - i$ ({unit}s)"),
    )
    for model, look in zip(result["models"], looks(result["models"]), strict=True):
        routers = model["mixing"]["routers"]
        x = [row["router"] for row in routers]
        for axes, (fact, _, _) in zip(grid.flat, panels, strict=False):
            values = np.array([row[fact] for row in routers])
            axes.plot(x, values.mean(axis=1), **look, marker="o", ms=4, label=_with_kind(model))
            axes.fill_between(x, values.min(axis=1), values.max(axis=1), color=look["color"], alpha=0.15, lw=0)
        counts = [len(row["sources"]) for row in routers]
        grid[0, 0].plot(x, counts, color=look["color"], ls=":", lw=1.5)
        r2 = model["probe"]["states"]
        grid[1, 1].plot(range(1, len(r2) + 1), r2, **look, marker="o", ms=4)
        grid[1, 1].axhline(model["probe"]["input"], color=look["color"], ls=":", lw=1.5)
    for axes, (_, title, label) in zip(grid.flat, panels, strict=False):
        axes.set_title(title, loc="left")
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
    grid[1, 1].set_ylim(top=1.04)
    grid[1, 1].set_title("Linear probe of t from the state (dotted: from the pixels)", loc="left")
    grid[1, 1].set_ylabel(r"$R^2$ on unseen pairs")
    for axes in grid.flat:
        axes.set_xlabel("router l; the last one feeds the head")
        axes.grid(axis="y", color="0.9")
        _whole_numbers(axes)
    grid[1, 1].set_xlabel(f"state l, the input of {unit} l or of the head")
    return _with_legend(figure, grid[0, 0])


def shown_times(times: Sequence[float]) -> list[int]:
    """Indices of the first, the middle and the last of `times`, or of as many as there are."""
    return sorted({0, len(times) // 2, len(times) - 1})


def unit_of(mixing: Facts) -> str:
    """What sources and routers count: "block" where the routers read whole blocks."""
    return mixing.get("unit", "sublayer")  # a diagnostics.json of before knows sublayers alone


def time_in_words(time: float) -> str:
    return f"t = {time:g}" + {0.0: " (data)", 1.0: " (noise)"}.get(time, "")


def looks(models: Sequence[Facts]) -> list[Facts]:
    """Line colour and style of each network."""
    chosen: list[Facts] = []
    for model in models:
        taken = any(look["color"] == COLOURS[model["kind"]] for look in chosen)
        colour = (SECOND if taken else COLOURS)[model["kind"]]
        chosen.append({"color": colour, "ls": "--" if chosen else "-", "lw": 1.8})
    return chosen


def _with_kind(model: Facts) -> str:
    return f"{model['name']}: " + ("alpha" if model["mixing"]["kind"] == "alpha" else "by gate gradients")


def _whole_numbers(axes: Axes) -> None:
    cast(MaxNLocator, axes.xaxis.get_major_locator()).set_params(integer=True)
    if axes.get_yscale() == "linear" and axes.images:
        cast(MaxNLocator, axes.yaxis.get_major_locator()).set_params(integer=True)


def _logarithmic(axes: Axes) -> None:
    """A logarithmic y axis with plain numbers, and 2 and 5 between the decades where few decades are seen."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def _with_legend(figure: Figure, axes: Axes) -> Figure:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=2, frameon=False, handlelength=3)
    return figure


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, metadata={"Software": None})
    return buffer.getvalue()
