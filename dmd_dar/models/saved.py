"""A trained network on disk: a folder in diffusers' layout, with a card that says how to use the network.

    denoiser.json      the card (`ModelCard`) and the network's hash; written last
    transformer/       config.json and safetensors; a class of diffusers, or SiTTransformer, which is ours
    scheduler/         for diffusers' eyes: the chain and the rungs, see schedulers.py
    vae/               the codec of a latent network, a copy
    model_index.json   for diffusers' eyes: the classes of these parts and the names of the labels; not read here
    text_encoder/ ...  of a student whose base is a pipeline, so that diffusers loads one; not read here

Folders of before are read too: model.json and model.safetensors of a SiT, denoiser.json of format 1.
"""

import hashlib
import json
import math
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save

from dmd_dar import flow
from dmd_dar.atomic import make_folder, replaced_folder, write_atomic
from dmd_dar.errors import DamagedFileError, MissingWeightsError, UserError
from dmd_dar.flow import Sampler
from dmd_dar.models.codecs import Codec
from dmd_dar.models.denoiser import MEANINGS, Meaning, Prediction, meaning_from_dict, meaning_of
from dmd_dar.models.diffusers_denoiser import DiffusersDenoiser, Reading, load_transformer
from dmd_dar.models.families.form import FixedInputs
from dmd_dar.models.frozen import store
from dmd_dar.models.hub import files_hash, read_json
from dmd_dar.models.merging import write_merged
from dmd_dar.models.pipeline_folder import Base, base_of, index_of, lay_parts
from dmd_dar.models.prompts import Prompts
from dmd_dar.models.schedulers import faults_of, scheduler_config, student_config
from dmd_dar.models.shared_lora import LoraDenoiser, merged
from dmd_dar.models.sit import SiT, SiTConfig
from dmd_dar.routing.folder import FORM
from dmd_dar.routing.layout import RoutingConfig

Denoiser = SiT | DiffusersDenoiser
CARD, FORMAT = "denoiser.json", 2
OLD_CARD = "model.json"  # of a SiT, format 1
SIT_CLASS, SIT_WEIGHTS = "SiTTransformer", "model.safetensors"  # diffusers looks for weights of another name
PARTS = ("README.md", "transformer", "adapter", OLD_CARD, SIT_WEIGHTS)  # of no use beside another network


@dataclass(frozen=True)
class ModelCard:
    """How to use a network and where it comes from."""

    prediction: Prediction | Meaning = "flow"
    rungs: tuple[float, ...] = ()  # of a few-step student; empty for a teacher
    label_names: tuple[str, ...] = ()
    origin: dict[str, Any] = field(default_factory=dict)  # free: data hash, command, step, teacher hash
    sampler: Sampler = "stochastic"  # that a few-step student was trained with

    def __post_init__(self) -> None:
        if not isinstance(self.prediction, Meaning) and self.prediction not in MEANINGS:
            raise ValueError(f"prediction must be one of {tuple(MEANINGS)}, got {self.prediction!r}")
        if self.sampler not in get_args(Sampler):
            raise ValueError(f"sampler must be one of {get_args(Sampler)}, got {self.sampler!r}")
        if self.rungs:
            flow.check_rungs(self.rungs)

    def at(self, step: int) -> "ModelCard":
        """The same of a network that was trained for `step` steps."""
        return replace(self, origin={**self.origin, "steps": step})


@dataclass(frozen=True)
class Saved:
    """A card as it was read, and what the folder says beside it."""

    card: ModelCard
    digest: str  # SHA-256, hexadecimal, of all that decides what the network computes, but for a table of prompts
    codec: dict[str, Any]  # codec, codec_revision, codec_digest of its latents, as far as known; none for pixels


def save_network(folder: Path, network: Denoiser, card: ModelCard, codec: Codec | None = None) -> None:
    """Write the folder; what stood there stays whole until all of the new one is on the disk."""
    with replaced_folder(folder, PARTS) as new:
        write_network(new, network, card, codec)


def write_network(folder: Path, network: Denoiser | LoraDenoiser, card: ModelCard, codec: Codec | None = None) -> str:
    """Fill an empty folder; returns the network's hash. A LoRA student is written merged."""
    transformer = make_folder(folder / "transformer")
    if isinstance(network, LoraDenoiser) and isinstance(network.network, DiffusersDenoiser):
        write_merged(transformer, network)
        network, written = network.network, True
    else:
        network, written = merged(network), False
    if isinstance(network, SiT):
        weights = save({name: value.contiguous().cpu() for name, value in network.state_dict().items()})
        write_atomic(transformer / SIT_WEIGHTS, weights)
        _write_json(transformer / "config.json", {"_class_name": SIT_CLASS, **asdict(network.config)})
    elif not written:
        network.transformer.save_pretrained(transformer)
    base = base_of(card.origin) if card.rungs and isinstance(network, DiffusersDenoiser) else None
    parts = {} if base is None else lay_parts(base, folder)
    if codec is not None:
        codec.vae.save_pretrained(folder / "vae")
        parts["vae"] = ["diffusers", type(codec.vae).__name__]
    _write_json(make_folder(folder / "scheduler") / "scheduler_config.json", _scheduler(network, card, base))
    _write_json(folder / "model_index.json", _index(network, card, base, parts))
    digest = _hash(folder, card)
    _write_json(folder / CARD, {"format": FORMAT, **asdict(card), "vae": codec is not None, "network": digest})
    return digest


