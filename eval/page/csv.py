"""Every number of a report as one flat row, for the CSV and for the page's complete tables."""

import csv
import io
from collections.abc import Iterator
from dataclasses import astuple, dataclass, fields
from typing import Any

WAVELET_BANDS = ("LH", "HL", "HH")
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
COSTS = ("latency_ms_per_image", "peak_memory_mb", "evaluations", "parameters")


@dataclass(frozen=True)
class Number:
    """A value of a set against another one ("teacher", "real" or, for what it is by itself, ""), with what places it.

    low and high: its 95 % interval over images; null: what a set of the other's own source would read.
    """

    name: str
    role: str
    against: str
    metric: str
    value: float | None
    low: float | None = None
    high: float | None = None
    null: float | None = None
    images: int = 0
    comparable_to_published: bool | None = None


def numbers(result: dict[str, Any]) -> list[Number]:
    """All numbers of a result of eval.measure, set by set."""
    found = []
    for row in result["sets"]:
        head = {"name": row["name"], "role": row["role"], "images": row["images"]}
        found += [Number(**head, against="", **values) for values in _alone(row)]
        for key, against in row["against"].items():
            if against is not None:
                found += [Number(**head, against=key, **values) for values in _against(against)]
    for row in (result.get("latent") or {"sets": []})["sets"]:
        head = {"name": row["name"], "role": row["role"], "images": row["images"]}
        for key, against in row["against"].items():
            if against is not None:
                found += [Number(**head, against=key, **values) for values in _latent(against)]
    return found


def _latent(against: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for band, interval in against["gain_db"].items():
        if interval["value"] is not None:
            yield {"metric": f"latent_gain_db.{band}", **interval}
    for channel, interval in enumerate(against["hf_gain_db_by_channel"]):
        yield {"metric": f"latent_gain_db.channel{channel}.HF", **interval}
    yield {"metric": "latent_lsd", "value": against["lsd"], "null": against["lsd_null"]}
    yield {"metric": "latent_lsd_signed", "value": against["lsd_signed"]}


def _alone(row: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield from ({"metric": name, "value": row[name]} for name in ALONE)
    for level, values in enumerate(row["wavelet"]["kurtosis"], 1):
        for band, value in zip(WAVELET_BANDS, values, strict=True):
            yield {"metric": f"wavelet_kurtosis.{level}.{band}", "value": value}
    for level, values in enumerate(row["wavelet"]["log_energy"], 1):
        for band, value in zip(WAVELET_BANDS, values, strict=True):
            yield {"metric": f"wavelet_log_energy.{level}.{band}", "value": value}
    yield from _grid_lines(row)
    yield from ({"metric": name, "value": row["facts"][name]} for name in COSTS if name in row["facts"])
    if "clip" in row:
        yield {"metric": "clip", **{name: row["clip"][name] for name in ("value", "comparable_to_published")}}
    if "lpips_diversity" in row:
        yield {"metric": "lpips_diversity", "value": row["lpips_diversity"]["value"]}
    if row["fid_npz"]:
        yield _distance("fid_npz", row["fid_npz"])


def _grid_lines(row: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for line in row["grid_lines"]:
        if line["height"]["value"] is not None:
            yield {"metric": f"grid_peak_db.{line['axis']}.{line['period']}", **line["height"]}


def _distance(metric: str, found: dict[str, Any]) -> dict[str, Any]:
    names = ("value", "null", "comparable_to_published")
    return {"metric": metric, **{name: found[name] for name in names}}


def _against(against: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield from _spectral(against)
    yield from ({"metric": name, **against[name]} for name in INTERVALS)
    yield {"metric": "lsd", "value": against["lsd"], "null": against["lsd_null"]}
    yield from ({"metric": name, "value": against[name]} for name in PLAIN)
    for level, values in enumerate(against["wavelet_kurtosis_ratio"], 1):
        for band, value in zip(WAVELET_BANDS, values, strict=True):
            yield {"metric": f"wavelet_kurtosis_ratio.{level}.{band}", "value": value}
    yield from _grid_lines(against)
    for level, one in enumerate(against["sliced_wasserstein"], 1):
        yield {"metric": f"sliced_wasserstein.{level}", "value": one["value"], "null": one["null"]}
    for space, ratio in against["diversity_ratio"].items():
        yield {"metric": f"diversity_ratio.{space}.least", "value": ratio["least"]}
        yield {"metric": f"diversity_ratio.{space}.median", "value": ratio["median"]}
    yield from (_distance(name, against[name]) for name in DISTANCES if name in against)
    yield from _neighbours(against)
    yield from _modes(against)
    if against["lpips_paired"]:
        yield {"metric": "lpips_paired", "value": against["lpips_paired"]["value"]}


def _spectral(against: dict[str, Any]) -> Iterator[dict[str, Any]]:
    gains = {"y": against["gain_db"], **(against["chroma"] or {})}
    for channel, bands in gains.items():
        for band, interval in bands.items():
            if interval["value"] is not None:
                yield {"metric": f"gain_db.{channel}.{band}", **interval}
    for band, value in (against["gain_db_median"] or {}).items():
        if value is not None:
            yield {"metric": f"gain_db_median.{band}", "value": value}


def _neighbours(against: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for extractor, found in against["neighbours"].items():
        null = found["null"] or {}
        alike = null.get("images") == found["images"]  # precision and recall depend on it, KID does not
        for name in ("kid", "precision", "recall"):
            beside = null.get(name) if alike or name == "kid" else None
            metric = {"metric": f"{name}.{extractor}", "value": found[name], "null": beside}
            yield {**metric, "comparable_to_published": found["comparable_to_published"]}


def _modes(against: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if modes := against["modes"]:
        named = {"comparable_to_published": False}
        yield {"metric": "modes.total_variation", "value": modes["total_variation"], "null": modes["null"], **named}
        yield {"metric": "modes.least_share_ratio", "value": modes["least_share_ratio"], **named}
        yield {"metric": "modes.agreement", "value": modes["agreement"], **named}


def as_csv(result: dict[str, Any]) -> str:
    """One line for each number, with a head; empty where a number has no interval or null."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["set", *[field.name for field in fields(Number)][1:]])
    writer.writerows(astuple(number) for number in numbers(result))
    return buffer.getvalue()
