"""The files of a model that a user names, a local path or a hub id in Hugging Face's cache: found, read, hashed."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from dmd_dar.errors import DamagedFileError, MissingWeightsError, UserError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# Configurations and safetensors only: pickled weights are not even fetched.
FILES = ("*.json", "diffusion_pytorch_model*.safetensors", "model.safetensors")
VAE_FILES = ("vae/*.safetensors",)
TEXT_FILES = ("text_encoder*/*.safetensors", "tokenizer*/*.model", "tokenizer*/merges.txt", "tokenizer*/*.jinja")
TEACHER_FILES = ("README.md", "transformer/*.safetensors", *VAE_FILES)  # the first for its licence
DIFFUSERS, TRANSFORMERS = "diffusion_pytorch_model", "model"  # how their files of weights begin


def resolve(path: str, revision: str = "", more: tuple[str, ...] = TEACHER_FILES) -> Path:
    """The local file or folder of `path`; a hub id "OWNER/NAME" becomes its snapshot at `revision` (a branch, tag,
    commit or "refs/pr/N"; empty: the default branch), which holds FILES and those of the patterns `more`.

    HF_HUB_OFFLINE=1 is honoured: only what the cache holds is then found. Raises MissingWeightsError where nothing is
    found, UserError for a revision of a local path.
    """
    local = Path(path)
    if local.exists():
        if revision:
            raise UserError(f"revision {revision!r} is for hub ids, but {path} is a local path: leave revision out")
        return local
    if not is_hub_id(path):
        raise MissingWeightsError(f"{path}: no such file or folder, and no hub id; write OWNER/NAME for a hub id")
    return snapshot(path, revision, (*FILES, *more))


def is_hub_id(path: str) -> bool:
    """Whether it is OWNER/NAME and neither is here."""
    return HUB_ID.fullmatch(path) is not None and not Path(path).exists() and not Path(path.partition("/")[0]).exists()


def configurations(path: str, revision: str = "") -> Path:
    """`resolve`, but of a hub id the configurations alone: no weights are fetched."""
    return Path(path) if Path(path).exists() else snapshot(path, revision, ("*.json",))


def snapshot(name: str, revision: str, patterns: tuple[str, ...], cache: Path | None = None) -> Path:
    """A hub id's files of these patterns, in the hub's cache or another; see `resolve`."""
    from huggingface_hub import constants, snapshot_download

    offline = constants.HF_HUB_OFFLINE
    at = f"{name} at revision {revision}" if revision else name
    try:
        given = {"allow_patterns": [*patterns], "local_files_only": offline, "cache_dir": cache}
        return Path(snapshot_download(name, revision=revision or None, **given))
    except (OSError, ValueError) as error:
        if offline:
            remedy = (
                "HF_HUB_OFFLINE is set and the cache does not hold it: fetch it once with HF_HUB_OFFLINE=0, or copy"
            )
            remedy += " the folder here and name its path"
        else:
            remedy = (
                "no such path here, and the hub did not give it: check the name, the revision and the connection, or"
            )
            remedy += " copy the folder here and name its path"
        raise MissingWeightsError(f"{at}: {remedy} ({type(error).__name__})") from error


def local_safetensors(folder: Path, stem: str) -> dict[str, Any]:
    """The arguments with which from_pretrained reads a folder's own safetensors and nothing else; see `variant_of`."""
    return {"variant": variant_of(folder, stem), "use_safetensors": True, "local_files_only": True}


def weight_files(folder: Path, stem: str) -> list[Path]:
    """A folder's own safetensors, of the variant that `variant_of` says: one file, or those that its index names.

    Raises what `variant_of` does, and DamagedFileError where the index names files elsewhere, or that are not here.
    """
    variant = variant_of(folder, stem)
    index = folder / f"{stem}.safetensors.index{f'.{variant}' if variant else ''}.json"
    if not index.is_file():
        return [folder / f"{stem}{f'.{variant}' if variant else ''}.safetensors"]
    named = read_json(index).get("weight_map")
    names = sorted({str(name) for name in named.values()}) if isinstance(named, dict) else []
    wrong = [name for name in names if Path(name).name != name or not (folder / name).is_file()]
    if wrong or not names:
        raise DamagedFileError(f"{index} names {', '.join(wrong[:4]) or 'no files'}, not here: give the whole folder")
    return [folder / name for name in names]


def variant_of(folder: Path, stem: str) -> str | None:
    """The variant ("fp16") of a folder's safetensors, as from_pretrained takes it; None where the plain ones are there.

    `stem` is DIFFUSERS or TRANSFORMERS. Raises MissingWeightsError, naming what is there, where it is neither or where
    there are several variants, of which none is the plain one.
    """
    names = sorted(file.name for file in folder.iterdir())
    if {f"{stem}.safetensors", f"{stem}.safetensors.index.json"} & {*names}:
        return None
    form = re.compile(rf"{stem}\.(\w+)\.safetensors|{stem}\.safetensors\.index\.(\w+)\.json")
    variants = sorted({match.group(match.lastindex or 0) for match in map(form.fullmatch, names) if match})
    if len(variants) == 1:
        return variants[0]
    if variants:
        raise MissingWeightsError(
            f"{folder} holds no {stem}.safetensors but the variants {', '.join(variants)}, and which one is meant"
            " is unknown: save it as a plain one,"
            f" from_pretrained(..., variant={variants[0]!r}).save_pretrained(NEW_FOLDER)"
        )
    held = ", ".join(name for name in names if name.endswith((".safetensors", ".index.json")))
    raise MissingWeightsError(f"{folder} holds no {stem}.safetensors but {held}: rename it, or restore the folder")


def files_hash(files: list[Path], *more: str) -> str:
    """SHA-256, hexadecimal, of the files' names and contents, in order, and of `more`."""
    total = hashlib.sha256("\x1f".join(more).encode())
    for file in files:
        with file.open("rb") as content:
            total.update(f"\x1f{file.name}\x1f".encode() + hashlib.file_digest(content, "sha256").digest())
    return total.hexdigest()


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object; MissingWeightsError or DamagedFileError naming the file otherwise."""
    if not file.is_file():
        raise MissingWeightsError(f"{file} is missing: give the whole folder that diffusers saved")
    try:
        values = json.loads(file.read_text())
    except ValueError as error:
        raise DamagedFileError(f"{file} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise DamagedFileError(f"{file} holds no JSON object")
    return values
