"""A trained network on disk: a folder with model.safetensors and model.json, enough to sample from it elsewhere."""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from dmd_dar.atomic import write_atomic
from dmd_dar.errors import DamagedFileError, MissingWeightsError
from dmd_dar.flow import Sampler
from dmd_dar.models.denoiser import Prediction
from dmd_dar.models.sit import SiT, SiTConfig
from dmd_dar.routing.layout import RoutingConfig

FORMAT = 1


@dataclass(frozen=True)
class ModelCard:
    """What model.json says beside the shape: how to use the network and where it comes from."""

    prediction: Prediction = "flow"
    rungs: tuple[float, ...] = ()  # of a few-step student; empty for a teacher
    label_names: tuple[str, ...] = ()
    origin: dict[str, Any] = field(default_factory=dict)  # free: data hash, command, step, teacher hash
    sampler: Sampler = "stochastic"  # that a few-step student was trained with

    def __post_init__(self) -> None:
        for name, value, choices in (("prediction", self.prediction, Prediction), ("sampler", self.sampler, Sampler)):
            if value not in get_args(choices):
                raise ValueError(f"{name} must be one of {get_args(choices)}, got {value!r}")


def save_network(folder: Path, network: SiT, card: ModelCard) -> None:
    """Write both files atomically; the weights first, so that a new model.json never meets old weights."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = save({name: value.contiguous().cpu() for name, value in network.state_dict().items()})
    text = json.dumps({"format": FORMAT, "model": asdict(network.config), **asdict(card)}, indent=1)
    write_atomic(folder / "model.safetensors", weights)
    write_atomic(folder / "model.json", text)


def _config(values: dict[str, Any]) -> SiTConfig:
    return SiTConfig(**{**values, "routing": RoutingConfig(**values["routing"])})


def load_network(folder: str | Path, device: torch.device | str = "cpu") -> tuple[SiT, ModelCard]:
    """The network in evaluation mode, frozen, and its card.

    Raises MissingWeightsError naming the missing file, DamagedFileError naming the file that is of another format or
    form, damaged, or does not fit the other.
    """
    folder = Path(folder)
    for name in ("model.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise MissingWeightsError(f"{folder / name} is missing: give a folder that a run of this project saved")
    try:
        described = json.loads((folder / "model.json").read_text())
        if described.pop("format") != FORMAT:
            raise ValueError(f"its format is not {FORMAT}")
        config = _config(described.pop("model"))
        card = ModelCard(**{k: tuple(v) if isinstance(v, list) else v for k, v in described.items()})
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise DamagedFileError(f"{folder / 'model.json'} describes no network of this project: {error}") from error
    network = SiT(config)
    try:
        network.load_state_dict(load_file(folder / "model.safetensors"))
    except (RuntimeError, SafetensorError) as error:
        fault = f"{folder / 'model.safetensors'} does not hold the weights of model.json"
        raise DamagedFileError(f"{fault}: {error}") from error
    return network.to(device).eval().requires_grad_(False), card


def network_hash(folder: str | Path) -> str:
    """SHA-256, hexadecimal, of all that decides what the network computes: weights, shape, routing, prediction."""
    described = json.loads((Path(folder) / "model.json").read_text())
    meaning = json.dumps([described["model"], described["prediction"]], sort_keys=True)
    return hashlib.sha256((Path(folder) / "model.safetensors").read_bytes() + meaning.encode()).hexdigest()
