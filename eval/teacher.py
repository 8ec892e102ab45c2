"""Is a teacher good enough to distil? python -m eval.teacher path=teachers/photos32 out=out/teacher

Its samples at guidance 1 against fresh crops of the training tiles: band gains with their bars, and whether they are
copies, by the distance to the nearest training crop beside that of held-out crops.
"""

import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dmd_dar import config
from dmd_dar.atomic import make_folder, write_atomic
from dmd_dar.data.config import MOST_PHOTOS
from dmd_dar.data.images import png_bytes, tile
from dmd_dar.data.photos import NAMES, Photos, data_hash
from dmd_dar.device import chosen_device
from dmd_dar.draws import Draws, sample_range
from dmd_dar.keys import key
from dmd_dar.methods.generate import balanced_labels, ode_generator
from dmd_dar.methods.solvers import Solver
from dmd_dar.models.denoiser import velocity_of
from dmd_dar.models.saved import Denoiser, Saved, read_card, read_network

from .measure.pair import Compared, measure
from .measure.provenance import command_line, provenance
from .measure.results import Comparison, Measurements, Origin, Provenance, jsonable
from .metrics.features import FeatureDistance
from .metrics.intervals import Interval
from .metrics.record import FLAT
from .samples.real import real_sets
from .samples.sampling import Bench
from .samples.sets import ImageSet

BAND_BAR_DB = 1.5
HF_BAR_DB = 1.0
BARRED_BANDS = ("B1", "B2", "B3", "B4")
GRID_ROWS = 8


@dataclass(frozen=True)
class TeacherReportConfig(Solver):
    """python -m eval.teacher"""

    path: str = key("teachers/photos32", "folder of a teacher of the seven photographs", path=True)
    out: str = key("out/teacher", "folder for quality.json and grid.png")
    n: int = key(2048, "samples, classes in turn", least=64)
    neighbours: int = key(4096, "training crops of each class among which the nearest is looked for", least=1)
    seed: int = key(0, "of the noise, the crops and the bootstrap", least=0)
    batch_size: int = key(64, "images at a time; changes no image beyond rounding", least=1)
    cache: str = key("out/cache", "folder in which the teacher's images are kept and found again")
    cpu: bool = key(False, "compute on the CPU although a GPU is there")


def nearest_distance(images: Tensor, bank: Tensor) -> Tensor:
    """(N,) root mean squared difference, in 8-bit levels, of each uint8 image to its nearest in `bank`."""
    x, y = images.flatten(1).float(), bank.flatten(1).float()
    return torch.cdist(x, y).amin(dim=1) / x.shape[1] ** 0.5


@dataclass(frozen=True)
class NearestCrop:
    """Distances of one set's images of a class to their nearest training crop, in levels of 255."""

    median: float
    least: float


def memorisation(
    sets: dict[str, ImageSet], data: Photos, neighbours: int, seed: int
) -> dict[str, dict[str, NearestCrop]]:
    """By set and class, the distances to the nearest of `neighbours` training crops of that class."""
    nearest: dict[str, dict[str, NearestCrop]] = {name: {} for name in sets}
    for label, name in enumerate(NAMES):
        samples = sample_range(0, neighbours, data.device)
        bank = data.crops(torch.full_like(samples, label), Draws(seed, f"bank_{name}", 0, samples)).cpu()
        for set_name, one in sets.items():
            distances = nearest_distance(one.first(one.count)[one.labels == label], bank)
            nearest[set_name][name] = NearestCrop(float(np.median(distances)), distances.min().item())
    return nearest


@dataclass(frozen=True)
class Judgement:
    """A teacher's samples and held-out crops against training crops, and whether the teacher passes its bars.

    Gains in dB by band or class name; null: other training crops against these.
    """

    gain_db: dict[str, float]
    gain_db_held_out: dict[str, float]
    gain_db_null: dict[str, float]
    hf_gain_by_class: dict[str, float]
    hf_gain_class_median: float | None
    hf_gain_by_class_held_out: dict[str, float]
    fd_wavelet: FeatureDistance
    fd_wavelet_held_out: FeatureDistance
    hf_kurtosis_ratio: Interval
    bars: dict[str, bool]


