"""FLUX.2, as Flux2Pipeline (dev, guidance an input) and Flux2KleinPipeline (guided as usual) ask and encode."""

from typing import Any

import torch
from torch import Tensor

from dmd_dar.models.families.form import THOUSAND, TOKENS, Family, FixedInputs, Prompting, Rows, as_cells, as_tokens

DEV = ("Mistral3ForConditionalGeneration", "PixtralProcessor")
KLEIN = ("Qwen3ForCausalLM", "Qwen2Tokenizer", "Qwen2TokenizerFast")


def ask(transformer: Any, x: Tensor, time: Tensor, rows: Rows, fixed: FixedInputs) -> Tensor:
    """Padding of prompts is read like any token: the pipelines give no mask."""
    embedding, guided = rows["embedding"].to(x.dtype), transformer.config.guidance_embeds
    y = transformer(
        as_tokens(x),
        timestep=time / THOUSAND,
        guidance=x.new_full((len(x),), fixed.embedded_guidance) if guided else None,
        encoder_hidden_states=embedding,
        img_ids=_positions((1, x.shape[-2], x.shape[-1], 1), x.device),
        txt_ids=_positions((1, 1, 1, embedding.shape[1]), x.device),
        return_dict=False,
    )[0]
    return as_cells(y, (x.shape[-2], x.shape[-1]))


def _positions(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """(product of sizes, 4) int64: zero, row, column, text token."""
    return torch.cartesian_prod(*(torch.arange(size, device=device) for size in sizes))


def encode(pipeline: Any, prompts: list[str], tokens: int, negatives: int = 0) -> Rows:
    return {"embedding": pipeline.encode_prompt(prompts, max_sequence_length=tokens)[0]}


FLUX2 = Family(
    "Flux2Transformer2DModel",
    ask,
    width="joint_attention_dim",
    side=64,
    patch=1,
    embedded=4.0,
    latents=TOKENS,
    pipelines={
        "Flux2Pipeline": Prompting(512, DEV, encode, lambda pipeline: (pipeline.system_message,)),
        "Flux2KleinPipeline": Prompting(512, KLEIN, encode),
    },
)
