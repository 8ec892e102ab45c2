"""Intervals and tests: the bootstrap over images, and what is exact or simultaneous over a few training seeds.

Images are resampled stratified by class (`strata`), or prompt by prompt with all images of each (`resample_prompts`),
paired by (noise, class) where rows correspond.
Legend: N images, R resamples, K training seeds, F points of a curve. Randomness is an argument: a numpy Generator made
by the caller.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from scipy import special, stats

RESAMPLES = 1000
LEVEL = 0.95
VALUES_PER_CHUNK = 1 << 22  # resampled values held at once, 32 MB
LEAST_IN_STRATUM = 8  # images of a class; smaller ones are pooled, since within them the spread hardly shows
LARGEST_EXACT = 16  # differences whose 2^K sign patterns are enumerated
BAND_CHUNK = 500  # simulated samples of curves held at once
LARGEST_FREEDOM = 1e6  # beyond, Student's t is normal


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
    """Per-image measurements and the class of each image; or its prompt, a draw from many more prompts."""

    values: np.ndarray  # (N, ...)
    labels: np.ndarray  # (N,)
    prompted: bool = False  # whether the labels are prompts

    def __post_init__(self):
        if len(self.values) != len(self.labels) or len(self.values) == 0:
            raise ValueError(f"{len(self.values)} values need as many labels, at least one; got {len(self.labels)}")

    def of(self, rows: np.ndarray | slice) -> "Sample":
        """The images of these rows."""
        return replace(self, values=self.values[rows], labels=self.labels[rows])


def strata(labels: np.ndarray) -> np.ndarray:
    """The stratum of each image (N,): its class's rank, or -1 for all classes of fewer than LEAST_IN_STRATUM images.

    A class of one image would have no spread of its own, and a few have too little: n images show (n - 1) / n of it.
    """
    _, ranks, counts = np.unique(labels, return_inverse=True, return_counts=True)
    return np.where(counts[ranks] < LEAST_IN_STRATUM, -1, ranks)


def resample(labels: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Row indices (count, N) drawn with replacement within each of the `strata`, so that each keeps its share."""
    indices, among = np.empty((count, len(labels)), dtype=np.int64), strata(labels)
    for stratum in np.unique(among):
        rows = np.flatnonzero(among == stratum)
        indices[:, rows] = rows[rng.integers(0, len(rows), size=(count, len(rows)))]
    return indices


