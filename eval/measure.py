"""Measures sets of samples against the teacher and against real images; the result is plain, JSON-ready data.

Legend: N images of a set, F radial bins. Everything is measured on 8-bit images mapped to [0, 1].
"""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, is_dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from eval import frechet, structure
from eval.spectrum import (
    BAND_EDGES,
    BAND_NAMES,
    Spectrum,
    band_gains,
    gain_curve,
    hf_gain_by_class,
    median_gains,
    spectrum_of,
)
from eval.stats import Sample, images_for_half_width
from eval.verdict import FLAT_NOISE_DB, GAIN_MARGIN_DB, KURTOSIS_RANGE, verdict

SCHEMA_VERSION = 1
SANE_HALF_WIDTH_DB = 0.25  # half of the margin: a wider interval cannot lie inside it comfortably
CHROMA = ("cb", "cr")


@dataclass(frozen=True)
class ImageSet:
    """Samples of one origin. `paired`: row i shares noise and class with row i of every other paired set."""

    name: str
    images: Tensor  # uint8 (N, 3, H, W)
    labels: Tensor  # (N,) integers
    role: Literal["real", "teacher", "undistilled", "student", "null"]
    paired: bool
    facts: dict[str, Any] = field(default_factory=dict)  # JSON-able: latency_ms_per_image, steps, parameters, ...


@dataclass(frozen=True)
class Measured:
    """Everything about one set that the comparisons need, measured once."""

    source: ImageSet
    labels: np.ndarray  # (N,)
    luma: Spectrum
    chroma: dict[str, Spectrum]
    kurtosis: np.ndarray  # (N,)
    parent_child: np.ndarray  # (N,)
    flat: np.ndarray  # (N, 2)
    features: Tensor  # (N, 20)
    pixel_spread: dict[int, float]  # diversity of each class in pixels

    def sample(self, values: np.ndarray) -> Sample:
        return Sample(values, self.labels)


def measure(
    sets: Iterable[ImageSet],
    reference: ImageSet,
    real: ImageSet,
    colour_labels: set[int],
    seed: int,
    class_names: dict[int, str] | None = None,
) -> dict:
    """Compares every set with the teacher's samples (`reference`) and with `real` images, in every metric of eval/.

    colour_labels: the classes that have colour; chroma is measured over these only. seed: of the bootstrap.
    Returns JSON-able data of SCHEMA_VERSION. ValueError naming the set whose images do not fit.
    """
    everything = _unique([real, reference, *sets])
    validate(everything)
    measured = {one.name: measure_one(one) for one in everything}
    null = next((measured[one.name].features for one in everything if one.role == "null"), None)
    rows = []
    for one in measured.values():
        row = describe(one)
        row["against"] = {"teacher": None, "real": None}
        for key, other, second in (("teacher", reference, None), ("real", real, null)):
            if one.source is not other:
                row["against"][key] = compare(one, measured[other.name], colour_labels, seed, second)
        rows.append(row)
    names = {"teacher": reference.name, "real": real.name, "class_names": class_names or {}}
    return jsonable({"schema_version": SCHEMA_VERSION, "seed": seed, **names, **_scales(real.images), "sets": rows})


def _scales(images: Tensor) -> dict:
    """Image size, bands and margins: what a reader of the numbers needs to place them."""
    height, width = images.shape[-2:]
    return {
        "image_size": [height, width],
        "bands": {"names": BAND_NAMES, "edges": [1.5 / min(height, width), *BAND_EDGES]},
        "margins": {"gain_db": GAIN_MARGIN_DB, "kurtosis": KURTOSIS_RANGE, "flat_noise_db": FLAT_NOISE_DB},
    }


def _unique(sets: list[ImageSet]) -> list[ImageSet]:
    """In order, an object given twice once."""
    return list({id(one): one for one in sets}.values())


def validate(sets: list[ImageSet]) -> None:
    """ValueError naming the first set with another shape, dtype, number of labels, or a name used before."""
    shape = sets[0].images.shape[1:]
    seen: set[str] = set()
    for one in sets:
        images = one.images
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"{one.name}: expected uint8 (N, 3, H, W), got {images.dtype} {tuple(images.shape)}")
        if images.shape[1:] != shape:
            raise ValueError(f"{one.name}: images {tuple(images.shape[1:])}, but {tuple(shape)} in {sets[0].name}")
        if len(images) < 4 or one.labels.shape != (len(images),):
            raise ValueError(f"{one.name}: {len(images)} images (at least 4) and labels {tuple(one.labels.shape)}")
        if one.name in seen:
            raise ValueError(f"two sets are called {one.name!r}")
        seen.add(one.name)


def measure_one(one: ImageSet) -> Measured:
    images = one.images.float() / 255
    return Measured(
        source=one,
        labels=one.labels.cpu().numpy(),
        luma=spectrum_of(images),
        chroma={channel: spectrum_of(images, channel=channel) for channel in CHROMA},
        kurtosis=structure.hf_kurtosis(images),
        parent_child=structure.parent_child_corr(images),
        flat=structure.flat_patch_energy(images),
        features=frechet.wavelet_features(images),
        pixel_spread=frechet.class_diversity(images.flatten(1), one.labels),
    )


