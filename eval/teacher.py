"""Is a teacher good enough to distil? python -m eval.teacher path=teachers/photos32 out=out/teacher

Its samples at guidance 1 against fresh crops of the training tiles: band gains with their bars, and whether they are
copies, by the distance to the nearest training crop beside that of held-out crops.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dmd_dar import config
from dmd_dar.atomic import make_folder, write_atomic
from dmd_dar.data.config import MOST_PHOTOS
from dmd_dar.data.images import png_bytes, tile
from dmd_dar.data.photos import NAMES, Photos, data_hash
from dmd_dar.draws import Draws, sample_range
from dmd_dar.keys import key
from dmd_dar.methods.generate import ode_generator
from dmd_dar.models.denoiser import velocity_of
from dmd_dar.models.saved import Denoiser, Saved, read_card, read_network

from .measure.pair import Compared, ImageSet, jsonable, measure
from .measure.provenance import command_line, provenance
from .samples.real import real_sets
from .samples.sampling import Bench

BAND_BAR_DB = 1.5
HF_BAR_DB = 1.0
BARRED_BANDS = ("B1", "B2", "B3", "B4")
GRID_ROWS = 8


@dataclass(frozen=True)
class TeacherReportConfig:
    """python -m eval.teacher"""

    path: str = key("teachers/photos32", "folder of a teacher of the seven photographs", path=True)
    out: str = key("out/teacher", "folder for quality.json and grid.png")
    n: int = key(2048, "samples, classes in turn", least=64)
    solver_steps: int = key(32, "Heun steps, two evaluations each", unit="steps", least=1)
    neighbours: int = key(4096, "training crops of each class among which the nearest is looked for", least=1)
    seed: int = key(0, "of the noise, the crops and the bootstrap", least=0)
    batch_size: int = key(64, "images at a time; changes no image beyond rounding", least=1)
    cache: str = key("out/cache", "folder in which the teacher's images are kept and found again")
    cpu: bool = key(False, "compute on the CPU although a GPU is there")


def nearest_distance(images: Tensor, bank: Tensor) -> Tensor:
    """(N,) root mean squared difference, in 8-bit levels, of each uint8 image to its nearest in `bank`."""
    x, y = images.flatten(1).float(), bank.flatten(1).float()
    return torch.cdist(x, y).amin(dim=1) / x.shape[1] ** 0.5


def memorisation(sets: dict[str, ImageSet], data: Photos, neighbours: int, seed: int) -> dict[str, Any]:
    """For each set and class, the median distance to the nearest of `neighbours` training crops of that class."""
    result: dict[str, Any] = {name: {} for name in sets}
    for label, name in enumerate(NAMES):
        samples = sample_range(0, neighbours, data.device)
        bank = data.crops(torch.full_like(samples, label), Draws(seed, f"bank_{name}", 0, samples)).cpu()
        for set_name, one in sets.items():
            distances = nearest_distance(one.images[one.labels == label], bank)
            result[set_name][name] = {"median": float(np.median(distances)), "least": distances.min().item()}
    return result


def judge(result: dict[str, Any], teacher: str) -> dict[str, Any]:
    """The teacher's gains against real crops, the bars, and the null: held-out crops against training crops."""
    rows = {row["name"]: row["against"]["real"] for row in result["sets"]}

    def gains(name: str) -> dict[str, float]:
        """A band without a bin, B0 at 32 px, is left out."""
        values = {band: interval["value"] for band, interval in rows[name]["gain_db"].items()}
        return {band: round(value, 3) for band, value in values.items() if value is not None}

    def named(by_class: dict[str, float]) -> dict[str, float]:
        return {NAMES[int(label)]: gain for label, gain in by_class.items()}

    ours = gains(teacher)
    bands_pass = all(abs(ours[band]) <= BAND_BAR_DB for band in BARRED_BANDS)
    return {
        "gain_db": ours,
        "gain_db_held_out": gains("held-out"),
        "gain_db_null": gains("real, again"),
        "hf_gain_by_class": named(rows[teacher]["hf_gain_by_class"]),
        "hf_gain_class_median": rows[teacher]["hf_gain_class_median"],
        "hf_gain_by_class_held_out": named(rows["held-out"]["hf_gain_by_class"]),
        "fd_wavelet": rows[teacher]["fd_wavelet"],
        "fd_wavelet_held_out": rows["held-out"]["fd_wavelet"],
        "hf_kurtosis_ratio": rows[teacher]["hf_kurtosis_ratio"],
        "bars": {
            f"B1-B4 within {BAND_BAR_DB} dB": bands_pass,
            f"HF within {HF_BAR_DB} dB": abs(ours["HF"]) <= HF_BAR_DB,
        },
    }


