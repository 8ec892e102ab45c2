"""What a network does inside: python -m dmd_dar.diagnostics run=RUN [compare=RUN2] out=DIR"""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from dmd_dar import config
from dmd_dar.atomic import make_folder, write_atomic
from dmd_dar.data.config import DataConfig
from dmd_dar.data.latents import Latents
from dmd_dar.data.sources import open_data
from dmd_dar.device import chosen_device
from dmd_dar.diagnostics.figures import figures
from dmd_dar.diagnostics.measure import measure, not_finite, rounded
from dmd_dar.diagnostics.probe import timestep_probe
from dmd_dar.diagnostics.states import Inputs, places_of
from dmd_dar.diagnostics.summary import lines
from dmd_dar.draws import Draws, sample_range
from dmd_dar.errors import DivergedError, UserError
from dmd_dar.guidance import Velocity
from dmd_dar.keys import key
from dmd_dar.models.codecs import sample_latents
from dmd_dar.models.denoiser import velocity_of
from dmd_dar.models.sit import SiT
from dmd_dar.models.teachers import Denoiser, Teacher, TeacherConfig, codec_of, load_teacher
from dmd_dar.routing.history import Observer

SCHEMA = 2  # 2: mixing.unit
NETWORKS = ("model.json", "denoiser.json", "transformer")  # what a network's folder holds, one of them


@dataclass(frozen=True)
class DiagnosticsConfig:
    """python -m dmd_dar.diagnostics"""

    run: str = key("", "run folder of pretrain or distill, or a network: folder, diffusers pipeline, .pt", path=True)
    compare: str = key("", "a second one, drawn on the same axes", path=True)
    out: str = key("out/diagnostics", "folder for diagnostics.json and the figures")
    samples: int = key(256, "real crops, each noised to all of `times`", least=2)
    times: tuple[float, ...] = key((0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0), "rising; 0 data, 1 noise", least=0, most=1)
    probe_pairs: int = key(256, "pairs (x0, eps) behind the probe of t, half of them to judge it", least=8)
    probe_times: int = key(4, "uniform times for each pair", least=1)
    data: DataConfig = key(factory=DataConfig)
    seed: int = key(0, "of the crops and the noise", least=0)
    batch_size: int = key(64, "crops at a time; changes no number beyond rounding", least=1)
    cpu: bool = key(False, "compute on the CPU although a GPU is there")

    def __post_init__(self) -> None:
        if not self.run:
            raise ValueError("run is empty: name a run folder or the folder of a network, run=teachers/photos32")
        if not self.times or any(a >= b for a, b in zip(self.times, self.times[1:], strict=False)):
            raise ValueError(f"times must rise strictly and hold at least one, got {list(self.times)}")


def network_folder(run: str, name: str) -> Path:
    """`run` itself or RUN/student; a ConfigError that names the key if neither holds a network."""
    for place in (Path(run), Path(run) / "student"):
        if place.is_file() or any((place / one).exists() for one in NETWORKS):
            return place
    raise config.ConfigError(
        f"{name} = {run}: holds no network and no student/ with one; name a finished run or a network's folder"
    )


def data_of(cfg: DiagnosticsConfig, on_command_line: bool = False) -> DataConfig:
    """The data that are set or, where nothing is, those that `run` learned from, if its folder says so.

    on_command_line: whether a key of them is there, be it at its default.
    """
    written = Path(cfg.run) / "config.yaml"
    if not on_command_line and cfg.data == DataConfig() and written.is_file():
        values = config.read_saved(written)
        if "data" in values:
            return config.from_dict(DataConfig, values["data"], where=str(written))
    return cfg.data


def name_of(run: str, network: Denoiser) -> str:
    routing = network.routing
    whole = not isinstance(network, SiT) and network.dar is not None and network.dar.plan.granularity == "block"
    form = f"DAR{' of whole blocks' if whole else ''} {routing.query}, S = {routing.chunk_size}, {routing.scale}"
    kind = "residual" if network.dar is None else form
    return f"{'/'.join(Path(run).parts[-2:])} ({kind})"


@dataclass(frozen=True)
class Subject:
    """One network to look into, and what it is fed: x0(draws) gives x0 (N, C, S, S) in its own space, and cond (N,)."""

    saved: Teacher
    x0: Callable[[Draws], tuple[Tensor, Tensor]]
    data_hash: str


