"""Measures sets of samples against the teacher and against real images; the result is plain, JSON-ready data.

Legend: N images of a set, F radial bins. Everything is measured on 8-bit images mapped to [0, 1].
"""

from collections.abc import Iterable
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
import torch

from dmd_dar.spectrum import BAND_NAMES, band_edges

from ..metrics import frechet, structure
from ..metrics import power_map as maps
from ..metrics.intervals import Interval, Sample, bootstrap_interval, images_for_half_width
from ..metrics.power_map import sector_means
from ..metrics.record import jsonable
from ..metrics.spectrum import (
    band_gains,
    gain_curve,
    hf_gain_by_class,
    hfer_difference,
    labelled,
    labelled_pair,
    median_gains,
)
from ..metrics.verdict import FLAT_NOISE_DB, GAIN_MARGIN_DB, KURTOSIS_RANGE, verdict
from ..samples.images import UnfitError
from ..samples.parallel import one_thread, side_by_side
from ..samples.sets import ImageSet, validate
from . import suite as distances
from .nulls import Target, lsd, over_features, sliced_levels
from .one_set import CHROMA, Measured, Reading, measure_one, read_one
from .suite import Ledger, Suite

__all__ = ["CHROMA", "SCHEMA_VERSION", "ImageSet", "jsonable", "measure"]

SCHEMA_VERSION = 3
MOST_WORKERS = 8  # comparisons at a time: each holds resampled values
SANE_HALF_WIDTH_DB = 0.25  # half of the margin: a wider interval cannot lie inside it comfortably


def measure(
    sets: Iterable[ImageSet],
    reference: ImageSet,
    real: ImageSet | None,
    colour_labels: set[int] | None,
    seed: int,
    class_names: dict[int, str] | None = None,
    suite: Suite | None = None,
    ledger: Ledger | None = None,
    read: dict[str, Reading] | None = None,
) -> dict[str, Any]:
    """Compares every set with `reference` (the teacher's samples) and with `real` images, in every metric of eval/.

    colour_labels: the classes that have colour; chroma is measured over these only (None: all). seed: of the bootstrap.
    suite: what reads features, fd_wavelet alone by default. read: by set, where they were read before. Sets that do not
    fit are left out and told in `ledger`; UnfitError where `reference` or `real` does not fit.
    Returns JSON-able data of SCHEMA_VERSION.
    """
    suite, ledger = suite or Suite(), Ledger() if ledger is None else ledger
    names = class_names or {}
    everything = fitting(sets, reference, real, ledger)
    workers = min(MOST_WORKERS, torch.get_num_threads()) if suite.small else 1
    with one_thread(suite.small):
        readings = [(one, (read or {}).get(one.name) or read_one(one, suite, ledger)) for one in everything]
        calls = [partial(measure_one, *pair, seed) for pair in readings]
        measured = list(side_by_side(calls, workers, 1))
        rows = _rows(measured, reference, real, colour_labels, seed, names, suite, ledger, workers)
    head = {"teacher": reference.name, "real": real and real.name, "class_names": names}
    parts = {**head, **_scales(reference), "skipped": ledger.skipped, "sets": rows}
    return jsonable({"schema_version": SCHEMA_VERSION, "seed": seed, **parts})


def _rows(
    measured: list[Measured],
    reference: ImageSet,
    real: ImageSet | None,
    colour_labels: set[int] | None,
    seed: int,
    names: dict[int, str],
    suite: Suite,
    ledger: Ledger,
    workers: int,
) -> list[dict[str, Any]]:
    """Every set by itself and against the two, `workers` comparisons at a time."""
    by_name = {one.source.name: one for one in measured}
    null = next((one for one in measured if one.source.role == "null"), None)
    targets = {"teacher": Target(by_name[reference.name], None, seed, ledger)}
    if real is not None:
        targets["real"] = Target(by_name[real.name], null, seed, ledger)
    for target in targets.values():
        target.prepare()
    rows = []
    for one in measured:
        row: dict[str, Any] = {**describe(one, seed), **distances.alone(one.source, suite, names, seed, ledger)}
        again = None if null is None or one is null else null.features.get("fid")
        row["fid_npz"] = distances.against_statistics(one.features.get("fid"), suite, ledger, again)
        rows.append(row | {"against": {"teacher": None, "real": None}})
    pairs = [(row, one, key) for row, one in zip(rows, measured, strict=True) for key in targets]
    pairs = [(row, one, key) for row, one, key in pairs if one is not targets[key].measured]
    notes = [Ledger() for _ in pairs]
    calls = [
        partial(compare, one, targets[key], colour_labels, suite, note)
        for (_, one, key), note in zip(pairs, notes, strict=True)
    ]
    for (row, _, key), note, found in zip(pairs, notes, side_by_side(calls, workers, 1), strict=True):
        row["against"][key] = found
        ledger.take(note)
    return rows


