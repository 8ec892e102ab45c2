"""What can each metric see? python -m eval.sensitivity out=DIR data=photos n=512

Sets of images spoiled in known ways against a reference of the same source. Each metric's value is read in units of
its own null: z = (value - mean) / deviation over fresh, unspoiled sets of the same size. The verdicts, on detail and on
colour, compare the reference with itself spoiled, image by image, as students and teacher share their noise.
Legend: N images of a set.
"""

import csv
import io
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from dmd_dar import config, moved
from dmd_dar.atomic import make_folder, write_atomic
from dmd_dar.data import photos, textures
from dmd_dar.draws import Draws, sample_range
from dmd_dar.keys import key
from dmd_dar.messages import LOGGER

from .measure.one_set import CHROMA, LUMA, chosen_rows
from .measure.provenance import command_line, provenance
from .measure.results import Origin, Provenance
from .metrics import colour, features, power_map, sliced, spoil, structure
from .metrics.colour import ColourVerdict, colour_verdict
from .metrics.frechet import feature_distance
from .metrics.record import jsonable
from .metrics.spectrum import BAND_NAMES, Spectrum, gain_curve, hfer_difference, pooled_gains
from .metrics.verdict import Verdict
from .samples.sets import ImageSet

SCHEMA_VERSION = 1
SEEN = 3.0  # |z| from which a metric is said to see a change
LARGEST_SHOWN = 999.0


@dataclass(frozen=True)
class SensitivityConfig:
    """python -m eval.sensitivity"""

    out: str = key("out/sensitivity", "folder for sensitivity.json, sensitivity.csv and sensitivity.png")
    data: Literal["photos", "textures"] = key("photos", "where the images come from")
    n: int = key(512, "images of each set", least=32)
    size: int = key(64, "side of an image: 32 or 64", unit="pixels", least=32, most=64)
    nulls: int = key(8, "unspoiled sets that give each metric's null", least=3)
    seed: int = key(0, "of the images and of what spoils them", least=0)


@dataclass(frozen=True)
class Labelled:
    images: Tensor  # uint8 (N, 3, H, W)
    labels: Tensor  # (N,)


Spoiler = Callable[[Labelled, Draws], Labelled]


def changing(change: Callable[[Tensor, Draws], Tensor]) -> Spoiler:
    """A change of float images, clipped and rounded afterwards; the labels stay."""

    def spoiler(one: Labelled, draws: Draws) -> Labelled:
        return Labelled(spoil.eight_bit(change(one.images.float() / 255, draws)), one.labels)

    return spoiler


def mode_dropped(one: Labelled, draws: Draws) -> Labelled:
    """The images of the last class replaced by others of the set."""
    kept = (one.labels != one.labels.max()).nonzero().flatten()
    instead = kept[draws.integers("replacement", len(kept))]
    rows = torch.where(one.labels == one.labels.max(), instead, torch.arange(len(one.labels)))
    return Labelled(one.images[rows], one.labels[rows])


SPOILERS: dict[str, Spoiler] = {
    "identity": lambda one, draws: one,
    "blur 0.3": changing(lambda x, draws: spoil.blurred(x, 0.3)),
    "blur 0.5": changing(lambda x, draws: spoil.blurred(x, 0.5)),
    "blur 0.7": changing(lambda x, draws: spoil.blurred(x, 0.7)),
    "blur 1.0": changing(lambda x, draws: spoil.blurred(x, 1.0)),
    "noise 2/255": changing(lambda x, draws: spoil.with_white_noise(x, 2, draws)),
    "noise 4/255": changing(lambda x, draws: spoil.with_white_noise(x, 4, draws)),
    "blur 0.7 + shaped noise": changing(lambda x, draws: spoil.with_shaped_noise(x, 0.7, draws)),
    "phases scrambled": changing(lambda x, draws: spoil.phase_scrambled(x, draws)),
    "HF phases scrambled": changing(lambda x, draws: spoil.phase_scrambled(x, draws, above=0.25)),
    "brightness +8/255": changing(lambda x, draws: spoil.brighter(x, 8)),
    "brightness +16/255": changing(lambda x, draws: spoil.brighter(x, 16)),
    "contrast x 0.9": changing(lambda x, draws: spoil.contrast(x, 0.9)),
    "saturation x 1.2": changing(lambda x, draws: spoil.saturated(x, 1.2)),
    "saturation x 0.8": changing(lambda x, draws: spoil.saturated(x, 0.8)),
    "colour noise 4/255": changing(lambda x, draws: spoil.with_chroma_noise(x, 4, draws)),
    "columns 6/255, period 4": changing(lambda x, draws: spoil.with_lattice(x, 6, 4)),
    "mode drop": mode_dropped,
}


