"""Qwen-Image (arXiv:2508.02324), as QwenImagePipeline asks, encodes and guides."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dmd_dar.models.families.form import PACKED, THOUSAND, Family, FixedInputs, Prompting, Rows, packed, unpacked

PARTS = ("Qwen2_5_VLForConditionalGeneration", "Qwen2Tokenizer", "Qwen2TokenizerFast")


def ask(transformer: Any, x: Tensor, time: Tensor, rows: Rows, fixed: FixedInputs) -> Tensor:
    size = (x.shape[-2] // 2, x.shape[-1] // 2)
    y = transformer(
        packed(x),
        timestep=time / THOUSAND,
        encoder_hidden_states=rows["embedding"].to(x.dtype),
        encoder_hidden_states_mask=rows.get("mask"),
        img_shapes=[[(1, *size)]] * len(x),
        return_dict=False,
    )[0]
    return unpacked(y, *size)


def encode(pipeline: Any, prompts: list[str], tokens: int, negatives: int = 0) -> Rows:
    """Filled up to `tokens` with zeros, which the mask keeps out."""
    embedding, mask = pipeline.encode_prompt(prompts, max_sequence_length=tokens)
    if mask is None:  # all prompts are equally long
        mask = embedding.new_ones(embedding.shape[:2])
    missing = tokens - embedding.shape[1]
    return {"embedding": F.pad(embedding, (0, 0, 0, missing)), "mask": F.pad(mask.to(torch.int64), (0, missing))}


def template(pipeline: Any) -> tuple[str, ...]:
    return pipeline.prompt_template_encode, str(pipeline.prompt_template_encode_start_idx)


def refused(config: Any) -> str:
    for key in ("guidance_embeds", "use_additional_t_cond", "use_layer3d_rope"):
        if config.get(key):
            return f"is a Qwen-Image that makes layers or takes further inputs ({key}): name one that makes an image"
    return ""


QWEN_IMAGE = Family(
    "QwenImageTransformer2DModel",
    ask,
    width="joint_attention_dim",
    beside="mask",
    side=128,
    patch=2,
    packed=True,
    guidance="rescaled",
    refused=refused,
    off=("true_cfg_scale", 1.0),
    latents=PACKED,
    pipelines={"QwenImagePipeline": Prompting(512, PARTS, encode, template, negative=" ")},
)
