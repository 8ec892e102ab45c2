"""Z-Image (arXiv:2511.22699), as ZImagePipeline asks and encodes.

Its pipeline's guidance_scale w is cond + w (cond - uncond), so that its 5 is our 6 (`guidance.convert`).
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dmd_dar.models.families.form import THOUSAND, Family, FixedInputs, Prompting, Rows

PARTS = ("Qwen3ForCausalLM", "Qwen3Model", "Qwen2Tokenizer", "Qwen2TokenizerFast")


def ask(transformer: Any, x: Tensor, time: Tensor, rows: Rows, fixed: FixedInputs) -> Tensor:
    """Its time runs from noise (0) to data (1), its output is x0 - eps, and it takes prompts without their padding."""
    embedding, mask = rows["embedding"].to(x.dtype), rows.get("mask")
    texts = [*embedding] if mask is None else [row[kept] for row, kept in zip(embedding, mask.bool(), strict=True)]
    made = transformer([*x[:, :, None]], (THOUSAND - time) / THOUSAND, texts, return_dict=False)[0]
    return -torch.stack(made)[:, :, 0]


def encode(pipeline: Any, prompts: list[str], tokens: int, negatives: int = 0) -> Rows:
    """Filled up to `tokens` with zeros, which the mask keeps out."""
    options = dict(do_classifier_free_guidance=False, max_sequence_length=tokens)
    embeddings, _ = pipeline.encode_prompt([*prompts], **options)  # it writes into the list
    mask = torch.stack([F.pad(row.new_ones(len(row)), (0, tokens - len(row))) for row in embeddings])
    return {
        "embedding": torch.stack([F.pad(row, (0, 0, 0, tokens - len(row))) for row in embeddings]),
        "mask": mask.to(torch.int64),
    }


Z_IMAGE = Family(
    "ZImageTransformer2DModel",
    ask,
    width="cap_feat_dim",
    beside="mask",
    side=128,
    patch=2,
    most=lambda config: 2 * min(config["axes_lens"][1:]),
    time_embedder="t_embedder",
    off=("guidance_scale", 0.0),
    pipelines={"ZImagePipeline": Prompting(512, PARTS, encode)},
)