def _scheduler(network: Denoiser, card: ModelCard, base: Base | None) -> dict[str, Any]:
    """Ours in a pipeline; one of diffusers' own, as far as one knows the rungs, beside a network alone."""
    meaning = meaning_of(card.prediction)
    if base is None or isinstance(network, SiT):
        return scheduler_config(meaning, card.rungs, card.sampler)
    unguided = network.family.unguided(network.transformer.config, network.fixed)
    return student_config(meaning, card.rungs, card.sampler, unguided)


def _index(network: Denoiser, card: ModelCard, base: Base | None, parts: dict[str, list[str]]) -> dict[str, Any]:
    """model_index.json: the base's, or for a network alone a class that diffusers does not have."""
    named = {"id2label": dict(enumerate(card.label_names))} if card.label_names else {}
    routed = network.routing.query != "residual"
    if base is not None and isinstance(network, DiffusersDenoiser):
        return {**index_of(base, type(network.transformer).__name__, routed, parts), **named}
    kind = ["dmd_dar", SIT_CLASS] if isinstance(network, SiT) else ["diffusers", type(network.transformer).__name__]
    scheduler = scheduler_config(meaning_of(card.prediction), card.rungs, card.sampler)["_class_name"]
    chain = meaning_of(card.prediction).schedule is not None
    theirs = kind[1] == "DiTTransformer2DModel" and not routed and "vae" in parts and chain
    index = {"_class_name": "DiTPipeline" if theirs else "StudentPipeline"}
    return {**index, "transformer": kind, "scheduler": ["diffusers", scheduler], **parts, **named}


def _write_json(file: Path, values: dict[str, Any]) -> None:
    write_atomic(file, json.dumps(values, indent=1))


def holds_network(folder: str | Path) -> bool:
    """Whether `folder` is one that this module wrote, today or before."""
    return (Path(folder) / CARD).is_file() or (Path(folder) / OLD_CARD).is_file()


def _is_old(folder: Path) -> bool:
    return (folder / OLD_CARD).is_file() and not (folder / CARD).is_file()


def read_network(
    folder: Path,
    prompts: Prompts | None = None,
    fixed: FixedInputs | None = None,
    device: torch.device | str = "cpu",
    reading: Reading | None = None,
) -> Denoiser:
    """The network of a folder whose card was read: on `device`, in evaluation mode, frozen; kept as `reading` says.

    Raises MissingWeightsError naming the missing file, DamagedFileError naming the file that does not fit the others.
    """
    sit = _sit_files(folder)
    if sit is None:
        return load_transformer(folder / "transformer", prompts, fixed, device, reading)
    return kept_so(_load_sit(*sit).to(device), reading)


def kept_so(network: SiT, reading: Reading | None) -> SiT:
    """The network, in place, with its frozen blocks kept as `reading` says."""
    if reading is not None:
        store(network, reading.kept.dtype, reading.kept.offload)
    return network


def load_network(folder: str | Path, device: torch.device | str = "cpu") -> tuple[SiT, ModelCard]:
    """The SiT of a folder, in evaluation mode, frozen, and its card.

    Raises what `read_card` and `read_network` do, and UserError for a network of another class.
    """
    card, sit = read_card(folder).card, _sit_files(Path(folder))
    if sit is None:
        name = read_json(Path(folder) / "transformer" / "config.json").get("_class_name")
        raise UserError(f"{folder} holds a {name}: this needs a SiT of this project")
    return _load_sit(*sit).to(device), card


def network_hash(folder: str | Path) -> str:
    """SHA-256, hexadecimal, of all that decides what the network computes: weights, shape, routing, prediction.

    A SiT has the same one in either form of the folder.
    """
    return read_card(folder).digest


def weight_count(folder: str | Path) -> int:
    """How many numbers the weights of a network are, from the heads of their files: no weight is read."""
    sit, count = _sit_files(Path(folder)), 0
    files = sorted((Path(folder) / "transformer").glob("*.safetensors")) if sit is None else [sit[2]]
    for file in files:
        try:
            with safe_open(file, "pt") as opened:
                count += sum(math.prod(opened.get_slice(name).get_shape()) for name in opened.keys())  # noqa: SIM118
        except SafetensorError as error:
            raise DamagedFileError(f"{file} cannot be read: {error}; restore it") from error
    return count


