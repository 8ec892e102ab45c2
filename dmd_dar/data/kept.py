"""Tensors that are made once and found again, each set in one file under the hash of all that decides its values.

    CACHE/0123456789abcdef.safetensors    its metadata hold that, as JSON, under `identity`

Several processes may use a folder at once: a file appears whole, and whoever comes second writes the same numbers.
Any file, or the whole folder, may be deleted at any time.
"""

import functools
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from dmd_dar.atomic import make_folder, write_atomic
from dmd_dar.errors import UserError
from dmd_dar.messages import LOGGER


@functools.cache
def code_digest() -> str:
    """Of the source of dmd_dar: what another version made is not found again."""
    root = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        digest.update(file.relative_to(root).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Kept:
    """One set of tensors in `folder`; `identity`, JSON, is what they are."""

    folder: Path
    identity: dict[str, Any]

    @staticmethod
    def of(folder: str | Path, device: torch.device, facts: dict[str, Any]) -> "Kept":
        """What `facts`, the kind of device, torch's version and this code decide."""
        computed = {"code": code_digest(), "torch": str(torch.__version__), "device": device.type}
        return Kept(Path(folder), {**facts, **computed})

    @property
    def text(self) -> str:
        return json.dumps(self.identity, sort_keys=True)

    @property
    def path(self) -> Path:
        return self.folder / f"{hashlib.sha256(self.text.encode()).hexdigest()[:16]}.safetensors"

    def find(self) -> dict[str, Tensor] | None:
        """The tensors, on the CPU; None where there are none. A file that is damaged, or not what its name says, is
        told and counts as none: `keep` then takes its place.
        """
        if not self.path.exists():
            return None
        try:
            with safe_open(self.path, framework="pt") as file:
                if (file.metadata() or {}).get("identity") == self.text:
                    return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                fault = "holds something else"
        except (SafetensorError, OSError) as error:
            fault = f"cannot be read ({error})"
        LOGGER.warning(f"{self.path} {fault}: it is made anew")
        return None

    def keep(self, tensors: dict[str, Tensor]) -> None:
        """What cannot be written is told: it is made again when it is next wanted."""
        contents = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
        try:
            make_folder(self.folder)
            write_atomic(self.path, save(contents, metadata={"identity": self.text}))
        except (OSError, UserError) as error:
            LOGGER.warning(f"{self.path} is not kept: {error}")
