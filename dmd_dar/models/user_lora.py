"""A LoRA that a user's teacher carries, as diffusers or peft saved it, fused into the frozen network.

diffusers    pytorch_lora_weights.safetensors: transformer.NAME.lora_A.weight, ..., alpha in its metadata or beside
peft         a folder: adapter_config.json and adapter_model.safetensors with base_model.model.NAME.lora_A.weight, ...
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from dmd_dar.errors import DamagedFileError, MissingWeightsError, UserError
from dmd_dar.models.hub import files_hash, read_json

FILE, PEFT_CONFIG, PEFT_FILE = "pytorch_lora_weights.safetensors", "adapter_config.json", "adapter_model.safetensors"
METADATA = "lora_adapter_metadata"  # of a file of diffusers
PREFIXES = {FILE: "transformer.", PEFT_FILE: "base_model.model."}
PART = re.compile(r"(.+)\.(lora_A\.weight|lora_B\.weight|lora\.down\.weight|lora\.up\.weight|alpha)")
DOWN, UP, ALPHA = ("lora_A.weight", "lora.down.weight"), ("lora_B.weight", "lora.up.weight"), "alpha"


@dataclass(frozen=True)
class Update:
    """Of one linear layer: scale B A, with A (r, in) and B (out, r)."""

    A: Tensor
    B: Tensor
    scale: float


def fuse(network: nn.Module, path: str) -> str:
    """Add the LoRA at `path` to the frozen network's weights, in place; returns its hash.

    Sums are made in float32 and kept in the type of the weights. Raises UserError where it belongs to another network
    or is of a kind that is not known, MissingWeightsError or DamagedFileError where there is none or it is damaged; the
    network is then as it was.
    """
    files = _files(path)
    updates = _read(files)
    transformer: nn.Module = getattr(network, "transformer", network)
    layers = {name: layer for name, layer in transformer.named_modules() if isinstance(layer, nn.Linear)}
    wrong = sorted(name for name, update in updates.items() if not _fits(update, layers.get(name)))
    if wrong:
        shown = ", ".join(wrong[:3]) + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else "")
        raise UserError(
            f"{path} is a LoRA of another network than a {type(transformer).__name__} of this size, which has no such"
            f" linear layers: {shown}"
        )
    with torch.no_grad():
        for name, update in updates.items():
            weight = layers[name].weight
            dtype = torch.promote_types(weight.dtype, torch.float32)
            added = update.scale * update.B.to(dtype) @ update.A.to(dtype)
            weight.copy_(weight.to(dtype) + added.to(weight.device))
    return files_hash(files)


def hash_of(path: str) -> str:
    """The hash that `fuse` returns. Raises MissingWeightsError where there is no LoRA."""
    return files_hash(_files(path))


def _fits(update: Update, layer: nn.Linear | None) -> bool:
    shape = (len(update.B), update.A.shape[-1])
    return (
        layer is not None
        and layer.weight.is_floating_point()
        and update.A.ndim == update.B.ndim == 2
        and len(update.A) == update.B.shape[1]
        and shape == (layer.out_features, layer.in_features)
    )


def _files(path: str) -> list[Path]:
    """What describes the updates: diffusers' file, or peft's configuration and file."""
    place = Path(path)
    if place.is_file():
        return [place]
    if (place / PEFT_CONFIG).is_file() and (place / PEFT_FILE).is_file():
        return [place / PEFT_CONFIG, place / PEFT_FILE]
    if (place / FILE).is_file():
        return [place / FILE]
    raise MissingWeightsError(f"{path} holds no LoRA: neither {FILE} nor {PEFT_CONFIG} with {PEFT_FILE}")


def _read(files: list[Path]) -> dict[str, Update]:
    file = files[-1]
    try:
        with safe_open(file, "pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            metadata = json.loads((opened.metadata() or {}).get(METADATA, "{}"))
    except (OSError, ValueError, SafetensorError) as error:
        raise DamagedFileError(f"{file} cannot be read: {error}") from error
    prefix, told = PREFIXES[FILE], metadata
    if len(files) > 1:
        prefix, told = PREFIXES[PEFT_FILE], read_json(files[0])
        if str(told.get("peft_type")) != "LORA":
            raise UserError(f"{files[0]}: peft_type {told.get('peft_type')}: only LORA, without routers, can be fused")
    else:
        told = {name.removeprefix(prefix): value for name, value in metadata.items() if name.startswith(prefix)}
    found: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        matched = PART.fullmatch(name)
        if matched is None or not name.startswith(prefix):
            raise UserError(
                f"{file} holds {name}, which is no low-rank update of a transformer's linear layer: save the LoRA of"
                f" the transformer alone, as {prefix}NAME.lora_A.weight and lora_B.weight"
            )
        found.setdefault(matched[1].removeprefix(prefix), {})[matched[2]] = value
    return {name: _update(file, name, parts, told) for name, parts in found.items()}


def _update(file: Path, name: str, parts: dict[str, Tensor], told: Mapping[str, Any]) -> Update:
    """As peft scales it: alpha / r, or alpha / sqrt(r); where nothing says alpha, as diffusers does, by 1."""
    down, up = (next((parts[key] for key in keys if key in parts), None) for keys in (DOWN, UP))
    if down is None or up is None:
        raise DamagedFileError(f"{file} holds one factor only of the update of {name}")
    rank = len(down)
    try:
        patterns = told.get("alpha_pattern") or {}
        special = [alpha for key, alpha in patterns.items() if re.match(rf"(.*\.)?({key})$", name)]
        alpha = float(special[0] if special else told.get("lora_alpha", rank))
    except (AttributeError, TypeError, ValueError, re.error) as error:
        raise DamagedFileError(f"{file}: its configuration does not say alpha: {error}") from error
    if ALPHA in parts:
        alpha = float(parts[ALPHA])
    return Update(down, up, alpha / (math.sqrt(rank) if told.get("use_rslora") else rank))
