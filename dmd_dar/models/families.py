"""How diffusers' own pipelines ask the transformers that read prompts, for square latents.

B samples, C channels, S latent cells on a side, T text tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from dmd_dar.errors import UserError

PIXELS = 8  # for each latent cell of a PixArt along one side
FLUX_SIDE = 128  # FluxPipeline's own, 1024 pixels; nothing in a FLUX transformer's files names a size
THOUSAND = 1000  # FluxPipeline's forward is given timestep / 1000, whatever the chain


@dataclass(frozen=True)
class FixedInputs:
    """What a transformer takes at every call and its files leave open."""

    input_size: int = 0  # S of a FLUX; 0 for all others, whose config names it
    embedded_guidance: float = 0.0  # of a network with guidance_embeds


Rows = dict[str, Tensor]  # embedding (B, T, D), and mask (B, T) or pooled (B, P)
Ask = Callable[[Any, Tensor, Tensor, Rows, FixedInputs], Tensor]


@dataclass(frozen=True)
class Family:
    """One class of transformers: the config key of the embeddings' width D, the tensor beside them, the call."""

    width: str
    beside: str
    ask: Ask  # (transformer, x (B, C, S, S), timesteps (B,) of the chain, rows, fixed) -> (B, C or 2 C, S, S)


def _pixart(transformer: Any, x: Tensor, time: Tensor, rows: Rows, fixed: FixedInputs) -> Tensor:
    added: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
    if transformer.use_additional_conditions:
        added = {"resolution": x.new_full((len(x), 2), PIXELS * x.shape[-1]), "aspect_ratio": x.new_ones(len(x), 1)}
    conditions = {"encoder_attention_mask": rows["mask"], "added_cond_kwargs": added}
    embedding = rows["embedding"].to(x.dtype)
    return transformer(x, timestep=time, encoder_hidden_states=embedding, **conditions, return_dict=False)[0]


def _sd3(transformer: Any, x: Tensor, time: Tensor, rows: Rows, fixed: FixedInputs) -> Tensor:
    embedding, pooled = rows["embedding"].to(x.dtype), rows["pooled"].to(x.dtype)
    conditions = {"encoder_hidden_states": embedding, "pooled_projections": pooled}
    return transformer(x, timestep=time, **conditions, return_dict=False)[0]


def _sana(transformer: Any, x: Tensor, time: Tensor, rows: Rows, fixed: FixedInputs) -> Tensor:
    conditions = {"encoder_hidden_states": rows["embedding"].to(x.dtype), "encoder_attention_mask": rows["mask"]}
    time = time * transformer.config.timestep_scale
    return transformer(x, timestep=time, **conditions, return_dict=False)[0]


def _flux(transformer: Any, x: Tensor, time: Tensor, rows: Rows, fixed: FixedInputs) -> Tensor:
    embedding, side = rows["embedding"].to(x.dtype), x.shape[-1] // 2
    guided = transformer.config.guidance_embeds
    y = transformer(
        packed(x),
        timestep=time / THOUSAND,
        guidance=x.new_full((len(x),), fixed.embedded_guidance) if guided else None,
        encoder_hidden_states=embedding,
        pooled_projections=rows["pooled"].to(x.dtype),
        txt_ids=x.new_zeros(embedding.shape[1], 3),
        img_ids=_positions(side, x),
        return_dict=False,
    )[0]
    return unpacked(y, side)


def packed(x: Tensor) -> Tensor:
    """(B, C, S, S) -> (B, S/2 S/2, 4 C): a token for 2 x 2 cells, channel first."""
    b, c, s, _ = x.shape
    return x.reshape(b, c, s // 2, 2, s // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, -1, 4 * c)


def unpacked(y: Tensor, side: int) -> Tensor:
    """The inverse of `packed`: (B, side side, 4 C) -> (B, C, 2 side, 2 side)."""
    b, _, c = y.shape
    return y.reshape(b, side, side, c // 4, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(b, c // 4, 2 * side, 2 * side)


def _positions(side: int, like: Tensor) -> Tensor:
    """(side side, 3): zero, row, column of each token."""
    ids = like.new_zeros(side, side, 3)
    count = ids.new_tensor(range(side))
    ids[..., 1], ids[..., 2] = count[:, None], count
    return ids.reshape(-1, 3)


PROMPTED = {
    "PixArtTransformer2DModel": Family("caption_channels", "mask", _pixart),
    "SD3Transformer2DModel": Family("joint_attention_dim", "pooled", _sd3),
    "SanaTransformer2DModel": Family("caption_channels", "mask", _sana),
    "FluxTransformer2DModel": Family("joint_attention_dim", "pooled", _flux),
}


def latent_shape(transformer: Any, fixed: FixedInputs) -> tuple[int, int]:
    """(C, S) of its latents."""
    config = transformer.config
    return (config.in_channels // 4, fixed.input_size) if fixed.input_size else (config.in_channels, config.sample_size)


def fixed_inputs(folder: Path, transformer: Any, requested: FixedInputs) -> FixedInputs:
    """`requested`, with a FLUX's own size where it names none.

    Raises UserError for a size or guidance that the transformer does not take, or that it needs and that is missing.
    """
    name, guided = type(transformer).__name__, bool(transformer.config.get("guidance_embeds"))
    if name == "SanaTransformer2DModel" and guided:
        raise UserError(f"{folder} is a SANA-Sprint, a few-step student of its own form: name the SANA that it is from")
    if guided and not requested.embedded_guidance:
        raise UserError(
            f"{folder} takes a guidance strength as an input: set teacher.embedded_guidance (diffusers' FluxPipeline"
            " gives 3.5)"
        )
    if requested.embedded_guidance and not guided:
        raise UserError(f"{folder} takes no guidance strength as an input: leave embedded_guidance out")
    if name != "FluxTransformer2DModel":
        if requested.input_size not in (0, transformer.config.get("sample_size")):
            raise UserError(f"{folder} makes latents of its own size: leave input_size out")
        return FixedInputs()
    size = requested.input_size or FLUX_SIDE
    if size % 2:
        raise UserError(f"input_size = {size}: {folder} reads 2 x 2 latent cells a token, so it must be even")
    return FixedInputs(size, requested.embedded_guidance)