@dataclass(frozen=True)
class TeacherOrigin(Origin):
    """Command and configuration of a judgement."""

    config: TeacherReportConfig


@dataclass(frozen=True)
class Quality:
    """All that quality.json holds."""

    judgement: Judgement = field(metadata=FLAT)
    nearest_training_crop: dict[str, dict[str, NearestCrop]]  # by set and class
    n: int
    evaluations: int
    network: str  # hash of the teacher's weights
    data_hash: str
    provenance: Provenance


def judge(measurements: Measurements, teacher: str) -> Judgement:
    """The teacher's gains against real crops, the bars, and the null: held-out crops against training crops."""
    ours, held_out, null = (against_real(measurements, name) for name in (teacher, "held-out", "real, again"))
    gains = band_gains(ours)
    bands_pass = all(abs(gains[band]) <= BAND_BAR_DB for band in BARRED_BANDS)
    return Judgement(
        gain_db=gains,
        gain_db_held_out=band_gains(held_out),
        gain_db_null=band_gains(null),
        hf_gain_by_class=by_class_name(ours),
        hf_gain_class_median=ours.hf_gain_class_median,
        hf_gain_by_class_held_out=by_class_name(held_out),
        fd_wavelet=ours.distances["fd_wavelet"],
        fd_wavelet_held_out=held_out.distances["fd_wavelet"],
        hf_kurtosis_ratio=ours.hf_kurtosis_ratio,
        bars={
            f"B1-B4 within {BAND_BAR_DB} dB": bands_pass,
            f"HF within {HF_BAR_DB} dB": abs(gains["HF"]) <= HF_BAR_DB,
        },
    )


def against_real(measurements: Measurements, name: str) -> Comparison:
    """What a set is against the training crops. ValueError where it was not compared with them."""
    comparison = measurements.row(name).against.real
    if comparison is None:
        raise ValueError(f"{name} was not compared with real crops")
    return comparison


def band_gains(against: Comparison) -> dict[str, float]:
    """In dB by band, rounded; a band without a bin, B0 at 32 px, is left out."""
    gains = {band: interval.value for band, interval in against.gain_db.items()}
    return {band: round(gain, 3) for band, gain in gains.items() if math.isfinite(gain)}


def by_class_name(against: Comparison) -> dict[str, float]:
    return {NAMES[label]: gain for label, gain in against.hf_gain_by_class.items()}


def judgeable(path: str, saved: Saved, network: Denoiser) -> None:
    """A ConfigError where it is no teacher of the seven photographs' pixels."""
    shape, message = network.config, f"path = {path}: "
    if saved.card.rungs:
        message += f"a student of {len(saved.card.rungs)} steps, whose ODE says nothing; compare it by eval.report"
    elif saved.codec.get("codec"):
        message += "it makes latents; this command judges teachers of pixels"
    elif (shape.in_channels, shape.num_classes) != (3, len(NAMES)):
        message += f"{shape.in_channels} channels and {shape.num_classes} classes; this command judges teachers of"
        message += f" photos, with 3 and {len(NAMES)}"
    elif shape.input_size > MOST_PHOTOS:
        message += f"images of {shape.input_size} px, of which photos has no held-out crops: they go up to"
        message += f" {MOST_PHOTOS}"
    elif saved.card.label_names not in ((), NAMES):
        message += f"its classes are {', '.join(saved.card.label_names)}; this command judges teachers of photos"
    else:
        return
    raise config.ConfigError(message)


@dataclass(frozen=True)
class TeacherSets:
    """A teacher's samples beside training crops, other training crops as their null, and held-out crops."""

    teacher: ImageSet
    real: ImageSet
    null: ImageSet
    held_out: ImageSet


