"""The figures of a report, as PNG bytes: curves from a result of eval.measure, grids from the images themselves.

Real is black, the teacher blue, residual vermilion, DAR green; each line has a style of its own besides.
"""

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import pywt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from eval.measure import ImageSet
from eval.structure import WAVELET, luma

REAL, TEACHER, RESIDUAL, DAR = "#000000", "#0072B2", "#D55E00", "#009E73"
OTHERS = ("#CC79A7", "#E69F00", "#56B4E9", "#7A7A7A", "#B8A800")  # Okabe-Ito; grey and a darker yellow for white paper
DASHES = ("--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 2)))
MARKERS = "osD^vPX"
BAND_GREY = "0.93"
NEAR_DB, MOST_SPAN_DB = 2.0, 25.0
GRID_ROWS, TILE, GAP, BLOCK_GAP, HEADER, ROW_LABEL = 8, 128, 4, 20, 52, 120
HEADER_FONT, ROW_FONT = 20, 16
GRID_WIDTH_IN_TILES = 14


@dataclass(frozen=True)
class Style:
    colour: str
    dash: str | tuple
    marker: str


def styles(rows: Sequence[dict]) -> dict[str, Style]:
    """Colour, line style and marker of each set of a result, by role and by what its name says it is."""
    free, chosen = list(OTHERS), {}
    for index, row in enumerate(rows):
        colour = {"real": REAL, "teacher": TEACHER}.get(row["role"])
        if row["role"] == "student":
            words = row["name"].lower()
            colour = RESIDUAL if "residual" in words else DAR if "dar" in words else None
        if colour is None or any(colour == style.colour for style in chosen.values()):
            colour = free.pop(0) if free else OTHERS[index % len(OTHERS)]
        solid = colour in (REAL, TEACHER, RESIDUAL, DAR)
        dash = {REAL: "-", TEACHER: "-", RESIDUAL: "--", DAR: "-."}[colour] if solid else DASHES[index % len(DASHES)]
        chosen[row["name"]] = Style(colour, dash, MARKERS[index % len(MARKERS)])
    return chosen


def figures(result: dict, sets: Sequence[ImageSet]) -> dict[str, bytes]:
    """All figures of the report by name: gain, bands, psd, samples, detail."""
    with matplotlib.rc_context({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False}):
        drawn = {"gain": gain_figure(result), "bands": band_figure(result), "psd": psd_figure(result)}
    drawn["samples"] = sample_grid(result, sets, colour_tiles)
    drawn["detail"] = sample_grid(result, sets, _detail_of(result, sets))
    return drawn


def gain_figure(result: dict) -> bytes:
    """10 log10(R / R_teacher) of every set over frequency, with the margin within which detail counts as preserved.

    Where a curve leaves +-NEAR_DB, a second panel below shows the surroundings of the margin enlarged.
    """
    curves = {
        row["name"]: (row["frequencies"], row["against"]["teacher"]["gain_curve_db"])
        for row in result["sets"]
        if row["against"]["teacher"] is not None
    }
    values = [value for _, curve in curves.values() for value in curve]
    low, high = min(values, default=0.0), max(values, default=0.0)
    wide = low < -NEAR_DB or high > NEAR_DB
    figure = Figure(figsize=(9, 7.6 if wide else 4.8), layout="constrained")
    panels = figure.subplots(2 if wide else 1, squeeze=False, sharex=True)[:, 0]
    for axes in panels:
        _gain_panel(axes, result, curves)
    if wide:
        panels[0].set_ylim(max(1.08 * low, -MOST_SPAN_DB) - 0.5, min(1.08 * high, MOST_SPAN_DB) + 0.5)
        panels[1].set_title("the same, enlarged", fontsize=10, loc="left", pad=18)
    panels[-1].set_ylim(-NEAR_DB, NEAR_DB)
    panels[-1].set_xlabel("frequency (cycles per pixel; 0.5 is the finest)")
    return _finish(figure, panels[0])


def _gain_panel(axes: Axes, result: dict, curves: dict[str, tuple[list[float], list[float]]]) -> None:
    look = styles(result["sets"])
    _shade_bands(axes, result)
    _margin_strip(axes, result)
    for name, (frequencies, curve) in curves.items():
        style = look[name]
        axes.plot(frequencies, curve, color=style.colour, ls=style.dash, lw=2, label=_plain(name))
    axes.set_xlim(result["bands"]["edges"][0], 0.5)
    axes.set_ylabel("against the teacher (dB)")


def _margin_strip(axes: Axes, result: dict) -> None:
    margin = result["margins"]["gain_db"]
    axes.axhline(0, color=TEACHER, lw=1.5, label=f"teacher, ±{margin:g} dB")
    axes.axhspan(-margin, margin, color=TEACHER, alpha=0.16, lw=0)


def band_figure(result: dict) -> bytes:
    """Gain of each band against the teacher with its confidence interval."""
    names = result["bands"]["names"]
    figure, axes = _axes(9, 4.2)
    _margin_strip(axes, result)
    axes.axvspan(len(names) - 1.5, len(names) - 0.5, color=BAND_GREY, zorder=0)
    look = styles(result["sets"])
    rows = [row for row in result["sets"] if row["against"]["teacher"] is not None]
    for place, row in enumerate(rows):
        gains = [row["against"]["teacher"]["gain_db"][name] for name in names]
        x = np.arange(len(names)) + 0.7 * ((place + 0.5) / len(rows) - 0.5)
        value, low, high = (np.array([gain[key] for gain in gains], dtype=float) for key in ("value", "low", "high"))
        style = look[row["name"]]
        errors = np.clip([value - low, high - value], 0, None)
        axes.errorbar(
            x, value, errors, fmt=style.marker, color=style.colour, capsize=3, ms=6, lw=1.6, label=_plain(row["name"])
        )
    axes.set_xlim(-0.5, len(names) - 0.5)
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, -NEAR_DB), max(high, NEAR_DB))
    axes.set_xticks(range(len(names)), [_band_label(result, name) for name in names])
    axes.set_ylabel("gain against the teacher (dB)")
    return _finish(figure, axes)


