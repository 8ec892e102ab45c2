"""A routed transformer on disk: backbone and routers in one safetensors file, their form in dar.json.

diffusers would load the backbone alone and drop the routers in silence. So its own loaders must refuse the folder:
the weights bear a name that they do not look for, and config.json asks for a quantisation that they do not have.
"""

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from dmd_dar.atomic import make_folder, write_atomic
from dmd_dar.errors import DamagedFileError, MissingWeightsError, UserError
from dmd_dar.routing.fused import unfused
from dmd_dar.routing.layout import RoutingConfig
from dmd_dar.routing.offload import keeper
from dmd_dar.routing.tensor_files import Entries, Stored, contents, write

FORMAT = 1
WEIGHTS, FORM, CONFIG = "dar_weights.safetensors", "dar.json", "config.json"
KEYS = {"format": int, "backbone": dict, "routing": dict, "granularity": str, "buffer_dtypes": dict}
SAVE_OPTIONS = {  # of diffusers' save_pretrained, with their defaults
    "save_function": None,  # diffusers does not call it either
    "safe_serialization": True,
    "variant": None,
    "max_shard_size": "10GB",
    "push_to_hub": False,
    "use_flashpack": False,
    **dict.fromkeys(("commit_message", "private", "create_pr", "token", "repo_id", "subfolder")),  # for push_to_hub
}
FIXED = {
    "safe_serialization": "saved as safetensors alone: leave safe_serialization out",
    "variant": "saved without a variant: leave it out, and cast the model before",
    "push_to_hub": "saved locally: save it without push_to_hub, then call model.push_to_hub(repo_id)",
    "use_flashpack": "saved as safetensors alone: leave use_flashpack out",
}
BARRIER = {"quant_method": "dar: it has routers, load it with dmd_dar.routing.load_routed"}


@dataclass(frozen=True)
class Saved:
    """What a folder holds: diffusers' configuration (class name included), the routing, and where its weights are."""

    backbone: dict[str, Any]
    routing: RoutingConfig
    granularity: str
    buffer_dtypes: dict[str, torch.dtype]  # of the buffers that are computed, not saved
    stored: dict[str, Stored]  # all weights by name, in their file


def save_routed(
    model: Any,
    save_directory: str | os.PathLike[str],
    is_main_process: bool = True,
    **options: Any,
) -> None:
    """`save_pretrained` of a routed transformer: weights, dar.json and config.json, each written atomically.

    The arguments are diffusers' own: `options` are SAVE_OPTIONS, by name. All weights go into one file, whatever
    `max_shard_size` says, and fused projections into the layers that they were made from. Raises UserError for what
    this form does not offer, for a model whose values an offloader keeps, for one with adapters, for one whose weights
    are not those of its class, which could not be loaded, and for a folder that holds a plain model's weights.
    """
    _check_options(options)
    if kept := keeper(model):
        raise UserError(f"save_pretrained: the model does not hold its values, {kept}")
    weights = unfused(model)
    if any(type(value).__name__ == "DTensor" for value in weights.values()):
        raise UserError("the model is sharded: load its gathered state dict into one that is not, and save that")
    if any(".base_layer." in name or ".modules_to_save." in name for name in weights):
        raise UserError("the model has adapters: fuse or unload them before save_pretrained, save them on their own")
    entries = {name: (value.dtype, tuple(value.shape)) for name, value in weights.items()}
    write_routed(model, save_directory, entries, weights.__getitem__, is_main_process)


def write_routed(
    model: Any,
    save_directory: str | os.PathLike[str],
    entries: Entries,
    value: Callable[[str], Tensor],
    is_main_process: bool = True,
) -> None:
    """The folder of a routed transformer with other weights than its own: value(name), in the form that `entries` says.

    Raises UserError where those are not the weights of its class, and for a folder that holds a plain model's.
    """
    backbone, routing = json.loads(model.to_json_string()), asdict(model.dar.config)
    _check_weights(type(model).__name__, backbone, {name: torch.Size(shape) for name, (_, shape) in entries.items()})
    if not is_main_process:
        return
    folder = make_folder(save_directory)
    if plain := sorted(path.name for path in folder.glob("diffusion_pytorch_model*")):
        raise UserError(f"{folder} holds the weights of a plain model, {plain[0]}: save to another folder")
    form = {"format": FORMAT, "backbone": backbone, "routing": routing, "granularity": model.dar.plan.granularity}
    buffers = computed_buffers(model)
    form["buffer_dtypes"] = {name: str(value.dtype).removeprefix("torch.") for name, value in buffers.items()}
    write(folder / WEIGHTS, entries, value, {"routing": json.dumps(routing)})
    write_atomic(folder / FORM, json.dumps(form, indent=1))
    write_atomic(folder / CONFIG, json.dumps({**backbone, "quantization_config": BARRIER}, indent=1))


def _check_options(options: dict[str, Any]) -> None:
    """Raises UserError for an option that is none of diffusers', or asks for another form than ours."""
    if unknown := sorted(options.keys() - SAVE_OPTIONS.keys()):
        raise UserError(f"save_pretrained of a routed transformer has no option {', '.join(unknown)}: leave it out")
    for name, remedy in FIXED.items():
        if (value := options.get(name, SAVE_OPTIONS[name])) != SAVE_OPTIONS[name]:
            raise UserError(f"{name}={value!r}: a routed transformer is {remedy}")


