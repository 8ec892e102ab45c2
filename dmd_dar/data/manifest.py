"""What a folder of shards holds, as its manifest says it."""

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dmd_dar.errors import DamagedFileError, UserError

FORMAT = 1
MANIFEST = "manifest.json"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}
OVERHEAD = 4096  # bytes of a shard's header and its lines in the manifest, generously
LENGTH = "length"  # of a sample's ragged tensors


@dataclass(frozen=True)
class Form:
    """One tensor of a sample: its type in the words of safetensors (see DTYPES) and its shape.

    The first axis of a ragged one has as many entries as the sample's tensor LENGTH says, at most those of `shape`. Its
    shard holds those of all samples, one after the other.
    """

    dtype: str
    shape: tuple[int, ...]
    ragged: bool = False

    def in_shard(self, samples: int, entries: int) -> tuple[int, ...]:
        """Its shape in a shard of so many samples, whose ragged tensors have so many entries together."""
        return (entries, *self.shape[1:]) if self.ragged else (samples, *self.shape)


@dataclass(frozen=True)
class Layout:
    """What a folder holds: `n` samples, `shard_size` to a file; `content` is all that decides their values (JSON)."""

    content: dict[str, Any]
    n: int
    shard_size: int
    tensors: dict[str, Form]
    filled: float = dataclasses.field(default=1.0, compare=False)  # share of ragged tensors' entries, as far as known

    @property
    def shards(self) -> int:
        return -(-self.n // self.shard_size)

    def span(self, index: int) -> tuple[int, int]:
        """First global sample of shard `index` and the one after its last."""
        return index * self.shard_size, min((index + 1) * self.shard_size, self.n)

    def bytes(self, index: int) -> int:
        """Upper bound of shard `index` on the disk; of ragged tensors about what `filled` says."""
        start, stop = self.span(index)
        return math.ceil((stop - start) * sum(map(self._bytes_of, self.tensors.values()))) + OVERHEAD

    def _bytes_of(self, form: Form) -> float:
        """Of a sample's tensor."""
        whole = DTYPES[form.dtype].itemsize * torch.Size(form.shape).numel()
        return whole * self.filled if form.ragged else whole

    def all_bytes(self) -> int:
        """Upper bound of all shards on the disk."""
        return sum(map(self.bytes, range(self.shards)))

    def described(self) -> dict[str, Any]:
        """In JSON's own types, as the manifest has it."""
        described = json.loads(json.dumps(dataclasses.asdict(self)))
        del described["filled"]
        for form in described["tensors"].values():
            if not form["ragged"]:
                del form["ragged"]  # the only kind before there was the other
        return described


@dataclass(frozen=True)
class Shard:
    """One complete shard as the manifest lists it: samples first .. stop - 1."""

    file: str
    first: int
    stop: int
    bytes: int
    sha256: str


def shard_name(index: int) -> str:
    return f"shard_{index:06d}.safetensors"


def read_manifest(folder: Path) -> tuple[Layout, dict[int, Shard]]:
    """The layout and the shards listed so far, by index.

    Raises UserError where there is no manifest, DamagedFileError where it is none of this format, contradicts itself
    or names any file but the folder's own shards.
    """
    path = folder / MANIFEST
    try:
        values = json.loads(path.read_bytes())
        if values["format"] != FORMAT:
            raise ValueError(f"its format is {values['format']!r}, not {FORMAT}")
        layout = _layout(values)
        listed = [_shard(layout, entry) for entry in values["shards"]]
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): name a folder of complete shards") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else error
        raise DamagedFileError(
            f"{path} is not a manifest of shards ({reason}); restore it, or make the folder anew"
        ) from error
    shards = {shard.first // layout.shard_size: shard for shard in listed}
    if len(shards) < len(listed):
        raise DamagedFileError(f"{path} lists a shard twice; restore it, or make the folder anew")
    return layout, shards


def _layout(values: dict[str, Any]) -> Layout:
    if not isinstance(values["content"], dict) or not isinstance(values["tensors"], dict) or not values["tensors"]:
        raise ValueError("content and tensors must be sections")
    tensors = {}
    for name, form in values["tensors"].items():
        if form["dtype"] not in DTYPES:
            raise ValueError(f"{name} has the unknown dtype {form['dtype']!r}")
        ragged = form.get("ragged", False) is True
        tensors[name] = Form(form["dtype"], tuple(_natural("shape", side, 1) for side in form["shape"]), ragged)
    if any(form.ragged for form in tensors.values()) and tensors.get(LENGTH) != Form("I64", ()):
        raise ValueError(f"tensors of different length need {LENGTH}, an I64 each")
    n, shard_size = (_natural(name, values[name], 1) for name in ("n", "shard_size"))
    return Layout(values["content"], n, shard_size, tensors)


def _shard(layout: Layout, entry: dict[str, Any]) -> Shard:
    first, stop, size = (_natural(name, entry[name], 0) for name in ("first", "stop", "bytes"))
    index = first // layout.shard_size
    if index >= layout.shards or (first, stop) != layout.span(index):
        raise ValueError(f"samples {first} to {stop} are no shard of {layout.shard_size} among {layout.n}")
    if entry["file"] != shard_name(index):  # so no path leads anywhere else
        raise ValueError(f"it names {entry['file']!r} where {shard_name(index)!r} in its own folder must stand")
    if not isinstance(entry["sha256"], str):
        raise ValueError(f"the sha256 of {shard_name(index)} is not a text")
    return Shard(shard_name(index), first, stop, size, entry["sha256"])


def _natural(name: str, value: Any, least: int) -> int:
    if type(value) is not int or value < least:
        raise ValueError(f"{name} is {value!r}, not an integer from {least}")
    return value