def open_subject(cfg: DiagnosticsConfig, run: str, name: str, device: torch.device) -> Subject:
    """The network and the data, through its VAE where it has one; a ConfigError where they do not fit each other."""
    try:
        saved = load_teacher(TeacherConfig(str(network_folder(run, name))), device)
        codec = codec_of(saved, device)
    except config.ConfigError:
        raise
    except UserError as error:
        raise config.ConfigError(f"{name} = {run}: {error}") from error
    network, wanted = saved.network, cfg.data
    channels, size, _ = network.shape
    side = size * (1 if codec is None else codec.factor)
    data = open_data(replace(wanted, size=side) if wanted.name == "photos" else wanted, device)
    data_channels = 3 if codec is not None and not isinstance(data, Latents) else channels
    fits = (data_channels, size if isinstance(data, Latents) else side) == (data.shape[0], data.shape[-1])
    if not fits or network.num_conditions != data.num_classes:
        raise config.ConfigError(
            f"{name} = {run}: {channels} channels of {size} x {size} and {network.num_conditions} classes, but"
            f" data.name = {wanted.name} gives {' x '.join(map(str, data.shape))} and {data.num_classes} classes;"
            " set data.name and its keys"
        )
    names = tuple(saved.label_names)
    if names and data.label_names and names != tuple(data.label_names):
        raise config.ConfigError(
            f"{name} = {run}: its classes are {', '.join(names[:9])}, those of data.name = {wanted.name} others; set"
            " data.name and its keys"
        )

    def x0(draws: Draws) -> tuple[Tensor, Tensor]:
        images, cond = data.batch(draws)
        if codec is None or isinstance(data, Latents):
            return images, cond
        mean, std = codec.encode(images)
        return sample_latents(mean, std, draws.normal("latent", *mean.shape[1:])), cond

    return Subject(saved, x0, data.hash)


def diagnose_one(cfg: DiagnosticsConfig, run: str, name: str, device: torch.device, tick: Callable) -> dict[str, Any]:
    """The card and the facts of one network."""
    subject = open_subject(cfg, run, name, device)
    saved, network = subject.saved, subject.saved.network
    try:
        places = places_of(network)
    except (UserError, ValueError) as error:
        raise config.ConfigError(f"{name} = {run}: {error}") from error

    def observed(observe: Observer | None) -> Velocity:
        return velocity_of(partial(network, observe=observe), saved.prediction)

    draws = Draws(cfg.seed, "diagnostics", 0, sample_range(0, cfg.samples, device))
    inputs = Inputs(*subject.x0(draws), draws, cfg.batch_size)
    facts = measure(observed, places, network.routing, inputs, cfg.times, tick)
    wrong = next(not_finite(facts), None)
    if wrong is not None:
        raise DivergedError(f"{name} = {run}: {wrong} is not finite; its weights have diverged, name another network")
    draws = Draws(cfg.seed, "diagnostics_probe", 0, sample_range(0, cfg.probe_pairs, device))
    pairs = Inputs(*subject.x0(draws), draws, cfg.batch_size)
    facts["probe"] = timestep_probe(observed(None), places, pairs, cfg.probe_times)
    meaning = saved.prediction if isinstance(saved.prediction, str) else asdict(saved.prediction)
    card = {"prediction": meaning, "rungs": saved.rungs, "label_names": saved.label_names, "origin": saved.origin}
    return {
        "name": name_of(run, network),
        "kind": "residual" if network.dar is None else "DAR",
        "network": saved.digest,
        "data": subject.data_hash,
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "model": asdict(network.config),
        "card": card,
        **rounded(facts),
    }


def diagnose(cfg: DiagnosticsConfig, data_given: bool = False) -> None:
    """Measure, write diagnostics.json and the figures, and say what was found; `data_given` as in `data_of`."""
    device = chosen_device(cfg.cpu)
    runs = {name: run for name in ("run", "compare") if (run := getattr(cfg, name))}
    for name, run in runs.items():
        network_folder(run, name)
    cfg = replace(cfg, data=data_of(cfg, data_given))
    out = make_folder(cfg.out)
    batches = -(-cfg.samples // cfg.batch_size) * len(cfg.times) * len(runs)
    with tqdm(total=batches, desc="batches", disable=None) as bar:
        models = [diagnose_one(cfg, run, name, device, bar.update) for name, run in runs.items()]
    settings = {name: getattr(cfg, name) for name in ("seed", "samples", "probe_pairs", "probe_times")}
    result = {
        "schema": SCHEMA,
        "time": "t = 0 is data, t = 1 is noise",
        "times": list(cfg.times),
        "settings": settings,
        "data": models[0]["data"],
        "models": models,
    }
    write_atomic(out / "diagnostics.json", json.dumps(result, allow_nan=False))
    for name, png in figures(result).items():
        write_atomic(out / f"{name}.png", png)
    print("\n".join(lines(result)))
    print(f"written: {out / 'diagnostics.json'}, symptoms.png, mixing.png, routers.png")


def main(argv: Sequence[str] | None = None) -> None:
    words = sys.argv[1:] if argv is None else argv
    job = partial(diagnose, data_given=any(word.startswith("data.") for word in words))
    config.run_job(DiagnosticsConfig, job, words, description=__doc__ or "")
