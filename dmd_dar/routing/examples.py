"""Small inputs for the transformers of `consumers.SUBLAYERS`, from their configurations: B samples, T text tokens."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dmd_dar.routing.offload import runs_on

B, T, SIDE = 2, 5, 4  # SIDE: patches on a side
Randn = Callable[..., Tensor]


def example_inputs(model: Any) -> dict[str, Any]:
    """Keyword arguments for `model`'s forward on its device and in its dtype, the same at every call.

    Raises ValueError for a class, or a variant of one, that this module does not know.
    """
    make = INPUTS.get(type(model).__name__)
    if make is None:
        raise ValueError(f"cannot make inputs for {type(model).__name__}: pass example_inputs, or check=False")
    generator = torch.Generator().manual_seed(0)
    device, dtype = runs_on(model), model.dtype

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    return make(model.config, randn)


def _latents(config: Any, randn: Randn) -> Tensor:
    side = config["patch_size"] * min(SIDE, (config["sample_size"] or SIDE) // config["patch_size"])
    return randn(B, config["in_channels"], side, side)


def _t(randn: Randn, scale: float = 1.0) -> Tensor:
    """Timesteps in (0, scale), one per sample."""
    return torch.linspace(0.1, 0.9, B).to(randn(1)) * scale


def _grid(rows: int, columns: int, like: Tensor) -> Tensor:
    """Position ids (rows * columns, 3): zero, row, column."""
    return torch.cartesian_prod(torch.arange(1), torch.arange(rows), torch.arange(columns)).to(like)


def _dit(config: Any, randn: Randn) -> dict[str, Any]:
    labels = torch.zeros(B, dtype=torch.long, device=randn(1).device)
    return {"hidden_states": _latents(config, randn), "timestep": _t(randn, 999).long(), "class_labels": labels}


def _pixart(config: Any, randn: Randn) -> dict[str, Any]:
    extra = config["use_additional_conditions"]
    extra = config["sample_size"] == 128 if extra is None else extra
    return {
        "hidden_states": _latents(config, randn),
        "encoder_hidden_states": randn(B, T, config["caption_channels"] or config["cross_attention_dim"]),
        "timestep": _t(randn, 999),
        "added_cond_kwargs": {
            "resolution": randn(B, 2) if extra else None,
            "aspect_ratio": randn(B, 1) if extra else None,
        },
    }


def _sana(config: Any, randn: Randn) -> dict[str, Any]:
    return {
        "hidden_states": _latents(config, randn),
        "encoder_hidden_states": randn(B, T, config["caption_channels"]),
        "timestep": _t(randn, 999),
        "guidance": _t(randn) if config["guidance_embeds"] else None,
    }


def _sd3(config: Any, randn: Randn) -> dict[str, Any]:
    return {
        "hidden_states": _latents(config, randn),
        "encoder_hidden_states": randn(B, T, config["joint_attention_dim"]),
        "pooled_projections": randn(B, config["pooled_projection_dim"]),
        "timestep": _t(randn, 999),
    }


def _flux(config: Any, randn: Randn) -> dict[str, Any]:
    return {
        "hidden_states": randn(B, SIDE * SIDE, config["in_channels"]),
        "encoder_hidden_states": randn(B, T, config["joint_attention_dim"]),
        "pooled_projections": randn(B, config["pooled_projection_dim"]),
        "timestep": _t(randn),
        "img_ids": _grid(SIDE, SIDE, randn(1)),
        "txt_ids": torch.zeros(T, 3).to(randn(1)),
        "guidance": _t(randn) if config["guidance_embeds"] else None,
    }


def _flux2(config: Any, randn: Randn) -> dict[str, Any]:
    image, text = _grid(SIDE, SIDE, randn(1)), torch.arange(T).to(randn(1))[:, None]
    return {
        "hidden_states": randn(B, SIDE * SIDE, config["in_channels"]),
        "encoder_hidden_states": randn(B, T, config["joint_attention_dim"]),
        "timestep": _t(randn),
        "img_ids": nn.functional.pad(image, (0, 1)),
        "txt_ids": nn.functional.pad(text, (3, 0)),
        "guidance": _t(randn) if config["guidance_embeds"] else None,
    }


def _qwen(config: Any, randn: Randn) -> dict[str, Any]:
    more = torch.zeros(B * (1 + config["zero_cond_t"]), dtype=torch.long, device=randn(1).device)
    return {
        "hidden_states": randn(B, SIDE * SIDE, config["in_channels"]),
        "encoder_hidden_states": randn(B, T, config["joint_attention_dim"]),
        "encoder_hidden_states_mask": torch.ones(B, T, dtype=torch.bool, device=randn(1).device),
        "timestep": _t(randn),
        "img_shapes": [[(1, SIDE, SIDE)]] * B,
        "additional_t_cond": more if config["use_additional_t_cond"] else None,
    }


def _z_image(config: Any, randn: Randn) -> dict[str, Any]:
    patch, frames = config["all_patch_size"][0], config["all_f_patch_size"][0]
    shape = (config["in_channels"], frames, SIDE * patch, SIDE * patch)
    return {
        "x": [randn(*shape) for _ in range(B)],
        "t": _t(randn),
        "cap_feats": [randn(T + i, config["cap_feat_dim"]) for i in range(B)],
        "patch_size": patch,
        "f_patch_size": frames,
    }


def _lumina2(config: Any, randn: Randn) -> dict[str, Any]:
    mask = torch.ones(B, T, dtype=torch.bool, device=randn(1).device)
    return {
        "hidden_states": _latents(config, randn),
        "encoder_hidden_states": randn(B, T, config["cap_feat_dim"]),
        "encoder_attention_mask": mask,
        "timestep": _t(randn),
    }


def _wan(config: Any, randn: Randn) -> dict[str, Any]:
    if config["pos_embed_seq_len"] is not None:
        raise ValueError("cannot make inputs for a Wan with first and last frame: pass example_inputs, or check=False")
    frames, rows, columns = (patch * count for patch, count in zip(config["patch_size"], (2, SIDE, SIDE), strict=True))
    images = config["image_dim"]
    return {
        "hidden_states": randn(B, config["in_channels"], frames, rows, columns),
        "timestep": _t(randn, 999),
        "encoder_hidden_states": randn(
            B, T if images is None else 512, config["text_dim"]
        ),  # 512 is built into diffusers
        "encoder_hidden_states_image": None if images is None else randn(B, T, images),
    }


INPUTS: dict[str, Callable[[Any, Randn], dict[str, Any]]] = {
    "DiTTransformer2DModel": _dit,
    "PixArtTransformer2DModel": _pixart,
    "SanaTransformer2DModel": _sana,
    "SD3Transformer2DModel": _sd3,
    "FluxTransformer2DModel": _flux,
    "Flux2Transformer2DModel": _flux2,
    "QwenImageTransformer2DModel": _qwen,
    "ZImageTransformer2DModel": _z_image,
    "Lumina2Transformer2DModel": _lumina2,
    "WanTransformer3DModel": _wan,
}