def read_card(folder: str | Path) -> Saved:
    """What a folder of either form says of its network.

    Raises MissingWeightsError naming the missing file; DamagedFileError naming the file that is of another format or
    form, or was not saved together with the others: rungs or chain that differ between card and scheduler, another
    network than the card's hash says.
    """
    folder = Path(folder)
    file = folder / (OLD_CARD if _is_old(folder) else CARD)
    described = read_json(file)
    try:
        version = described.pop("format")
        if version not in ((1, FORMAT) if file.name == CARD else (1,)):
            raise ValueError(f"its format is not {FORMAT if file.name == CARD else 1}")
        if version == FORMAT:
            return _checked(folder, described)
        described.pop("model", None)
        if "meaning" in described:
            described["prediction"] = described.pop("meaning")
        card = card_from_dict(described)
        return Saved(card, _hash(folder, card), card.origin)
    except UserError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise DamagedFileError(f"{file} describes no network of this project: {error}") from error


def card_from_dict(described: dict[str, Any]) -> ModelCard:
    """The inverse of dataclasses.asdict(card), through JSON. Raises KeyError, TypeError or ValueError for others."""
    values: dict[str, Any] = {name: tuple(x) if isinstance(x, list) else x for name, x in described.items()}
    if isinstance(values["prediction"], dict):
        values["prediction"] = meaning_from_dict(values["prediction"])
    return ModelCard(**values)


def _checked(folder: Path, described: dict[str, Any]) -> Saved:
    """Today's form, whose parts must have been saved together."""
    latent, digest = described.pop("vae"), described.pop("network")
    card, file = card_from_dict(described), folder / "scheduler" / "scheduler_config.json"
    if wrong := faults_of(read_json(file), meaning_of(card.prediction), card.rungs, card.sampler):
        differences = ", ".join(f"{name} = {theirs} where {CARD} says {ours}" for name, (theirs, ours) in wrong.items())
        raise DamagedFileError(
            f"{file}: {differences}; one of them belongs to another network: restore the whole folder"
        )
    if _hash(folder, card) != digest:
        raise DamagedFileError(
            f"{folder / 'transformer'} is not the network that {CARD} was saved with: its weights or its config.json"
            " were changed, or come from another folder; restore the whole folder"
        )
    own = {"codec": str(folder / "vae"), "codec_digest": card.origin.get("codec_digest", "")}
    return Saved(card, digest, own if latent else {})


def _hash(folder: Path, card: ModelCard) -> str:
    sit = _sit_files(folder)
    if sit is None:
        return transformer_hash(folder / "transformer", card.prediction)
    shape, _, weights = sit
    meaning = json.dumps([shape, card.prediction], sort_keys=True)
    return hashlib.sha256(weights.read_bytes() + meaning.encode()).hexdigest()


def transformer_hash(
    transformer: Path,
    prediction: Prediction | Meaning,
    prompts: str = "",
    fixed: FixedInputs | None = None,
) -> str:
    """The hash of a diffusers transformer's folder and of what it is given: no path, no version of diffusers in it.

    `prompts` is the hash of its prompts, empty for none.
    """
    shape = {name: value for name, value in read_json(transformer / "config.json").items() if not name.startswith("_")}
    files = sorted([*transformer.glob("*.safetensors"), *transformer.glob(FORM)])
    more = [prompts] if prompts else []
    more += [] if fixed in (None, FixedInputs()) else [json.dumps(asdict(fixed), sort_keys=True)]
    return files_hash(files, json.dumps([asdict(meaning_of(prediction)), shape], sort_keys=True), *more)


def _sit_files(folder: Path) -> tuple[dict[str, Any], Path, Path] | None:
    """A SiT's shape, the file it stands in and the file of its weights; None for a folder of another network."""
    if _is_old(folder):
        file, weights = folder / OLD_CARD, folder / SIT_WEIGHTS
        shape = read_json(file)["model"]
    else:
        file, weights = folder / "transformer" / "config.json", folder / "transformer" / SIT_WEIGHTS
        shape = read_json(file)
        if shape.pop("_class_name", None) != SIT_CLASS:
            return None
    if not weights.is_file():
        raise MissingWeightsError(f"{weights} is missing: give a folder that a run of this project saved")
    return shape, file, weights


def _load_sit(shape: dict[str, Any], file: Path, weights: Path) -> SiT:
    try:
        network = SiT(SiTConfig(**{**shape, "routing": RoutingConfig(**shape["routing"])}))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise DamagedFileError(f"{file} describes no network of this project: {error}") from error
    try:
        network.load_state_dict(load_file(weights))
    except (RuntimeError, SafetensorError) as error:
        raise DamagedFileError(f"{weights} does not hold the weights of {file.name}: {error}") from error
    return network.eval().requires_grad_(False)
