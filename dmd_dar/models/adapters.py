"""A LoRA student apart from its base: an adapter in peft's form, and beside it its routers and whose adapter it is.

adapter_config.json, adapter_model.safetensors    as peft reads and writes them
pytorch_lora_weights.safetensors                  the same for diffusers' load_lora_weights and load_lora_adapter
routers.safetensors                               of a routed student, whose adapter peft and diffusers refuse
adapter.json                                      the card, the base's hash, the routing, the merged network's hash,
                                                  a SiT's attention heads
"""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from dmd_dar.atomic import make_folder, write_atomic
from dmd_dar.errors import DamagedFileError, UserError
from dmd_dar.models.denoiser import Meaning
from dmd_dar.models.diffusers_denoiser import routed_copy
from dmd_dar.models.hub import files_hash, read_json, resolve
from dmd_dar.models.prompts import Prompts
from dmd_dar.models.saved import ModelCard, card_from_dict
from dmd_dar.models.shared_lora import Lora, LoraConfig, LoraDenoiser, merged
from dmd_dar.models.sit import SiT, with_routing
from dmd_dar.models.teachers import Teacher, TeacherConfig, prompts_of
from dmd_dar.routing.layout import RoutingConfig

FORMAT, CARD = 1, "adapter.json"
CONFIG, WEIGHTS, ROUTERS = "adapter_config.json", "adapter_model.safetensors", "routers.safetensors"
DIFFUSERS = "pytorch_lora_weights.safetensors"  # which its loaders choose among the files of a folder
METADATA = "lora_adapter_metadata"  # of that file, in diffusers' words
PEFT = "base_model.model."  # before the names of the base's layers
OURS = "transformer."  # before those of a diffusers transformer, in our wrapper and in diffusers' files
LORA = "LORA"  # peft's type of an adapter
BARRIER = "it has routers, load it with dmd_dar's load_pipeline"  # where peft and diffusers look, and then quote it


def write_adapter(folder: Path, student: LoraDenoiser, card: ModelCard, digest: str = "") -> str:
    """Fill an empty folder; returns the network's hash.

    That is `digest`, the merged network's where it was written, too, else one of the adapter and its base, whose own is
    card.origin["teacher"].
    """
    layers, routers = _layers(student), _routers(student)
    updates = {f"{name}.lora_A.weight": layer.lora.A for name, layer in layers.items()}
    # The scale is part of B: load_lora_adapter takes 1 whatever a configuration beside the file says.
    updates |= {f"{name}.lora_B.weight": layer.lora.scale * layer.lora.B for name, layer in layers.items()}
    rank, kind = len(next(iter(updates.values()))), BARRIER if routers else LORA
    config = {"peft_type": kind, "base_model_name_or_path": None, "r": rank}
    config |= {"lora_alpha": rank, "bias": "none", "target_modules": sorted(layers), "lora_dropout": 0.0}
    write_atomic(make_folder(folder) / WEIGHTS, _bytes({_prefix(kind) + name: x for name, x in updates.items()}))
    write_atomic(folder / CONFIG, json.dumps({**config, "inference_mode": True}, indent=1))
    if hasattr(getattr(student.network, "transformer", None), "load_lora_adapter"):
        if routers:
            updates = {f"{BARRIER}.lora_{part}.weight": torch.zeros(1, 1) for part in "AB"}
        said = {"r": rank, "lora_alpha": rank, "target_modules": sorted(layers), "lora_dropout": 0.0, "bias": "none"}
        about = {} if routers else {METADATA: json.dumps({OURS + name: value for name, value in said.items()})}
        write_atomic(folder / DIFFUSERS, _bytes({OURS + name: x for name, x in updates.items()}, about))
    if routers:
        write_atomic(folder / ROUTERS, _bytes(routers))
    if not digest:
        files = [folder / name for name in (WEIGHTS, CONFIG, ROUTERS) if (folder / name).is_file()]
        digest = files_hash(files, card.origin["teacher"])
    described = {"format": FORMAT, "card": asdict(card), "base": card.origin["teacher"], "network": digest}
    described |= {"routing": asdict(student.routing), "heads": getattr(student.config, "heads", 0)}
    write_atomic(folder / CARD, json.dumps(described, indent=1))
    return digest


def adapter_origin(folder: Path) -> dict[str, Any]:
    """What the adapter's card says of where it comes from, {} for none; `base_config` says what is wrong with it."""
    card = read_json(folder / CARD).get("card")
    return dict(card.get("origin") or {}) if isinstance(card, dict) else {}


def base_config(
    folder: Path, path: str, revision: str = "", prompts: str = "", table: Prompts | None = None
) -> TeacherConfig:
    """How the base at `path` is loaded: with what the adapter's own card says that its files may leave open.

    table: stands for prompts whose folder is not here.
    Raises MissingWeightsError or DamagedFileError naming the file, UserError where the prompts that it was trained on
    have changed, or `prompts` were encoded by another encoder.
    """
    try:
        described = read_json(folder / CARD)
        card, heads = card_from_dict(described["card"]), int(described.get("heads", 0))
        origin, prediction = card.origin, card.prediction
        size, guidance = int(origin.get("input_size", 0)), float(origin.get("embedded_guidance", 0))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise DamagedFileError(f"{folder} holds no adapter of this project: {error!r}") from error
    table = None if table is not None else prompts_of(TeacherConfig(path, prompts=prompts), origin)
    bare = (resolve(path, revision) / "config.json").is_file()
    if bare and prediction == Meaning("flow", time_scale=1000.0):
        prediction = "flow"  # as a bare transformer that reads prompts takes it
    return TeacherConfig(
        path,
        revision,
        prediction="auto" if isinstance(prediction, Meaning) else prediction,
        heads=heads,
        prompts="" if table is None else table.folder,
        input_size=size,
        embedded_guidance=guidance,
        lora=str(origin.get("lora", "")),
    )


