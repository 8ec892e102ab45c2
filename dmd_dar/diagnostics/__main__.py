"""What a network does inside: python -m dmd_dar.diagnostics run=RUN [compare=RUN2] out=DIR"""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from dmd_dar import config
from dmd_dar.atomic import make_folder, write_atomic
from dmd_dar.data.photos import NAMES, Photos, data_hash
from dmd_dar.diagnostics.figures import figures
from dmd_dar.diagnostics.measure import measure, not_finite, rounded
from dmd_dar.diagnostics.probe import timestep_probe
from dmd_dar.diagnostics.states import places_of
from dmd_dar.diagnostics.summary import lines
from dmd_dar.draws import Draws, sample_range
from dmd_dar.errors import DivergedError
from dmd_dar.guidance import Velocity
from dmd_dar.keys import key
from dmd_dar.models.denoiser import velocity_of
from dmd_dar.models.saved import load_network, network_hash
from dmd_dar.models.sit import SiT
from dmd_dar.routing.history import Observer

SCHEMA = 1


@dataclass(frozen=True)
class DiagnosticsConfig:
    """python -m dmd_dar.diagnostics"""

    run: str = key("", "run folder of pretrain or distill, or the folder of a network", path=True)
    compare: str = key("", "a second one, drawn on the same axes", path=True)
    out: str = key("out/diagnostics", "folder for diagnostics.json and the figures")
    samples: int = key(256, "real crops, each noised to all of `times`", least=2)
    times: tuple[float, ...] = key((0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0), "rising; 0 data, 1 noise", least=0, most=1)
    probe_pairs: int = key(256, "pairs (x0, eps) behind the probe of t, half of them to judge it", least=8)
    probe_times: int = key(4, "uniform times for each pair", least=1)
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
    for folder in (Path(run), Path(run) / "student"):
        if (folder / "model.json").is_file():
            return folder
    raise config.ConfigError(
        f"{name} = {run}: holds no model.json and no student/model.json; name a finished run or a network's folder"
    )


def name_of(run: str, network: SiT) -> str:
    routing = network.config.routing
    kind = "residual" if network.dar is None else f"DAR {routing.query}, S = {routing.chunk_size}, {routing.scale}"
    return f"{'/'.join(Path(run).parts[-2:])} ({kind})"


def diagnose_one(cfg: DiagnosticsConfig, run: str, name: str, device: torch.device, tick: Callable) -> dict[str, Any]:
    """The card and the facts of one network."""
    folder = network_folder(run, name)
    network, card = load_network(folder, device)
    shape = network.config
    if (shape.in_channels, shape.num_classes) != (3, len(NAMES)):
        raise config.ConfigError(
            f"{name} = {run}: {shape.in_channels} channels and {shape.num_classes} classes; this command feeds photos,"
            f" with 3 and {len(NAMES)}"
        )
    if card.label_names not in ((), NAMES):
        raise config.ConfigError(
            f"{name} = {run}: its classes are {', '.join(card.label_names)}; this command feeds photos"
        )
    data = Photos(shape.input_size, device)
    draws = Draws(cfg.seed, "diagnostics", 0, sample_range(0, cfg.samples, device))
    places = places_of(network)

    def observed(observe: Observer | None) -> Velocity:
        return velocity_of(partial(network, observe=observe), card.prediction)

    facts = measure(observed, places, shape.routing, *data.batch(draws), draws, cfg.times, cfg.batch_size, tick)
    wrong = next(not_finite(facts), None)
    if wrong is not None:
        raise DivergedError(f"{name} = {run}: {wrong} is not finite; its weights have diverged, name another network")
    draws = Draws(cfg.seed, "diagnostics_probe", 0, sample_range(0, cfg.probe_pairs, device))
    facts["probe"] = timestep_probe(observed(None), places, *data.batch(draws), draws, cfg.probe_times, cfg.batch_size)
    return {
        "name": name_of(run, network),
        "kind": "residual" if network.dar is None else "DAR",
        "network": network_hash(folder),
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "model": asdict(shape),
        "card": asdict(card),
        **rounded(facts),
    }


def diagnose(cfg: DiagnosticsConfig) -> None:
    """Measure, write diagnostics.json and the figures, and say what was found."""
    device = torch.device("cuda" if torch.cuda.is_available() and not cfg.cpu else "cpu")
    runs = {name: run for name in ("run", "compare") if (run := getattr(cfg, name))}
    for name, run in runs.items():
        network_folder(run, name)
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
        "data": data_hash(),
        "models": models,
    }
    write_atomic(out / "diagnostics.json", json.dumps(result, allow_nan=False))
    for name, png in figures(result).items():
        write_atomic(out / f"{name}.png", png)
    print("\n".join(lines(result)))
    print(f"written: {out / 'diagnostics.json'}, symptoms.png, mixing.png, routers.png")


if __name__ == "__main__":
    config.run_job(DiagnosticsConfig, diagnose, sys.argv[1:], description=__doc__ or "")