@dataclass(frozen=True)
class Measured:
    """Everything about one set that the metrics need."""

    luma: Spectrum
    structure: structure.Structure
    colour: np.ndarray  # (N, 6), columns of colour.COLUMNS
    lines: np.ndarray  # (N, 2, 4, 5)
    slices: sliced.Slices
    features: dict[str, features.Features]


def extractors_of(draw: Callable[[str], Labelled], seed: int) -> list[features.Extractor]:
    """Those that a report always has, fitted as there on images that are compared with nothing."""
    return [features.wavelet(), features.fit_pca(draw("fit").images, seed=seed)]


def measure(images: Tensor, extractors: list[features.Extractor]) -> Measured:
    """By the code that measures a set of a report; seeds of patches and of their directions are always 0."""
    one = ImageSet("set", images, None, "images", paired=False)
    rows = chosen_rows(one, LUMA, *CHROMA, "structure", "colour", "grid")
    return Measured(
        luma=rows.spectrum(),
        structure=rows.structure,
        colour=rows.colour,
        lines=rows.lines,
        slices=sliced.Slices(sliced.sliced_patches(images)),
        features={extractor.name: features.extract(one.stream, extractor) for extractor in extractors},
    )


def metrics(ours: Measured, theirs: Measured) -> dict[str, float]:
    """Every metric of `ours` against the reference `theirs`, by name; differences and ratios as the reports define.

    Without those that the reference leaves undefined: bands without a mode, ratios to a kurtosis without heavy tails.
    """
    gains = pooled_gains(ours.luma.energies, theirs.luma.energies)
    _, distance, signed = gain_curve(ours.luma, theirs.luma)
    slopes = np.subtract(ours.luma.slopes, theirs.luma.slopes)
    heights = power_map.line_heights(ours.lines) - power_map.line_heights(theirs.lines)
    values_by_name = {f"gain {band}, dB": gain for band, gain in zip(BAND_NAMES, gains, strict=True)}
    shares = hfer_difference(ours.luma.hfer_per_image, theirs.luma.hfer_per_image)
    values_by_name |= {"lsd, dB": distance, "lsd signed, dB": signed, "hfer difference": shares}
    values_by_name |= {"slope difference": slopes[0], "slope_hf difference": slopes[1]}
    values_by_name |= {
        "largest grid peak, dB": np.nanmax(np.abs(heights)),
        **_structure_metrics(ours.structure, theirs.structure),
    }
    everything = colour.groups_of(None, None, None)
    values_by_name |= colour.colour_values(ours.colour, theirs.colour, everything)
    levels = sliced.level_distances(ours.slices, theirs.slices)
    values_by_name |= {f"sliced Wasserstein, level {i}": level for i, level in enumerate(levels)}
    for name, values in ours.features.items():
        target = theirs.features[name]
        values_by_name[name] = feature_distance(features.scaled(values, target), features.scaled(target, target))
    return {name: float(value) for name, value in values_by_name.items() if not np.isnan(value)}


