"""The text encoders of a diffusers pipeline. Only `python -m dmd_dar.encode` loads them, no training job does.

B prompts, T tokens, D width.
"""

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from dmd_dar import moved
from dmd_dar.errors import DamagedFileError, MissingWeightsError, UserError
from dmd_dar.models.families import PIPELINES
from dmd_dar.models.families.form import Prompting
from dmd_dar.models.hub import TEXT_FILES, TRANSFORMERS, files_hash, local_safetensors, read_json, resolve
from dmd_dar.models.prompts import lengths_of

ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
PARTS = ("tokenizer", "tokenizer_2", "tokenizer_3", *ENCODERS)
SPARE = 2  # tokens that a prompt may take more beside a template than alone
LOADING = (OSError, ValueError, RuntimeError, TypeError, ImportError, SafetensorError)  # what a faulty folder raises


@dataclass(frozen=True)
class TextEncoder:
    """Tokenizers and text encoders of one pipeline."""

    pipeline: Any  # diffusers' own, without transformer, VAE and scheduler
    name: str
    prompting: Prompting
    tokens: int
    digest: str  # SHA-256, hexadecimal, of its files

    @torch.no_grad()
    def encode(self, prompts: list[str], negatives: int = 0) -> dict[str, Tensor]:
        """embedding (B, T, D) and, as the pipeline has it, mask (B, T) int64 or pooled (B, P); as the pipeline encodes.

        The last `negatives` prompts, and the empty one, are encoded as what guidance leads away from. A prompt of too
        many tokens is cut, and diffusers warns.
        """
        return self.prompting.encode(self.pipeline, prompts, self.tokens, negatives)

    def filled(self, prompts: list[str], rows: dict[str, Tensor], text: str) -> float:
        """About the share of tokens that are no padding, by the tokenizer alone; `rows` is the prompt `text`, encoded.

        1 where there is no mask, and so no padding that could be left out.
        """
        if "mask" not in rows:
            return 1.0
        longest = rows["embedding"].shape[1]
        around = int(lengths_of(rows)) - len(self.pipeline.tokenizer(text).input_ids)  # what the template adds
        found = self.pipeline.tokenizer(prompts, truncation=True, max_length=self.tokens).input_ids
        return sum(min(longest, max(1, len(one) + around + SPARE)) for one in found) / (longest * len(found))


def load_text_encoder(
    path: str, revision: str = "", tokens: int = 0, dtype: torch.dtype = torch.float32, device: Any = "cpu"
) -> TextEncoder:
    """The text encoder of the pipeline folder or hub id `path`; `tokens` 0 means as many as the pipeline reads itself.

    Raises UserError for a pipeline, tokenizer or encoder of a class that is not known, MissingWeightsError or
    DamagedFileError where files are missing or damaged.
    """
    import diffusers

    folder = resolve(path, revision, TEXT_FILES)
    index = read_json(folder / "model_index.json")
    name = str(index.get("_class_name"))
    if name not in PIPELINES:
        raise UserError(f"{folder} holds a {name}: prompts can be encoded for {', '.join(PIPELINES)}")
    prompting = PIPELINES[name]
    parts = [part for part in PARTS if index.get(part, [None, None]) != [None, None]]
    for part in parts:
        if index[part][0] != "transformers" or index[part][1] not in prompting.parts:
            known = ", ".join(prompting.parts)
            raise UserError(f"{folder / 'model_index.json'}: {part} is {index[part]}, none of {known}")
    left_out = [part for part in PARTS if part in index and part not in parts]
    options = dict.fromkeys(("transformer", "vae", "scheduler", *left_out))
    options |= {part: _load_encoder(folder / part, index[part][1], dtype) for part in parts if part in ENCODERS}
    try:
        pipeline = getattr(diffusers, name).from_pretrained(folder, **options, local_files_only=True)
    except LOADING as error:
        raise DamagedFileError(f"{folder}: its tokenizer cannot be loaded: {error}") from error
    files = [file for part in parts for file in sorted((folder / part).iterdir()) if file.is_file()]
    pipeline = pipeline.to(device)
    if prompting.asks_transformer and left_out:
        # zeros take the third one's place; only the transformer's configuration says how wide they are
        shape = read_json(folder / "transformer" / "config.json")
        pipeline.transformer = SimpleNamespace(config=SimpleNamespace(**shape))
    digest = files_hash(files, name, *prompting.template(pipeline))
    return TextEncoder(pipeline, name, prompting, tokens or prompting.tokens, digest)


def encoder_sizes(folder: Path) -> dict[str, int]:
    """Parameters of each text encoder of a pipeline folder, by its config.json alone; of known classes only."""
    import transformers

    file, found = folder / "model_index.json", {}
    index = read_json(file) if file.is_file() else {}
    prompting = PIPELINES.get(str(index.get("_class_name")))
    for part in ENCODERS if prompting is not None else ():
        library, name = index.get(part) or (None, None)
        config = folder / part / "config.json"
        if library == "transformers" and name in prompting.parts and config.is_file():  # type: ignore[union-attr]
            kind = getattr(transformers, name)
            with torch.device("meta"):
                model = kind(kind.config_class.from_json_file(config))
            found[part] = sum(parameter.numel() for parameter in model.parameters())
    return found


def _load_encoder(folder: Path, name: str, dtype: torch.dtype) -> Any:
    import transformers

    if not list(folder.glob("*.safetensors")):
        raise MissingWeightsError(f"{folder} holds no safetensors; pickled weights are not read")
    options = local_safetensors(folder, TRANSFORMERS)
    try:
        model, info = getattr(transformers, name).from_pretrained(
            folder, dtype=dtype, output_loading_info=True, **options
        )
    except LOADING as error:
        raise DamagedFileError(f"{folder}: transformers cannot load it: {error}") from error
    if faults := sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]])):
        raise DamagedFileError(f"{folder}: the weights do not fit config.json: {faults}")  # transformers only warns
    return model.eval()


moved.keep_names(__name__)
