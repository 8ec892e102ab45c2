"""Two arms trained from the same seeds: is one nearer to the reference? The training seed is the unit.

    g = 10 log10( mean_i E_i / mean_i E_i reference )      D = mean_s ( |g_s baseline| - |g_s routed| )

D > 0: the routed arm is nearer. All models are evaluated on the same noise and classes, so a draw of images is one
draw for all seeds and arms. Legend: K seeds, N images, R resamples or simulated runs; axes of length 2 are (baseline,
routed); all in dB.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import special
from scipy import stats as distributions

from ..metrics.intervals import LEVEL, Interval, resample, sign_flip_interval, sign_flip_p, strata, student_t
from ..metrics.spectrum import decibel

Method = Literal["two-level bootstrap", "Student-t", "inverted sign-flip"]

PILOT_BELOW = 6  # the fewest seeds with which the sign-flip test can reach 5 %
LEAST_COVERAGE = 0.92
RESAMPLES = 2000
SIMULATED_RUNS = 2000
SIMULATED_RESAMPLES = 400
SIMULATED_CHUNK = 100
TARGET_DB = 0.5
POWER = 0.8
MOST_SEEDS = 1000
SPREAD_BOUND = 0.9  # one-sided confidence of the upper bound of the spread over seeds


@dataclass(frozen=True)
class Arms:
    """Energies of every image under two arms trained from the same K seeds, rows sharing noise and class.

    Trailing axes, such as frequencies, are measured side by side. ValueError where shapes or labels do not fit, or an
    energy is not finite and positive.
    """

    baseline: np.ndarray  # (K, N, ...)
    routed: np.ndarray  # (K, N, ...)
    reference: np.ndarray  # (N, ...)
    labels: np.ndarray  # (N,)

    def __post_init__(self) -> None:
        shape = self.baseline.shape
        if self.routed.shape != shape or self.reference.shape != shape[1:] or self.labels.shape != shape[1:2]:
            shapes = [array.shape for array in (self.baseline, self.routed, self.reference, self.labels)]
            raise ValueError(f"arms (K, N, ...), reference (N, ...) and labels (N,) do not fit: {shapes}")
        if shape[0] < 2:
            raise ValueError(f"{shape[0]} training seed: a comparison over seeds needs at least two")
        for name in ("baseline", "routed", "reference"):
            energies = getattr(self, name)
            if not (np.isfinite(energies).all() and (energies > 0).all()):
                raise ValueError(f"{name}: energies must be finite and above 0")

    @property
    def energies(self) -> np.ndarray:
        return np.stack([self.baseline, self.routed])  # (2, K, N, ...)

    @property
    def gains(self) -> np.ndarray:
        """Signed gains (2, K, ...)."""
        return decibel(self.energies.mean(2) / self.reference.mean(0))


def differences(gains: np.ndarray) -> np.ndarray:
    """|g baseline| - |g routed| of each seed, (2, K, ...) -> (K, ...)."""
    return np.abs(gains[0]) - np.abs(gains[1])


@dataclass(frozen=True)
class ImageSpread:
    """Covariances over images of one image's share in the gains, (2, 2, ...), in dB^2; divide by N.

    `shared` is what all seeds have in common (the teacher's images, the difficulty of a noise), `own` the rest.
    """

    shared: np.ndarray
    own: np.ndarray

    def of_difference(self, gains: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(shared, own) variance of D (...), by linearising |g| at `gains` (2, K, ...)."""
        signs = np.sign(gains) * np.array([1.0, -1.0]).reshape(2, *[1] * (gains.ndim - 1))
        mean = signs.mean(1)
        shared = np.einsum("a...,ab...,b...->...", mean, self.shared, mean)
        own = np.einsum("ak...,ab...,bk...->k...", signs, self.own, signs).mean(0)
        return np.maximum(shared, 0.0), np.maximum(own, 0.0)


def influence(arms: Arms) -> np.ndarray:
    """What each image adds to the gains, centred within its stratum, (2, K, N, ...): their spread over sqrt(N) is the
    error of a gain (delta method)."""
    energies = arms.energies
    share = energies / energies.mean(2, keepdims=True) - arms.reference / arms.reference.mean(0)
    share *= 10 / math.log(10)
    among = strata(arms.labels)
    for stratum in np.unique(among):
        rows = among == stratum
        share[:, :, rows] -= share[:, :, rows].mean(2, keepdims=True)
    return share


def image_freedom(arms: Arms) -> int:
    """Degrees of freedom of a spread over images within the strata."""
    return len(arms.labels) - len(np.unique(strata(arms.labels)))


def image_spread(arms: Arms) -> ImageSpread:
    """Two-way analysis of `influence` over seeds and images, by strata."""
    share = influence(arms)
    seeds, freedom = share.shape[1], image_freedom(arms)
    mean = share.mean(1, keepdims=True)
    own = _products(share - mean, freedom) / (seeds - 1)
    return ImageSpread(shared=_products(mean, freedom) - own / seeds, own=own)


def _products(share: np.ndarray, freedom: int) -> np.ndarray:
    return np.einsum("akn...,bkn...->ab...", share, share) / freedom


def image_intervals(arms: Arms) -> tuple[Interval, ...]:
    """|g baseline| - |g routed| of each seed with its 95 % interval over images, from HF energies (K, N)."""
    signs = np.sign(arms.gains) * np.array([[1.0], [-1.0]])
    share = np.einsum("ak,akn->kn", signs, influence(arms))
    images = share.shape[1]
    error = np.sqrt((share**2).sum(1) / image_freedom(arms) / images)
    half = special.ndtri((1 + LEVEL) / 2) * error
    return tuple(
        Interval(float(d), float(d - h), float(d + h)) for d, h in zip(differences(arms.gains), half, strict=True)
    )


def two_level_bootstrap(arms: Arms, rng: np.random.Generator, resamples: int = RESAMPLES) -> Interval:
    """Percentile interval of D, HF energies (K, N): seeds are drawn with replacement, and images within `strata`.

    One draw of images serves every seed, arm and the reference of a resample, as one set of noises served the models.
    """
    seeds, images = arms.baseline.shape
    rows = resample(arms.labels, resamples, rng)  # (R, N)
    counts = np.stack([np.bincount(row, minlength=images) for row in rows]).astype(np.float64)
    gains = decibel(np.einsum("akn,rn->akr", arms.energies, counts, optimize=True) / (counts @ arms.reference))
    drawn = rng.integers(0, seeds, size=(resamples, seeds))
    means = np.take_along_axis(differences(gains).T, drawn, axis=1).mean(1)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(differences(arms.gains).mean()), float(low), float(high))


