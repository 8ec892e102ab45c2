"""A student into a pipeline of diffusers that is there already: `dmd_dar.load_student(pipe, "RUN/student/adapter")`."""

from pathlib import Path
from typing import Any

from dmd_dar.errors import DamagedFileError, UserError
from dmd_dar.models import adapters
from dmd_dar.models.denoiser import meaning_of
from dmd_dar.models.families import family_of
from dmd_dar.models.families.form import FixedInputs
from dmd_dar.models.hub import read_json, resolve
from dmd_dar.models.pipeline_classes import routed_class
from dmd_dar.models.saved import ModelCard, card_from_dict, holds_network, read_card, transformer_hash
from dmd_dar.models.schedulers import student_config
from dmd_dar.models.student_scheduler import StudentScheduler
from dmd_dar.routing.attach import attach
from dmd_dar.routing.folder import FORM
from dmd_dar.routing.layout import RoutingConfig

NAME = "student"  # of the adapter in the pipeline


def load_student(pipe: Any, path: str, revision: str = "") -> Any:
    """Put a student into `pipe`, its base's pipeline, in place; returns `pipe`.

    path: RUN/student/adapter, which is added to the transformer as the adapter "student", and its routers with it; or a
    student's whole folder or hub id, whose transformer takes the place of the pipeline's. Either brings its scheduler,
    which says how the pipeline is to be called.

    Raises UserError where the pipeline's transformer is of another class, holds routers or adapters already, or was
    loaded from files that are not the base's; DamagedFileError or MissingWeightsError naming the file.
    """
    folder, transformer = resolve(str(path), revision), getattr(pipe, "transformer", None)
    if transformer is None:
        raise UserError(f"a {type(pipe).__name__} has no transformer: give the pipeline of the student's base")
    if (folder / adapters.CARD).is_file():
        card = _add(transformer, folder)
    elif holds_network(folder):
        card = read_card(folder).card
        pipe.transformer = _whole(folder / "transformer", transformer)
    else:
        raise UserError(f"{path} holds no student: name RUN/student or RUN/student/adapter")
    pipe.scheduler = _scheduler(pipe.transformer, card)
    return pipe


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
        card, routing = card_from_dict(described["card"]), RoutingConfig(**described["routing"])
        _check_base(transformer, folder, str(described["base"]), card)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise DamagedFileError(f"{folder} holds no adapter of this project: {error!r}") from error
    updates = adapters.updates_of(folder)
    if not hasattr(transformer, "load_lora_adapter"):
        fault = f"diffusers loads no adapters into a {type(transformer).__name__}"
        raise UserError(f"{fault}: name the student's whole folder, RUN/student")
    if getattr(transformer, "peft_config", None) or getattr(transformer, "dar", None) is not None:
        raise UserError("this transformer holds adapters or routers already: unload them, or load the pipeline anew")
    missing = sorted({name.rpartition(".lora_")[0] for name in updates} - {n for n, _ in transformer.named_modules()})
    if missing:
        raise UserError(f"{folder} is no adapter of this {type(transformer).__name__}: it has no {missing[0]}")
    if routing.query != "residual":
        attach(transformer, routing, check=False, allow_change=True)  # before the adapter, whose layers it must not see
        own = {f"{adapters.OURS}dar.{name}": value for name, value in transformer.dar.named_parameters()}
        adapters.fill(folder / adapters.ROUTERS, own)
    transformer.load_lora_adapter(updates, prefix=None, adapter_name=NAME)
    return card


def _check_base(transformer: Any, folder: Path, base: str, card: ModelCard) -> None:
    """Raises UserError where the files that the transformer was loaded from are not those of the adapter's base."""
    files = Path(str(transformer.config.get("_name_or_path", "")))
    if not (files / "config.json").is_file():
        return
    found = transformer_hash(files, card.prediction, card.origin.get("prompts_hash", ""), _fixed(card))
    if found != base:
        raise UserError(
            f"{folder} is an adapter of the network {base[:12]}, and {files} is {found[:12]}: load the pipeline that"
            " the student was distilled from"
        )
