"""FLUX.1, as FluxPipeline asks and encodes."""

from typing import Any

from torch import Tensor

from dmd_dar.models.families.form import PACKED, THOUSAND, Family, FixedInputs, Prompting, Rows, packed, unpacked
from dmd_dar.models.families.pixart import T5

PARTS = ("CLIPTextModel", "CLIPTokenizer", *T5)


def ask(transformer: Any, x: Tensor, time: Tensor, rows: Rows, fixed: FixedInputs) -> Tensor:
    embedding, size = rows["embedding"].to(x.dtype), (x.shape[-2] // 2, x.shape[-1] // 2)
    guided = transformer.config.guidance_embeds
    y = transformer(
        packed(x),
        timestep=time / THOUSAND,
        guidance=x.new_full((len(x),), fixed.embedded_guidance) if guided else None,
        encoder_hidden_states=embedding,
        pooled_projections=rows["pooled"].to(x.dtype),
        txt_ids=x.new_zeros(embedding.shape[1], 3),
        img_ids=_positions(*size, x),
        return_dict=False,
    )[0]
    return unpacked(y, *size)


def _positions(rows: int, columns: int, like: Tensor) -> Tensor:
    """(rows columns, 3): zero, row, column of each token."""
    ids = like.new_zeros(rows, columns, 3)
    ids[..., 1], ids[..., 2] = ids.new_tensor(range(rows))[:, None], ids.new_tensor(range(columns))
    return ids.reshape(-1, 3)


def encode(pipeline: Any, prompts: list[str], tokens: int, negatives: int = 0) -> Rows:
    embedding, pooled, _ = pipeline.encode_prompt(prompts, max_sequence_length=tokens)
    return {"embedding": embedding, "pooled": pooled}


FLUX = Family(
    "FluxTransformer2DModel",
    ask,
    width="joint_attention_dim",
    beside="pooled",
    side=128,
    patch=2,
    packed=True,
    embedded=3.5,
    latents=PACKED,
    pipelines={"FluxPipeline": Prompting(512, PARTS, encode)},
)