def resample_prompts(labels: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Row indices (count, N): prompts drawn with replacement, each with all its images, until there are N images.

    Images of one prompt are no independent witnesses of other prompts. Of a single prompt, its images are drawn.
    """
    _, ranks, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    if len(sizes) == 1:
        return resample(labels, count, rng)
    rows = np.argsort(ranks, kind="stable")  # prompt by prompt
    drawn = rng.integers(0, len(sizes), size=(count, math.ceil(len(labels) / sizes.min())))
    if (sizes == sizes[0]).all():
        return rows.reshape(len(sizes), -1)[drawn].reshape(count, -1)
    of_prompt = np.split(rows, np.cumsum(sizes)[:-1])
    return np.stack([np.concatenate([of_prompt[one] for one in each])[: len(labels)] for each in drawn])


def _draws(samples: Sequence[Sample], paired: bool, count: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Resampled values (count, N, ...) of each sample; paired samples share their indices."""

    def indices(sample: Sample) -> np.ndarray:
        return (resample_prompts if sample.prompted else resample)(sample.labels, count, rng)

    if paired:
        shared = indices(samples[0])
        return [sample.values[shared] for sample in samples]
    return [sample.values[indices(sample)] for sample in samples]


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


def _inexact(count: int) -> str:
    return f"{count} seeds: the exact test enumerates all signs of 1 to {LARGEST_EXACT} differences"


@lru_cache(maxsize=4)
def _subsets(count: int) -> np.ndarray:
    """Every subset of `count` things as a row of zeros and ones, (2^count, count); the last column halves the rows."""
    if not 1 <= count <= LARGEST_EXACT:
        raise ValueError(_inexact(count))
    return (np.arange(1 << count)[:, None] >> np.arange(count) & 1).astype(np.float64)


def sign_flip_p(differences: np.ndarray) -> float:
    """Exact two-sided p-value of "symmetric about 0", from differences (K,), one for each training seed.

    The share of all 2^K sign patterns whose |mean| is at least the observed one: no less than 2 / 2^K, so that five
    seeds cannot reach 0.05. ValueError for no difference or more than LARGEST_EXACT.
    """
    if not 1 <= len(differences) <= LARGEST_EXACT:
        raise ValueError(_inexact(len(differences)))
    if len(differences) == 1:
        return 1.0  # both signs of one difference are as far from 0; SciPy takes two at least
    observed, rounding = abs(differences.sum()), 1e-12 * np.abs(differences).sum()

    def distance(flipped: np.ndarray, axis: int) -> np.ndarray:
        """|sum|; ties up to rounding are made exact."""
        sums = np.abs(flipped.sum(axis))
        return np.where(np.abs(sums - observed) <= rounding, observed, sums)

    every = {"permutation_type": "samples", "n_resamples": 1 << LARGEST_EXACT, "vectorized": True}
    return float(stats.permutation_test((differences,), distance, alternative="greater", **every).pvalue)


def sign_flip_interval(differences: np.ndarray, level: float = LEVEL) -> tuple[np.ndarray, np.ndarray]:
    """The shifts that `sign_flip_p` does not reject at 1 - level: (low, high), for differences (..., K).

    Flipping the signs of a subset F of d - shift raises |mean| exactly where `shift` lies between the mean of F and
    that of the rest. So the end is the k-th smallest lower one of these pairs, k = floor((1 - level) 2^(K-1)), and
    likewise above; infinite for k = 0, at 95 % for fewer than six seeds.
    """
    differences = np.asarray(differences, dtype=np.float64)
    count = differences.shape[-1]
    order = math.floor((1 - level) * 2 ** (count - 1))
    if order == 0:
        return np.full(differences.shape[:-1], -np.inf), np.full(differences.shape[:-1], np.inf)
    chosen = _subsets(count)[1 : 1 << (count - 1)]  # one of each pair of a subset and the rest
    size = chosen.sum(1)
    part = differences @ chosen.T
    means = part / size, (differences.sum(-1, keepdims=True) - part) / (count - size)
    low = np.partition(np.minimum(*means), order - 1, axis=-1)[..., order - 1]
    high = -np.partition(-np.maximum(*means), order - 1, axis=-1)[..., order - 1]
    return low, high


def student_t(
    values: np.ndarray, extra_variance: np.ndarray | float = 0.0, level: float = LEVEL
) -> tuple[np.ndarray, np.ndarray]:
    """Interval of the mean over the last axis of values (..., K): (low, high).

    `extra_variance` is the variance of an error that all K values share, known from elsewhere; the degrees of freedom
    are then Welch and Satterthwaite's. ValueError for fewer than two values.
    """
    count = values.shape[-1]
    if count < 2:
        raise ValueError(f"{count} value has no spread: Student's t needs at least two")
    spread = values.var(-1, ddof=1) / count
    total = spread + extra_variance
    freedom = (count - 1) * np.divide(total, spread, out=np.full_like(total, np.inf), where=spread > 0) ** 2
    half = special.stdtrit(np.minimum(freedom, LARGEST_FREEDOM), (1 + level) / 2) * np.sqrt(total)
    return values.mean(-1) - half, values.mean(-1) + half


def holm(p_values: dict[str, float]) -> dict[str, float]:
    """Holm's step-down adjustment: compare with 0.05 to hold the chance of any false alarm in the family at 5 %."""
    adjusted, least = {}, 0.0
    for rank, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        least = max(least, min(1.0, (len(p_values) - rank) * p_values[name]))
        adjusted[name] = least
    return {name: adjusted[name] for name in p_values}


def max_t_band(
    curves: np.ndarray,
    rng: np.random.Generator,
    extra_variance: np.ndarray | float = 0.0,
    level: float = LEVEL,
    draws: int = 4000,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean curve of K curves (K, F) with a band that covers it at all F points at once: (value, low, high).

    value +- c s / sqrt(K), with c the `level` quantile of max_f |t_f| over K normal curves, studentised as these are.
    Their correlations are the sample's, shrunk by 1 / K towards independence: K curves leave out directions of which
    the truth may have more. `extra_variance` (F,) of the mean, shared by all curves, widens s only.
    """
    count = len(curves)
    if count < 2:
        raise ValueError(f"{count} curve has no spread: a band needs at least two")
    deviations = curves - curves.mean(0)
    spread = curves.std(0, ddof=1)
    scaled = deviations / np.where(spread > 0, spread, 1.0) / math.sqrt(count - 1)  # rows combine to unit variance
    largest = [_largest_t(_normal_curves(scaled, BAND_CHUNK, rng)) for _ in range(math.ceil(draws / BAND_CHUNK))]
    half = np.quantile(np.concatenate(largest), level) * np.sqrt(spread**2 / count + extra_variance)
    value = curves.mean(0)
    return value, value - half, value + half


def _normal_curves(scaled: np.ndarray, draws: int, rng: np.random.Generator) -> np.ndarray:
    """Samples of K normal curves of unit variance (draws, K, F) with the shrunk correlations of `scaled` (K, F)."""
    count, points = scaled.shape
    alike = rng.standard_normal((draws, count, count)) @ scaled
    free = rng.standard_normal((draws, count, points)) * scaled.any(0)
    return math.sqrt(1 - 1 / count) * alike + math.sqrt(1 / count) * free


def _largest_t(curves: np.ndarray) -> np.ndarray:
    """max_f |mean| sqrt(K) / s of samples of K curves, (R, K, F) -> (R,); a point without variation is left out."""
    spread = curves.std(1, ddof=1)
    t = np.divide(np.abs(curves.mean(1)), spread, out=np.zeros_like(spread), where=spread > 0)
    return math.sqrt(curves.shape[1]) * t.max(-1)
