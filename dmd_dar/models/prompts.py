"""Encoded prompts as conditions: a frozen table, looked up by the index that stands for a prompt everywhere else.

Row i is prompt i, the last row what guidance leads away from, the empty prompt or a negative one; it is the
unconditional one. N prompts, T tokens, D width.
"""

import contextlib
import hashlib
import json
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from dmd_dar.data.prompt_files import LOSSLESS, PLAIN, read_prompts
from dmd_dar.data.shards import DTYPES, MANIFEST, Form, Layout, Shards
from dmd_dar.errors import DamagedFileError, UserError
from dmd_dar.models.hub import files_hash

KIND = "prompts"
IN_MEMORY = 2e9  # bytes of a table that is kept on the device; of a larger one the rows are read as they are asked for


def layout_of(content: dict[str, Any], count: int, row: dict[str, Tensor], size: int) -> Layout:
    """A folder of `count` prompts and the empty one, `size` to a shard, each in the form of the tensors `row`.

    `content` is what else decides their values: "encoder", the digest of what encodes them, at least.
    """
    names = {dtype: name for name, dtype in DTYPES.items()}
    tensors = {name: Form(names[value.dtype], tuple(value.shape)) for name, value in row.items()}
    return Layout({"kind": KIND, **content}, count + 1, size, tensors)


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
        self.texts_hash, self.count = content.get("prompts"), len(self.shards) - 1
        self.names = tuple(layout.tensors)
        self.width = layout.tensors["embedding"].shape[-1]
        self.small = layout.all_bytes() <= IN_MEMORY
        self.held: dict[torch.device, dict[str, Tensor]] = {}

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

    def blank(self, device: torch.device | str = "cpu") -> None:
        """From now on, zeros of the prompts' form on `device`, without memory: enough to trace a network.

        Without a mask, so that all tokens count: how many a mask keeps is not known where nothing is computed.
        """
        forms = [name for name in self.names if name != "mask"]
        row = {name: self.shards.rows(name, torch.tensor([0])) for name in forms}
        self.small = True
        self.held[torch.device(device)] = {
            name: torch.zeros_like(value).expand(self.count + 1, *value.shape[1:]) for name, value in row.items()
        }

    def rows(self, cond: Tensor) -> dict[str, Tensor]:
        """The tensors of the prompts cond (B,) in 0 .. N, where N is the empty one; each (B, ...), on cond's device."""
        if not self.small:
            return {name: self.shards.rows(name, cond).to(cond.device) for name in self.names}
        if cond.device not in self.held:
            every = torch.arange(self.count + 1)
            self.held[cond.device] = {name: self.shards.rows(name, every).to(cond.device) for name in self.names}
        return {name: table[cond] for name, table in self.held[cond.device].items()}


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
        found = [self.written[index] for index in cond.tolist()]
        return {name: torch.stack([row[name] for row in found]).to(cond.device) for name in self.names}


def absent_prompts(origin: dict[str, Any]) -> Written | None:
    """What stands for the prompts of a student's card where their folder is not on this machine; None where it is."""
    folder = str(origin.get("prompts") or "")
    if not folder or (Path(folder) / MANIFEST).is_file():
        return None
    return Written({}, str(origin.get("prompts_encoder", "")), folder=folder)
