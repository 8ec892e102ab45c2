"""Teachers that users have, by path: our own folders, diffusers folders and hub ids, the public SiT and DiT weights.

Nothing is unpickled, and no code that comes with weights is run.
"""

import math
import re
import zipfile
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dmd_dar import moved
from dmd_dar.data.config import DataConfig
from dmd_dar.errors import DamagedFileError, UserError
from dmd_dar.flow import Sampler
from dmd_dar.keys import key
from dmd_dar.models.codecs import Codec, Decoding, load_codec, vae_of
from dmd_dar.models.denoiser import MEANINGS, Meaning, Prediction, meaning_of
from dmd_dar.models.diffusers_denoiser import DiffusersDenoiser, Reading, load_transformer
from dmd_dar.models.families.form import FixedInputs
from dmd_dar.models.hub import files_hash, read_json, resolve
from dmd_dar.models.pipeline_folder import Base, base_at, base_of
from dmd_dar.models.prompts import Prompts
from dmd_dar.models.saved import (
    CARD,
    Denoiser,
    Saved,
    holds_network,
    kept_so,
    read_card,
    read_network,
    transformer_hash,
)
from dmd_dar.models.schedulers import meaning_of_scheduler
from dmd_dar.models.sit import PRESETS, SiT, SiTConfig, sin_cos_positions
from dmd_dar.models.user_lora import fuse

LABELS = "y_embedder.embedding_table.weight"  # of the public weights: a row for each class, then the unconditional one
# Parts of names that wrappers of torch put in: DDP and its averages, torch.compile, FSDP, checkpointing.
WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
COUNTER = "n_averaged"  # of torch's AveragedModel, no weight


@dataclass(frozen=True)
class TeacherConfig:
    """Which teacher, and what its files leave open."""

    path: str = key("teachers/photos32", "folder of a run or of diffusers, hub id OWNER/NAME, or public SiT/DiT .pt")
    revision: str = key("", "branch, tag, commit or refs/pr/N of a hub id; empty: its default branch")
    prediction: Literal["auto", "flow", "sit", "dit"] = key(
        "auto",
        "what the output means; auto: as the folder says, or as a public .pt's file name (SiT-..., DiT-...) says",
    )
    heads: int = key(0, "attention heads of a .pt; 0: those of the public size of its width", least=0)
    lora: str = key("", "LoRA that it carries: diffusers' file or its folder, or a peft folder", path=True)
    codec: str = key("", "VAE of a latent teacher, folder or hub id; empty: the pipeline's own, or pixels")
    codec_revision: str = key("", "as revision, of the codec")
    codec_decode: Decoding = key(
        "whole", "images: several at a time, one (slices), or one in tiles, which takes the least memory"
    )
    prompts: str = key("", "folder of encoded prompts, for a teacher that reads prompts; see dmd_dar.encode", path=True)
    prompts_are_classes: bool = key(False, "prompt i describes class i of data; no need to say so if it is its name")
    input_size: int = key(0, "latent cells on a side, of a FLUX, which knows no size; 0: 128, 1024 pixels", least=0)
    embedded_guidance: float = key(0.0, "input of a FLUX with guidance_embeds, in diffusers 3.5; 0: none", least=0)


@dataclass(frozen=True)
class Teacher:
    """A frozen network, what its output means, and what else its files say."""

    network: Denoiser
    prediction: Prediction | Meaning
    digest: str  # SHA-256, hexadecimal, of all that decides what it computes
    label_names: tuple[str, ...] = ()
    rungs: tuple[float, ...] = ()  # of a few-step student; empty for a teacher
    codec: str = ""  # path or hub id for codecs.load_codec; empty for pixels
    codec_revision: str = ""
    codec_decode: Decoding = "whole"
    codec_digest: str = ""  # of the codec that it was trained with, where its folder says so
    origin: dict[str, Any] = field(default_factory=dict)  # what a run of this project says of where it comes from
    sampler: Sampler = "stochastic"  # that a few-step student was trained with
    prompts_are_classes: bool = False  # as TeacherConfig's
    transformer: Path | None = None  # the folder of a network that reads prompts
    text_encoder: str = ""  # path or hub id of the pipeline whose text encoder reads them; empty: not known
    text_encoder_revision: str = ""
    base: Base | None = None  # the pipeline that it is, or was distilled in
    lora: str = ""  # path of what was fused into it
    lora_hash: str = ""

    def knows(self, label_names: tuple[str, ...]) -> bool:
        """Whether data of those classes has its conditions: labels always, prompts if they are the classes' names."""
        prompts = self.network.prompts
        return prompts is None or self.prompts_are_classes or prompts.are(label_names)

    def digest_with(self, prompts: str) -> str:
        """The digest that it would have with the prompts of that hash; its own where it reads none."""
        if self.transformer is None:
            return self.digest
        own = transformer_hash(self.transformer, self.prediction, prompts, self.network.fixed)  # type: ignore[union-attr]
        return files_hash([], own, self.lora_hash) if self.lora else own