def _check_weights(name: str, backbone: dict[str, Any], shapes: dict[str, torch.Size]) -> None:
    """Raises UserError where `load_routed` would find that the weights are not those of the class."""
    model_class = class_of(name)
    if model_class is None:
        raise UserError(
            f"{name} is no class of diffusers', so load_routed could not make one: save model.state_dict(), and load it"
            " into a model that was attached in the same way"
        )
    with torch.device("meta"):
        own = {key: value.shape for key, value in model_class.from_config(backbone).state_dict().items()}
    found = {key: shape for key, shape in shapes.items() if not key.startswith("dar.")}
    if wrong := sorted(key for key in {*own, *found} if own.get(key) != found.get(key)):
        raise UserError(
            f"these weights of the model are not what {name} has by its configuration: {', '.join(wrong[:4])}"
            f"{f' and {len(wrong) - 4} more' if len(wrong) > 4 else ''}: take off what was added (IP-adapter,"
            " quantisation), or bring its configuration up to date with register_to_config, before save_pretrained"
        )


def class_of(name: str) -> Any:
    """The model class that diffusers has under `name`, None where it has none."""
    import diffusers

    found: Any = getattr(diffusers, name, None)
    return found if nn.Module in getattr(found, "__mro__", ()) and hasattr(found, "from_config") else None


def computed_buffers(model: Any) -> dict[str, Tensor]:
    """The buffers that are not in the state dict."""
    saved = model.state_dict()
    return {name: value for name, value in model.named_buffers() if name not in saved}


def read_folder(folder: str | os.PathLike[str]) -> Saved:
    """What `save_routed` wrote. Raises MissingWeightsError or DamagedFileError, naming the file, key and fault."""
    folder = Path(folder)
    for name in (FORM, WEIGHTS, CONFIG):
        if not (folder / name).is_file():
            raise MissingWeightsError(f"{folder / name} is missing: give a folder that a routed model was saved to")
    form = _read_form(folder / FORM)
    found, saved = _read_json(folder / CONFIG), {**form["backbone"], "quantization_config": BARRIER}
    if found != saved:
        found = found if isinstance(found, dict) else {}
        keys = sorted(key for key in {*found, *saved} if found.get(key) != saved.get(key))
        raise DamagedFileError(
            f"{folder / CONFIG} was not saved with {FORM}, they differ in {', '.join(keys)}: if a plain model was saved"
            " to this folder later, load it with diffusers, and save routed models to another folder"
        )
    routing = _routing(f"{folder / FORM}: routing", form["routing"])
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            metadata = json.loads((file.metadata() or {})["routing"])
    except (KeyError, TypeError, ValueError, OSError, SafetensorError) as error:
        raise DamagedFileError(f"{folder / WEIGHTS} is not a routed transformer's: {error!r}") from error
    trained = _routing(f"{folder / WEIGHTS}: routing", metadata)
    if trained != routing:
        raise DamagedFileError(f"{folder}: {FORM} says {routing}, but the weights were saved with {trained}")
    return Saved(form["backbone"], routing, form["granularity"], form["buffer_dtypes"], contents([folder / WEIGHTS]))


def _read_form(path: Path) -> dict[str, Any]:
    """dar.json with exactly its keys, each of its type, buffer_dtypes as torch's; routing is not looked into."""
    form = _read_json(path)
    if isinstance(form, dict) and form.get("format", FORMAT) != FORMAT:
        raise DamagedFileError(f"{path}: format is {form['format']!r}, not {FORMAT}")
    _check_keys(f"{path}", form, KEYS)
    for key, kind in KEYS.items():
        if type(form[key]) is not kind:
            raise DamagedFileError(f"{path}: {key} must be of type {kind.__name__}, got {form[key]!r}")
    if not isinstance(name := form["backbone"].get("_class_name"), str):
        raise DamagedFileError(f"{path}: backbone._class_name must name a class, got {name!r}")
    dtypes = {name: getattr(torch, str(dtype), None) for name, dtype in form["buffer_dtypes"].items()}
    for name, dtype in dtypes.items():
        if not isinstance(dtype, torch.dtype):
            raise DamagedFileError(f"{path}: buffer_dtypes.{name} is no dtype: {form['buffer_dtypes'][name]!r}")
    return {**form, "buffer_dtypes": dtypes}


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise DamagedFileError(f"{path} cannot be read as JSON: {error}") from error


def _routing(where: str, values: Any) -> RoutingConfig:
    _check_keys(where, values, [field.name for field in fields(RoutingConfig)])
    try:
        return RoutingConfig(**values)
    except (ValueError, TypeError) as error:
        raise DamagedFileError(f"{where}: {error}") from error


def _check_keys(where: str, found: Any, keys: Iterable[str]) -> None:
    if not isinstance(found, dict):
        raise DamagedFileError(f"{where} must be a mapping, got {found!r:.80}")
    for fault, names in (("lacks", set(keys) - set(found)), ("has unknown keys", set(found) - set(keys))):
        if names:
            raise DamagedFileError(f"{where} {fault}: {', '.join(sorted(names))}")
