"""Colour beside detail: does a set drift, saturate, speckle or show a grid against a reference?

What is measured of images is dmd_dar.colour's. Legend: N images of a set, columns of COLUMNS; R resamples. Groups:
classes that have colour and those that are grey, where that is known; all images otherwise.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from dmd_dar import colour
from dmd_dar.spectrum import BAND_NAMES

from .intervals import Interval, Sample, bootstrap
from .power_map import GridLine, grid_lines, grid_peaks
from .spectrum import as_floats, labelled_pair
from .verdict import Side, show, side

ColourWord = Literal["over-saturated", "washed out", "colour drift", "colour speckle", "grid"]
COLOUR_WORDS: tuple[ColourWord, ...] = ("over-saturated", "washed out", "colour drift", "colour speckle", "grid")
OK, UNDECIDED = "colour ok", "colour inconclusive"

COLUMNS = ("y", "cb", "cr", "contrast", "saturation", "speckle")
DRIFTS = ("drift_y", "drift_cb", "drift_cr")
WHOLE, OF_GROUPS = (*DRIFTS, "contrast_ratio"), ("saturation_ratio", "speckle_db")

DRIFT_Y, DRIFT_CHROMA = 8.0, 3.0  # levels of 255, of the mean
CONTRAST_RANGE = (0.85, 1.15)
SATURATION_RANGE = (0.9, 1.1)
SPECKLE_DB = 2.0

Rows = np.ndarray | slice
Groups = Mapping[str, tuple[Rows, Rows]]  # rows (N,) and (M,) of both sets, by name; "" for all


@dataclass(frozen=True)
class Placed(Interval):
    """An interval beside its null: by how much other images of the reference's own source would differ from it."""

    null: float


@dataclass(frozen=True)
class ColourVerdict:
    """word: the faults joined, or "colour ok", or "colour inconclusive" where an interval straddles a margin."""

    word: str
    reason: str
    faults: tuple[ColourWord, ...]


@dataclass(frozen=True, kw_only=True)
class ColourComparison:
    """Drifts in levels of 255, ratios, and dB; against the reference."""

    verdict: ColourVerdict
    measures: dict[str, Placed]  # WHOLE, then OF_GROUPS, with .colour or .grey where classes are known


def colour_rows(images: Tensor) -> dict[str, Tensor]:
    """What is said of each image (N, 3, H, W) in [0, 1] by itself: `values` (N, 5), all COLUMNS but the last."""
    read = colour.colours(images)
    return {"values": torch.cat([read.mean, read.contrast[:, None], read.saturation[:, None]], dim=1)}


def with_speckle(values: np.ndarray, energies: Sequence[np.ndarray], size: tuple[int, int]) -> np.ndarray:
    """(N, 6), from `colour_rows` and the energies (N, 6) of Cb and Cr over BAND_NAMES."""
    hf = torch.from_numpy(sum(one[:, BAND_NAMES.index("HF")] for one in energies))
    return np.concatenate([values, colour.speckle(hf, *size).numpy()[:, None]], axis=1)


def groups_of(labels: np.ndarray | None, other: np.ndarray | None, colour_labels: set[int] | None) -> Groups:
    """The rows of both sets that `saturation_ratio` and `speckle_db` are told of; groups that one has not are left out.

    labels, other: classes, None where they are not known. colour_labels: the classes that have colour, None: unknown.
    """
    if labels is None or other is None or colour_labels is None:
        return {"": (slice(None), slice(None))}
    coloured = [np.isin(one, list(colour_labels)) for one in (labels, other)]
    groups = {".colour": (coloured[0], coloured[1]), ".grey": (~coloured[0], ~coloured[1])}
    return {name: rows for name, rows in groups.items() if all(one.any() for one in rows)}


