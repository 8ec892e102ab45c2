"""Encoded prompts as conditions: a frozen table, looked up by the index that stands for a prompt everywhere else.

Row i is prompt i, the last row what guidance leads away from, the empty prompt or a negative one; it is the
unconditional one. Each is stored without the padding at its end and padded with zeros again where it is used: beside a
mask to the longest of the batch, without one to the length that its pipeline gives, since there the padding is read.
N prompts, T tokens, D width.
"""

import contextlib
import hashlib
import json
import math
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from dmd_dar.data.manifest import DTYPES, LENGTH, MANIFEST, Form, Layout
from dmd_dar.data.prompt_files import LOSSLESS, PLAIN, read_prompts
from dmd_dar.data.shards import Shards
from dmd_dar.errors import DamagedFileError, UserError
from dmd_dar.models.hub import files_hash

KIND = "prompts"
IN_MEMORY = 2e9  # bytes of a table that is kept on the device; of a larger one the rows are read as they are asked for
READ = 1e9  # bytes of rows of such a one that are kept once they are read
TOKENS = ("embedding", "mask")  # tensors of a row with an entry for each token


def layout_of(content: dict[str, Any], count: int, row: dict[str, Tensor], size: int, filled: float = 1.0) -> Layout:
    """A folder of `count` prompts and the empty one, `size` to a shard, each in the form of the tensors `row`.

    `content` is what else decides their values: "encoder", the digest of what encodes them, at least. `filled` is the
    share of a row's tokens that are no padding, about.
    """
    names = {dtype: name for name, dtype in DTYPES.items()}
    tensors = {name: Form(names[value.dtype], tuple(value.shape), ragged=name in TOKENS) for name, value in row.items()}
    return Layout({"kind": KIND, **content}, count + 1, size, {**tensors, LENGTH: Form("I64", ())}, filled)


def lengths_of(rows: dict[str, Tensor]) -> Tensor:
    """Tokens of each row (B,) before the padding at its end: what its mask leaves out or, without one, zeros."""
    kept = rows["mask"] > 0 if "mask" in rows else rows["embedding"].ne(0).any(-1)
    places = torch.arange(1, kept.shape[1] + 1, device=kept.device)
    return (kept * places).amax(1).clamp(min=1)


def together(rows: list[dict[str, Tensor]], whole: int) -> dict[str, Tensor]:
    """Rows of different length as one batch (B, ...), padded to the longest, or to `whole` tokens if that is not 0."""
    longest = whole or max(len(row["embedding"]) for row in rows)
    return {name: torch.stack([_filled_up(name, row[name], longest) for row in rows]) for name in rows[0]}


def _filled_up(name: str, value: Tensor, tokens: int) -> Tensor:
    if name not in TOKENS or len(value) >= tokens:
        return value
    return torch.cat([value, value.new_zeros(tokens - len(value), *value.shape[1:])])


def texts_hash(texts: list[str]) -> str:
    """SHA-256, hexadecimal, of the prompts themselves, without the empty one; "prompts" in a folder's content."""
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()


class Prompts:
    """The prompts in `folder`, as `python -m dmd_dar.encode prompts=FILE` wrote them; copies share one table.

    Raises UserError where the folder holds something else or is not complete, DamagedFileError where it is damaged.
    """

    def __init__(self, folder: str):
        self.folder, self.shards = folder, Shards(folder)
        self.hash = self.shards.hash
        layout, content = self.shards.layout, self.shards.layout.content
        if content.get("kind") != KIND:
            raise UserError(f"{folder} holds no prompts; name a folder that dmd_dar.encode prompts=FILE made")
        if "embedding" not in layout.tensors or not isinstance(content.get("encoder"), str) or len(self.shards) < 2:
            raise DamagedFileError(f"{Path(folder) / MANIFEST} describes no prompts; make them anew")
        self.encoder: str = content["encoder"]
        self.pipeline = str(content.get("pipeline", ""))  # class of the pipeline whose text encoders made them
        self.tokens, self.dtype = int(content.get("tokens", 0)), str(content.get("dtype", "float32"))
        self.negative = str(content.get("negative", ""))  # what guidance leads away from
        self.texts_hash, self.count = content.get("prompts"), len(self.shards) - 1
        self.names = tuple(name for name in layout.tensors if name != LENGTH)
        self.width = layout.tensors["embedding"].shape[-1]
        self.small = layout.all_bytes() <= IN_MEMORY
        self.held: dict[torch.device, dict[str, Tensor]] = {}
        self.whole = not self.shards.ragged
        self.read = ReadRows(self.shards, self.names)
        self.own_lengths: Tensor | None = None
        self.recent: deque[tuple[Tensor, dict[str, Tensor]]] = deque(maxlen=2)  # what a step asks for again and again

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def are(self, texts: tuple[str, ...]) -> bool:
        """Whether these are the prompts, in that order."""
        return self.texts_hash == texts_hash(list(texts))

    def texts(self) -> tuple[str, ...]:
        """The prompts themselves, without the empty one; () where the folder's copy of them is gone or was changed."""
        for name in (PLAIN, LOSSLESS):
            with contextlib.suppress(UserError):
                texts = tuple(read_prompts(str(Path(self.folder) / name)))
                if self.are(texts):
                    return texts
        return ()

    @property
    def tokens_at_use(self) -> int:
        """To how many tokens a batch is padded; 0: to its longest."""
        form = self.shards.layout.tensors["embedding"]
        return form.shape[0] if self.whole or "mask" not in self.names else 0

    @contextlib.contextmanager
    def padded_whole(self) -> Iterator[None]:
        """Within it every batch is as long as a prompt may be, as a longest one makes it."""
        before, self.whole = self.whole, True
        self.recent.clear()
        try:
            yield
        finally:
            self.whole = before
            self.recent.clear()

    def blank(self, device: torch.device | str = "cpu") -> None:
        """From now on, zeros of the prompts' form on `device`, without memory: enough to trace a network.

        Without a mask, so that all tokens count: how many a mask keeps is not known where nothing is computed.
        """
        forms = {name: form for name, form in self.shards.layout.tensors.items() if name not in ("mask", LENGTH)}
        self.small = self.whole = True
        self.held[torch.device(device)] = {
            name: torch.zeros(1, *form.shape, dtype=DTYPES[form.dtype]).expand(self.count + 1, *form.shape)
            for name, form in forms.items()
        }

    def ahead(self, cond: Tensor) -> None:
        """Begin to read the rows cond (B,) of a large table, which will be asked for soon."""
        if not self.small:
            self.read.begin(cond.tolist())

    def rows(self, cond: Tensor) -> dict[str, Tensor]:
        """The tensors of the prompts cond (B,) in 0 .. N, where N is the empty one; each (B, ...), on cond's device."""
        if self.small and self.tokens_at_use:  # no number of it needs to be known here, so no device is waited for
            return {name: table[cond] for name, table in self._table(cond.device).items()}
        for asked, found in self.recent:
            if asked is cond:
                return found
        if self.small:
            tokens = int(self.lengths[cond.cpu()].max())
            found = {
                name: table[cond, :tokens] if name in TOKENS else table[cond]
                for name, table in self._table(cond.device).items()
            }
        else:
            rows = together(self.read.rows(cond.tolist()), self.tokens_at_use)
            found = {name: value.to(cond.device) for name, value in rows.items()}
        self.recent.append((cond, found))
        return found

    @property
    def lengths(self) -> Tensor:
        """(N + 1,) tokens of each row, on the CPU."""
        if self.own_lengths is None:
            self.own_lengths = self.shards.rows(LENGTH, torch.arange(self.count + 1))
        return self.own_lengths

    def _table(self, device: torch.device) -> dict[str, Tensor]:
        """All rows on the device, each as long as a prompt may be."""
        if device not in self.held:
            every = self.read.rows(range(self.count + 1), keep=False)
            whole = self.shards.layout.tensors["embedding"].shape[0]
            self.held[device] = {name: value.to(device) for name, value in together(every, whole).items()}
        return self.held[device]


