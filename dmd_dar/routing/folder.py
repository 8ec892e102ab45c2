"""A routed transformer on disk: backbone and routers in one safetensors file, their form in dar.json.

diffusers would load the backbone alone and drop the routers in silence. So its own loaders must refuse the folder:
the weights bear a name that they do not look for, and config.json asks for a quantisation that they do not have.
"""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from dmd_dar.atomic import make_folder, sync_folder, write_atomic
from dmd_dar.errors import DamagedFileError, MissingWeightsError, UserError
from dmd_dar.routing.layout import RoutingConfig

FORMAT = 1
WEIGHTS, FORM = "dar_weights.safetensors", "dar.json"
BARRIER = {"quant_method": "dar: it has routers, load it with dmd_dar.routing.load_routed"}


@dataclass(frozen=True)
class Saved:
    """What a folder holds: diffusers' configuration (class name included), the routing, and all weights by name."""

    backbone: dict[str, Any]
    routing: RoutingConfig
    granularity: str
    buffer_dtypes: dict[str, str]  # of the buffers that are computed, not saved
    weights: dict[str, Tensor]


def save_routed(
    model: Any,
    save_directory: str | os.PathLike[str],
    is_main_process: bool = True,
    save_function: None = None,
    safe_serialization: bool = True,
    variant: str | None = None,
    max_shard_size: int | str | None = None,
    push_to_hub: bool = False,
) -> None:
    """`save_pretrained` of a routed transformer: weights, dar.json and config.json, each written atomically.

    The arguments are diffusers' own; all weights go into one file whatever `max_shard_size` says. Raises UserError
    for what this form does not offer, for a model with adapters, and for a folder that holds a plain model's weights.
    """
    if not safe_serialization or variant is not None or push_to_hub or save_function is not None:
        raise UserError("a routed transformer is saved locally, as safetensors, without variant or save_function")
    weights = {name: value.detach().contiguous() for name, value in model.state_dict().items()}
    if any(type(value).__name__ == "DTensor" for value in weights.values()):
        raise UserError("the model is sharded: load its gathered state dict into one that is not, and save that")
    if any(".base_layer." in name for name in weights):
        raise UserError("the model has adapters: fuse or unload them before save_pretrained, save them on their own")
    if not is_main_process:
        return
    folder = make_folder(save_directory)
    if plain := sorted(path.name for path in folder.glob("diffusion_pytorch_model*")):
        raise UserError(f"{folder} holds the weights of a plain model, {plain[0]}: save to another folder")
    backbone, routing = json.loads(model.to_json_string()), asdict(model.dar.config)
    form = {"format": FORMAT, "backbone": backbone, "routing": routing, "granularity": model.dar.plan.granularity}
    computed = {name: value for name, value in model.named_buffers() if name not in weights}
    form["buffer_dtypes"] = {name: str(value.dtype).removeprefix("torch.") for name, value in computed.items()}
    half = folder / f".{WEIGHTS}.tmp"
    save_file(weights, half, metadata={"format": "pt", "routing": json.dumps(routing)})
    os.replace(half, folder / WEIGHTS)
    sync_folder(folder)
    write_atomic(folder / FORM, json.dumps(form, indent=1))
    write_atomic(folder / "config.json", json.dumps({**backbone, "quantization_config": BARRIER}, indent=1))


def read_folder(folder: str | os.PathLike[str]) -> Saved:
    """What `save_routed` wrote. Raises MissingWeightsError or DamagedFileError, naming the file and the fault."""
    folder = Path(folder)
    for name in (FORM, WEIGHTS):
        if not (folder / name).is_file():
            raise MissingWeightsError(f"{folder / name} is missing: give a folder that a routed model was saved to")
    try:
        form = json.loads((folder / FORM).read_text())
        if form["format"] != FORMAT:
            raise ValueError(f"its format is {form['format']!r}, not {FORMAT}")
        saved = {"routing": RoutingConfig(**form["routing"]), "granularity": form["granularity"]}
        saved |= {"backbone": dict(form["backbone"]), "buffer_dtypes": dict(form["buffer_dtypes"])}
        str(saved["backbone"]["_class_name"])
        if not all(isinstance(getattr(torch, name, None), torch.dtype) for name in saved["buffer_dtypes"].values()):
            raise ValueError(f"buffer_dtypes names something else than a dtype: {saved['buffer_dtypes']}")
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise DamagedFileError(f"{folder / FORM} describes no routed transformer: {error!r}") from error
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            trained = RoutingConfig(**json.loads((file.metadata() or {})["routing"]))
        weights = load_file(folder / WEIGHTS)
    except (KeyError, TypeError, ValueError, SafetensorError) as error:
        raise DamagedFileError(f"{folder / WEIGHTS} is not a routed transformer's: {error!r}") from error
    if trained != saved["routing"]:
        raise DamagedFileError(f"{folder}: {FORM} says {saved['routing']}, but the weights were saved with {trained}")
    return Saved(**saved, weights=weights)