def describe(one: Measured) -> dict:
    """What is measured on a set alone."""
    slope, slope_hf = one.luma.slopes
    return {
        "name": one.source.name,
        "role": one.source.role,
        "paired": one.source.paired,
        "images": len(one.labels),
        "facts": one.source.facts,
        "frequencies": one.luma.frequencies.tolist(),
        "power": one.luma.power.tolist(),
        "hfer": one.luma.hfer,
        "slope": slope,
        "slope_hf": slope_hf,
        "hf_kurtosis": float(np.median(one.kurtosis)),
        "parent_child_corr": float(np.median(one.parent_child)),
    }


def compare(one: Measured, other: Measured, colour_labels: set[int], seed: int, second: Tensor | None) -> dict:
    """All metrics of `one` against `other`. `second`: features of another set of the other's source, for the null."""
    rng = np.random.default_rng(seed)
    paired = one.source.paired and other.source.paired
    energies = one.sample(one.luma.energies), other.sample(other.luma.energies)
    gains = band_gains(*energies, paired=paired, rng=rng)
    by_class = hf_gain_by_class(*energies)
    curve, lsd, lsd_signed = gain_curve(one.luma, other.luma)
    kurtosis = structure.kurtosis_ratio(one.sample(one.kurtosis), other.sample(other.kurtosis), paired=paired, rng=rng)
    flat_noise = structure.flat_noise_db(one.sample(one.flat), other.sample(other.flat), paired=paired, rng=rng)
    return {
        "reference": other.source.name,
        "paired": paired,
        "class_share_gap": class_share_gap(one.labels, other.labels),
        "verdict": verdict(gains["HF"], kurtosis, flat_noise),
        "gain_db": gains,
        "gain_db_median": median_gains(*energies) if paired else None,
        "images_for_quarter_db": images_for_half_width(gains["HF"], len(one.labels), SANE_HALF_WIDTH_DB),
        "hf_gain_by_class": by_class,
        "hf_gain_class_median": float(np.median(list(by_class.values()))) if by_class else None,
        "gain_curve_db": curve.tolist(),
        "lsd": lsd,
        "lsd_signed": lsd_signed,
        "hf_kurtosis_ratio": kurtosis,
        "parent_child_difference": float(np.median(one.parent_child) - np.median(other.parent_child)),
        "flat_noise_db": flat_noise,
        "fd_wavelet": _distance(one, other, rng, second),
        "diversity_ratio": _diversity(one, other),
        "chroma": _chroma(one, other, colour_labels, paired, rng),
    }


def class_share_gap(labels: np.ndarray, other: np.ndarray) -> float:
    """Largest difference of a class's share between two sets: above a few per cent a gain compares the classes."""
    return max(abs(float((labels == label).mean() - (other == label).mean())) for label in np.union1d(labels, other))


def _distance(one: Measured, other: Measured, rng: np.random.Generator, second: Tensor | None) -> dict:
    second = None if second is one.features else second
    null = frechet.fd_null(other.features, len(one.labels), rng, second)
    distance = frechet.fd_wavelet(one.features, other.features, null, (one.source.name, other.source.name))
    return {**asdict(distance), "excess": distance.excess}


def _diversity(one: Measured, other: Measured) -> dict:
    """Diversity in pixels and in standardised wavelet features, as ratios to the other set's, class by class."""
    spread = {
        "pixels": [m.pixel_spread for m in (one, other)],
        "wavelet": [
            frechet.class_diversity(frechet.standardise(m.features, other.features), m.source.labels)
            for m in (one, other)
        ],
    }
    ratios = {}
    for name, (ours, theirs) in spread.items():
        by_class = frechet.diversity_ratio(ours, theirs)
        values = list(by_class.values())
        ratios[name] = {
            "by_class": by_class,
            "least": min(values, default=math.nan),
            "median": float(np.median(values)) if values else math.nan,
        }
    return ratios


def _chroma(one: Measured, other: Measured, colour_labels: set[int], paired: bool, rng: np.random.Generator):
    """Band gains of Cb and Cr over the classes that have colour; None when there are none."""
    rows = [np.isin(m.labels, list(colour_labels)) for m in (one, other)]
    if not all(selected.any() for selected in rows):
        return None
    gains = {}
    for channel in CHROMA:
        ours, theirs = (
            Sample(m.chroma[channel].energies[selected], m.labels[selected])
            for m, selected in zip((one, other), rows, strict=True)
        )
        gains[channel] = band_gains(ours, theirs, paired=paired, rng=rng)
    return gains


def jsonable(value: Any) -> Any:
    """Dataclasses to dicts, tuples to lists, keys to strings, numbers that are not finite to None."""
    if is_dataclass(value) and not isinstance(value, type):
        return jsonable(asdict(value))
    if isinstance(value, dict):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value
