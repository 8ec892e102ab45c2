"""Prompts that a command names, in the place of those that its runs were trained on, encoded as theirs were."""

import hashlib
import json
from pathlib import Path
from typing import Any, Protocol

import torch

from dmd_dar import config
from dmd_dar.data.prompt_files import read_prompts
from dmd_dar.encode import EncodeConfig, encode
from dmd_dar.models.prompts import Prompts
from dmd_dar.models.words import Source, Words

from ..samples.parallel import Processes

LEAST, IMAGES = 64, 1024  # images of a set, and where nothing says their number


class PromptKeys(Protocol):
    """The keys of a command that say which prompts are sampled, and how many images of each; see `ReportConfig`."""

    @property
    def prompts(self) -> str: ...
    @property
    def text_encoder(self) -> str: ...
    @property
    def n(self) -> int: ...
    @property
    def seeds(self) -> int: ...
    @property
    def cache(self) -> str: ...
    @property
    def cpu(self) -> bool: ...


def encoded_for(folder: Path, origin: dict[str, Any], keys: PromptKeys, processes: Processes) -> str:
    """The folder of `keys.prompts`, a file in words or such a folder, for the run in `folder`; "" where none is named.

    origin: what the card of its student says. A file is encoded by the run's own text encoder, at its length, in its
    type and beside its negative prompt, and kept in `cache`. A ConfigError for a run that reads class labels, UserError
    where the text encoder is gone or is another one.
    """
    if not keys.prompts:
        return ""
    source = Source.of(origin)
    if not source.digest:
        raise config.ConfigError(f"prompts = {keys.prompts}: {folder} reads class labels; leave prompts out")
    if Path(keys.prompts).is_dir():
        return keys.prompts
    own = {"tokens": source.tokens, "dtype": source.dtype, "negative": Prompts(str(origin["prompts"])).negative}
    described = json.dumps([read_prompts(keys.prompts), source.digest, own])
    out = Path(keys.cache) / f"prompts_{hashlib.sha256(described.encode()).hexdigest()[:16]}"
    card = str(origin.get("text_encoder", "")), str(origin.get("text_encoder_revision", ""))
    places = ((keys.text_encoder, ""),) if keys.text_encoder else ((str(folder / "student"), ""), card)
    pipeline, revision = Words(source, places, torch.device("cpu")).place()
    encode(
        EncodeConfig(str(out), prompts=keys.prompts, pipeline=pipeline, pipeline_revision=revision, cpu=keys.cpu, **own)
    )
    processes.any(False)  # each has encoded its share: none reads before all have
    if Prompts(str(out)).encoder != source.digest:
        raise config.ConfigError(
            f"prompts = {keys.prompts}: {pipeline} holds another text encoder than the one that {folder} was trained"
            " with; name the teacher's own pipeline, text_encoder=FOLDER"
        )
    return str(out)


def images_of(keys: PromptKeys, conditions: int) -> int:
    """How many images of a set: `seeds` of each of the prompts or classes, else n.

    Image i is seed i // K of prompt i % K, of K prompts. A ConfigError for both, and below LEAST images.
    """
    if not keys.seeds:
        return keys.n
    if keys.n != IMAGES:
        raise config.ConfigError(f"n = {keys.n}, seeds = {keys.seeds}: both say how many images, leave one of them out")
    count = keys.seeds * conditions
    if count < LEAST:
        raise config.ConfigError(
            f"seeds = {keys.seeds}: of {conditions} prompts that is {count} images, and comparisons need {LEAST} at"
            f" least; set seeds={-(-LEAST // conditions)}, or name more prompts"
        )
    return count
