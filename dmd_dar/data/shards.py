"""Samples on disk in shards: safetensors files beside a manifest that says what they hold and their hashes.

    manifest.json  shard_000000.safetensors  shard_000001.safetensors ...  .lock

A shard is complete or absent: it counts once the manifest lists it, and it is listed after it stands on the disk.
Several processes fill one folder. Byte i + 1 of `.lock` belongs to whoever makes shard i, byte 0 to whoever writes the
manifest; these locks are the kernel's (`lockf`) and go with their process, however it dies.
"""

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import itertools
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from dmd_dar.atomic import make_folder, sweep, write_atomic
from dmd_dar.data.batches import Batches
from dmd_dar.data.manifest import (
    DTYPES,
    FORMAT,
    LENGTH,
    MANIFEST,
    Form,
    Layout,
    Shard,
    read_manifest,
    shard_name,
)
from dmd_dar.errors import DamagedFileError, UserError

WAIT = 0.2  # seconds between looks at the shards that other processes make


class ShardFolder:
    """A folder that one or several processes fill with the shards of one layout; each process opens it once.

    Raises UserError where the folder cannot be made or locked, or holds shards of another layout.
    """

    def __init__(self, folder: str | os.PathLike[str], layout: Layout):
        self.folder, self.layout = make_folder(folder), layout
        with self._faults("opening"):
            self.lock = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            with self._locked(0):
                if not holds_shards(self.folder, flat(self.layout.described())):
                    self._write_manifest({})

    def close(self) -> None:
        os.close(self.lock)

    def __enter__(self) -> "ShardFolder":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def missing(self) -> list[int]:
        """The shards that are still to be made, ascending."""
        listed = self._listed()
        return [index for index in range(self.layout.shards) if not self._stands(listed.get(index))]

    def samples_made(self) -> int:
        return sum(shard.stop - shard.first for shard in self._listed().values() if self._stands(shard))

    def require_space(self) -> None:
        """Raises UserError where the disk has no room for the missing shards."""
        need, free = sum(map(self.layout.bytes, self.missing())), shutil.disk_usage(self.folder).free
        if need > free:
            fault = f"'{self.folder}' needs {need / 1e6:.1f} MB more, and {free / 1e6:.1f} MB of its disk are free"
            raise UserError(f"{fault}: free some, use a folder on another disk, or make fewer samples")

    @contextlib.contextmanager
    def claim(self, indices: range) -> Iterator[list[int]]:
        """Those of the shards `indices` that are missing, if no other process has one; inside, none can take one."""
        with self._locked(indices[0] + 1, len(indices), wait=False) as mine:
            for index in indices if mine else ():
                sweep(self.folder, shard_name(index))
            listed = self._listed()
            yield [index for index in indices if mine and not self._stands(listed.get(index))]

    def write(self, index: int, tensors: dict[str, Tensor]) -> None:
        """Shard `index` from tensors (B, *shape) of its samples; inside its `claim`. Of ragged ones, what lies beyond
        each sample's length is left out.

        Raises ValueError where they are not of the layout, UserError where the disk is full; whole shards survive.
        """
        start, stop = self.layout.span(index)
        for name, form in self.layout.tensors.items():
            held, wanted = tensors[name], (stop - start, *form.shape)
            if tuple(held.shape) != wanted or held.dtype != DTYPES[form.dtype]:
                raise ValueError(
                    f"{name} of shard {index} is {held.dtype} {tuple(held.shape)}, not {form.dtype} {wanted}"
                )
        file = save(packed(self.layout, tensors))
        shard = Shard(shard_name(index), start, stop, len(file), hashlib.sha256(file).hexdigest())
        with self._faults(f"writing {shard.file}"):
            write_atomic(self.folder / shard.file, file)
            with self._locked(0):
                self._write_manifest({**self._listed(), index: shard})

    def _listed(self) -> dict[int, Shard]:
        return read_manifest(self.folder)[1]

    def _stands(self, shard: Shard | None) -> bool:
        """Listed, and there in its full length: a shard that was deleted is made anew."""
        if shard is None:
            return False
        path = self.folder / shard.file
        return path.is_file() and path.stat().st_size == shard.bytes

    def _write_manifest(self, shards: dict[int, Shard]) -> None:
        sweep(self.folder, MANIFEST)
        listed = [dataclasses.asdict(shards[index]) for index in sorted(shards)]
        text = json.dumps({"format": FORMAT, **self.layout.described(), "shards": listed}, indent=1)
        write_atomic(self.folder / MANIFEST, text)

    @contextlib.contextmanager
    def _locked(self, byte: int, count: int = 1, wait: bool = True) -> Iterator[bool]:
        try:
            fcntl.lockf(self.lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), count, byte)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise UserError(f"'{self.folder}' cannot be locked: {error.strerror}; use a local folder") from error
            yield False
            return
        try:
            yield True
        finally:
            fcntl.lockf(self.lock, fcntl.LOCK_UN, count, byte)

    @contextlib.contextmanager
    def _faults(self, doing: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            remedy = (
                f"{'free some space' if full else 'mend that'}, and the same command continues from the whole shards"
            )
            raise UserError(f"'{self.folder}': {error.strerror or error} while {doing}; {remedy}") from error


def packed(layout: Layout, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The samples' tensors as a shard holds them. ValueError for a length that is none."""
    made = {name: tensors[name].contiguous().cpu() for name in layout.tensors}
    for name, form in layout.tensors.items():
        if form.ragged:
            lengths = made[LENGTH].tolist()
            if not all(1 <= length <= form.shape[0] for length in lengths):
                raise ValueError(f"lengths of {name} are {lengths}, not from 1 to {form.shape[0]}")
            made[name] = torch.cat([row[:length] for row, length in zip(made[name], lengths, strict=True)])
    return made


def holds_shards(folder: Path, wanted: dict[str, Any], *, partly: bool = False) -> bool:
    """Whether the folder was begun for samples that are described as `wanted`, see `flat`; `partly`: by some keys.

    Raises UserError where it was begun for others, or holds shards without a manifest.
    """
    if (folder / MANIFEST).exists():
        old = flat(read_manifest(folder)[0].described())
        differ = differences({name: old[name] for name in old if not partly or name in wanted}, wanted)
        if differ:
            raise UserError(
                f"'{folder}' holds other samples: {'; '.join(differ)}. Use another folder or restore these values"
            )
        return True
    if any(folder.glob("shard_*")):
        raise UserError(f"'{folder}' holds shards but no {MANIFEST}; restore it, or use another folder")
    return False


def flat(described: dict[str, Any]) -> dict[str, Any]:
    """A layout's description with what is in `content` beside the rest."""
    return {**described["content"], **{name: value for name, value in described.items() if name != "content"}}


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """`key: old -> new` wherever two flat descriptions in JSON's types differ."""
    names = [*old, *(name for name in new if name not in old)]
    values = [(name, *(json.dumps(side.get(name, "(absent)")) for side in (old, new))) for name in names]
    return [f"{name}: {a} -> {b}" for name, a, b in values if a != b]


def fill(
    folder: ShardFolder,
    batches: Batches,
    *,
    stopped: Callable[[], bool],
    report: Callable[[int], None] | None = None,
    rank: int = 0,
    processes: int = 1,
) -> bool:
    """Make the missing shards from `batches`; False where `stopped()` came true first.

    Process `rank` of `processes` begins with every processes-th group of shards that share batches and then helps the
    others. Groups in other hands are waited for, and taken over should their process die. `report` hears how many
    samples are on the disk.
    """
    layout = folder.layout
    together = batches.group(layout.shard_size)

    def tell() -> None:
        if report is not None:
            report(folder.samples_made())

    while missing := folder.missing():
        made = False
        groups = {index // together for index in missing}
        for group in sorted(groups, key=lambda group: ((group - rank) % processes, group)):
            indices = range(group * together, min((group + 1) * together, layout.shards))
            span = layout.span(indices[0])[0], layout.span(indices[-1])[1]
            with folder.claim(indices) as mine:
                for index in mine:
                    if stopped() and not batches.holds(*layout.span(index)):  # what is made is not thrown away
                        return False
                    folder.write(index, batches.samples(*layout.span(index), span))
                    made = True
                    tell()
            if not mine:
                if stopped():
                    return False
                tell()
        if not made:
            time.sleep(WAIT)
    return True


class Shards:
    """The samples of a complete folder by global index, read as they are asked for.

    A shard's hash is checked when it is first read. Raises UserError where shards are missing, DamagedFileError naming
    the file that is damaged, of another form, or a link out of the folder.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        self.folder = Path(folder)
        self.layout, self.shards = read_manifest(self.folder)
        self.hash = hashlib.sha256((self.folder / MANIFEST).read_bytes()).hexdigest()  # of all that the folder holds
        self.opened: dict[int, Any] = {}
        self.starts: dict[int, list[int]] = {}  # of each sample's entries in the ragged tensors of opened shards
        if len(self.shards) < self.layout.shards:
            done = f"{len(self.shards)} of {self.layout.shards} shards"
            raise UserError(f"'{self.folder}' is not complete ({done}): let the command that makes it finish")
        for shard in self.shards.values():
            self._check_file(shard)

    def __len__(self) -> int:
        return self.layout.n

    @property
    def ragged(self) -> bool:
        """Whether samples differ in length."""
        return any(form.ragged for form in self.layout.tensors.values())

    def rows(self, name: str, index: Tensor, *at: int) -> Tensor:
        """Tensor `name` of the samples `index` (B,), each at position `at` of its leading axes: (B, ...), on the CPU.

        Raises IndexError where a sample is not in 0 .. n - 1.
        """
        rows = []
        for sample in index.tolist():
            if not 0 <= sample < len(self):
                raise IndexError(f"sample {sample} of '{self.folder}', which holds 0 to {len(self) - 1}")
            shard, row = divmod(sample, self.layout.shard_size)
            rows.append(self._open(shard).get_slice(name)[(row, *at)])
        return torch.stack(rows)

    def row(self, name: str, sample: int) -> Tensor:
        """Tensor `name` of one sample, of its own length where it is ragged, on the CPU; raises as `rows` does."""
        if not self.layout.tensors[name].ragged:
            return self.rows(name, torch.tensor([sample]))[0]
        length = int(self.rows(LENGTH, torch.tensor([sample])))
        shard, row = divmod(sample, self.layout.shard_size)
        start = self.starts[shard][row]
        return self._open(shard).get_slice(name)[start : start + length]

    def _check_file(self, shard: Shard) -> None:
        path = self.folder / shard.file
        if path.resolve().parent != self.folder.resolve():
            raise DamagedFileError(f"{path} is a link out of its folder; put the file itself there")
        if not path.is_file() or path.stat().st_size != shard.bytes:
            problem = "is cut short or too long" if path.is_file() else "is missing"
            raise DamagedFileError(f"{path} {problem}: run the command that made the folder again, which makes it anew")

    def _open(self, index: int) -> Any:
        """The shard's open file: mapped into memory, none of it read yet but for its hash."""
        if index not in self.opened:
            shard = self.shards[index]
            path = self.folder / shard.file
            remedy = "delete it and run the command that made the folder again, which makes it anew"
            try:
                with open(path, "rb") as file:
                    if hashlib.file_digest(file, "sha256").hexdigest() != shard.sha256:
                        raise DamagedFileError(f"{path} is damaged, its SHA-256 is not the manifest's: {remedy}")
                opened = safe_open(path, "pt")
                held = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            except (OSError, SafetensorError) as error:
                raise DamagedFileError(f"{path} cannot be read ({error}): {remedy}") from error
            forms = {name: Form(part.get_dtype(), tuple(part.get_shape())) for name, part in held.items()}
            lengths = opened.get_tensor(LENGTH).tolist() if LENGTH in held and self.ragged else []
            size, entries = shard.stop - shard.first, sum(lengths)
            wanted = {name: Form(f.dtype, f.in_shard(size, entries)) for name, f in self.layout.tensors.items()}
            if forms != wanted or min(lengths, default=1) < 1:
                raise DamagedFileError(f"{path} does not hold the tensors that {MANIFEST} describes: {remedy}")
            self.starts[index] = [0, *itertools.accumulate(lengths)]
            self.opened[index] = opened  # last: another thread may look for it
        return self.opened[index]