def described_in(described: dict[str, Any]) -> tuple[ModelCard, str, RoutingConfig]:
    """(card, the base's hash, routing) of an adapter.json; KeyError, TypeError or ValueError for another format."""
    if described["format"] != FORMAT:
        raise ValueError(f"its format is not {FORMAT}")
    return card_from_dict(described["card"]), str(described["base"]), RoutingConfig(**described["routing"])


def load_adapter(folder: Path, base: Teacher) -> Teacher:
    """The student: `base` with the adapter merged into it, and the student's routers.

    Raises UserError where the adapter was trained on another base, MissingWeightsError or DamagedFileError naming the
    file that is missing or does not fit.
    """
    described, config = read_json(folder / CARD), read_json(folder / CONFIG)
    try:
        card, trained_on, routing = described_in(described)
        targets = tuple(str(name) for name in config["target_modules"])
        lora, kind = LoraConfig(int(config["r"]), float(config["lora_alpha"]), targets), str(config["peft_type"])
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise DamagedFileError(f"{folder} holds no adapter of this project: {error!r}") from error
    digest = base.digest_with(card.origin.get("prompts_hash", ""))
    if trained_on != digest:
        raise UserError(
            f"{folder} is an adapter of the network {trained_on[:12]}, and this base is {digest[:12]}: name the"
            " teacher that the student was distilled from"
        )
    routed = with_routing if isinstance(base.network, SiT) else routed_copy
    student = LoraDenoiser(routed(base.network, routing, True), lora)  # type: ignore[arg-type]
    layers, before = _layers(student).items(), _prefix(kind)
    own = {f"{before}{name}.lora_{part}.weight": getattr(x.lora, part) for name, x in layers for part in "AB"}
    fill(folder / WEIGHTS, own)
    if routers := _routers(student):
        fill(folder / ROUTERS, routers)
    facts = {"rungs": card.rungs, "label_names": card.label_names, "origin": card.origin, "sampler": card.sampler}
    facts |= _codec(card.origin, base)
    prompts = base.network.prompts
    digest = str(described["network"]) if prompts is None else files_hash([], str(described["network"]), prompts.hash)
    return replace(base, network=merged(student).eval(), digest=digest, **facts)


def _codec(origin: dict[str, Any], base: Teacher) -> dict[str, str]:
    """Teacher's codec fields: the card's codec or, where a path in it is not on this machine, the base's own."""
    fields = {name: str(origin.get(name, "")) for name in ("codec", "codec_revision", "codec_digest")}
    if base.codec and not Path(fields["codec"]).exists():
        fields |= {"codec": base.codec, "codec_revision": base.codec_revision}
    return fields


def _layers(student: LoraDenoiser) -> dict[str, Any]:
    """The updated layers by their names in the base, as its own library names them."""
    named = student.network.named_modules()
    return {name.removeprefix(OURS): x for name, x in named if isinstance(getattr(x, "lora", None), Lora)}


def _prefix(kind: str) -> str:
    """What stands before a layer's name in WEIGHTS: of an adapter that is none of peft's, no layer has that name."""
    return PEFT if kind == LORA else f"{PEFT}{kind}."


def _routers(student: LoraDenoiser) -> dict[str, nn.Parameter]:
    own = {id(parameter) for parameter in student.network.router_parameters()}
    return {name: value for name, value in student.network.named_parameters() if id(value) in own}


def _bytes(tensors: dict[str, Any], about: dict[str, str] | None = None) -> bytes:
    written = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    return save(written, {"format": "pt", **(about or {})})


def updates_of(folder: Path) -> dict[str, Tensor]:
    """The updates of an adapter, by their names in the base as its own library names them, for a scale of 1.

    Raises MissingWeightsError or DamagedFileError naming the file.
    """
    config = read_json(folder / CONFIG)
    try:
        before = _prefix(str(config["peft_type"]))
        scale = float(config["lora_alpha"]) / int(config["r"])  # not part of B in those of earlier versions
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise DamagedFileError(f"{folder / CONFIG} does not say how its updates are scaled: {error!r}") from error
    saved = {name.removeprefix(before): value for name, value in _tensors(folder / WEIGHTS).items()}
    return {name: scale * value if name.endswith("lora_B.weight") else value for name, value in saved.items()}


def _tensors(file: Path) -> dict[str, Tensor]:
    """Raises DamagedFileError naming the file where it cannot be read."""
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise DamagedFileError(f"{file} cannot be read: {error}") from error


def fill(file: Path, own: dict[str, Any]) -> None:
    """Copy a file's tensors into those of the same names; DamagedFileError where names or shapes differ."""
    saved = _tensors(file)
    shapes = [{name: tuple(value.shape) for name, value in tensors.items()} for tensors in (saved, own)]
    if shapes[0] != shapes[1]:
        wrong = sorted(name for name in {*saved, *own} if shapes[0].get(name) != shapes[1].get(name))
        raise DamagedFileError(f"{file} does not fit its base and {CONFIG}: {', '.join(wrong[:4])}")
    with torch.no_grad():
        for name, value in own.items():
            value.copy_(saved[name])
