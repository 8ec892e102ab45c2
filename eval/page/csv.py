"""Every number of a report as one flat row, for the CSV and for the page's complete tables."""

import csv
import io
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import astuple, dataclass, fields

from ..measure.results import Comparison, LatentComparison, LatentRow, Report, SetRow
from ..metrics.colour import COLOUR_WORDS
from ..metrics.features import FeatureDistance
from ..metrics.intervals import Interval
from ..metrics.power_map import GridLine
from ..metrics.structure import BANDS
from ..samples.facts import SetFacts
from .cells import finite

ALONE = ("hfer", "slope", "slope_hf", "hf_kurtosis", "gradient_kurtosis", "parent_child_corr")
INTERVALS = (
    "hf_kurtosis_ratio",
    "gradient_kurtosis_ratio",
    "parent_child_difference",
    "flat_noise_db",
    "hfer_difference",
)
PLAIN = ("lsd_signed", "slope_difference", "slope_hf_difference", "hf_gain_class_median")
DISTANCES = ("fd_wavelet", "fd_pca", "fd_classifier", "fid", "patch_fid", "fd_dinov2")


@dataclass(frozen=True)
class Value:
    """A metric's value with what places it: its 95 % interval over images, or what a set of the reference's own source
    would read. None where a number is not defined.
    """

    metric: str
    value: float | None
    low: float | None = None
    high: float | None = None
    null: float | None = None
    comparable_to_published: bool | None = None


@dataclass(frozen=True)
class Number:
    """A `Value` of a set of `images` images against another one, "teacher" or "real", or by itself, ""."""

    name: str
    role: str
    against: str
    metric: str
    value: float | None
    low: float | None
    high: float | None
    null: float | None
    images: int
    comparable_to_published: bool | None


def numbers(report: Report) -> list[Number]:
    """All numbers of a report, set by set."""
    every: list[Number] = []
    for row in report.sets:
        every += _placed(row, "", _alone(row))
        for reference, against in row.against.measured():
            every += _placed(row, reference, _against(against))
    for row in report.latent.sets if report.latent else ():
        for reference, against in row.against.measured():
            every += _placed(row, reference, _latent(against))
    return every


def _placed(row: SetRow | LatentRow, against: str, values: Iterable[Value]) -> Iterator[Number]:
    for one in values:
        yield Number(
            name=row.name,
            role=row.role,
            against=against,
            metric=one.metric,
            value=finite(one.value),
            low=finite(one.low),
            high=finite(one.high),
            null=finite(one.null),
            images=row.images,
            comparable_to_published=one.comparable_to_published,
        )


def _interval(metric: str, interval: Interval) -> Value:
    return Value(metric, interval.value, interval.low, interval.high)


def _intervals(metric: str, intervals: Mapping[str, Interval]) -> Iterator[Value]:
    """By band, those that are defined."""
    for band, interval in intervals.items():
        if finite(interval.value) is not None:
            yield _interval(f"{metric}.{band}", interval)


def _latent(against: LatentComparison) -> Iterator[Value]:
    yield from _intervals("latent_gain_db", against.gain_db)
    for channel, interval in enumerate(against.hf_gain_db_by_channel):
        yield _interval(f"latent_gain_db.channel{channel}.HF", interval)
    yield Value("latent_lsd", against.lsd, null=against.lsd_null)
    yield Value("latent_lsd_signed", against.lsd_signed)


def _alone(row: SetRow) -> Iterator[Value]:
    yield from (Value(name, getattr(row, name)) for name in ALONE)
    yield from _wavelet("wavelet_kurtosis", row.wavelet.kurtosis)
    yield from _wavelet("wavelet_log_energy", row.wavelet.log_energy)
    yield from _grid_lines(row.grid_lines)
    yield from _costs(row.facts)
    if row.clip is not None:
        published = row.clip.comparable_to_published
        yield Value("clip", row.clip.value, row.clip.low, row.clip.high, comparable_to_published=published)
    if row.lpips_diversity is not None:
        yield Value("lpips_diversity", row.lpips_diversity.value)
    if row.fid_npz is not None:
        yield _distance("fid_npz", row.fid_npz)


