"""A diffusers transformer, conditioned on labels or prompts, with the surface of `SiT`: forward, shape, routing."""

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dmd_dar.errors import DamagedFileError, MissingWeightsError, UserError
from dmd_dar.models.families import FAMILIES, family_of, fixed_inputs
from dmd_dar.models.families.form import FixedInputs
from dmd_dar.models.frozen import Kept, block_layers, store
from dmd_dar.models.hub import DIFFUSERS, read_json, weight_files
from dmd_dar.models.prompts import Prompts
from dmd_dar.models.rungs import HookedRungs, Rung
from dmd_dar.models.sizes import Limits
from dmd_dar.models.unencoded import Unencoded
from dmd_dar.routing.attach import attach, routed_outline
from dmd_dar.routing.consumers import blocks_of, output_readers
from dmd_dar.routing.folder import FORM
from dmd_dar.routing.history import Observer
from dmd_dar.routing.hooks import DarBank
from dmd_dar.routing.layout import RoutingConfig
from dmd_dar.routing.tensor_files import Reader, Stored, contents, faults_of, fill, tensors_in, without_weights


@dataclass(frozen=True)
class Shape:
    """What SiTConfig says of a SiT, as far as the methods ask for it."""

    input_size: int
    in_channels: int
    num_classes: int
    learn_sigma: bool
    routing: RoutingConfig


@dataclass(frozen=True)
class Reading:
    """How the weights of a network are read: how they are kept, and who reads them."""

    kept: Kept = field(default_factory=Kept)
    reader: Reader = tensors_in


class DiffusersDenoiser(nn.Module):
    """(x (B, C, H, W), t (B,) in timesteps of the transformer's chain, cond (B,)) -> (B, C or 2 C, H, W).

    cond are labels or, for a transformer that reads prompts, rows of the table `prompts`, which its state leaves out.
    `fixed` is the same at every call. `dtypes` are those of its tensors in the files that it was read from.
    """

    def __init__(
        self,
        transformer: Any,
        prompts: Prompts | None = None,
        fixed: FixedInputs | None = None,
        dtypes: dict[str, torch.dtype] | None = None,
    ):
        super().__init__()
        self.dtypes = dtypes or {}
        self.transformer, self.prompts, self.fixed = transformer, prompts, fixed or FixedInputs()
        self.family = family_of(transformer)
        self.rungs: HookedRungs | None = None
        for module in transformer.modules():
            if type(module).__name__ == "LabelEmbedding":
                module.dropout_prob = 0.0  # in train mode, each block would drop other labels, by torch's own generator

    @property
    def config(self) -> Shape:
        given, bank = self.transformer.config, self.dar
        channels, size, _ = self.shape
        return Shape(
            input_size=size,
            in_channels=channels,
            num_classes=given.num_embeds_ada_norm if self.prompts is None else self.prompts.count,
            learn_sigma=given.get("out_channels") == 2 * given.in_channels,
            routing=RoutingConfig() if bank is None else bank.config,
        )

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, S, S) of its input where no other size is asked for."""
        channels, size = self.family.latent_shape(self.transformer.config, self.fixed)
        return channels, size, size

    @property
    def limits(self) -> Limits:
        """The sizes that it takes."""
        return self.family.limits(self.transformer.config)

    @property
    def num_conditions(self) -> int:
        """Labels or prompts; the next index is the unconditional one."""
        return self.config.num_classes

    @property
    def routing(self) -> RoutingConfig:
        return self.config.routing

    def with_prompts(self, prompts: Prompts) -> "DiffusersDenoiser":
        """The same network, of the same weights, whose conditions are the rows of another table."""
        twin = copy.copy(self)
        twin.prompts = prompts
        return twin

    def block_readers(self) -> list[nn.Module]:
        """For each block what reads its output: the next block's first norm, or the head's."""
        return [self.transformer.get_submodule(path) for path in output_readers(self.transformer)]

    @property
    def dar(self) -> DarBank | None:
        """Its routers; None for a plain network."""
        return getattr(self.transformer, "dar", None)

    def forward(
        self, x: Tensor, t: Tensor, cond: Tensor, rung: Rung | None = None, observe: Observer | None = None
    ) -> Tensor:
        if self.rungs is not None:
            self.rungs.rung = rung
        with self._observed(observe):
            rows = {"labels": cond} if self.prompts is None else self.prompts.rows(cond)
            return self.family.ask(self.transformer, x, t, rows, self.fixed)

    @contextlib.contextmanager
    def _observed(self, observe: Observer | None) -> Iterator[None]:
        """Routers of image tokens only: those of an SD3's text tokens bear the same numbers."""
        if observe is None or self.dar is None:
            yield
            return
        before = self.dar.observe
        self.dar.observe = lambda stream, router, alpha: observe(router, alpha) if stream != "text" else None
        try:
            yield
        finally:
            self.dar.observe = before

    def tell_rungs_apart(self, count: int, device: torch.device | None = None) -> None:
        """From now on a call must name one of `count` rungs, which at first makes no difference; see `Rungs`.

        Raises UserError where the transformer has no time embedding of a known name.
        """
        named = [(name.rpartition(".")[2], module) for name, module in self.transformer.named_modules()]
        embedders = [module for name, module in named if name == self.family.time_embedder]
        self.rungs = HookedRungs(embedders, count, device)

    def checkpoint_activations(self) -> None:
        """From now on, keep the blocks' inputs for the backward pass, and compute the rest again."""
        self.transformer.enable_gradient_checkpointing()

    def router_parameters(self) -> list[nn.Parameter]:
        """The parameters that DAR adds; empty for a plain network."""
        return [] if self.dar is None else list(self.dar.parameters())

    def rung_parameters(self) -> list[nn.Parameter]:
        """The vectors of rungs; empty for a network that is not told the rung."""
        return [] if self.rungs is None else list(self.rungs.parameters())

    def backbone_parameters(self) -> list[nn.Parameter]:
        """All trainable parameters of the transformer that are not routers."""
        named = self.transformer.named_parameters()
        return [p for name, p in named if p.requires_grad and not name.startswith("dar.")]

    def shards(self) -> list[nn.Module]:
        """What is gathered by itself when weights are sharded: the blocks, but for the first.

        DiT asks the first block's embedder once more at its end, when that block's weights would be gone again.
        """
        return [block for _, block in blocks_of(self.transformer)][1:]