def _whole(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """(R, N, 6) and (R, M, 6) -> (R, 4), of WHOLE."""
    means = [torch.from_numpy(one[..., :4].mean(1)) for one in (ours, theirs)]
    ratio = colour.contrast_ratio(means[0][:, 3:], means[1][:, 3:])
    return torch.cat([means[0][:, :3] - means[1][:, :3], ratio], dim=1).numpy()


def _of_groups(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """(R, N, 6) and (R, M, 6) -> (R, 2), of OF_GROUPS."""
    one, other = (torch.from_numpy(values[..., 4:].mean(1)) for values in (ours, theirs))  # saturation, speckle
    ratio = colour.saturation_ratio(one[:, 0], other[:, 0])
    return torch.stack([ratio, colour.speckle_db(one[:, 1], other[:, 1], ratio)], dim=1).numpy()


def colour_values(ours: np.ndarray, theirs: np.ndarray, groups: Groups) -> dict[str, float]:
    """The measures by name without intervals, from (N, 6) and (M, 6)."""
    values = dict(zip(WHOLE, _whole(ours[None], theirs[None])[0].tolist(), strict=True))
    for group, (rows, others) in groups.items():
        found = _of_groups(ours[rows][None], theirs[others][None])[0]
        values |= {f"{name}{group}": float(value) for name, value in zip(OF_GROUPS, found, strict=True)}
    return values


def colour_intervals(
    ours: Sample, theirs: Sample, groups: Groups, *, paired: bool, rng: np.random.Generator
) -> dict[str, Interval]:
    """The measures by name, from samples of (N, 6)."""
    bounds = bootstrap(_whole, ours, theirs, paired=paired, rng=rng)
    found = dict(zip(WHOLE, np.stack(bounds, 1).tolist(), strict=True))
    for group, rows in groups.items():
        pair = [one.of(kept) for one, kept in zip((ours, theirs), rows, strict=True)]
        bounds = bootstrap(_of_groups, *pair, paired=paired, rng=rng)
        names = [f"{name}{group}" for name in OF_GROUPS]
        found |= dict(zip(names, np.stack(bounds, 1).tolist(), strict=True))
    return {name: Interval(*numbers) for name, numbers in found.items()}


def neutral(name: str) -> float:
    """What a measure reads where nothing differs."""
    return 1.0 if "ratio" in name else 0.0


def halved_null(one: Sample, colour_labels: set[int] | None, rng: np.random.Generator, splits: int) -> dict[str, float]:
    """Root mean square deviation of each measure between random halves of a set of (M, 6), split within classes."""
    values, labels = one.values, one.labels
    squares: dict[str, list[float]] = {}
    for _ in range(splits):
        order = rng.permutation(len(values))
        order = order[np.argsort(labels[order], kind="stable")]
        halves = order[::2], order[1::2]
        groups = groups_of(labels[halves[0]], labels[halves[1]], colour_labels)
        for name, value in colour_values(values[halves[0]], values[halves[1]], groups).items():
            squares.setdefault(name, []).append((value - neutral(name)) ** 2)
    return {name: float(np.mean(found)) ** 0.5 for name, found in squares.items()}


@dataclass(frozen=True)
class Judged:
    """One measure with its margins and the words beyond them; no word: beyond there is no fault."""

    title: str
    interval: Interval
    low: float
    high: float
    below: ColourWord | None
    above: ColourWord | None
    unit: str = ""

    @property
    def place(self) -> Side:
        return side(self.interval, self.low, self.high)

    @property
    def fault(self) -> ColourWord | None:
        return self.below if self.place == "below" else self.above if self.place == "above" else None


def judged(name: str, interval: Interval) -> Judged:
    """A measure of ColourComparison by its name, beside its margins."""
    measure, _, group = name.partition(".")
    of = {"colour": " of coloured classes", "grey": " of grey classes"}.get(group, "")
    if measure in DRIFTS:
        margin = DRIFT_Y if measure == "drift_y" else DRIFT_CHROMA
        title = {"drift_y": "mean brightness", "drift_cb": "mean Cb", "drift_cr": "mean Cr"}[measure]
        return Judged(title, interval, -margin, margin, "colour drift", "colour drift", " levels of 255")
    if measure == "contrast_ratio":
        return Judged("contrast ratio", interval, *CONTRAST_RANGE, "washed out", "over-saturated")
    if measure == "saturation_ratio":
        above: ColourWord = "colour drift" if group == "grey" else "over-saturated"  # grey that is tinted
        return Judged(f"saturation ratio{of}", interval, *SATURATION_RANGE, "washed out", above)
    return Judged(f"colour speckle{of}", interval, -np.inf, SPECKLE_DB, None, "colour speckle", " dB")


def colour_verdict_of(measures: Mapping[str, Interval], lines: Sequence[GridLine]) -> ColourVerdict:
    """Each measure beyond its margin with its whole interval is a fault, and so is a line of the pixel grid that is a
    peak against the reference. Without faults: ok, or inconclusive where an interval straddles a margin.
    """
    faults: list[tuple[ColourWord, str]] = []
    doubts: list[str] = []
    for name, interval in measures.items():
        one = judged(name, interval)
        told = f"{one.title} {show(interval, one.unit, '' if 'ratio' in name else '+')}"
        if one.fault is not None:
            faults.append((one.fault, told))
        elif one.place == "straddles":
            doubts.append(told)
    peaks = [line for line in lines if line.word == "peak"]
    if peaks:
        highest = max(peaks, key=lambda line: line.height.value)
        faults.append(("grid", _line(highest)))
    if not faults:
        if doubts:
            return ColourVerdict(UNDECIDED, f"{doubts[0]} straddles its margin", ())
        return ColourVerdict(OK, "drift, contrast, saturation and speckle are within their margins", ())
    words: tuple[ColourWord, ...] = tuple(word for word in COLOUR_WORDS if any(word == fault for fault, _ in faults))
    return ColourVerdict(", ".join(words), "; ".join(told for _, told in faults), words)


def _line(line: GridLine) -> str:
    return f"a line of period {line.period} px on {line.axis} stands out by {show(line.height)}"


def colour_values_of(images: Tensor) -> np.ndarray:
    """COLUMNS of images (N, 3, H, W), uint8 or floats in [0, 1]: (N, 6)."""
    floats = as_floats(images)
    return np.concatenate([colour_rows(floats)["values"].numpy(), colour.speckle_of(floats).numpy()[:, None]], axis=1)


def colour_verdict(
    images: Tensor,
    reference: Tensor,
    *,
    labels: Tensor | None = None,
    reference_labels: Tensor | None = None,
    colour_labels: set[int] | None = None,
    paired: bool = False,
) -> ColourVerdict:
    """What happened to colour, beside `structure.verdict`, which says what happened to detail; arguments as there.

    colour_labels: the classes that have colour, which are told apart from grey ones; None: all images are one group.
    """
    classes = [None if one is None else one.cpu().numpy() for one in (labels, reference_labels)]
    rng = np.random.default_rng(0)
    pair = labelled_pair((colour_values_of(images), colour_values_of(reference)), classes, paired)
    groups = groups_of(classes[0], classes[1], colour_labels)
    measures = colour_intervals(*pair, groups, paired=paired, rng=rng)
    lines = labelled_pair((grid_lines(as_floats(images)), grid_lines(as_floats(reference))), classes, paired)
    return colour_verdict_of(measures, grid_peaks(*lines, paired=paired, rng=rng))