def judgeable(path: str, said: Saved, network: Denoiser) -> None:
    """A ConfigError where it is no teacher of the seven photographs' pixels."""
    shape, told = network.config, f"path = {path}: "
    if said.card.rungs:
        told += f"a student of {len(said.card.rungs)} steps, whose ODE says nothing; compare it by eval.report"
    elif said.codec.get("codec"):
        told += "it makes latents; this command judges teachers of pixels"
    elif (shape.in_channels, shape.num_classes) != (3, len(NAMES)):
        told += f"{shape.in_channels} channels and {shape.num_classes} classes; this command judges teachers of photos,"
        told += f" with 3 and {len(NAMES)}"
    elif shape.input_size > MOST_PHOTOS:
        told += f"images of {shape.input_size} px, of which photos has no held-out crops: they go up to {MOST_PHOTOS}"
    elif said.card.label_names not in ((), NAMES):
        told += f"its classes are {', '.join(said.card.label_names)}; this command judges teachers of photos"
    else:
        return
    raise config.ConfigError(told)


def judge_teacher(cfg: TeacherReportConfig) -> None:
    began = time.monotonic()
    device = torch.device("cuda" if torch.cuda.is_available() and not cfg.cpu else "cpu")
    said = read_card(cfg.path)
    card, network = said.card, read_network(Path(cfg.path)).to(device)
    judgeable(cfg.path, said, network)
    shape = network.config
    out = make_folder(cfg.out)
    bench = Bench.of(cfg, network, device)
    facts = {"teacher": said.digest, "guidance": 1.0, "heun_steps": cfg.solver_steps}
    made = bench.cached(facts, ode_generator(velocity_of(network, card.prediction), cfg.solver_steps), "teacher")
    images, teacher = made.images, made.as_set("teacher", "teacher", paired=False)
    data = Photos(shape.input_size, device)
    real, null = real_sets(bench, data)
    draws = Draws(cfg.seed, "held_out", 0, sample_range(0, cfg.n, device))
    crops = Photos(shape.input_size, device, held_out=True).crops(real.labels.to(device), draws).cpu()
    held_out = ImageSet("held-out", crops, real.labels, "real", paired=False)
    compared = Compared([null, held_out], teacher, real, set(Photos.colour_labels), dict(enumerate(NAMES)))
    result = jsonable(measure(compared, cfg.seed))
    judged = judge(result, "teacher")
    judged["nearest_training_crop"] = memorisation(
        {"teacher": teacher, "held-out": held_out, "training": null}, data, cfg.neighbours, cfg.seed
    )
    judged |= {"n": cfg.n, "evaluations": 2 * cfg.solver_steps, "network": said.digest, "data_hash": data_hash()}
    origin = {
        "command": command_line("eval.teacher", config.differences(TeacherReportConfig(), cfg)),
        "config": asdict(cfg),
    }
    judged["provenance"] = jsonable(provenance(device, time.monotonic() - began, **origin))
    write_atomic(out / "quality.json", json.dumps(judged, indent=1))
    shown = GRID_ROWS * shape.num_classes
    pictures = torch.cat([images[:shown], real.images[:shown]])
    write_atomic(out / "grid.png", png_bytes(tile(pictures, columns=shape.num_classes)))
    print_judgement(judged)
    print(f"written: {out / 'quality.json'}, {out / 'grid.png'} (samples above, crops below)")


def print_judgement(judged: dict[str, Any]) -> None:
    for title, name in (
        ("teacher against training crops", "gain_db"),
        ("held-out crops against training crops", "gain_db_held_out"),
        ("training crops against training crops", "gain_db_null"),
    ):
        print(f"{title:38}", "  ".join(f"{band} {gain:+.2f} dB" for band, gain in judged[name].items()))
    by_class = "  ".join(f"{name} {gain:+.2f}" for name, gain in judged["hf_gain_by_class"].items())
    print(f"HF gain by class, dB: {by_class}; median {judged['hf_gain_class_median']:+.2f}")
    for name, classes in judged["nearest_training_crop"].items():
        distances = "  ".join(f"{c} {distance['median']:.1f}" for c, distance in classes.items())
        print(f"{name:9} to the nearest training crop, levels of 255: {distances}")
    for bar, passed in judged["bars"].items():
        print(f"{bar}: {'yes' if passed else 'NO'}")


def main(argv: Sequence[str] | None = None) -> None:
    config.run_job(TeacherReportConfig, judge_teacher, argv, description=__doc__ or "")


if __name__ == "__main__":
    main()