class ReadRows:
    """Rows of a folder, read by one thread, which may begin before they are asked for; the last ones are kept."""

    def __init__(self, shards: Shards, names: tuple[str, ...]):
        self.shards, self.names = shards, names
        sizes = [DTYPES[form.dtype].itemsize * math.prod(form.shape) for form in shards.layout.tensors.values()]
        self.most = max(64, int(READ / sum(sizes)))
        self.coming: OrderedDict[int, Future[dict[str, Tensor]]] = OrderedDict()
        self.thread: ThreadPoolExecutor | None = None

    def begin(self, indices: Iterable[int]) -> None:
        """Read these rows, unless they are there or under way."""
        self.thread = self.thread or ThreadPoolExecutor(1, "prompts")
        for index in indices:
            if index not in self.coming:
                self.coming[index] = self.thread.submit(self._read, index)
            self.coming.move_to_end(index)
        while len(self.coming) > self.most:
            self.coming.popitem(last=False)

    def rows(self, indices: Iterable[int], keep: bool = True) -> list[dict[str, Tensor]]:
        """The rows, on the CPU, without padding. Raises what `Shards` does."""
        if not keep:
            return [self._read(index) for index in indices]
        indices = list(indices)
        self.begin(indices)
        return [self.coming[index].result() if index in self.coming else self._read(index) for index in indices]

    def _read(self, index: int) -> dict[str, Tensor]:
        return {name: self.shards.row(name, index) for name in self.names}


class Written(Prompts):
    """Prompts that were encoded just now, in the place of a folder of them; without any, one that is not here."""

    def __init__(self, rows: dict[str, dict[str, Tensor]], encoder: str = "", pipeline: str = "", folder: str = ""):
        """rows: of each prompt, without a batch axis. folder: the one that is not here."""
        self.encoder, self.pipeline, self.folder = encoder, pipeline, folder
        self.written, self.count = [*rows.values()], len(rows)
        self.own_texts = tuple(rows)
        self.texts_hash = texts_hash([*rows])
        self.hash = files_hash([], encoder, self.texts_hash) if rows else ""
        self.names = tuple(self.written[0]) if rows else ()
        self.width = self.written[0]["embedding"].shape[-1] if rows else 0

    def texts(self) -> tuple[str, ...]:
        return self.own_texts

    def rows(self, cond: Tensor) -> dict[str, Tensor]:
        """As of a folder, but for the one behind the last, which is not here: nothing is guided by these."""
        rows = {name: torch.stack([self.written[index][name] for index in cond.tolist()]) for name in self.names}
        tokens = int(lengths_of(rows).max()) if "mask" in rows else rows["embedding"].shape[1]
        return {name: (x[:, :tokens] if name in TOKENS else x).to(cond.device) for name, x in rows.items()}


def absent_prompts(origin: dict[str, Any]) -> Written | None:
    """What stands for the prompts of a student's card where their folder is not on this machine; None where it is."""
    folder = str(origin.get("prompts") or "")
    if not folder or (Path(folder) / MANIFEST).is_file():
        return None
    return Written({}, str(origin.get("prompts_encoder", "")), folder=folder)
