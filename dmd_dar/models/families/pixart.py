"""PixArt-alpha (arXiv:2310.00426) and -sigma (arXiv:2403.04692), as PixArtAlphaPipeline asks and encodes."""

from typing import Any

from torch import Tensor

from dmd_dar.models.families.form import Family, FixedInputs, Prompting, Rows

PIXELS = 8  # for each latent cell along one side
T5 = ("T5EncoderModel", "T5Tokenizer", "T5TokenizerFast")


def ask(transformer: Any, x: Tensor, time: Tensor, rows: Rows, fixed: FixedInputs) -> Tensor:
    added: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
    if transformer.use_additional_conditions:
        height, width = x.shape[-2:]
        size = x.new_tensor([PIXELS * height, PIXELS * width]).expand(len(x), 2)
        added = {"resolution": size, "aspect_ratio": x.new_full((len(x), 1), height / width)}
    conditions = {"encoder_attention_mask": rows.get("mask"), "added_cond_kwargs": added}
    embedding = rows["embedding"].to(x.dtype)
    return transformer(x, timestep=time, encoder_hidden_states=embedding, **conditions, return_dict=False)[0]


def encode(pipeline: Any, prompts: list[str], tokens: int, negatives: int = 0) -> Rows:
    options = dict(do_classifier_free_guidance=False, max_sequence_length=tokens)
    embedding, mask, _, _ = pipeline.encode_prompt(prompts, **options)
    return {"embedding": embedding, "mask": mask.long()}


PIXART = Family(
    "PixArtTransformer2DModel",
    ask,
    width="caption_channels",
    beside="mask",
    pipelines={"PixArtAlphaPipeline": Prompting(120, T5, encode), "PixArtSigmaPipeline": Prompting(300, T5, encode)},
)
