"""A student into a pipeline of diffusers that is there already: `dmd_dar.load_student(pipe, "RUN/student/adapter")`."""

from pathlib import Path
from typing import Any

from torch import Tensor

from dmd_dar.errors import DamagedFileError, UserError
from dmd_dar.models import adapters
from dmd_dar.models.denoiser import meaning_of
from dmd_dar.models.families import family_of
from dmd_dar.models.families.form import FixedInputs
from dmd_dar.models.hub import files_hash, read_json, resolve
from dmd_dar.models.pipeline_classes import routed_class
from dmd_dar.models.saved import ModelCard, holds_network, read_card, transformer_hash
from dmd_dar.models.schedulers import student_config
from dmd_dar.models.student_scheduler import StudentScheduler
from dmd_dar.models.user_lora import fuse, hash_of
from dmd_dar.routing.attach import attach, detach
from dmd_dar.routing.folder import FORM
from dmd_dar.routing.offload import is_offloaded

NAME = "student"  # of the adapter in the pipeline
FUSED = "dmd_dar_lora"  # of a transformer: the hash of the teacher's LoRA that was fused into it


def load_student(pipe: Any, path: str, revision: str = "") -> Any:
    """Put a student into `pipe`, its base's pipeline, in place; returns `pipe`.

    path: RUN/student/adapter, which is added to the transformer as the adapter "student", and its routers with it; or a
    student's whole folder or hub id, whose transformer takes the place of the pipeline's. Either brings its scheduler,
    which says how the pipeline is to be called.

    Raises UserError where the pipeline's transformer is of another class, holds routers or adapters already, is
    offloaded, or was loaded from files that are not the base's, and for what is no few-step student; DamagedFileError
    or MissingWeightsError naming the file. The pipeline is then as it was, but for a LoRA of the teacher's own
    that was fused already, which is not fused twice.
    """
    folder, transformer = resolve(str(path), revision), getattr(pipe, "transformer", None)
    if transformer is None:
        raise UserError(f"a {type(pipe).__name__} has no transformer: give the pipeline of the student's base")
    if is_offloaded(transformer):
        remedy = "put the student in before enable_..._offload, into a pipeline loaded without device_map"
        raise UserError(f"the pipeline's transformer is offloaded: {remedy}")
    if (folder / adapters.CARD).is_file():
        card = _add(transformer, folder)
    elif holds_network(folder):
        card = read_card(folder).card
        _require_rungs(folder, card)
        transformer = _whole(folder / "transformer", transformer)
    else:
        raise UserError(f"{path} holds no student: name RUN/student or RUN/student/adapter")
    scheduler = _scheduler(transformer, card)
    pipe.transformer, pipe.scheduler = transformer, scheduler
    return pipe


def _require_rungs(folder: Path, card: ModelCard) -> None:
    if not card.rungs:
        raise UserError(f"{folder} holds a network of no rungs, a teacher: name a few-step student, RUN/student")


def _scheduler(transformer: Any, card: ModelCard) -> Any:
    unguided = family_of(transformer).unguided(transformer.config, _fixed(card))
    config = student_config(meaning_of(card.prediction), card.rungs, card.sampler, unguided)
    return StudentScheduler.from_config(config)


def _fixed(card: ModelCard) -> FixedInputs:
    size, guidance = (card.origin.get(name, 0) for name in ("input_size", "embedded_guidance"))
    return FixedInputs(int(size), float(guidance))


def _whole(folder: Path, before: Any) -> Any:
    """The student's transformer, of the dtype and on the device of the one `before`."""
    import diffusers

    name = str(read_json(folder / "config.json").get("_class_name"))
    if name != type(before).__name__:
        raise UserError(f"{folder} holds a {name}, and this pipeline has a {type(before).__name__}: give its base's")
    kind = routed_class(name) if (folder / FORM).is_file() else getattr(diffusers, name)
    return kind.from_pretrained(folder, torch_dtype=before.dtype).to(before.device)


def _add(transformer: Any, folder: Path) -> ModelCard:
    described = read_json(folder / adapters.CARD)
    try:
        card, base, routing = adapters.described_in(described)
        _require_rungs(folder, card)
        _check_base(transformer, folder, base, card)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise DamagedFileError(f"{folder} holds no adapter of this project: {error!r}") from error
    updates = adapters.updates_of(folder)
    _check_fit(transformer, folder, updates)
    lora, lora_hash = (str(card.origin.get(name, "")) for name in ("lora", "lora_hash"))
    fused = getattr(transformer, FUSED, "")
    if fused not in ("", lora_hash):
        raise UserError("the LoRA of another teacher is fused into this transformer: load the pipeline anew")
    routed = routing.query != "residual"
    if routed:
        attach(transformer, routing, check=False, allow_change=True)  # before the adapter, whose layers it must not see
    try:
        if routed:
            own = {f"{adapters.OURS}dar.{name}": value for name, value in transformer.dar.named_parameters()}
            adapters.fill(folder / adapters.ROUTERS, own)
        if lora and not fused:
            setattr(transformer, FUSED, fuse(transformer, lora))
        transformer.load_lora_adapter(updates, prefix=None, adapter_name=NAME)
    except Exception:
        if routed:
            detach(transformer)
        raise
    return card


def _check_fit(transformer: Any, folder: Path, updates: dict[str, Tensor]) -> None:
    kind, layers = type(transformer).__name__, dict(transformer.named_modules())
    if not hasattr(transformer, "load_lora_adapter"):
        raise UserError(f"diffusers loads no adapters into a {kind}: name the student's whole folder, RUN/student")
    if getattr(transformer, "peft_config", None) or getattr(transformer, "dar", None) is not None:
        raise UserError("this transformer holds adapters or routers already: unload them, or load the pipeline anew")
    missing = sorted({name.rpartition(".lora_")[0] for name in updates} - layers.keys())
    if missing:
        raise UserError(f"{folder} is no adapter of this {kind}: it has no {missing[0]}")


def _check_base(transformer: Any, folder: Path, base: str, card: ModelCard) -> None:
    """Raises UserError where the files that the transformer was loaded from are not those of the adapter's base.

    What the teacher carried, a LoRA that is still to be fused, is part of the base.
    """
    lora, lora_hash = (str(card.origin.get(name, "")) for name in ("lora", "lora_hash"))
    if lora and hash_of(lora) != lora_hash:
        raise UserError(f"{folder} was trained on its base with the LoRA {lora}, which has changed since: restore it")
    files = Path(str(transformer.config.get("_name_or_path", "")))
    if not (files / "config.json").is_file():
        return
    found = transformer_hash(files, card.prediction, card.origin.get("prompts_hash", ""), _fixed(card))
    found = files_hash([], found, lora_hash) if lora else found
    if found != base:
        raise UserError(
            f"{folder} is an adapter of the network {base[:12]}, and {files} is {found[:12]}: load the pipeline that"
            " the student was distilled from"
        )