def load_teacher(
    config: TeacherConfig,
    device: torch.device | str = "cpu",
    saved: Saved | None = None,
    table: Prompts | None = None,
    reading: Reading | None = None,
) -> Teacher:
    """The teacher at `config.path`, in evaluation mode, frozen, on `device`, its weights kept as `reading` says.

    saved: `read_card` of the folder, where it was read before, so that weights of gigabytes are not hashed again.
    table: takes the place of the prompts that the configuration or the folder names.
    Raises UserError or a kind of it, naming the file and the remedy, where nothing is found, a file is damaged, needs
    unpickling or another kind of condition, or does not say what its output means.
    """
    place, to = resolve(config.path, config.revision), (device, reading)
    if place.is_file():
        teacher = _public(place, config, *to)
    elif holds_network(place):
        teacher = _saved(place, config, saved or read_card(place), table, *to)
    elif (place / "transformer").is_dir():
        teacher = _pipeline(place, config, table, *to)
    elif (place / "config.json").is_file():
        teacher = _transformer(place, config, table, *to)
    else:
        raise UserError(f"{place} holds no teacher: no {CARD}, no transformer folder, no config.json")
    prompted = teacher.network.prompts is not None
    if (config.prompts or config.prompts_are_classes) and not prompted:
        raise UserError(f"{place} reads class labels: leave prompts out")
    if (config.input_size or config.embedded_guidance) and not isinstance(teacher.network, DiffusersDenoiser):
        raise UserError(f"{place} is no transformer that leaves them open: leave input_size and embedded_guidance out")
    teacher = replace(teacher, prompts_are_classes=config.prompts_are_classes)
    if not config.lora:
        return teacher
    added = fuse(teacher.network, config.lora)
    return replace(teacher, digest=files_hash([], teacher.digest, added), lora=config.lora, lora_hash=added)


def _saved(place: Path, config: TeacherConfig, saved: Saved, table: Prompts | None, *to: Any) -> Teacher:
    card, prediction = saved.card, _stated(config, saved.card.prediction, place)
    network = read_network(place, table or prompts_of(config, card.origin), _fixed(config, card.origin), *to)
    prompted = network.prompts is not None
    digest = _digest(place / "transformer", prediction, network) if prompted else saved.digest  # type: ignore[arg-type]
    facts = {**_codec(config, saved.codec), "origin": card.origin, "sampler": card.sampler}
    facts |= {"transformer": place / "transformer" if prompted else None, "base": base_of(card.origin)}
    facts |= {name: str(card.origin.get(name, "")) for name in ("text_encoder", "text_encoder_revision")}
    return Teacher(network, prediction, digest, card.label_names, card.rungs, **facts)


def _pipeline(place: Path, config: TeacherConfig, table: Prompts | None, *to: Any) -> Teacher:
    file = place / "scheduler" / "scheduler_config.json"
    meaning = None
    if file.is_file():
        try:
            meaning = meaning_of_scheduler(read_json(file))
        except (KeyError, TypeError, ValueError) as error:
            raise DamagedFileError(f"{file}: {error}") from error
    prediction = _stated(config, meaning, file)
    folder, names = place / "transformer", {"codec": vae_of(place)}
    network = load_transformer(folder, table or prompts_of(config), _fixed(config), *to)
    _check_encoder(place, network)
    facts = {**_codec(config, names), "transformer": folder if network.prompts is not None else None}
    if network.prompts is not None:
        facts |= {"text_encoder": config.path, "text_encoder_revision": config.revision}
    facts |= {"base": base_at(place, config.path, config.revision)}
    return Teacher(network, prediction, _digest(folder, prediction, network), _label_names(place, network), **facts)


