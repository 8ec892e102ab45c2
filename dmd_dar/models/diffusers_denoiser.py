"""A class-conditional diffusers transformer with the surface of `SiT`: raw forward, shape, parameters, routing."""

import contextlib
import copy
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dmd_dar.errors import DamagedFileError, MissingWeightsError, UserError
from dmd_dar.flow import Schedule
from dmd_dar.models.denoiser import Meaning
from dmd_dar.routing.attach import attach, load_routed
from dmd_dar.routing.folder import FORM
from dmd_dar.routing.history import Observer
from dmd_dar.routing.hooks import DarBank
from dmd_dar.routing.layout import RoutingConfig

CLASSES = ("DiTTransformer2DModel",)  # conditioned on class labels and t alone


@dataclass(frozen=True)
class Shape:
    """What SiTConfig says of a SiT, as far as the methods ask for it."""

    input_size: int
    in_channels: int
    num_classes: int
    learn_sigma: bool
    routing: RoutingConfig


class DiffusersDenoiser(nn.Module):
    """(x (B, C, S, S), t (B,) in the transformer's own units, labels (B,)) -> (B, C or 2 C, S, S)."""

    def __init__(self, transformer: Any):
        super().__init__()
        self.transformer = transformer
        for module in transformer.modules():
            if type(module).__name__ == "LabelEmbedding":
                module.dropout_prob = 0.0  # in train mode, each block would drop other labels, by torch's own generator

    @property
    def config(self) -> Shape:
        given, bank = self.transformer.config, self.dar
        return Shape(
            input_size=given.sample_size,
            in_channels=given.in_channels,
            num_classes=given.num_embeds_ada_norm,
            learn_sigma=self.transformer.out_channels == 2 * given.in_channels,
            routing=RoutingConfig() if bank is None else bank.config,
        )

    @property
    def dar(self) -> DarBank | None:
        """Its routers; None for a plain network."""
        return getattr(self.transformer, "dar", None)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor, observe: Observer | None = None) -> Tensor:
        with self._observed(observe):
            return self.transformer(x, timestep=t, class_labels=labels, return_dict=False)[0]

    @contextlib.contextmanager
    def _observed(self, observe: Observer | None) -> Iterator[None]:
        """These transformers have one token stream, whose name says nothing."""
        if observe is None or self.dar is None:
            yield
            return
        before, self.dar.observe = self.dar.observe, lambda stream, router, alpha: observe(router, alpha)
        try:
            yield
        finally:
            self.dar.observe = before

    def router_parameters(self) -> list[nn.Parameter]:
        """The parameters that DAR adds; empty for a plain network."""
        return [] if self.dar is None else list(self.dar.parameters())

    def backbone_parameters(self) -> list[nn.Parameter]:
        """All trainable parameters that are not routers."""
        named = self.transformer.named_parameters()
        return [p for name, p in named if p.requires_grad and not name.startswith("dar.")]


def routed_copy(model: DiffusersDenoiser, routing: RoutingConfig, allow_change: bool = False) -> DiffusersDenoiser:
    """A copy of `model` under `routing`: its own routers where it has that routing already, else zero-query ones.

    Raises ValueError where that would change the function, unless `allow_change`, or drop a network's routers.
    """
    twin, own = copy.deepcopy(model), model.config.routing
    if routing.query == own.query == "residual":
        return twin
    if own.query != "residual":
        if routing.resolved(twin.transformer.dar.plan.sublayers) == own:
            return twin
        raise ValueError(f"routing {routing} would drop the network's routers: keep its own form, {own}")
    attach(twin.transformer, **asdict(routing), allow_change=allow_change)
    return twin


def load_transformer(folder: Path) -> DiffusersDenoiser:
    """The transformer of a diffusers folder, plain or routed, frozen, in evaluation mode, in float32.

    Raises MissingWeightsError without safetensors, DamagedFileError where they do not fit config.json, UserError for a
    class that needs other conditions than labels.
    """
    if (folder / FORM).is_file():
        transformer = load_routed(folder)
        _check_class(folder, type(transformer).__name__)
    else:
        transformer = _load_plain(folder)
    return DiffusersDenoiser(transformer.float()).eval().requires_grad_(False)


def _load_plain(folder: Path) -> Any:
    import diffusers

    given = read_json(folder / "config.json")
    name = str(given.get("_class_name", "network of no class"))
    if (name, given.get("norm_type")) == ("Transformer2DModel", "ada_norm_zero"):  # its name in the public DiT folders
        name = "DiTTransformer2DModel"
    _check_class(folder, name)
    if not list(folder.glob("*.safetensors")):
        raise MissingWeightsError(
            f"{folder} holds no safetensors; pickled weights are not read: name a revision that has them, or save the"
            " pipeline again with diffusers' save_pretrained (safetensors is its default)"
        )
    try:
        kind = getattr(diffusers, name)
        model, info = kind.from_pretrained(
            folder, use_safetensors=True, local_files_only=True, low_cpu_mem_usage=False, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise DamagedFileError(f"{folder}: diffusers cannot load it: {error}") from error
    faults = {kind: sorted(map(str, names)) for kind, names in info.items() if names}
    if faults:  # diffusers only warns, and leaves such weights random
        raise DamagedFileError(f"{folder}: the weights do not fit config.json: {faults}")
    return model


def _check_class(folder: Path, name: str) -> None:
    if name not in CLASSES:
        raise UserError(
            f"{folder} holds a {name}: a teacher is conditioned on class labels, so it must be one of"
            f" {', '.join(CLASSES)}, a public SiT or DiT .pt, or a folder that a run of this project saved"
        )


def meaning_of_scheduler(scheduler: dict[str, Any]) -> Meaning:
    """How the network is asked, by diffusers' scheduler_config.json. Raises ValueError for what is not known here."""
    name, steps = str(scheduler.get("_class_name", "")), int(scheduler.get("num_train_timesteps", 1000))
    if name.startswith("FlowMatch"):
        return Meaning("flow", time_scale=float(steps))
    predicted = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
    betas = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine"}
    kind, shape = scheduler.get("prediction_type", "epsilon"), scheduler.get("beta_schedule", "linear")
    if kind == "flow_prediction":
        return Meaning("flow", time_scale=float(steps))
    if kind not in predicted or shape not in betas:
        raise ValueError(f"prediction_type {kind!r} with beta_schedule {shape!r} is not known")
    if scheduler.get("trained_betas") is not None or scheduler.get("rescale_betas_zero_snr"):
        raise ValueError("trained_betas and rescale_betas_zero_snr are not known")
    start, end = scheduler.get("beta_start", 1e-4), scheduler.get("beta_end", 0.02)
    return Meaning(predicted[kind], Schedule(betas[shape], steps, float(start), float(end)))  # type: ignore[arg-type]


def meaning_from_dict(values: dict[str, Any]) -> Meaning:
    """The inverse of dataclasses.asdict(meaning)."""
    schedule = values["schedule"]
    return replace(Meaning(**{**values, "schedule": None}), schedule=None if schedule is None else Schedule(**schedule))


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