def psd_figure(result: dict) -> bytes:
    """Radially averaged power of luma, both axes logarithmic, with the bands shaded."""
    figure, axes = _axes(9, 4.8)
    look = styles(result["sets"])
    axes.set_xscale("log")
    axes.set_yscale("log")
    for row in result["sets"]:
        style = look[row["name"]]
        axes.plot(
            row["frequencies"], row["power"], color=style.colour, ls=style.dash, lw=1.8, label=_plain(row["name"])
        )
    axes.set_xlim(result["bands"]["edges"][0], 0.5)
    _shade_bands(axes, result)
    ticks = [tick for tick in (1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2) if tick >= axes.get_xlim()[0]]
    axes.set_xticks(ticks, [f"1/{round(1 / tick)}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("frequency (cycles per pixel)")
    axes.set_ylabel("power of luma (image units²)")
    return _finish(figure, axes)


def _axes(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def _plain(name: str) -> str:
    """A name as matplotlib shall show it: no mathematics, not hidden by a leading underscore."""
    return name.replace("$", r"\$") if not name.startswith("_") else " " + name.replace("$", r"\$")


def _band_label(result: dict, name: str) -> str:
    edges, names = result["bands"]["edges"], result["bands"]["names"]
    low, high = (edges[3], edges[5]) if name == "HF" else edges[names.index(name) : names.index(name) + 2]
    return f"{name}\n{low:.3g} to {high:.3g}"


def _shade_bands(axes: Axes, result: dict) -> None:
    """Every second band grey, each named above the axes; the names of B3 and B4 say that they make up HF."""
    edges = result["bands"]["edges"]
    logarithmic = axes.get_xscale() == "log"
    for b, (low, high) in enumerate(zip(edges, edges[1:], strict=False)):
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


def _finish(figure: Figure, axes: Axes) -> bytes:
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        columns = min(4, len(labels))
        figure.legend(handles, labels, loc="outside upper left", ncols=columns, frameon=False, handlelength=3)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, metadata={"Software": None})
    return buffer.getvalue()


def colour_tiles(images: torch.Tensor) -> np.ndarray:
    """uint8 (n, 3, H, W) -> (n, H, W, 3)."""
    return images.permute(0, 2, 3, 1).cpu().numpy()


def fine_detail(images: torch.Tensor) -> np.ndarray:
    """Luma without its level-1 wavelet approximation, uint8 (n, 3, H, W) -> (n, H, W) around 0."""
    plane = luma(images.double() / 255)
    approximation, bands = pywt.dwt2(plane, WAVELET, mode="symmetric", axes=(-2, -1))
    detail = pywt.idwt2((np.zeros_like(approximation), bands), WAVELET, mode="symmetric", axes=(-2, -1))
    return detail[:, : plane.shape[-2], : plane.shape[-1]]


def _detail_of(result: dict, sets: Sequence[ImageSet]) -> Callable[[torch.Tensor], np.ndarray]:
    """Fine detail around mid-grey, amplified alike for all sets so that the teacher's just fills the range."""
    anchor = next((one for one in sets if one.name == result["teacher"]), sets[0])
    amplitude = max(float(np.quantile(np.abs(fine_detail(anchor.images[:256])), 0.98)), 1 / 255)

    def tiles(images: torch.Tensor) -> np.ndarray:
        grey = 127.5 + 127.5 * np.clip(fine_detail(images) / amplitude, -1, 1)
        return np.repeat(grey.round().astype(np.uint8)[..., None], 3, axis=-1)

    return tiles


def sample_grid(result: dict, sets: Sequence[ImageSet], tiles_of: Callable[[torch.Tensor], np.ndarray]) -> bytes:
    """One block of columns per set and one class per row; a place in a block is the same noise seed in paired sets.

    Pixels are enlarged without interpolation. Nulls are left out. Unpaired sets (real) show images of the row's class.
    """
    sets = [one for one in sets if one.role != "null"]
    columns = max(1, min(4, GRID_WIDTH_IN_TILES // len(sets)))
    classes = sets[0].labels.unique()
    classes = classes[torch.linspace(0, len(classes) - 1, min(GRID_ROWS, len(classes))).round().long()].tolist()
    rows = classes if len(classes) > 2 else [label for label in classes for _ in range(4 // len(classes))]
    height, width = sets[0].images.shape[-2:]
    zoom = max(1, TILE // width)
    tile_h, tile_w, block = zoom * height, zoom * width, columns * (zoom * width + GAP) + BLOCK_GAP
    canvas = Image.new("RGB", (ROW_LABEL + len(sets) * block, HEADER + len(rows) * (tile_h + GAP)), "white")
    draw = ImageDraw.Draw(canvas)
    for index, one in enumerate(sets):
        left = ROW_LABEL + index * block
        for line, part in enumerate(one.name.split(", ", 1)):
            place = (left, 4 + line * (HEADER_FONT + 2))
            draw.text(place, _fitted(part, block - BLOCK_GAP, HEADER_FONT), fill="black", font=_font(HEADER_FONT))
        for row, label in enumerate(rows):
            nth = rows[:row].count(label) * columns
            chosen = torch.nonzero(one.labels == label).flatten()[nth : nth + columns]
            for column, tile in enumerate(tiles_of(one.images[chosen]) if len(chosen) else []):
                picture = Image.fromarray(tile).resize((tile_w, tile_h), Image.Resampling.NEAREST)
                canvas.paste(picture, (left + column * (tile_w + GAP), HEADER + row * (tile_h + GAP)))
    for row, label in enumerate(rows):
        name = _fitted(str(result["class_names"].get(str(label), f"class {label}")), ROW_LABEL - 12, ROW_FONT)
        draw.text((6, HEADER + row * (tile_h + GAP) + 4), name, fill="black", font=_font(ROW_FONT))
    buffer = io.BytesIO()
    canvas.save(buffer, format="png", optimize=True)
    return buffer.getvalue()


def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), size)


def _fitted(text: str, width: int, size: int) -> str:
    """The text on one line, cut with an ellipsis to `width` pixels."""
    text = " ".join(text.split())
    font = _font(size)
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"
