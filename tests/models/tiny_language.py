"""Tiny random language models as text encoders of pipelines, with tokenizers of bytes that nobody has to download."""

from typing import Any

import torch

CHATML = (  # as Qwen3's own template does: a turn for each message, then the assistant's, thinking or not
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
MARKS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def byte_vocabulary(*marks: str) -> dict[str, int]:
    from tokenizers.pre_tokenizers import ByteLevel

    return {piece: i for i, piece in enumerate([*marks, *sorted(ByteLevel.alphabet())])}


def qwen_tokenizer() -> Any:
    from transformers import Qwen2Tokenizer

    tokenizer = Qwen2Tokenizer(vocab=byte_vocabulary(*MARKS), merges=[], additional_special_tokens=MARKS[1:])
    tokenizer.chat_template = CHATML
    return tokenizer


def tiny_qwen2_5_vl(seed: int = 0) -> tuple[Any, Any]:
    """A tokenizer and a Qwen2.5-VL of width 16, with an eye that no prompt uses."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    tokenizer = qwen_tokenizer()
    torch.manual_seed(seed)
    text: dict[str, Any] = dict(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2)
    text |= dict(num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=2048)
    text |= dict(bos_token_id=0, eos_token_id=0, pad_token_id=0)
    text["rope_scaling"] = text["rope_parameters"] = {
        "type": "default", "rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4,
    }  # fmt: skip
    eye = dict(depth=1, hidden_size=8, intermediate_size=8, num_heads=1, out_hidden_size=16, patch_size=2)
    return tokenizer, Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=eye)).eval()


def tiny_qwen3(layers: int = 3, seed: int = 0) -> tuple[Any, Any]:
    """A tokenizer with a chat template and a Qwen3 of width 16."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    tokenizer = qwen_tokenizer()
    torch.manual_seed(seed)
    shape = dict(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=layers, head_dim=8)
    shape |= dict(num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=2048)
    return tokenizer, Qwen3ForCausalLM(Qwen3Config(**shape, bos_token_id=0, eos_token_id=0)).eval()


def tiny_mistral3(seed: int = 0) -> tuple[Any, Any]:
    """A processor with a chat template and a Mistral3 of width 16 and 30 layers, with an eye that no prompt uses."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import (
        Mistral3Config,
        Mistral3ForConditionalGeneration,
        PixtralImageProcessor,
        PixtralProcessor,
        PreTrainedTokenizerFast,
    )

    marks = ["<unk>", "<s>", "</s>", "<pad>", "[IMG]", "[IMG_BREAK]", "[IMG_END]", "[INST]", "[/INST]"]
    bytewise = Tokenizer(models.BPE(vocab=byte_vocabulary(*marks), merges=[]))
    bytewise.pre_tokenizer, bytewise.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    names = dict(unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytewise, **names, additional_special_tokens=marks[4:])
    template = (
        "{{ bos_token }}{% for message in messages %}{% for part in message['content'] %}"
        "{% if message['role'] == 'user' %}[INST]{{ part['text'] }}[/INST]{% else %}{{ part['text'][:9] }}{% endif %}"
        "{% endfor %}{% endfor %}"
    )
    processor = PixtralProcessor(PixtralImageProcessor(), tokenizer, chat_template=template)
    torch.manual_seed(seed)
    text: dict[str, Any] = dict(model_type="mistral", vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32)
    text |= dict(num_hidden_layers=30, num_attention_heads=2, num_key_value_heads=1, head_dim=8)
    eye = dict(model_type="pixtral", hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    shape = Mistral3Config(text_config=text, vision_config={**eye, "image_size": 16, "patch_size": 4})
    return processor, Mistral3ForConditionalGeneration(shape).eval()
