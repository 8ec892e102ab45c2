"""Which modules of a diffusers transformer read the residual stream, and in which order.

A *consumer* is a module that a block hands the stream x_l to: the norm before a sublayer, or the sublayer itself where
it reads the raw stream. Each block adds its sublayers' outputs to x_l, never to what a consumer was given, so that
v_l = x_{l+1} - x_l holds whatever else (ControlNet, IP-adapter) is added on the way.
"""

import inspect
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Form:
    """One model class: the class and list of its blocks, and the consumers in a block, per token stream, in order."""

    block: str
    blocks: str
    image: str
    text: str = ""
    joint: str = ""  # blocks and consumer behind the seam, where both streams are one: text tokens, then image tokens
    head: str = "norm_out"
    width: str = "num_attention_heads attention_head_dim"  # config keys whose product is d
    widens: bool = False  # its norms are given float32 whatever the stream's dtype


SUBLAYERS = {
    "DiTTransformer2DModel": Form("BasicTransformerBlock", "transformer_blocks", "norm1 norm3"),
    "PixArtTransformer2DModel": Form("BasicTransformerBlock", "transformer_blocks", "norm1 attn2 norm2"),
    "SanaTransformer2DModel": Form("SanaTransformerBlock", "transformer_blocks", "norm1 attn2 norm2"),
    "SD3Transformer2DModel": Form(
        "JointTransformerBlock", "transformer_blocks", "norm1 norm2", text="norm1_context norm2_context"
    ),
    "FluxTransformer2DModel": Form(
        "FluxTransformerBlock",
        "transformer_blocks",
        "norm1 norm2",
        text="norm1_context norm2_context",
        joint="single_transformer_blocks norm",
    ),
    "Flux2Transformer2DModel": Form(
        "Flux2TransformerBlock",
        "transformer_blocks",
        "norm1 norm2",
        text="norm1_context norm2_context",
        joint="single_transformer_blocks norm",
    ),
    "QwenImageTransformer2DModel": Form(
        "QwenImageTransformerBlock", "transformer_blocks", "img_norm1 img_norm2", text="txt_norm1 txt_norm2"
    ),
    "ZImageTransformer2DModel": Form(
        "ZImageTransformerBlock",
        "layers",
        "attention_norm1 ffn_norm1",
        head="all_final_layer.*.norm_final",
        width="dim",
    ),
    "Lumina2Transformer2DModel": Form("Lumina2TransformerBlock", "layers", "norm1 ffn_norm1", width="hidden_size"),
    "WanTransformer3DModel": Form("WanTransformerBlock", "blocks", "norm1 norm2 norm3", widens=True),
}
TIME_EMBEDDERS = {  # where no class's name tells it
    "AceStepTransformer1DModel": "time_embed.linear_2",
    "CosmosTransformer3DModel": "time_embed.t_embedder",
    "Ideogram4Transformer2DModel": "t_embedding",
    "Krea2Transformer2DModel": "time_embed",
    "PRXTransformer2DModel": "time_in",
    "StableAudioDiTModel": "timestep_proj",
    "WanAnimate2Transformer3DModel": "time_embedding",
}
REFUSED = {
    "AuraFlowTransformer2DModel": "its blocks normalise x + attention before the MLP but add only the MLP's output to"
    " x, so the attention's output never enters the residual stream"
}


@dataclass(frozen=True)
class Tap:
    """One reading of a stream: router `router` acts on the input of module `path`, or on its `output` (the last)."""

    path: str
    stream: str
    router: int
    output: bool = False


@dataclass(frozen=True)
class Stream:
    """A token stream: L sublayers in all, and the routers that exist for it (L + 1 is the head's)."""

    sublayers: int
    routers: range


@dataclass(frozen=True)
class Plan:
    """All that routing needs to know of one model."""

    taps: tuple[Tap, ...]
    streams: dict[str, Stream]
    blocks: tuple[str, ...]  # paths, in the order in which they run
    width: int
    granularity: str
    first_block: str | None = None  # where the stream's dtype must be read, for a class that widens it for its norms

    @property
    def sublayers(self) -> int:
        return max(stream.sublayers for stream in self.streams.values())


def plan_of(model: nn.Module, granularity: str) -> Plan:
    """How `model` is routed at `granularity`, "sublayer" or "block".

    Classes outside the table get block granularity, with a warning. Raises ValueError where the model has no blocks,
    or is known not to fit.
    """
    name = type(model).__name__
    if granularity not in ("sublayer", "block"):
        raise ValueError(f"granularity must be 'sublayer' or 'block', got {granularity!r}")
    if granularity == "block":
        return block_plan(model)
    if name in REFUSED:
        raise ValueError(f"{name} cannot be routed per sublayer: {REFUSED[name]}; use granularity='block'")
    if name in SUBLAYERS:
        return sublayer_plan(model, SUBLAYERS[name])
    plan = block_plan(model)
    warnings.warn(f"the sublayers of {name} are not known: routing its {len(plan.blocks)} whole blocks", stacklevel=3)
    return plan