def _scales(one: ImageSet) -> dict[str, Any]:
    """Image size, bands and margins: what a reader of the numbers needs to place them."""
    return {
        "image_size": one.stream.size,
        "bands": {"names": BAND_NAMES, "edges": band_edges(*one.stream.size)},
        "margins": {"gain_db": GAIN_MARGIN_DB, "kurtosis": KURTOSIS_RANGE, "flat_noise_db": FLAT_NOISE_DB},
    }


def fitting(sets: Iterable[ImageSet], reference: ImageSet, real: ImageSet | None, ledger: Ledger) -> list[ImageSet]:
    """`real` and `reference`, then the further sets that can be compared, each once; those that cannot, in `ledger`.

    UnfitError where `reference` or `real` itself cannot be.
    """
    fixed = [one for one in (real, reference) if one is not None]
    for one in fixed:
        validate(one, reference)
    if real is not None and real.name == reference.name:
        raise UnfitError(_called_alike(real.name, "the reference and the real images"))
    kept: list[ImageSet] = []
    for one in sets:
        if any(one is other for other in (*fixed, *kept)):
            continue
        if ledger.attempt("every metric", one.name, lambda one=one: _fits(one, fixed[-1], [*fixed, *kept])):
            kept.append(one)
    return fixed + kept


def _fits(one: ImageSet, reference: ImageSet, others: list[ImageSet]) -> bool:
    if one.name in [other.name for other in others]:
        raise UnfitError(_called_alike(one.name, "two sets"))
    validate(one, reference)
    return True


def _called_alike(name: str, which: str) -> str:
    return f"{which} are called {name!r}; rename one of their folders"


def describe(one: Measured, seed: int) -> dict[str, Any]:
    """What is measured on a set alone."""
    slope, slope_hf = one.luma.slopes
    lines = maps.grid_peaks(labelled(one.lines, one.source.classes), rng=np.random.default_rng(seed))
    return {
        "name": one.source.name,
        "role": one.source.role,
        "paired": one.source.paired,
        "images": len(one),
        "facts": one.source.facts.as_json(),
        "frequencies": one.luma.frequencies.tolist(),
        "power": one.luma.power.tolist(),
        "hfer": one.luma.hfer,
        "slope": slope,
        "slope_hf": slope_hf,
        "hf_kurtosis": float(np.median(one.structure.kurtosis)),
        "gradient_kurtosis": float(np.median(one.structure.gradient_kurtosis)),
        "parent_child_corr": float(np.median(one.structure.parent_child)),
        "wavelet": {"log_energy": one.wavelet_energy.tolist(), "kurtosis": one.wavelet_kurtosis.tolist()},
        "map_sectors_db": sector_means(one.plane),
        "grid_lines": _told(lines),
    }


def _told(lines: list[maps.GridLine]) -> list[dict[str, Any]]:
    return [asdict(line) for line in lines]


