"""Measures sets of samples against the teacher and against real images.

Legend: N images of a set, F radial bins. Everything is measured on 8-bit images mapped to [0, 1].
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import cast

import numpy as np
import torch
from torch import Tensor

from dmd_dar.spectrum import BAND_NAMES, band_edges

from ..metrics import structure
from ..metrics.colour import ColourComparison, Placed, colour_intervals, colour_verdict_of, groups_of
from ..metrics.diversity import DiversityRatio, class_diversity, diversity_ratios
from ..metrics.frechet import standardise
from ..metrics.intervals import Interval, Sample, bootstrap_interval, images_for_half_width
from ..metrics.power_map import GridLine, grid_peaks, sector_means
from ..metrics.spectrum import (
    band_gains,
    gain_curve,
    hf_gain_by_class,
    hfer_difference,
    labelled,
    labelled_pair,
    median_gains,
)
from ..metrics.verdict import FLAT_NOISE_DB, GAIN_MARGIN_DB, KURTOSIS_RANGE, verdict_of
from ..samples.images import UnfitError
from ..samples.parallel import one_thread, side_by_side
from ..samples.sets import ImageSet, validate
from .clip import Scored, clip_difference, scored
from .ledger import Ledger
from .nulls import Target, colour_nulls, lsd, over_features, sliced_levels
from .one_set import CHROMA, MeasuredSet, Reading, by_prompt, measure_one, read_one
from .results import Against, Bands, Comparison, Margins, Measurements, Reference, SetRow, Wavelet, jsonable
from .suite import Suite, against_statistics, diversity_result

__all__ = ["CHROMA", "SCHEMA_VERSION", "Compared", "ImageSet", "jsonable", "measure"]

SCHEMA_VERSION = 3
MOST_WORKERS = 8  # comparisons at a time: each holds resampled values
SANE_HALF_WIDTH_DB = 0.25  # half of the margin: a wider interval cannot lie inside it comfortably


@dataclass(frozen=True)
class Compared:
    """Sets of images, and the two that each is compared with: `reference` (the teacher's samples) and `real` images.

    colour_labels: the classes that have colour; chroma is measured over these only (None: all).
    """

    sets: Sequence[ImageSet]
    reference: ImageSet
    real: ImageSet | None = None
    colour_labels: set[int] | None = None
    class_names: dict[int, str] = field(default_factory=dict)


def measure(
    compared: Compared,
    seed: int = 0,
    suite: Suite | None = None,
    ledger: Ledger | None = None,
    read: dict[str, Reading] | None = None,
) -> Measurements:
    """Every set against the reference and the real images, in every metric of eval/.

    seed: of the bootstrap. suite: what reads features, fd_wavelet alone by default. read: by set, where they were read
    before. Sets that do not fit are left out and told in `ledger`; UnfitError where `reference` or `real` does not fit.
    """
    suite, ledger = suite or Suite(), Ledger() if ledger is None else ledger
    everything = fitting(compared.sets, compared.reference, compared.real, ledger)
    workers = min(MOST_WORKERS, torch.get_num_threads()) if suite.small else 1
    with one_thread(suite.small):
        readings = [(one, (read or {}).get(one.name) or read_one(one, suite, ledger)) for one in everything]
        calls = [partial(measure_one, *pair, seed) for pair in readings]
        measured = list(side_by_side(calls, workers, 1))
        rows = Comparisons(compared, measured, suite, seed, ledger).rows(workers)
    size = compared.reference.stream.size
    return Measurements(
        schema_version=SCHEMA_VERSION,
        seed=seed,
        teacher=compared.reference.name,
        real=compared.real and compared.real.name,
        class_names=compared.class_names,
        image_size=size,
        bands=Bands(BAND_NAMES, tuple(band_edges(*size))),
        margins=Margins(GAIN_MARGIN_DB, KURTOSIS_RANGE, FLAT_NOISE_DB),
        skipped=list(ledger.skipped),
        sets=rows,
    )


@dataclass(frozen=True)
class Comparisons:
    """Every measured set by itself and against the two, for a report."""

    compared: Compared
    measured: list[MeasuredSet]
    suite: Suite
    seed: int
    ledger: Ledger

    @cached_property
    def null(self) -> MeasuredSet | None:
        """The second set of real images, where there is one."""
        return next((one for one in self.measured if one.source.role == "null"), None)

    @cached_property
    def targets(self) -> dict[Reference, Target]:
        """What the sets are compared with."""
        by_name = {one.source.name: one for one in self.measured}
        targets: dict[Reference, Target] = {
            "teacher": Target(by_name[self.compared.reference.name], None, self.seed, self.ledger)
        }
        if self.compared.real is not None:
            targets["real"] = Target(by_name[self.compared.real.name], self.null, self.seed, self.ledger)
        return targets

    @cached_property
    def scores(self) -> dict[str, Scored]:
        """CLIP of each set that has texts, by name."""
        names = self.compared.class_names
        found = {one.source.name: scored(one.source, self.suite, names, self.ledger) for one in self.measured}
        return {name: score for name, score in found.items() if score is not None}

    def rows(self, workers: int) -> list[SetRow]:
        """The rows in the order of the sets, `workers` comparisons at a time."""
        for target in self.targets.values():
            target.prepare()
        rows = [self.alone(one) for one in self.measured]
        pairs: list[tuple[int, Reference]] = [
            (i, key)
            for i, one in enumerate(self.measured)
            for key, target in self.targets.items()
            if one is not target.measured
        ]
        notes = [Ledger() for _ in pairs]
        calls = [
            partial(compare_sets, self.measured[i], self.targets[key], self.compared.colour_labels, self.suite, note)
            for (i, key), note in zip(pairs, notes, strict=True)
        ]
        comparisons: list[dict[Reference, Comparison]] = [{} for _ in rows]
        for (i, key), note, comparison in zip(pairs, notes, side_by_side(calls, workers, 1), strict=True):
            ours, theirs = (self.scores.get(one.source.name) for one in (self.measured[i], self.targets[key].measured))
            comparisons[i][key] = replace(comparison, clip_difference=clip_difference(ours, theirs, self.seed))
            self.ledger.take(note)
        return [replace(row, against=Against(**held)) for row, held in zip(rows, comparisons, strict=True)]

    def alone(self, one: MeasuredSet) -> SetRow:
        """What is measured on a set by itself."""
        score, again = self.scores.get(one.source.name), None
        if self.null is not None and one is not self.null:
            again = self.null.features.get("fid")
        return replace(
            describe(one, self.seed),
            clip=score and score.result(self.seed),
            lpips_diversity=diversity_result(one.source, self.suite, self.seed, self.ledger),
            fid_npz=against_statistics(one.features.get("fid"), self.suite, self.ledger, again),
        )


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


def describe(one: MeasuredSet, seed: int) -> SetRow:
    """What is measured on a set alone without weights."""
    slope, slope_hf = one.luma.slopes
    lines = by_prompt(labelled(one.lines, one.source.classes), one.source)
    lines = grid_peaks(lines, rng=np.random.default_rng(seed))
    return SetRow(
        name=one.source.name,
        role=one.source.role,
        paired=one.source.paired,
        images=len(one),
        facts=one.source.facts,
        frequencies=one.luma.frequencies.tolist(),
        power=one.luma.power.tolist(),
        hfer=one.luma.hfer,
        slope=slope,
        slope_hf=slope_hf,
        hf_kurtosis=float(np.median(one.structure.kurtosis)),
        gradient_kurtosis=float(np.median(one.structure.gradient_kurtosis)),
        parent_child_corr=float(np.median(one.structure.parent_child)),
        wavelet=Wavelet(one.wavelet_energy.tolist(), one.wavelet_kurtosis.tolist()),
        map_sectors_db=sector_means(one.plane),
        grid_lines=lines,
        fid_npz=None,
        against=Against(),
    )


@dataclass(frozen=True)
class Samples:
    """Per-image values of two sets with what the bootstrap needs: their classes, whether they are paired, its draws.

    Every interval of a comparison takes its draws from `rng` in turn, so that their order is part of the numbers.
    """

    one: MeasuredSet
    other: MeasuredSet
    rng: np.random.Generator

    @property
    def paired(self) -> bool:
        return self.one.source.paired and self.other.source.paired

    @property
    def both_known(self) -> bool:
        """Whether the classes of both sets are."""
        return self.one.source.classes is not None and self.other.source.classes is not None

    def of(self, values_of: Callable[[MeasuredSet], np.ndarray]) -> tuple[Sample, Sample]:
        """What `values_of` takes from both, with classes where both have them; prompts are those of each."""
        sets = self.one.source, self.other.source
        pair = labelled_pair((values_of(self.one), values_of(self.other)), [one.classes for one in sets], self.paired)
        return by_prompt(pair[0], sets[0]), by_prompt(pair[1], sets[1])

    def interval(self, statistic: Callable[..., Interval], values_of: Callable[[MeasuredSet], np.ndarray]) -> Interval:
        """`statistic` of both with its interval."""
        return statistic(*self.of(values_of), paired=self.paired, rng=self.rng)


def compare_sets(
    one: MeasuredSet, target: Target, colour_labels: set[int] | None, suite: Suite, ledger: Ledger
) -> Comparison:
    """All metrics of `one` against the target's set."""
    other = target.measured
    samples = Samples(one, other, np.random.default_rng(target.seed))
    paired, interval = samples.paired, samples.interval
    energies = samples.of(lambda m: m.luma.energies)
    gains = band_gains(*energies, paired=paired, rng=samples.rng)
    by_class = hf_gain_by_class(*energies) if samples.both_known else {}
    curve, *_ = gain_curve(one.luma, other.luma)
    kurtosis = interval(structure.kurtosis_ratio, lambda m: m.structure.kurtosis)
    flat_noise = interval(structure.flat_noise_db, lambda m: m.structure.flat)
    gradient = interval(structure.kurtosis_ratio, lambda m: m.structure.gradient_kurtosis)
    agreement = interval(structure.parent_child_difference, lambda m: m.structure.parent_child)
    compared = Comparison(
        reference=other.source.name,
        paired=paired,
        reference_images=len(other),
        class_share_gap=class_share_gap(energies[0].labels, energies[1].labels) if samples.both_known else None,
        verdict=verdict_of(gains["HF"], kurtosis, flat_noise),
        gain_db=gains,
        gain_db_median=median_gains(*energies) if paired else None,
        images_for_quarter_db=images_for_half_width(gains["HF"], len(one), SANE_HALF_WIDTH_DB),
        hf_gain_by_class=by_class,
        hf_gain_class_median=float(np.median(list(by_class.values()))) if by_class else None,
        gain_curve_db=curve.tolist(),
        **vars(lsd(one, target)),
        hfer_difference=interval(_hfer_difference, lambda m: m.luma.hfer_per_image),
        slope_difference=one.luma.slopes[0] - other.luma.slopes[0],
        slope_hf_difference=one.luma.slopes[1] - other.luma.slopes[1],
        hf_kurtosis_ratio=kurtosis,
        gradient_kurtosis_ratio=gradient,
        parent_child_difference=agreement,
        flat_noise_db=flat_noise,
        wavelet_kurtosis_ratio=structure.tail_ratio(one.wavelet_kurtosis, other.wavelet_kurtosis).tolist(),
        grid_lines=grid_peaks(*samples.of(lambda m: m.lines), paired=paired, rng=samples.rng),
        map_sectors_db=sector_means(one.plane - other.plane),
        sliced_wasserstein=sliced_levels(one, target),
        diversity_ratio=_diversity(samples),
        chroma=_chroma(samples, colour_labels if samples.both_known else None),
        **vars(over_features(one, target, suite, ledger)),
    )
    nulls = colour_nulls(one, target, colour_labels)
    return replace(compared, colour=_colour(samples, colour_labels, compared.grid_lines, nulls))


def _hfer_difference(ours: Sample, theirs: Sample, *, paired: bool, rng: np.random.Generator) -> Interval:
    """Difference of the means over images of the share of energy at f > 1/4."""
    return bootstrap_interval(lambda a, b: hfer_difference(a, b, axis=1), ours, theirs, paired=paired, rng=rng)


def class_share_gap(labels: np.ndarray, other: np.ndarray) -> float:
    """Largest difference of a class's share between two sets: above a few per cent a gain compares the classes."""
    return max(abs(float((labels == label).mean() - (other == label).mean())) for label in np.union1d(labels, other))


def _diversity(samples: Samples) -> dict[str, DiversityRatio]:
    """Diversity in pixels and in wavelet features, as ratios to the other set's; by class where classes are known."""
    both, known = (samples.one, samples.other), samples.both_known
    pairs = {"pixels": [m.spread if known else m.spread_of_all for m in both]}
    if known and all("fd_wavelet" in m.features for m in both):
        base = samples.other.features["fd_wavelet"].values
        pairs["wavelet"] = [
            class_diversity(standardise(m.features["fd_wavelet"].values, base), cast(Tensor, m.source.labels))
            for m in both
        ]
    return {name: diversity_ratios(*pair) for name, pair in pairs.items()}


def _colour(
    samples: Samples, colour_labels: set[int] | None, lines: list[GridLine], nulls: dict[str, float]
) -> ColourComparison:
    """Drift, contrast, saturation and speckle; its draws come after those of all other intervals."""
    groups = groups_of(samples.one.source.classes, samples.other.source.classes, colour_labels)
    pair = samples.of(lambda m: m.colour)
    found = colour_intervals(*pair, groups, paired=samples.paired, rng=samples.rng)
    placed = {name: Placed(**vars(one), null=nulls.get(name, math.nan)) for name, one in found.items()}
    return ColourComparison(verdict=colour_verdict_of(found, lines), measures=placed)


def _chroma(samples: Samples, colour_labels: set[int] | None) -> dict[str, dict[str, Interval]] | None:
    """Band gains of Cb and Cr over the classes that have colour; None when there are none."""
    gains = {}
    for channel in CHROMA:
        pair = samples.of(lambda m, c=channel: m.chroma[c].energies)
        if colour_labels is not None:
            chosen = [np.isin(sample.labels, list(colour_labels)) for sample in pair]
            if not all(rows.any() for rows in chosen):
                return None
            pair = tuple(sample.of(rows) for sample, rows in zip(pair, chosen, strict=True))
        gains[channel] = band_gains(*pair, paired=samples.paired, rng=samples.rng)
    return gains