def sample_sets(cfg: TeacherReportConfig, saved: Saved, network: Denoiser, data: Photos) -> TeacherSets:
    """Row i of every set is of the same class."""
    bench = Bench.of(cfg, network, data.device)
    facts = {"teacher": saved.digest, "guidance": 1.0, "solver": asdict(cfg.ode)}
    generator = ode_generator(velocity_of(network, saved.card.prediction), cfg.ode)
    made = bench.cached(facts, generator, "teacher")
    real, null = real_sets(bench, data)
    samples = sample_range(0, cfg.n, data.device)
    labels = balanced_labels(samples, len(NAMES))
    held_out = Photos(network.shape[-1], data.device, held_out=True)
    crops = held_out.crops(labels, Draws(cfg.seed, "held_out", 0, samples)).cpu()
    return TeacherSets(
        made.as_set("teacher", "teacher", paired=False),
        real,
        null,
        ImageSet("held-out", crops, labels.cpu(), "real", paired=False),
    )


def judge_teacher(cfg: TeacherReportConfig) -> None:
    """Sample, measure, judge; write quality.json and a grid, print the judgement."""
    began = time.monotonic()
    device = chosen_device(cfg.cpu)
    saved, network = read_card(cfg.path), read_network(Path(cfg.path)).to(device)
    judgeable(cfg.path, saved, network)
    out, data = make_folder(cfg.out), Photos(network.shape[-1], device)
    sets = sample_sets(cfg, saved, network, data)
    compared = Compared(
        [sets.null, sets.held_out], sets.teacher, sets.real, set(Photos.colour_labels), dict(enumerate(NAMES))
    )
    judgement = judge(measure(compared, cfg.seed), sets.teacher.name)
    read = {"teacher": sets.teacher, "held-out": sets.held_out, "training": sets.null}
    origin = TeacherOrigin(command_line("eval.teacher", config.differences(TeacherReportConfig(), cfg)), cfg)
    quality = Quality(
        judgement,
        memorisation(read, data, cfg.neighbours, cfg.seed),
        n=cfg.n,
        evaluations=cfg.ode.evaluations,
        network=saved.digest,
        data_hash=data_hash(),
        provenance=provenance(device, time.monotonic() - began, origin),
    )
    write_atomic(out / "quality.json", json.dumps(jsonable(quality), indent=1))
    columns = network.num_conditions
    pictures = torch.cat([one.first(GRID_ROWS * columns) for one in (sets.teacher, sets.real)])
    write_atomic(out / "grid.png", png_bytes(tile(pictures, columns=columns)))
    print_judgement(quality)
    print(f"written: {out / 'quality.json'}, {out / 'grid.png'} (samples above, crops below)")


def print_judgement(quality: Quality) -> None:
    """Gains, distances to training crops and bars, for a terminal."""
    judged = quality.judgement
    for title, gains in (
        ("teacher against training crops", judged.gain_db),
        ("held-out crops against training crops", judged.gain_db_held_out),
        ("training crops against training crops", judged.gain_db_null),
    ):
        print(f"{title:38}", "  ".join(f"{band} {gain:+.2f} dB" for band, gain in gains.items()))
    by_class = "  ".join(f"{name} {gain:+.2f}" for name, gain in judged.hf_gain_by_class.items())
    print(f"HF gain by class, dB: {by_class}; median {judged.hf_gain_class_median:+.2f}")
    for name, classes in quality.nearest_training_crop.items():
        distances = "  ".join(f"{c} {distance.median:.1f}" for c, distance in classes.items())
        print(f"{name:9} to the nearest training crop, levels of 255: {distances}")
    for bar, passed in judged.bars.items():
        print(f"{bar}: {'yes' if passed else 'NO'}")


def main(argv: Sequence[str] | None = None) -> None:
    config.run_job(TeacherReportConfig, judge_teacher, argv, description=__doc__ or "")


if __name__ == "__main__":
    main()
