"""Weights on their way between a network and safetensors files, one tensor at a time: neither side is held twice."""

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from dmd_dar.atomic import reached, sync_folder, synced
from dmd_dar.errors import DamagedFileError

PIECE = 2**25  # bytes of a file that are mapped at the most, since mapped pages count as the process's memory
# in the order in which safetensors itself writes them: from the widest, so that all lie aligned
NAMES = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.complex64: "C64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPES = {name: dtype for dtype, name in NAMES.items()}


@dataclass(frozen=True)
class Stored:
    """A tensor as a file holds it."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


# what files hold -> each name with its tensor, which may be the file's own memory and is good until the next is asked
Reader = Callable[[Mapping[str, Stored]], Iterator[tuple[str, Tensor]]]


Entries = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]  # type and shape of tensors that are to be written


@contextlib.contextmanager
def without_weights() -> Iterator[None]:
    """Networks made within have their parameters on the meta device, and no time is spent on starting values.

    Buffers, such as tables of positions, are computed as ever: no file holds those.
    """

    def empty(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta:
            return None
        return nn.Parameter(parameter.to("meta"), parameter.requires_grad)

    handle = register_module_parameter_registration_hook(empty)  # type: ignore[arg-type]
    try:
        yield
    finally:
        handle.remove()


def contents(files: Iterable[Path]) -> dict[str, Stored]:
    """All tensors of the files by name, from their heads. Raises DamagedFileError naming the file."""
    found: dict[str, Stored] = {}
    for file in files:
        try:
            with safe_open(file, "pt") as opened:
                for name in opened.keys():  # noqa: SIM118
                    part = opened.get_slice(name)
                    found[name] = Stored(file, DTYPES[part.get_dtype()], tuple(part.get_shape()))
        except (KeyError, OSError, SafetensorError) as error:
            raise DamagedFileError(f"{file} cannot be read: {error!r}") from error
    return found


def tensors_in(stored: Mapping[str, Stored]) -> Iterator[tuple[str, Tensor]]:
    """A `Reader`: read here, file by file. A file is opened again after every PIECE, which unmaps what was read."""
    for file, names in pieces(stored):
        try:
            with safe_open(file, "pt") as opened:
                for name in names:
                    yield name, opened.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise DamagedFileError(f"{file} cannot be read: {error}") from error


def pieces(stored: Mapping[str, Stored]) -> list[tuple[Path, list[str]]]:
    """The names by file, in lists of about PIECE bytes; the same order wherever the same files are read."""
    found: list[tuple[Path, list[str]]] = []
    size = 0
    for name, one in sorted(stored.items(), key=lambda entry: (str(entry[1].file), entry[0])):
        if not found or found[-1][0] != one.file or size + one.nbytes > PIECE:
            found.append((one.file, []))
            size = 0
        found[-1][1].append(name)
        size += one.nbytes
    return found


def faults_of(model: nn.Module, stored: Mapping[str, Stored]) -> dict[str, list[str]]:
    """How the files do not fit the network's state dict: names that are missing, unexpected or of another shape."""
    own = model.state_dict()
    wrong = sorted(name for name in {*own} & {*stored} if tuple(own[name].shape) != stored[name].shape)
    faults = {
        "missing_keys": sorted({*own} - {*stored}),
        "unexpected_keys": sorted({*stored} - {*own}),
        "mismatched_keys": [f"{name} {stored[name].shape} for {tuple(own[name].shape)}" for name in wrong],
    }
    return {kind: names for kind, names in faults.items() if names}


def fill(
    model: nn.Module,
    stored: Mapping[str, Stored],
    put: Callable[[Tensor, Tensor], Tensor],
    reader: Reader = tensors_in,
) -> None:
    """Give a network that was made `without_weights` those of the files, which must fit (`faults_of`), in place.

    put(tensor of the network, what the file holds) -> what takes its place; it must not share the latter's memory.
    """
    for name, value in reader(stored):
        path, _, own = name.rpartition(".")
        module = model.get_submodule(path)
        held = module._parameters if own in module._parameters else module._buffers
        old = held[own]
        assert old is not None
        new = put(old, value)
        held[own] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new  # type: ignore[assignment]


def write(
    file: Path,
    entries: Entries,
    value: Callable[[str], Tensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """A safetensors file, byte for byte as the library writes it, atomically; value(name) is made when its turn comes.

    `entries` says the type, to which values are converted, and the shape of each.
    """
    order = sorted(entries, key=lambda name: ([*NAMES].index(entries[name][0]), name))
    head: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    end = 0
    for name in order:
        dtype, shape = entries[name]
        start, end = end, end + math.prod(shape) * dtype.itemsize
        head[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(head, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    half = file.with_name(f".{file.name}.tmp")
    try:
        with synced(half) as opened:
            opened.write(len(text).to_bytes(8, "little") + text)
            for name in order:
                dtype, shape = entries[name]
                made = value(name).detach().to("cpu", dtype).contiguous()
                assert tuple(made.shape) == shape, (name, made.shape, shape)
                opened.write(made.reshape(-1).view(torch.uint8).numpy().data)
        os.replace(half, file)
    except BaseException:
        half.unlink(missing_ok=True)
        raise
    reached("file renamed")
    sync_folder(file.parent)
