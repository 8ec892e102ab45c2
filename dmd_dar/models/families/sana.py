"""Sana (arXiv:2410.10629), as SanaPipeline asks and encodes."""

import inspect
import itertools
from typing import Any

import torch
from torch import Tensor

from dmd_dar.models.families.form import Family, FixedInputs, Prompting, Rows

PIPELINE = "SanaPipeline"
GEMMA = ("Gemma2Model", "GemmaTokenizer", "GemmaTokenizerFast")


def ask(transformer: Any, x: Tensor, time: Tensor, rows: Rows, fixed: FixedInputs) -> Tensor:
    conditions = {"encoder_hidden_states": rows["embedding"].to(x.dtype), "encoder_attention_mask": rows.get("mask")}
    time = time * transformer.config.timestep_scale
    return transformer(x, timestep=time, **conditions, return_dict=False)[0]


def encode(pipeline: Any, prompts: list[str], tokens: int, negatives: int = 0) -> Rows:
    """Each prompt behind the pipeline's own instruction to its language model; the empty and the last ones alone."""
    options = dict(do_classifier_free_guidance=False, max_sequence_length=tokens)
    parts, first = [], len(prompts) - negatives
    instructed = [(bool(text) and i < first, text) for i, text in enumerate(prompts)]
    for with_instruction, group in itertools.groupby(instructed, lambda one: one[0]):
        texts, before = [text for _, text in group], instruction() if with_instruction else None
        embedding, mask, _, _ = pipeline.encode_prompt(texts, complex_human_instruction=before, **options)
        parts.append({"embedding": embedding, "mask": mask.long()})
    return {name: torch.cat([part[name] for part in parts]) for name in ("embedding", "mask")}


def instruction(pipeline: Any = None) -> list[str]:
    """What SanaPipeline puts before a prompt unless it is told otherwise."""
    import diffusers

    return inspect.signature(getattr(diffusers, PIPELINE).__call__).parameters["complex_human_instruction"].default


def refused(config: Any) -> str:
    if config.get("guidance_embeds"):
        return "is a SANA-Sprint, a few-step student of its own form: name the SANA that it is from"
    return ""


SANA = Family(
    "SanaTransformer2DModel",
    ask,
    width="caption_channels",
    beside="mask",
    refused=refused,
    pipelines={PIPELINE: Prompting(300, GEMMA, encode, lambda pipeline: tuple(instruction()))},
)