@dataclass(frozen=True)
class Components:
    """Where the spread of the two gains comes from: a normal model of the experiment, in dB and dB^2."""

    mean: np.ndarray  # (2,) signed gains
    seed: np.ndarray  # (2, 2) between training seeds
    images: ImageSpread


def components(arms: Arms, inflation: float = 1.0) -> Components:
    """By the method of moments; HF energies (K, N). `inflation` multiplies the observed covariance over seeds."""
    spread = image_spread(arms)
    between = inflation * np.cov(arms.gains) - spread.own / arms.baseline.shape[1]
    return Components(arms.gains.mean(1), _positive(between), ImageSpread(_positive(spread.shared), spread.own))


def spread_bound(seeds: int) -> float:
    """By what the variance over K seeds may be too small: the ratio of its upper 90 % bound to its estimate."""
    return float((seeds - 1) / distributions.chi2.ppf(1 - SPREAD_BOUND, seeds - 1))


def coverage_of(arms: Arms, seed: int) -> dict[Method, float]:
    """The lower of two simulated coverages: with the variance over seeds as estimated, and at its upper bound.

    A few seeds may agree by luck; an interval must hold there too.
    """
    seeds, images = arms.baseline.shape
    models = [components(arms, inflation) for inflation in (1.0, spread_bound(seeds))]
    simulated = [simulated_coverage(model, seeds, images, np.random.default_rng([seed, 1])) for model in models]
    return {method: min(one[method] for one in simulated) for method in simulated[0]}