def routed_copy(
    model: DiffusersDenoiser,
    routing: RoutingConfig,
    allow_change: bool = False,
    copied: Callable[[DiffusersDenoiser], DiffusersDenoiser] = copy.deepcopy,
) -> DiffusersDenoiser:
    """A copy of `model` under `routing`: its own routers where it has that routing already, else zero-query ones.

    `copied` makes the copy. Raises ValueError where that would change the function, unless `allow_change`, or drop a
    network's routers.
    """
    twin, own = copied(model), model.config.routing
    if routing.query == own.query == "residual":
        return twin
    if own.query != "residual":
        if routing.resolved(twin.transformer.dar.plan.sublayers) == own:
            return twin
        raise ValueError(f"routing {routing} would drop the network's routers: keep its own form, {own}")
    attach(twin.transformer, routing, allow_change=allow_change)
    return twin


def load_transformer(
    folder: Path,
    prompts: Prompts | None = None,
    fixed: FixedInputs | None = None,
    device: torch.device | str = "cpu",
    reading: Reading | None = None,
) -> DiffusersDenoiser:
    """The transformer of a diffusers folder, plain or routed, frozen, in evaluation mode, on `device`.

    Each tensor goes from its file straight to where, and to the type in which, `reading` keeps it: float32, but for
    blocks that are kept in less. Nothing is held twice or wider.
    Raises MissingWeightsError without safetensors, DamagedFileError where they do not fit config.json, UserError for a
    class that needs other conditions than labels or prompts, for prompts and `fixed` inputs that are missing, not
    wanted or of another form.
    """
    reading, outline = reading or Reading(), outlined(folder, prompts)
    if faults := faults_of(outline.transformer, outline.stored):
        raise DamagedFileError(f"{folder}: the weights do not fit config.json: {faults}")
    fixed = fixed_inputs(folder, outline.transformer, fixed or FixedInputs())
    transformer = outline.transformer.float()
    store(transformer, reading.kept.dtype, reading.kept.offload)
    _fill(transformer, outline.stored, torch.device(device), reading)
    dtypes = {name: one.dtype for name, one in outline.stored.items()}
    return DiffusersDenoiser(transformer, prompts, fixed, dtypes).eval().requires_grad_(False)


def _fill(transformer: Any, stored: dict[str, Stored], device: torch.device, reading: Reading) -> None:
    layers = block_layers(transformer) if reading.kept.offload else ()
    away = {id(parameter) for layer in layers for parameter in layer.parameters(recurse=False)}

    def put(old: Tensor, value: Tensor) -> Tensor:
        dtype = old.dtype if value.is_floating_point() else value.dtype
        if id(old) not in away:
            return value.to(device, dtype, copy=True)
        value = value.to("cpu", dtype, copy=True)
        return value.pin_memory() if device.type == "cuda" else value

    fill(transformer, stored, put, reading.reader)
    for module in transformer.modules():  # those that are computed
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(device)


