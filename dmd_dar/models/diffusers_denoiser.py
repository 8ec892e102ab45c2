"""A diffusers transformer, conditioned on labels or prompts, with the surface of `SiT`: forward, shape, routing."""

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dmd_dar.errors import DamagedFileError, MissingWeightsError, UserError
from dmd_dar.models.families import FAMILIES, family_of, fixed_inputs
from dmd_dar.models.families.form import FixedInputs
from dmd_dar.models.hub import DIFFUSERS, local_safetensors, read_json
from dmd_dar.models.prompts import Prompts
from dmd_dar.models.rungs import HookedRungs, Rung
from dmd_dar.models.sizes import Limits
from dmd_dar.routing.attach import attach, load_routed
from dmd_dar.routing.consumers import blocks_of, output_readers
from dmd_dar.routing.folder import FORM
from dmd_dar.routing.history import Observer
from dmd_dar.routing.hooks import DarBank
from dmd_dar.routing.layout import RoutingConfig


@dataclass(frozen=True)
class Shape:
    """What SiTConfig says of a SiT, as far as the methods ask for it."""

    input_size: int
    in_channels: int
    num_classes: int
    learn_sigma: bool
    routing: RoutingConfig


class DiffusersDenoiser(nn.Module):
    """(x (B, C, H, W), t (B,) in timesteps of the transformer's chain, cond (B,)) -> (B, C or 2 C, H, W).

    cond are labels or, for a transformer that reads prompts, rows of the table `prompts`, which its state leaves out.
    `fixed` is the same at every call.
    """

    def __init__(self, transformer: Any, prompts: Prompts | None = None, fixed: FixedInputs | None = None):
        super().__init__()
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
    folder: Path, prompts: Prompts | None = None, fixed: FixedInputs | None = None
) -> DiffusersDenoiser:
    """The transformer of a diffusers folder, plain or routed, frozen, in evaluation mode, in float32.

    Raises MissingWeightsError without safetensors, DamagedFileError where they do not fit config.json, UserError for a
    class that needs other conditions than labels or prompts, for prompts and `fixed` inputs that are missing, not
    wanted or of another form.
    """
    if (folder / FORM).is_file():
        transformer = load_routed(folder)
        _check_class(folder, type(transformer).__name__, prompts)
    else:
        transformer = _load_plain(folder, prompts)
    if prompts is not None:
        _check_prompts(folder, transformer, prompts)
    fixed = fixed_inputs(folder, transformer, fixed or FixedInputs())
    return DiffusersDenoiser(transformer.float(), prompts, fixed).eval().requires_grad_(False)


def _load_plain(folder: Path, prompts: Prompts | None) -> Any:
    import diffusers

    given = read_json(folder / "config.json")
    name = str(given.get("_class_name", "network of no class"))
    if (name, given.get("norm_type")) == ("Transformer2DModel", "ada_norm_zero"):  # its name in the public DiT folders
        name = "DiTTransformer2DModel"
    _check_class(folder, name, prompts)
    if not list(folder.glob("*.safetensors")):
        raise MissingWeightsError(
            f"{folder} holds no safetensors; pickled weights are not read: name a revision that has them, or save the"
            " pipeline again with diffusers' save_pretrained (safetensors is its default)"
        )
    given = local_safetensors(folder, DIFFUSERS)
    try:
        model, info = getattr(diffusers, name).from_pretrained(
            folder, low_cpu_mem_usage=False, output_loading_info=True, **given
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise DamagedFileError(f"{folder}: diffusers cannot load it: {error}") from error
    faults = {kind: sorted(map(str, names)) for kind, names in info.items() if names}
    if faults:  # diffusers only warns, and leaves such weights random
        raise DamagedFileError(f"{folder}: the weights do not fit config.json: {faults}")
    return model


def _check_class(folder: Path, name: str, prompts: Prompts | None) -> None:
    if name not in FAMILIES:
        raise UserError(
            f"{folder} holds a {name}: a teacher is conditioned on class labels or prompts, so it must be one of"
            f" {', '.join(FAMILIES)}, a public SiT or DiT .pt, or a folder that a run of this project saved"
        )
    if FAMILIES[name].width and prompts is None:
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