def _positive(covariance: np.ndarray) -> np.ndarray:
    """The nearest covariance: negative eigenvalues, which moments may give, become zero."""
    values, vectors = np.linalg.eigh(covariance)
    return (vectors * np.maximum(values, 0.0)) @ vectors.T


def folded_mean(mean: np.ndarray, deviation: np.ndarray) -> np.ndarray:
    """E|x| of normal x."""
    scale = np.maximum(deviation, 1e-12)
    tail = scale * math.sqrt(2 / math.pi) * np.exp(-0.5 * (mean / scale) ** 2)
    return tail + mean * special.erf(mean / scale / math.sqrt(2))


def simulated_coverage(
    model: Components, seeds: int, images: int, rng: np.random.Generator, runs: int = SIMULATED_RUNS
) -> dict[Method, float]:
    """How often each 95 % interval holds the true D when the experiment is repeated from `model`.

    The truth is the mean over seeds of |gain| at infinitely many images, so the upward bias of |gain| near 0 counts
    as an error. Images enter through their normal limit.
    """
    truth = float(np.subtract(*folded_mean(model.mean, np.sqrt(np.diag(model.seed)))))
    hits: dict[Method, list[np.ndarray]] = {"two-level bootstrap": [], "Student-t": [], "inverted sign-flip": []}
    for start in range(0, runs, SIMULATED_CHUNK):
        shape = (min(SIMULATED_CHUNK, runs - start),)
        gains = model.mean + _normal(model.seed, (*shape, seeds), rng) + _image_noise(model, seeds, images, shape, rng)
        per_seed = np.abs(gains[..., 0]) - np.abs(gains[..., 1])  # (R, K)
        shared, _ = model.images.of_difference(gains.T)
        ends: dict[Method, tuple[np.ndarray, np.ndarray]] = {
            "two-level bootstrap": _simulated_bootstrap(model, gains, images, rng),
            "Student-t": student_t(per_seed, shared / images),
            "inverted sign-flip": sign_flip_interval(per_seed),
        }
        for method, (low, high) in ends.items():
            hits[method].append((low <= truth) & (truth <= high))
    return {method: float(np.concatenate(hit).mean()) for method, hit in hits.items()}


