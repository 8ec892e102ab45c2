"""Sample grids of a report, as PNG bytes: a column for each set, a row for each noise seed, pixels as they are.

Legend: n images of a set, H x W pixels.
"""

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import matplotlib
import numpy as np
import pywt
import torch
from PIL import Image, ImageDraw, ImageFont

from ..measure.results import Report
from ..metrics.structure import WAVELET, luma
from ..samples.sets import ImageSet

TILE, GAP, HEADER, ROW_LABEL, PROMPT_LABEL = 128, 4, 52, 120, 260  # pixels of the picture
HEADER_FONT, ROW_FONT = 18, 16
MOST_ROWS = 14  # of the sample grid
MOST_CLASSES = 8
ZOOM = 4
OPENING_ROWS, OPENING_SETS = 2, 6
ANCHOR = 256  # images of the teacher that set the amplification of fine detail

Tiles = Callable[[torch.Tensor], np.ndarray]  # uint8 (n, 3, H, W) -> uint8 (n, h, w, 3)


@dataclass(frozen=True)
class Row:
    """One noise seed: its class and the number of the image in every set, None where a set has no such image."""

    label: int | None
    images: dict[str, int | None]


def chosen_rows(sets: Sequence[ImageSet], most: int = MOST_ROWS) -> list[Row]:
    """The same number of rows of each class; paired sets show the same image number, and so the same noise."""
    leader = next((one for one in sets if one.paired), sets[0])
    if leader.classes is None:
        return [
            Row(None, {one.name: i if i < one.count else None for one in sets}) for i in range(min(most, leader.count))
        ]
    classes = np.unique(leader.classes)
    classes = classes[np.linspace(0, len(classes) - 1, min(MOST_CLASSES, len(classes))).round().astype(int)]
    each = max(1, most // len(classes))
    return [
        Row(int(label), {one.name: _nth(one, leader, int(label), nth) for one in sets})
        for label in classes
        for nth in range(each)
    ]


def _nth(one: ImageSet, leader: ImageSet, label: int, nth: int) -> int | None:
    """The number of the nth image of a class; of a set without classes, simply the leader's number."""
    labels = leader.classes if one.classes is None else one.classes
    of_class = np.flatnonzero(labels == label)
    return int(of_class[nth]) if nth < len(of_class) and of_class[nth] < one.count else None


def shown(sets: Sequence[ImageSet]) -> list[ImageSet]:
    """All but the nulls."""
    return [one for one in sets if one.role != "null"]


def whole_tiles(images: torch.Tensor) -> np.ndarray:
    """uint8 (n, 3, H, W) -> (n, H, W, 3)."""
    return images.permute(0, 2, 3, 1).cpu().numpy()


def magnification(side: int) -> int:
    """By how much the sample grid enlarges images of this width."""
    return max(1, TILE // side)


def zoom_factor(side: int) -> int:
    """By how much the zoomed grid enlarges: ZOOM, and at least twice the sample grid's."""
    return max(ZOOM, 2 * magnification(side))


def central_tiles(images: torch.Tensor) -> np.ndarray:
    """The centre, as large as fills a tile of the sample grid once enlarged by `zoom_factor`."""
    height, width = images.shape[-2:]
    part = zoom_factor(width) / magnification(width)
    rows, columns = (int(length / part) for length in (height, width))
    top, left = (height - rows) // 2, (width - columns) // 2
    return whole_tiles(images[:, :, top : top + rows, left : left + columns])


def fine_detail(images: torch.Tensor) -> np.ndarray:
    """Luma without its level-1 wavelet approximation, uint8 (n, 3, H, W) -> (n, H, W) around 0."""
    plane = luma(images.double() / 255)
    approximation, bands = pywt.dwt2(plane, WAVELET, mode="symmetric", axes=(-2, -1))
    detail = pywt.idwt2((np.zeros_like(approximation), bands), WAVELET, mode="symmetric", axes=(-2, -1))
    return detail[:, : plane.shape[-2], : plane.shape[-1]]


def detail_tiles(anchor: ImageSet) -> Tiles:
    """Fine detail around mid-grey, amplified alike for all sets so that the anchor's just fills the range."""
    amplitude = max(float(np.quantile(np.abs(fine_detail(anchor.first(ANCHOR))), 0.98)), 1 / 255)

    def tiles(images: torch.Tensor) -> np.ndarray:
        grey = 127.5 + 127.5 * np.clip(fine_detail(images) / amplitude, -1, 1)
        return np.repeat(grey.round().astype(np.uint8)[..., None], 3, axis=-1)

    return tiles


def grids(report: Report, sets: Sequence[ImageSet]) -> tuple[dict[str, bytes], list[Row]]:
    """The grids by name (opening, samples, zoom, detail), and the rows of the samples; the others show some of them."""
    sets, names = shown(sets), report.class_names
    anchor = next((one for one in sets if one.name == report.teacher), sets[0])
    rows = chosen_rows(sets)
    few = one_of_each(rows)
    side = anchor.stream.size[1]
    opened = opening_sets(anchor, sets)
    # prompts are read beside their pictures, classes are seen
    margins = (PROMPT_LABEL, PROMPT_LABEL) if any(one.prompted for one in sets) else (0, ROW_LABEL)
    return {
        "opening": grid(names, opened, opening_rows(few), opening_tiles, 1, margins[0]),
        "samples": grid(names, sets, rows, whole_tiles, magnification(side), margins[1]),
        "zoom": grid(names, sets, few, central_tiles, zoom_factor(side), margins[1]),
        "detail": grid(names, sets, few, detail_tiles(anchor), magnification(side), margins[1]),
    }, rows


def one_of_each(rows: Sequence[Row]) -> list[Row]:
    """The first row of each class."""
    labels = [row.label for row in rows]
    return [row for i, row in enumerate(rows) if row.label is None or row.label not in labels[:i]][:MOST_CLASSES]


def opening_sets(anchor: ImageSet, sets: Sequence[ImageSet]) -> list[ImageSet]:
    """The anchor and the first students or folders beside it; all sets where there is none of them."""
    others = [one for one in sets if one.role in ("student", "images") and one is not anchor]
    return [anchor, *(others or [one for one in sets if one is not anchor])][:OPENING_SETS]


def opening_rows(rows: Sequence[Row]) -> list[Row]:
    """A few of the rows, evenly spaced."""
    count = min(OPENING_ROWS, len(rows))
    return [rows[i * len(rows) // count] for i in range(count)]


def opening_tiles(images: torch.Tensor) -> np.ndarray:
    """Each image enlarged as in the sample grid, and below it its centre enlarged further."""
    side = images.shape[-1]
    whole = _enlarged(whole_tiles(images), magnification(side))
    centre = _enlarged(central_tiles(images), zoom_factor(side))
    missing = max(0, whole.shape[2] - centre.shape[2])  # of sides that do not divide
    centre = np.pad(centre, ((0, 0), (GAP, 0), (0, missing), (0, 0)), constant_values=255)[:, :, : whole.shape[2]]
    return np.concatenate([whole, centre], axis=1)


def _enlarged(tiles: np.ndarray, zoom: int) -> np.ndarray:
    return tiles.repeat(zoom, axis=1).repeat(zoom, axis=2)


def grid(
    names: Mapping[int, str],
    sets: Sequence[ImageSet],
    rows: Sequence[Row],
    tiles: Tiles,
    zoom: int,
    margin: int = ROW_LABEL,
) -> bytes:
    """A column for each set, a row for each noise seed. Pixels are enlarged `zoom` times without interpolation.

    names: of the classes, or prompts, by label. margin: pixels for the names of the rows; 0: without names.
    """
    height, width = (zoom * length for length in tiles(sets[0].first(1)).shape[1:3])
    headers = [header_lines(one.name, width) for one in sets]
    top = HEADER + (HEADER_FONT + 4) * max(0, *(len(lines) - 2 for lines in headers))
    size = (margin + len(sets) * (width + GAP), top + len(rows) * (height + GAP))
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    for column, one in enumerate(sets):
        left = margin + column * (width + GAP)
        for line, part in enumerate(headers[column]):
            place = (left, 4 + line * (HEADER_FONT + 4))
            draw.text(place, part, fill="black", font=_font(HEADER_FONT))
        numbers = {i: image for i, row in enumerate(rows) if (image := row.images[one.name]) is not None}
        pictures = tiles(one.rows(list(numbers.values()))) if numbers else []
        for i, picture in zip(numbers, pictures, strict=True):
            large = Image.fromarray(picture).resize((width, height), Image.Resampling.NEAREST)
            canvas.paste(large, (left, top + i * (height + GAP)))
    for i, row in enumerate(rows if margin else ()):
        lines = wrapped(row_name(names, row, i), margin - 12, ROW_FONT, max(1, height // (ROW_FONT + 4)))
        for line, text in enumerate(lines):
            place = (6, top + i * (height + GAP) + 4 + line * (ROW_FONT + 4))
            draw.text(place, text, fill="black", font=_font(ROW_FONT))
    buffer = io.BytesIO()
    canvas.save(buffer, format="png", optimize=True)
    return buffer.getvalue()


def row_name(names: Mapping[int, str], row: Row, place: int) -> str:
    """Of its class, or without classes its number."""
    return f"image {place}" if row.label is None else names.get(row.label, f"class {row.label}")


def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), size)


def header_lines(name: str, width: int) -> list[str]:
    """A set's name over its column, on two lines where it has a comma, or is too long and has a place to break; on
    three where what follows the comma is too long and has another.
    """
    whole = " ".join(name.split())
    if ", " in whole:
        first, rest = whole.split(", ", 1)
        long = _font(HEADER_FONT).getlength(rest) > width
        lines = [first, *(rest.rsplit(", ", 1) if long else [rest])]
    elif _font(HEADER_FONT).getlength(whole) <= width:
        lines = [whole]
    else:
        breaks = [i + 1 for i, letter in enumerate(whole[:-1]) if letter in " _-/"]
        fits = [i for i in breaks if _font(HEADER_FONT).getlength(whole[:i].rstrip()) <= width]
        lines = [whole[: fits[-1]], whole[fits[-1] :]] if fits else [whole]
    first, *rest = lines
    return [fitted(first, width, HEADER_FONT), *(fitted(line, width, HEADER_FONT, keep="end") for line in rest)]


def wrapped(text: str, width: int, size: int, most: int) -> list[str]:
    """The text on lines of `width` pixels, broken between words; the last of at most `most` is cut with an ellipsis."""
    words, lines = text.split(), []
    while words and len(lines) < most - 1:
        count = 1
        while count < len(words) and _font(size).getlength(" ".join(words[: count + 1])) <= width:
            count += 1
        lines.append(fitted(" ".join(words[:count]), width, size))
        words = words[count:]
    return [*lines, *([fitted(" ".join(words), width, size)] if words else [])]


def fitted(text: str, width: int, size: int, keep: Literal["start", "end"] = "start") -> str:
    """The text on one line, cut with an ellipsis to `width` pixels."""
    text = " ".join(text.split())
    font = _font(size)
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1] if keep == "start" else text[1:]
    return text + "…" if keep == "start" else "…" + text
