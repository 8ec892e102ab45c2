"""Bootstrap confidence intervals over images: stratified by class, paired by (noise, class) where rows correspond.

Legend: N images, R resamples. Randomness is an argument: a numpy Generator made by the caller.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 1000
LEVEL = 0.95
VALUES_PER_CHUNK = 1 << 22  # resampled values held at once, 32 MB


@dataclass(frozen=True)
class Interval:
    """A statistic with its confidence interval, in the unit of the statistic."""

    value: float
    low: float
    high: float

    @property
    def half_width(self) -> float:
        return (self.high - self.low) / 2

    @property
    def defined(self) -> bool:
        return all(math.isfinite(number) for number in (self.value, self.low, self.high))


UNDEFINED = Interval(math.nan, math.nan, math.nan)


@dataclass(frozen=True)
class Sample:
    """Per-image measurements and the class of each image."""

    values: np.ndarray  # (N, ...)
    labels: np.ndarray  # (N,)

    def __post_init__(self):
        if len(self.values) != len(self.labels) or len(self.values) == 0:
            raise ValueError(f"{len(self.values)} values need as many labels, at least one; got {len(self.labels)}")


def resample(labels: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Row indices (count, N) drawn with replacement within each class, so that every class keeps its share."""
    indices = np.empty((count, len(labels)), dtype=np.int64)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        indices[:, rows] = rows[rng.integers(0, len(rows), size=(count, len(rows)))]
    return indices


def _draws(samples: Sequence[Sample], paired: bool, count: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Resampled values (count, N, ...) of each sample; paired samples share their indices."""
    if paired:
        indices = resample(samples[0].labels, count, rng)
        return [sample.values[indices] for sample in samples]
    return [sample.values[resample(sample.labels, count, rng)] for sample in samples]


def bootstrap(
    statistic: Callable[..., np.ndarray],
    *samples: Sample,
    rng: np.random.Generator,
    paired: bool = False,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Percentile interval of statistic(values_1, ..., values_k): (value, low, high), each of the statistic's shape.

    `statistic` takes arrays (R, N, ...), reduces axis 1 and returns (R, ...). `paired` means that row i of every
    sample shares noise and class; ValueError where the labels say otherwise.
    """
    if paired and any(not np.array_equal(samples[0].labels, other.labels) for other in samples[1:]):
        raise ValueError("paired samples must have the same classes row by row")
    value = np.asarray(statistic(*[sample.values[None] for sample in samples]))[0]
    chunk = max(1, VALUES_PER_CHUNK // max(sample.values.size for sample in samples))
    parts = [
        statistic(*_draws(samples, paired, min(chunk, resamples - start), rng)) for start in range(0, resamples, chunk)
    ]
    tail = (1 - level) / 2
    low, high = np.quantile(np.concatenate(parts), [tail, 1 - tail], axis=0)
    return value, low, high


def bootstrap_interval(statistic: Callable[..., np.ndarray], *samples: Sample, **options) -> Interval:
    """`bootstrap` for a statistic that is one number."""
    return Interval(*(float(number) for number in bootstrap(statistic, *samples, **options)))


def images_for_half_width(interval: Interval, images: int, target: float) -> int | None:
    """About how many images bring the half-width of `interval`, measured on `images`, down to `target`."""
    if not interval.defined:
        return None
    return max(2, math.ceil(images * (interval.half_width / target) ** 2))