def _normal(covariance: np.ndarray, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    values, vectors = np.linalg.eigh(covariance)
    return rng.standard_normal((*shape, 2)) * np.sqrt(np.maximum(values, 0.0)) @ vectors.T


def _image_noise(
    model: Components, seeds: int, images: int, shape: tuple[int, ...], rng: np.random.Generator
) -> np.ndarray:
    """(*shape, K, 2): the part that all seeds share, and each network's own."""
    shared = _normal(model.images.shared / images, (*shape, 1), rng)
    return shared + _normal(model.images.own / images, (*shape, seeds), rng)


def _simulated_bootstrap(
    model: Components, gains: np.ndarray, images: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """`two_level_bootstrap` of R simulated runs, gains (R, K, 2): (low, high), each (R,)."""
    runs, seeds, _ = gains.shape
    again = gains[:, None] + _image_noise(model, seeds, images, (runs, SIMULATED_RESAMPLES), rng)
    per_seed = np.abs(again[..., 0]) - np.abs(again[..., 1])  # (R, resamples, K)
    drawn = rng.integers(0, seeds, size=per_seed.shape)
    means = np.take_along_axis(per_seed, drawn, axis=-1).mean(-1)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=-1)
    return low, high


def choose(coverage: dict[Method, float], intervals: dict[Method, Interval]) -> tuple[Method, str]:
    """The interval to report and why: the bootstrap unless its coverage is below 92 %, then the first that is not."""
    usable: list[Method] = [method for method in coverage if intervals[method].defined]
    good: list[Method] = [method for method in usable if coverage[method] >= LEAST_COVERAGE]
    method = good[0] if good else max(usable, key=lambda name: coverage[name])
    own = f"its simulated coverage is {percent(coverage[method])}"
    poor: list[Method] = [name for name in coverage if name not in good and name != method]
    if method == "two-level bootstrap" or not poor:
        return method, own if good else f"{own}, and none reaches {percent(LEAST_COVERAGE)}"
    others = " and ".join(
        f"the {name} covers {percent(coverage[name])}" if name in usable else f"the {name} is unbounded"
        for name in poor
    )
    return method, f"{own}, where {others}" + ("" if good else f"; none reaches {percent(LEAST_COVERAGE)}")


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


@dataclass(frozen=True)
class Power:
    """What would resolve `target_db` with 80 % power at the two-sided 5 % level; None where nothing below the limit."""

    target_db: float
    seeds: int | None  # at the present number of images
    seeds_at_most: int | None  # if the spread over seeds is at its upper 90 % bound
    images: int  # for these networks alone, their seeds taken as given


def power(arms: Arms, target_db: float = TARGET_DB) -> Power:
    """From the variances of D between seeds, between images of a network, and between images for all networks."""
    seeds, images = arms.baseline.shape
    shared, own = (float(variance) for variance in image_spread(arms).of_difference(arms.gains))
    observed = float(differences(arms.gains).var(ddof=1))
    widest = observed * spread_bound(seeds)
    normal = special.ndtri(1 - (1 - LEVEL) / 2) + special.ndtri(POWER)
    needed = math.ceil((normal / target_db) ** 2 * (shared + own / seeds))
    floor = own / images  # what `observed` holds of image noise, as any later experiment of N images will
    return Power(
        target_db,
        _seeds_needed(max(observed, floor), shared / images, target_db),
        _seeds_needed(max(widest, floor), shared / images, target_db),
        max(2, needed),
    )


def _seeds_needed(variance: float, shared: float, target: float) -> int | None:
    """The fewest seeds with which a paired t-test finds `target` at POWER, for D of that variance per seed."""
    for seeds in range(2, MOST_SEEDS + 1):
        deviation = math.sqrt(variance / seeds + shared)
        limit = special.stdtrit(seeds - 1, (1 + LEVEL) / 2)
        shift = target / deviation if deviation > 0 else math.inf
        if shift > 30 or distributions.nct.sf(limit, seeds - 1, shift) >= POWER:
            return seeds
    return None


@dataclass(frozen=True)
class Endpoint:
    """The primary endpoint with everything that a reader needs to judge it."""

    gains: np.ndarray  # (2, K), signed
    per_seed: tuple[Interval, ...]  # |g baseline| - |g routed|, with its interval over images
    difference: Interval  # D by `method`
    method: Method
    reason: str
    intervals: dict[Method, Interval]
    coverage: dict[Method, float]  # simulated, see `coverage_of`
    p: float  # exact sign-flip test
    power: Power
    variance: dict[str, float]  # of D in dB^2: seed, and own and shared of one image

    @property
    def pilot(self) -> bool:
        return len(self.per_seed) < PILOT_BELOW


def pilot_label(pilot: bool) -> str:
    """What a comparison is called; empty where it can decide."""
    return f"pilot: fewer than {PILOT_BELOW} training seeds" if pilot else ""


def endpoint(arms: Arms, seed: int) -> Endpoint:
    """D with its interval, test and power, from HF energies (K, N). `seed` is of the resampling and the simulation."""
    per_seed, (_, images) = differences(arms.gains), arms.baseline.shape
    spread, value = image_spread(arms), float(per_seed.mean())
    shared, own = (float(variance) for variance in spread.of_difference(arms.gains))
    ends: dict[Method, tuple[np.ndarray, np.ndarray]] = {
        "Student-t": student_t(per_seed, shared / images),
        "inverted sign-flip": sign_flip_interval(per_seed),
    }
    intervals: dict[Method, Interval] = {"two-level bootstrap": two_level_bootstrap(arms, np.random.default_rng(seed))}
    intervals |= {method: Interval(value, float(low), float(high)) for method, (low, high) in ends.items()}
    coverage = coverage_of(arms, seed)
    method, reason = choose(coverage, intervals)
    return Endpoint(
        gains=arms.gains,
        per_seed=image_intervals(arms),
        difference=intervals[method],
        method=method,
        reason=reason,
        intervals=intervals,
        coverage=coverage,
        p=sign_flip_p(per_seed),
        power=power(arms),
        variance={"seed": max(0.0, float(per_seed.var(ddof=1)) - own / images), "own": own, "shared": shared},
    )