def sublayer_plan(model: nn.Module, form: Form) -> Plan:
    """The plan of a model whose blocks read their streams as `form` says. Raises ValueError for other blocks."""
    blocks = _blocks(model, form.blocks)
    wrong = {type(block).__name__ for block in blocks.values()} - {form.block}
    if not blocks or wrong:
        raise ValueError(f"{type(model).__name__}.{form.blocks} must hold {form.block}s, found {wrong or 'none'}")
    seam, consumer = form.joint.split() if form.joint else ("", "")
    behind = _blocks(model, seam) if seam else {}
    image, text, joint = _consumers(blocks, form.image), _consumers(blocks, form.text), _consumers(behind, consumer)
    if not joint:  # the last block's text output is dropped: a router behind its attention would have no gradient
        text = text[: len(form.text.split()) * (len(blocks) - 1) + 1]

    total = len(image) + len(joint)
    streams = {"image": Stream(total, range(2, len(image) + (1 if joint else 2)))}
    taps = [Tap(path, "image", router) for router, path in enumerate(image, start=1)]
    if len(text) > 1:
        streams["text"] = Stream(total, range(2, len(text) + 1))
        taps += [Tap(path, "text", router) for router, path in enumerate(text, start=1)]
    if joint:
        streams["joint"] = Stream(total, range(len(image) + 1, total + 2))
        taps += [Tap(path, "joint", router) for router, path in enumerate(joint, start=len(image) + 1)]
    taps += [Tap(path, "joint" if joint else "image", total + 1) for path in _heads(model, form.head)]
    first = next(iter(blocks)) if form.widens else None
    return Plan(tuple(taps), streams, (*blocks, *behind), _width(model, form), "sublayer", first)


def block_plan(model: nn.Module) -> Plan:
    """The plan of any model with lists of blocks: every list is a stream of its own, v_k = Block(h_k) - h_k."""
    lists = _block_lists(model)
    if not lists:
        raise ValueError(f"{type(model).__name__} has no list of transformer blocks: there is nothing to route")
    streams, taps = {}, []
    for name, blocks in lists.items():
        streams[name] = Stream(len(blocks), range(2, len(blocks) + 2))
        taps += [Tap(path, name, router) for router, path in enumerate(blocks, start=1)]
        taps += [Tap(list(blocks)[-1], name, len(blocks) + 1, output=True)]
    paths = tuple(path for blocks in lists.values() for path in blocks)
    return Plan(tuple(taps), streams, paths, _width(model, SUBLAYERS.get(type(model).__name__)), "block")


def blocks_of(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(path, block) of all blocks of a model of SUBLAYERS, in the order in which they run."""
    form = SUBLAYERS[type(model).__name__]
    lists = filter(None, (form.blocks, form.joint.partition(" ")[0]))
    return [named for path in lists for named in _blocks(model, path).items()]


def output_readers(model: nn.Module) -> list[str]:
    """For each block of `blocks_of` the path of what reads its output first: the next block's consumer, or the head.

    In front of the seam these read image tokens, behind it text tokens and image tokens, at the head image tokens.
    """
    form = SUBLAYERS[type(model).__name__]
    joint = form.joint.partition(" ")
    first = {form.blocks: form.image.split()[0], joint[0]: joint[2]}
    readers = [f"{path}.{first[path.rpartition('.')[0]]}" for path, _ in blocks_of(model)]
    return [*readers[1:], _heads(model, form.head)[0]]


def wrapped(model: nn.Module) -> str | None:
    """Path of the transformer that `model` is no more than a wrapper of, such as DDP, None where it is none."""
    path, inner = "", model
    while len(children := list(inner.named_children())) == 1 and not _block_lists(inner):
        name, inner = children[0]
        path = f"{path}.{name}" if path else name
    return path if path and _block_lists(inner) else None


def time_embedder(model: nn.Module) -> str | None:
    """Path of the module that embeds the timestep, None if there is none to be recognised."""
    if known := TIME_EMBEDDERS.get(type(model).__name__):
        return known
    names = ("TimestepEmbedding", "TimestepEmbedder")
    found = [path for path, module in model.named_modules() if type(module).__name__ in names]
    # an embedder of guidance is of the same class; one deeper inside serves a part, such as a refiner of text
    found = [path for path in found if "guidance" not in path.rpartition(".")[2]]
    return min(found, key=lambda path: path.count("."), default=None)


def stream_argument(module: nn.Module) -> str:
    """The name of a block's or consumer's first parameter, which is the stream."""
    return next(name for name in inspect.signature(type(module).forward).parameters if name != "self")


def _block_lists(model: nn.Module) -> dict[str, dict[str, nn.Module]]:
    """Every list of blocks that is a child of `model`, by its name."""
    return {
        name: _blocks(model, name)
        for name, child in model.named_children()
        if isinstance(child, nn.ModuleList) and len(child) > 1 and all(map(_is_block, child))
    }


def _blocks(model: nn.Module, path: str) -> dict[str, nn.Module]:
    return {f"{path}.{i}": block for i, block in enumerate(model.get_submodule(path).children())}


def _consumers(blocks: dict[str, nn.Module], names: str) -> list[str]:
    read = ((path, block, name) for path, block in blocks.items() for name in names.split())
    return [f"{path}.{name}" for path, block, name in read if getattr(block, name, None) is not None]


def _heads(model: nn.Module, path: str) -> list[str]:
    folder, star, rest = path.partition(".*")
    return [f"{folder}.{name}{rest}" for name, _ in model.get_submodule(folder).named_children()] if star else [path]


def _is_block(module: nn.Module) -> bool:
    return any("attn" in name or "attention" in name for name, _ in module.named_modules())


def _width(model: nn.Module, form: Form | None) -> int:
    """d, from what the model's configuration calls it."""
    config: Any = getattr(model, "config", {})
    for keys in [form.width] if form else ["hidden_size", "dim", "inner_dim", "num_attention_heads attention_head_dim"]:
        known = config if isinstance(config, Mapping) else vars(config)
        sizes: list[Any] = [known.get(key) for key in keys.split()]
        if None not in sizes:
            return math.prod(int(size) for size in sizes)
    raise ValueError(f"the config of {type(model).__name__} tells no width: no hidden_size, dim, or number of heads")