def _check_encoder(place: Path, network: DiffusersDenoiser) -> None:
    """Raises UserError where the prompts were encoded for a pipeline of the family with other text encoders."""
    file, known, prompts = place / "model_index.json", network.family.pipelines, network.prompts
    own = str(read_json(file).get("_class_name")) if file.is_file() else ""
    if prompts is None or not prompts.count or own not in known or known[own].parts == known[prompts.pipeline].parts:
        return
    raise UserError(
        f"{prompts.folder} holds prompts encoded for {prompts.pipeline}, and {place} is a {own}, whose"
        " text encoder is another: encode them with its own"
    )


def _transformer(place: Path, config: TeacherConfig, table: Prompts | None, *to: Any) -> Teacher:
    """Of a transformer's folder alone, whose chain is unknown; those that read prompts count flow's t to 1000."""
    network = load_transformer(place, table or prompts_of(config), _fixed(config), *to)
    prediction = _stated(config, None, place / "config.json")
    if prediction == "flow" and network.family.time_scale != 1:
        prediction = Meaning("flow", time_scale=network.family.time_scale)
    facts = {**_codec(config), "transformer": place if network.prompts is not None else None}
    return Teacher(network, prediction, _digest(place, prediction, network), **facts)


def _digest(transformer: Path, prediction: Prediction | Meaning, network: DiffusersDenoiser) -> str:
    prompts = "" if network.prompts is None else network.prompts.hash
    return transformer_hash(transformer, prediction, prompts, network.fixed)


def _fixed(config: TeacherConfig, recorded: dict[str, Any] | None = None) -> FixedInputs:
    """What the configuration sets, else what the folder says."""
    size, guidance = ((recorded or {}).get(name, 0) for name in ("input_size", "embedded_guidance"))
    return FixedInputs(config.input_size or int(size), config.embedded_guidance or float(guidance))


def _codec(config: TeacherConfig, recorded: dict[str, Any] | None = None) -> dict[str, Any]:
    """Teacher's codec fields: what the configuration names, else what the folder says."""
    names, recorded = ("codec", "codec_revision", "codec_digest"), recorded or {}
    fields: dict[str, Any] = {name: str(recorded.get(name, "")) for name in names}
    fields |= {"codec_decode": config.codec_decode}
    if config.codec:
        fields |= {"codec": config.codec, "codec_revision": config.codec_revision}
    return fields


def codec_of(teacher: Teacher, device: torch.device | str = "cpu") -> Codec | None:
    """The codec of a latent teacher's images, None for pixels.

    Raises UserError where it is another one than the teacher was trained with, and what `load_codec` raises.
    """
    if not teacher.codec:
        return None
    codec = load_codec(teacher.codec, teacher.codec_revision)
    if teacher.codec_digest not in ("", codec.digest()):
        raise UserError(
            f"codec {teacher.codec} is another VAE than the one that the network was trained with"
            f" ({teacher.codec_digest[:12]}): restore it, or name the right one"
        )
    codec.decode_in(teacher.codec_decode)
    return codec.to(device)


def open_teacher(
    config: TeacherConfig,
    data: DataConfig,
    device: torch.device | str = "cpu",
    sized: bool = False,
    reading: Reading | None = None,
) -> tuple[Teacher, Codec | None]:
    """The frozen teacher and the codec of its latents, None for pixels.

    Raises UserError naming the key where it cannot be loaded, where the codec does not fit it, or where it makes images
    of another size than those of `data`, unless it is `sized` otherwise. Its classes may be others than theirs: `data`
    stays closed.
    """
    try:
        teacher = load_teacher(config, device, reading=reading)
        codec = codec_of(teacher, device)
    except UserError as error:
        raise UserError(f"teacher.path = {config.path}: {' '.join(str(error).split())}") from error
    channels, size, _ = teacher.network.shape
    made = f"teacher.path = {config.path}: it makes {channels} channels of {size} x {size}"
    if codec is None and channels != 3:
        raise UserError(f"{made}, not RGB: set teacher.codec to the VAE of its latents, a folder or a hub id")
    if codec is None and not sized and data.name != "latents" and size != data.size:
        raise UserError(f"{made}, not data.size {data.size}; set data.size, or name another teacher")
    if codec is not None and channels != codec.channels:
        raise UserError(f"{made}, but latents of teacher.codec {teacher.codec} have {codec.channels} channels")
    return teacher, codec