@dataclass(frozen=True)
class Outline:
    """A transformer without weights, and what its files hold."""

    transformer: Any
    stored: dict[str, Stored]


def planned_transformer(folder: Path, prompts: Prompts | None, fixed: FixedInputs, pipeline: str) -> DiffusersDenoiser:
    """What `load_transformer` gives, without its weights, on the meta device: by config.json and dar.json alone.

    Where it reads prompts and none are given, those of the class `pipeline` stand in for them.
    """
    routed = (folder / FORM).is_file()
    transformer = routed_outline(folder)[0] if routed else empty_transformer(folder, prompted=True)
    _check_class(folder, type(transformer).__name__, prompted=True)
    family = family_of(transformer)
    if prompts is None and family.width:
        prompts = Unencoded(family, transformer.config, pipeline)
    if prompts is not None:
        _check_prompts(folder, transformer, prompts)
        prompts.blank()
    fixed = fixed_inputs(folder, transformer, fixed)
    return DiffusersDenoiser(transformer.float().to("meta"), prompts, fixed).eval().requires_grad_(False)


def outlined(folder: Path, prompts: Prompts | None) -> Outline:
    """The outline of a diffusers folder, plain or routed. Raises what `load_transformer` does but for faults of fit."""
    if (folder / FORM).is_file():
        transformer, saved = routed_outline(folder)
        _check_class(folder, type(transformer).__name__, prompts is not None)
        stored = saved.stored
    else:
        transformer, stored = empty_transformer(folder, prompts is not None), contents(_files(folder))
    if prompts is not None:
        _check_prompts(folder, transformer, prompts)
    return Outline(transformer, stored)


def empty_transformer(folder: Path, prompted: bool) -> Any:
    """A plain transformer by its config.json alone, with parameters on the meta device.

    Raises UserError for a class that is no teacher's, or that reads prompts where it is not `prompted`.
    """
    import diffusers

    given = read_json(folder / "config.json")
    name = str(given.get("_class_name", "network of no class"))
    if (name, given.get("norm_type")) == ("Transformer2DModel", "ada_norm_zero"):  # its name in the public DiT folders
        name = "DiTTransformer2DModel"
    _check_class(folder, name, prompted)
    if given.get("quantization_config"):
        raise UserError(f"{folder} holds quantised weights, which are not read: name the folder before quantisation")
    try:
        with without_weights():
            return getattr(diffusers, name).from_config(given)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DamagedFileError(f"{folder}: diffusers cannot make it of its config.json: {error}") from error


def _files(folder: Path) -> list[Path]:
    if not list(folder.glob("*.safetensors")):
        raise MissingWeightsError(
            f"{folder} holds no safetensors; pickled weights are not read: name a revision that has them, or save the"
            " pipeline again with diffusers' save_pretrained (safetensors is its default)"
        )
    return weight_files(folder, DIFFUSERS)


def _check_class(folder: Path, name: str, prompted: bool) -> None:
    if name not in FAMILIES:
        raise UserError(
            f"{folder} holds a {name}: a teacher is conditioned on class labels or prompts, so it must be one of"
            f" {', '.join(FAMILIES)}, a public SiT or DiT .pt, or a folder that a run of this project saved"
        )
    if FAMILIES[name].width and not prompted:
        raise UserError(
            f"{folder} holds a {name}, which reads prompts: encode some (python -m dmd_dar.encode prompts=FILE ...) and"
            " name their folder, teacher.prompts=FOLDER"
        )


def _check_prompts(folder: Path, transformer: Any, prompts: Prompts) -> None:
    family = family_of(transformer)
    if not family.width:
        raise UserError(f"{folder} reads class labels: leave prompts out")
    if not prompts.count:
        return  # they are encoded when they are asked for
    width, names = transformer.config[family.width], tuple(filter(None, ("embedding", family.beside)))
    if {*prompts.names} != {*names} or width != prompts.width or prompts.pipeline not in family.pipelines:
        raise UserError(
            f"{prompts.folder} holds prompts of another pipeline ({', '.join(prompts.names)}, width {prompts.width},"
            f" encoded for {prompts.pipeline}) than {folder}, which needs {', '.join(names)}, width {width}, of"
            f" {' or '.join(family.pipelines)}: encode them with its own text encoder"
        )