def _structure_metrics(ours: structure.Structure, theirs: structure.Structure) -> dict[str, float]:
    def medians(name: str) -> tuple[np.ndarray, np.ndarray]:
        return np.asarray(np.median(getattr(ours, name))), np.asarray(np.median(getattr(theirs, name)))

    kurtosis, gradient, agreement = (medians(name) for name in ("kurtosis", "gradient_kurtosis", "parent_child"))
    return {
        "hf_kurtosis ratio": float(structure.tail_ratio(*kurtosis)),
        "gradient kurtosis ratio": float(structure.tail_ratio(*gradient)),
        "parent-child difference": float(agreement[0] - agreement[1]),
        "flat noise, dB": float(structure.flat_gain(ours.flat, theirs.flat)),
    }


def data_of(cfg: SensitivityConfig) -> photos.Photos | textures.Textures:
    return {"photos": photos.Photos, "textures": textures.Textures}[cfg.data](cfg.size)


def source(cfg: SensitivityConfig) -> Callable[[str], Labelled]:
    """Independent sets of the data by name, the classes in turn."""
    data = data_of(cfg)
    samples = sample_range(0, cfg.n)
    labels = samples % data.num_classes
    return lambda name: Labelled(data.crops(labels, Draws(cfg.seed, f"sensitivity {name}", 0, samples)), labels)


@dataclass(frozen=True)
class Null:
    """A metric over fresh, unspoiled sets."""

    mean: float
    deviation: float

    @staticmethod
    def of(values: Sequence[float]) -> "Null":
        return Null(float(np.mean(values)), float(np.std(values, ddof=1)))

    def z(self, value: float) -> float | None:
        """Deviations from the mean; None where the null does not vary."""
        return (value - self.mean) / self.deviation if self.deviation > 0 else None


@dataclass(frozen=True)
class Spoiled:
    """What the metrics, by name, and the verdict read of one way to spoil images."""

    values: dict[str, float]
    z: dict[str, float | None]
    verdict: Verdict
    colour: ColourVerdict


@dataclass(frozen=True)
class Sensitivity:
    """All that sensitivity.json holds: the null of each metric, and each way to spoil, by name."""

    schema_version: int
    config: SensitivityConfig
    null: dict[str, Null]
    spoiled: dict[str, Spoiled]
    provenance: Provenance | None = None


def sensitivity(cfg: SensitivityConfig) -> Sensitivity:
    """Measure fresh sets for the nulls, then every way to spoil; says the verdicts as it goes."""
    colour_labels = set(data_of(cfg).colour_labels)
    draw, draws = source(cfg), Draws(cfg.seed, "spoil", 0, sample_range(0, cfg.n))
    reference, fresh = draw("reference"), draw("fresh")
    extractors = extractors_of(draw, cfg.seed)
    theirs = measure(reference.images, extractors)
    unspoiled = [metrics(measure(draw(f"null {i}").images, extractors), theirs) for i in range(cfg.nulls)]
    nulls = {name: Null.of([values[name] for values in unspoiled]) for name in unspoiled[0]}
    spoiled = {}
    for name, spoiler in SPOILERS.items():
        values = metrics(measure(spoiler(fresh, draws).images, extractors), theirs)
        z = {metric: nulls[metric].z(value) for metric, value in values.items()}
        verdicts = paired_verdicts(spoiler, reference, draws, colour_labels)
        spoiled[name] = Spoiled(values, z, *verdicts)
        LOGGER.info(f"{name}: {words(spoiled[name])}")
    return Sensitivity(SCHEMA_VERSION, cfg, nulls, spoiled)


def paired_verdicts(
    spoiler: Spoiler, reference: Labelled, draws: Draws, colour_labels: set[int]
) -> tuple[Verdict, ColourVerdict]:
    """Of the reference's own images, spoiled, against themselves; unpaired where their classes are others."""
    ours = spoiler(reference, draws)
    paired, labels = torch.equal(ours.labels, reference.labels), (ours.labels, reference.labels)
    given = {"labels": labels[0], "reference_labels": labels[1], "paired": paired}
    detail = structure.verdict(ours.images, reference.images, **given)
    return detail, colour_verdict(ours.images, reference.images, colour_labels=colour_labels, **given)


def words(row: Spoiled) -> str:
    """Both verdicts in a few words; colour that is right is not told."""
    return row.verdict.word + ("" if row.colour.word == colour.OK else f"; {row.colour.word}")