def compare(
    one: Measured, target: Target, colour_labels: set[int] | None, suite: Suite, ledger: Ledger
) -> dict[str, Any]:
    """All metrics of `one` against the target's set."""
    other, rng = target.measured, np.random.default_rng(target.seed)
    paired = one.source.paired and other.source.paired
    classes = one.source.classes, other.source.classes
    both_known = all(known is not None for known in classes)

    def samples(read: Any) -> tuple[Sample, Sample]:
        """What `read` takes from both, with classes where both have them."""
        return labelled_pair((read(one), read(other)), classes, paired)

    energies = samples(lambda m: m.luma.energies)
    gains = band_gains(*energies, paired=paired, rng=rng)
    by_class = hf_gain_by_class(*energies) if both_known else {}
    curve, *_ = gain_curve(one.luma, other.luma)
    kurtosis = structure.kurtosis_ratio(*samples(lambda m: m.structure.kurtosis), paired=paired, rng=rng)
    flat_noise = structure.flat_noise_db(*samples(lambda m: m.structure.flat), paired=paired, rng=rng)
    gradient = structure.kurtosis_ratio(*samples(lambda m: m.structure.gradient_kurtosis), paired=paired, rng=rng)
    agreement = structure.parent_child_difference(*samples(lambda m: m.structure.parent_child), paired=paired, rng=rng)
    found = {
        "reference": other.source.name,
        "paired": paired,
        "reference_images": len(other),
        "class_share_gap": class_share_gap(energies[0].labels, energies[1].labels) if both_known else None,
        "verdict": verdict(gains["HF"], kurtosis, flat_noise),
        "gain_db": gains,
        "gain_db_median": median_gains(*energies) if paired else None,
        "images_for_quarter_db": images_for_half_width(gains["HF"], len(one), SANE_HALF_WIDTH_DB),
        "hf_gain_by_class": by_class,
        "hf_gain_class_median": float(np.median(list(by_class.values()))) if by_class else None,
        "gain_curve_db": curve.tolist(),
        **lsd(one, target),
        "hfer_difference": _hfer_difference(*samples(lambda m: m.luma.hfer_per_image), paired=paired, rng=rng),
        "slope_difference": one.luma.slopes[0] - other.luma.slopes[0],
        "slope_hf_difference": one.luma.slopes[1] - other.luma.slopes[1],
        "hf_kurtosis_ratio": kurtosis,
        "gradient_kurtosis_ratio": gradient,
        "parent_child_difference": agreement,
        "flat_noise_db": flat_noise,
        "wavelet_kurtosis_ratio": structure.tail_ratio(one.wavelet_kurtosis, other.wavelet_kurtosis).tolist(),
        "grid_lines": _told(maps.grid_peaks(*samples(lambda m: m.lines), paired=paired, rng=rng)),
        "map_sectors_db": sector_means(one.plane - other.plane),
        "sliced_wasserstein": sliced_levels(one, target),
        "diversity_ratio": _diversity(one, other, both_known),
        "chroma": _chroma(samples, colour_labels if both_known else None, paired, rng),
    }
    return {**found, **over_features(one, target, suite, ledger)}


def _hfer_difference(ours: Sample, theirs: Sample, *, paired: bool, rng: np.random.Generator) -> Interval:
    """Difference of the means over images of the share of energy at f > 1/4."""
    return bootstrap_interval(lambda a, b: hfer_difference(a, b, axis=1), ours, theirs, paired=paired, rng=rng)


def class_share_gap(labels: np.ndarray, other: np.ndarray) -> float:
    """Largest difference of a class's share between two sets: above a few per cent a gain compares the classes."""
    return max(abs(float((labels == label).mean() - (other == label).mean())) for label in np.union1d(labels, other))


def _diversity(one: Measured, other: Measured, both_known: bool) -> dict[str, Any]:
    """Diversity in pixels and in wavelet features, as ratios to the other set's; by class where classes are known."""
    pairs = {"pixels": [m.spread if both_known else m.spread_of_all for m in (one, other)]}
    if both_known and all("fd_wavelet" in m.features for m in (one, other)):
        base = other.features["fd_wavelet"].values
        pairs["wavelet"] = [
            frechet.class_diversity(frechet.standardise(m.features["fd_wavelet"].values, base), m.source.labels)
            for m in (one, other)
        ]
    return {name: frechet.diversity_ratios(*pair) for name, pair in pairs.items()}


def _chroma(samples: Any, colour_labels: set[int] | None, paired: bool, rng: np.random.Generator) -> Any:
    """Band gains of Cb and Cr over the classes that have colour; None when there are none."""
    gains = {}
    for channel in CHROMA:
        pair = samples(lambda m, c=channel: m.chroma[c].energies)
        if colour_labels is not None:
            chosen = [np.isin(sample.labels, list(colour_labels)) for sample in pair]
            if not all(rows.any() for rows in chosen):
                return None
            pair = [Sample(s.values[rows], s.labels[rows]) for s, rows in zip(pair, chosen, strict=True)]
        gains[channel] = band_gains(*pair, paired=paired, rng=rng)
    return gains