def origin_of(teacher: Teacher, codec: Codec | None) -> dict[str, Any]:
    """What a student's card says of its codec, prompts, fixed inputs, base and LoRA, for them to be found again."""
    origin: dict[str, Any] = {} if teacher.base is None else {**teacher.base.origin}
    origin |= {"lora": teacher.lora, "lora_hash": teacher.lora_hash} if teacher.lora else {}
    if codec is not None:
        origin |= {"codec": teacher.codec, "codec_revision": teacher.codec_revision, "codec_digest": codec.digest()}
    if (prompts := teacher.network.prompts) is not None:
        origin |= {"prompts": prompts.folder, "prompts_hash": prompts.hash, "prompts_encoder": prompts.encoder}
        origin |= {"prompts_tokens": prompts.tokens, "prompts_dtype": prompts.dtype}
        if teacher.text_encoder:
            origin |= {"text_encoder": teacher.text_encoder, "text_encoder_revision": teacher.text_encoder_revision}
        origin |= {name: value for name, value in asdict(teacher.network.fixed).items() if value}  # type: ignore[union-attr]
    return origin


def prompts_of(config: TeacherConfig, recorded: dict[str, Any] | None = None) -> Prompts | None:
    """The prompts that the configuration names, else those that the folder says; None for neither.

    Raises UserError where the latter have changed, or the former were encoded by another encoder.
    """
    recorded = recorded or {}
    if not config.prompts and not recorded.get("prompts"):
        return None
    prompts = Prompts(config.prompts or str(recorded["prompts"]))
    if recorded.get("prompts_encoder") not in (None, prompts.encoder):
        raise UserError(f"{prompts.folder} holds prompts of another text encoder than the network was trained with")
    if not config.prompts and recorded.get("prompts_hash") not in (None, prompts.hash):
        raise UserError(f"{prompts.folder} holds other prompts than when the network was trained: name it by prompts")
    return prompts


def _label_names(place: Path, network: Denoiser) -> tuple[str, ...]:
    """The names in DiTPipeline's model_index.json; empty unless there is one for every class."""
    file = place / "model_index.json"
    names = read_json(file).get("id2label") if file.is_file() else None
    count = network.num_conditions
    if not isinstance(names, dict) or set(names) != {str(i) for i in range(count)}:
        return ()
    return tuple(str(names[str(i)]) for i in range(count))


def _stated(config: TeacherConfig, in_file: Prediction | Meaning | None, file: Path) -> Prediction | Meaning:
    """What the file says, else what the configuration says; UserError where neither does or they contradict."""
    in_config = None if config.prediction == "auto" else config.prediction
    if in_file is None and in_config is None:
        raise UserError(f"{file} does not say what the network predicts: set teacher.prediction to flow, sit or dit")
    if in_file is None:
        return in_config  # type: ignore[return-value]
    if in_config is not None and MEANINGS[in_config] != meaning_of(in_file):
        raise UserError(f"teacher.prediction = {in_config}: {file} says {in_file}; leave teacher.prediction out")
    return in_file


# The public SiT (github.com/willisma/SiT) and DiT (github.com/facebookresearch/DiT) weights have the same names and
# shapes: nothing in them tells one from the other.
def _public(file: Path, config: TeacherConfig, device: torch.device | str, reading: Reading | None) -> Teacher:
    named = re.match(r"(sit|dit)[-_.]", file.name.lower())
    by_name = named.group(1) if named and config.prediction == "auto" else None
    prediction = _stated(config, by_name, file)  # type: ignore[arg-type]
    weights = public_weights(file)
    table = weights.get(LABELS)
    if table is not None and len(table) == 1:  # trained without labels to drop: unconditional, so both rows are its one
        weights[LABELS] = table.repeat(2, 1)
    shape = public_shape(weights, config.heads, file)
    with torch.device("meta"):
        network = SiT(shape)
    try:
        network.load_state_dict(
            {name: value.to(torch.float32, copy=True) for name, value in weights.items()}, assign=True
        )
    except RuntimeError as error:
        fault = " ".join(str(error).split())
        raise DamagedFileError(f"{file} holds another network than SiT or DiT: {fault}") from error
    network = kept_so(network.eval().requires_grad_(False).to(device), reading)
    return Teacher(network, prediction, files_hash([file], str(prediction), str(shape.heads)), **_codec(config))


