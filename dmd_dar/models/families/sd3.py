"""Stable Diffusion 3 and 3.5 (arXiv:2403.03206), as StableDiffusion3Pipeline asks and encodes."""

from typing import Any

from torch import Tensor

from dmd_dar.models.families.form import Family, FixedInputs, Prompting, Rows
from dmd_dar.models.families.pixart import T5

PARTS = ("CLIPTextModelWithProjection", "CLIPTokenizer", *T5)


def ask(transformer: Any, x: Tensor, time: Tensor, rows: Rows, fixed: FixedInputs) -> Tensor:
    embedding, pooled = rows["embedding"].to(x.dtype), rows["pooled"].to(x.dtype)
    conditions = {"encoder_hidden_states": embedding, "pooled_projections": pooled}
    return transformer(x, timestep=time, **conditions, return_dict=False)[0]


def encode(pipeline: Any, prompts: list[str], tokens: int, negatives: int = 0) -> Rows:
    options = dict(do_classifier_free_guidance=False, max_sequence_length=tokens)
    embedding, _, pooled, _ = pipeline.encode_prompt(prompts, None, None, **options)
    return {"embedding": embedding, "pooled": pooled}


SD3 = Family(
    "SD3Transformer2DModel",
    ask,
    width="joint_attention_dim",
    beside="pooled",
    most=lambda config: config["patch_size"] * (config.get("pos_embed_max_size") or 0),
    pipelines={"StableDiffusion3Pipeline": Prompting(256, PARTS, encode, before=77, asks_transformer=True)},
)
