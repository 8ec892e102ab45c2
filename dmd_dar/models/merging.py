"""A LoRA student's merged network on its way to the disk: of all that is merged, one tensor is held at a time."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from torch import Tensor

from dmd_dar.atomic import write_atomic
from dmd_dar.models.hub import DIFFUSERS
from dmd_dar.models.shared_lora import Lora, LoraDenoiser
from dmd_dar.routing.folder import write_routed
from dmd_dar.routing.tensor_files import Entries, write

SHARD = 10 * 10**9  # bytes of a file at the most, as of diffusers' save_pretrained


def write_merged(folder: Path, student: LoraDenoiser, shard: int = SHARD) -> None:
    """Fill a folder with the merged transformer of a diffusers network, as its save_pretrained does.

    Every tensor has the type that the base's files have, or bfloat16 where that has eight bits, in which most of an
    update would be lost; sums are made in float32.
    """
    network: Any = student.network
    transformer = network.transformer
    layers = {f"{name}.weight": layer for name, layer in transformer.named_modules() if _updated(layer)}
    own = {name: value for name, value in transformer.state_dict().items() if ".lora." not in name}
    entries = {name: (_wide(network.dtypes.get(name, x.dtype)), tuple(x.shape)) for name, x in own.items()}

    def value(name: str) -> Tensor:
        return layers[name].lora.merged(layers[name]) if name in layers else own[name]

    if network.dar is not None:
        write_routed(transformer, folder, entries, value)
    else:
        transformer.save_config(folder)
        _write_shards(folder, entries, value, shard)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.bfloat16 if dtype.is_floating_point and dtype.itemsize == 1 else dtype


def _updated(layer: Any) -> bool:
    return isinstance(getattr(layer, "lora", None), Lora)


def _write_shards(folder: Path, entries: Entries, value: Callable[[str], Tensor], shard: int) -> None:
    def size(entry: tuple[torch.dtype, tuple[int, ...]]) -> int:
        return math.prod(entry[1]) * entry[0].itemsize

    split = split_state_dict_into_shards_factory(
        dict(entries),
        get_storage_size=size,
        filename_pattern=DIFFUSERS + "{suffix}.safetensors",
        max_shard_size=shard,
    )
    for file, names in split.filename_to_tensors.items():
        write(folder / file, {name: entries[name] for name in names}, value)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_atomic(folder / f"{DIFFUSERS}.safetensors.index.json", json.dumps(index, indent=1))