def public_weights(file: Path) -> dict[str, Tensor]:
    """The averaged weights of a public checkpoint: its `ema` entry if it has one, else the file's own tensors.

    Under the network's own names, whatever wrappers it was saved in. Raises DamagedFileError for a file that is none
    or holds one weight under two names, UserError for one that needs unpickling.
    """
    try:
        if file.suffix == ".safetensors":
            content: Any = load_file(file)
        else:
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except (SafetensorError, OSError) as error:
        raise DamagedFileError(f"{file} cannot be read: {error}") from error
    except Exception as error:  # torch.load raises all kinds on a file that is no checkpoint
        if needed := re.search(r"GLOBAL (\S+)", str(error)):
            raise UserError(
                f"{file} holds the class {needed.group(1)}, which only unpickling could restore, and that may run"
                " code from the file: refused. If you trust its source, keep its weights alone: load it where"
                " it was made and torch.save({'ema': checkpoint['ema']}, NEW_FILE)"
            ) from error
        raise DamagedFileError(f"{file} is no checkpoint that torch reads: {type(error).__name__}") from error
    weights = content.get("ema", content) if isinstance(content, dict) else None
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        held = sorted(map(str, content))[:8] if isinstance(content, dict) else type(content).__name__
        raise DamagedFileError(f"{file} holds neither `ema` nor the weights themselves, but {held}")
    return _unwrapped(weights, file)


def _unwrapped(weights: dict[Any, Tensor], file: Path) -> dict[str, Tensor]:
    """The weights by their names without WRAPPERS, which may stand anywhere in a name."""
    bare: dict[str, Tensor] = {}
    for name, value in weights.items():
        own = ".".join(part for part in str(name).split(".") if part not in WRAPPERS)
        if own in bare:
            raise DamagedFileError(f"{file} holds {own} twice, once as {name}: save the weights of one network alone")
        if own != COUNTER:
            bare[own] = value
    return bare


def public_shape(weights: dict[str, Tensor], heads: int, file: Path) -> SiTConfig:
    """The SiT that fits the weights' shapes; `heads`, which they do not show, is that of the public size if 0.

    Raises DamagedFileError where they fit none, or where pos_embed is not DiT's table of sines and cosines.
    """
    try:
        width, channels, patch, _ = weights["x_embedder.proj.weight"].shape
        cells = weights["pos_embed"].shape[1]
        out_channels = weights["final_layer.linear.weight"].shape[0] // patch**2
        classes = weights[LABELS].shape[0] - 1
        hidden = weights["blocks.0.mlp.fc1.weight"].shape[0]
    except (KeyError, ValueError, IndexError) as error:
        raise DamagedFileError(f"{file} holds another network than SiT or DiT: {error!r}") from error
    public = {width: heads for width, _, heads in PRESETS.values()}
    if not heads and width not in public:
        raise UserError(
            f"{file}: width {width} is no public size, so its attention heads are unknown: set teacher.heads"
        )
    table = sin_cos_positions(width, math.isqrt(cells))
    positions = weights["pos_embed"].float()
    if positions.shape != table.shape or (positions - table).abs().max() > 5e-3:  # room for bfloat16
        raise DamagedFileError(f"{file}: pos_embed is not DiT's table of sines and cosines")
    if out_channels not in (channels, 2 * channels):
        raise DamagedFileError(f"{file}: {out_channels} output channels for {channels} input channels")
    return SiTConfig(
        input_size=math.isqrt(cells) * patch,
        in_channels=channels,
        patch=patch,
        width=width,
        depth=len({name.split(".")[1] for name in weights if name.startswith("blocks.")}),
        heads=heads or public[width],
        mlp_ratio=hidden / width,
        num_classes=classes,
        learn_sigma=out_channels == 2 * channels,
    )


moved.keep_names(__name__)