def _costs(facts: SetFacts) -> Iterator[Value]:
    if cost := facts.cost:
        yield Value("latency_ms_per_image", cost.latency_ms_per_image)
        yield Value("peak_memory_mb", cost.peak_memory_mb)
    if network := facts.network:
        yield Value("evaluations", network.evaluations)
        yield Value("parameters", network.parameters)


def _wavelet(metric: str, levels: Iterable[Iterable[float]]) -> Iterator[Value]:
    """(3, 3) numbers by level, the finest first, and sub-band."""
    for level, values in enumerate(levels, 1):
        for band, value in zip(BANDS, values, strict=True):
            yield Value(f"{metric}.{level}.{band}", value)


def _grid_lines(lines: Iterable[GridLine]) -> Iterator[Value]:
    for line in lines:
        if finite(line.height.value) is not None:
            yield _interval(f"grid_peak_db.{line.axis}.{line.period}", line.height)


def _distance(metric: str, one: FeatureDistance) -> Value:
    return Value(metric, one.value, null=one.null, comparable_to_published=one.comparable_to_published)


def _against(against: Comparison) -> Iterator[Value]:
    yield from _spectral(against)
    yield from (_interval(name, getattr(against, name)) for name in INTERVALS)
    yield Value("lsd", against.lsd, null=against.lsd_null)
    yield from (Value(name, getattr(against, name)) for name in PLAIN)
    yield from _wavelet("wavelet_kurtosis_ratio", against.wavelet_kurtosis_ratio)
    yield from _grid_lines(against.grid_lines)
    for level, distance in enumerate(against.sliced_wasserstein, 1):
        yield Value(f"sliced_wasserstein.{level}", distance.value, null=distance.null)
    for space, ratio in against.diversity_ratio.items():
        yield Value(f"diversity_ratio.{space}.least", ratio.least)
        yield Value(f"diversity_ratio.{space}.median", ratio.median)
    yield from (_distance(name, against.distances[name]) for name in DISTANCES if name in against.distances)
    yield from _colour(against)
    yield from _neighbours(against)
    yield from _modes(against)
    if against.lpips_paired is not None:
        yield Value("lpips_paired", against.lpips_paired.value)
    if against.clip_difference is not None:
        yield _interval("clip_difference", against.clip_difference)


def _spectral(against: Comparison) -> Iterator[Value]:
    for channel, gains in {"y": against.gain_db, **(against.chroma or {})}.items():
        yield from _intervals(f"gain_db.{channel}", gains)
    for band, value in (against.gain_db_median or {}).items():
        if finite(value) is not None:
            yield Value(f"gain_db_median.{band}", value)


def _colour(against: Comparison) -> Iterator[Value]:
    """The measures, and 1 for each fault that the verdict names, 0 for the others."""
    if colour := against.colour:
        for name, one in colour.measures.items():
            yield Value(f"colour.{name}", one.value, one.low, one.high, one.null)
        for word in COLOUR_WORDS:
            yield Value(f"colour_fault.{word}", float(word in colour.verdict.faults))


def _neighbours(against: Comparison) -> Iterator[Value]:
    for extractor, one in against.neighbours.items():
        alike = one.null is not None and one.null.images == one.images  # precision and recall depend on it, KID not
        for name in ("kid", "precision", "recall"):
            null = getattr(one.null, name) if alike or (name == "kid" and one.null is not None) else None
            published = one.comparable_to_published
            yield Value(f"{name}.{extractor}", getattr(one, name), null=null, comparable_to_published=published)


def _modes(against: Comparison) -> Iterator[Value]:
    if modes := against.modes:
        total, null = modes.total_variation, modes.null
        yield Value("modes.total_variation", total, null=null, comparable_to_published=False)
        yield Value("modes.least_share_ratio", modes.least_share_ratio, comparable_to_published=False)
        yield Value("modes.agreement", modes.agreement, comparable_to_published=False)


def as_csv(report: Report) -> str:
    """One line for each number, with a head; empty where a number has no interval or null."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["set", *[field.name for field in fields(Number)][1:]])
    writer.writerows(astuple(number) for number in numbers(report))
    return buffer.getvalue()
