"""Prompts given as words: encoded by the text encoder that the student's own prompts were encoded with, then let go."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dmd_dar.device import free_memory
from dmd_dar.errors import UserError
from dmd_dar.models.hub import HUB_ID, TEXT_FILES, resolve
from dmd_dar.models.prompts import Written
from dmd_dar.models.text import TextEncoder, load_text_encoder

SPARE = 1.2  # a text encoder needs this much of its files' bytes, at least


@dataclass(frozen=True)
class Source:
    """How a student's prompts were encoded; `tokens` 0 is as many as the pipeline reads itself."""

    digest: str  # of the text encoder, see models.text
    tokens: int
    dtype: str

    @staticmethod
    def of(origin: dict[str, Any]) -> "Source":
        """From a student's card. Those of before say neither tokens nor type: the pipeline's own, float32."""
        tokens, dtype = origin.get("prompts_tokens", 0), origin.get("prompts_dtype", "float32")
        return Source(str(origin.get("prompts_encoder", "")), int(tokens), str(dtype))


@dataclass
class Words:
    """Encodes prompts on `device`. The text encoder is loaded when a prompt is new, and `keep` leaves it there."""

    source: Source
    places: tuple[tuple[str, str], ...]  # (path or hub id, revision) of pipelines, the first that is there is taken
    device: torch.device
    keep: bool = False
    known: dict[str, dict[str, Tensor]] = field(default_factory=dict, repr=False)  # rows on the CPU
    held: TextEncoder | None = field(default=None, repr=False)
    pipeline: str = ""  # its class, once it was loaded

    def table(self, texts: Sequence[str], others: Sequence[nn.Module] = ()) -> Written:
        """The prompts, each once, in the order in which they first come.

        `others` leave the device meanwhile where its memory is too small for them beside the text encoder.
        Raises UserError where the text encoder is gone or is another one.
        """
        distinct = list(dict.fromkeys(texts))
        if new := [text for text in distinct if text not in self.known]:
            self._encode(new, others)
        return Written({text: self.known[text] for text in distinct}, self.source.digest, self.pipeline)

    def _encode(self, texts: list[str], others: Sequence[nn.Module]) -> None:
        place, revision = self.place()
        folder = str(resolve(place, revision, TEXT_FILES))
        moved = [] if self._fits(folder) else others
        encoder = None
        try:
            for module in moved:
                module.to("cpu")
            free_memory()
            encoder = self.held or self._load(place, folder)
            for text in texts:  # one by one: a prompt is the same whatever stands beside it
                rows = encoder.encode([text])
                self.known[text] = {name: value[0].cpu() for name, value in rows.items()}
            self.pipeline, self.held = encoder.name, encoder if self.keep else None
        finally:
            del encoder
            free_memory()
            for module in moved:
                module.to(self.device)

    def _load(self, place: str, folder: str) -> TextEncoder:
        dtype = getattr(torch, self.source.dtype)
        encoder = load_text_encoder(folder, "", self.source.tokens, dtype, self.device)
        if encoder.digest != self.source.digest:
            raise UserError(
                f"text_encoder = {place}: it is another text encoder ({encoder.digest[:12]}) than the one that the"
                f" student's prompts were encoded with ({self.source.digest[:12]}): name the teacher's own pipeline"
            )
        return encoder

    def place(self) -> tuple[str, str]:
        """Path or hub id, and revision, of the pipeline that encodes. Raises UserError where there is none."""
        for place, revision in self.places:
            if holds_text_encoder(place) or (HUB_ID.fullmatch(place) and not Path(place).exists()):
                return place, revision
        looked = ", ".join(place for place, _ in self.places if place)
        raise UserError(
            f"no text encoder for prompts in words: {f'none in {looked}' if looked else 'the card names none'}; name"
            " the teacher's pipeline, text_encoder=FOLDER or hub id, or give encoded prompts, prompts=FOLDER"
        )

    def _fits(self, folder: str) -> bool:
        """Whether the device has room for the text encoder beside what is there; other devices than GPUs always do."""
        if self.device.type != "cuda" or self.held is not None:
            return True
        size = sum(file.stat().st_size for file in Path(folder).glob("text_encoder*/*.safetensors"))
        return SPARE * size < torch.cuda.mem_get_info(self.device)[0]


def holds_text_encoder(place: str) -> bool:
    """Whether a folder of this machine is a pipeline with a text encoder."""
    folder = Path(place or "/nowhere")
    return (folder / "model_index.json").is_file() and any(folder.glob("text_encoder*/*.safetensors"))