def terminal_table(result: Sensitivity) -> str:
    """z of every metric (rows) for every way to spoil (columns, numbered), an asterisk where it is seen; verdicts."""
    spoiled = result.spoiled
    width = max(len(name) for name in result.null)
    lines = ["z = (value - null mean) / null deviation; * where |z| is at least 3", ""]
    lines += [f"{i:>3}  {name:<26} {words(row)}" for i, (name, row) in enumerate(spoiled.items())]
    lines += ["", " " * width + "".join(f"{i:>8}" for i in range(len(spoiled)))]
    for metric in result.null:
        lines.append(f"{metric:<{width}}" + "".join(f"{_shown(row.z[metric]):>8}" for row in spoiled.values()))
    return "\n".join(lines)


def _shown(z: float | None) -> str:
    if z is None:
        return "-"
    return f"{np.clip(z, -LARGEST_SHOWN, LARGEST_SHOWN):.1f}{'*' if abs(z) >= SEEN else ' '}"


def as_csv(result: Sensitivity) -> str:
    """One line for each metric and way to spoil."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["spoiled", "metric", "value", "null_mean", "null_deviation", "z", "verdict", "colour"])
    for name, row in result.spoiled.items():
        for metric, null in result.null.items():
            cells = [row.values[metric], null.mean, null.deviation, row.z[metric]]
            writer.writerow([name, metric, *cells, row.verdict.word, row.colour.word])
    return buffer.getvalue()


def figure(result: Sensitivity) -> bytes:
    """The table as a PNG: blue below the null, red above, on a logarithmic scale; numbers where it is seen."""
    names, rows = list(result.null), result.spoiled
    z = np.array([[row.z[metric] or 0.0 for row in rows.values()] for metric in names])
    shade = np.sign(z) * np.log10(1 + np.abs(z))
    drawn = Figure(figsize=(2.6 + 0.62 * len(rows), 2.2 + 0.27 * len(names)), layout="constrained")
    axes = drawn.add_subplot()
    axes.imshow(shade, cmap="RdBu_r", vmin=-3, vmax=3, aspect="auto")
    for y, x in zip(*np.nonzero(np.abs(z) >= SEEN), strict=True):
        colour = "white" if abs(shade[y, x]) > 1.9 else "black"
        axes.text(
            x,
            y,
            f"{np.clip(z[y, x], -LARGEST_SHOWN, LARGEST_SHOWN):.0f}",
            ha="center",
            va="center",
            fontsize=8,
            color=colour,
        )
    titles = [f"{name}\n({words(row)})" for name, row in rows.items()]
    axes.set_xticks(range(len(rows)), titles, rotation=55, ha="right", rotation_mode="anchor", fontsize=8)
    axes.set_yticks(range(len(names)), names, fontsize=9)
    axes.set_title(f"z against the null, {result.config.data}, n = {result.config.n}", fontsize=11)
    buffer = io.BytesIO()
    drawn.savefig(buffer, format="png", dpi=150, metadata={"Software": None})
    return buffer.getvalue()


def run(cfg: SensitivityConfig) -> None:
    """Measure, print the table, write it with its figure."""
    began, folder = time.monotonic(), make_folder(cfg.out)
    result = sensitivity(cfg)
    origin = Origin(command_line("eval.sensitivity", config.differences(SensitivityConfig(), cfg)))
    result = replace(result, provenance=provenance(torch.device("cpu"), time.monotonic() - began, origin))
    write_atomic(folder / "sensitivity.json", json.dumps(jsonable(result), indent=1) + "\n")
    write_atomic(folder / "sensitivity.csv", as_csv(result))
    write_atomic(folder / "sensitivity.png", figure(result))
    print(terminal_table(result))


def main(argv: Sequence[str] | None = None) -> None:
    config.run_job(SensitivityConfig, run, argv, description=__doc__ or "")


moved.keep_names(__name__)


if __name__ == "__main__":
    main()
