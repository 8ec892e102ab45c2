"""Tiny random teachers as users have them: a DiTPipeline saved by diffusers itself, and public-style .pt files."""

import json
from pathlib import Path
from typing import Any

import torch

from dmd_dar.models.sit import SiT, SiTConfig
from tests.tiny import tiny_sit

CLASSES = 1000  # DiTPipeline's unconditional label is 1000 whatever the network's number of classes
LATENT = SiTConfig(input_size=8, in_channels=4, patch=2, width=16, depth=2, heads=2, num_classes=5, learn_sigma=True)


def shaken(module: torch.nn.Module, seed: int = 0) -> Any:
    """No weight is zero: under adaLN-Zero's own start nearly every test would pass."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return module.eval()


def tiny_dit(**changes) -> Any:
    """A DiTTransformer2DModel of two blocks on 4 x 8 x 8 latents, with learned sigma."""
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    fields = dict(num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2)
    fields |= dict(sample_size=8, patch_size=2, norm_num_groups=1, num_embeds_ada_norm=CLASSES)
    return shaken(DiTTransformer2DModel(**{**fields, **changes}))


def tiny_vae(**changes) -> Any:
    """An AutoencoderKL from 3 x 16 x 16 images to 4 x 8 x 8 latents."""
    from diffusers import AutoencoderKL

    torch.manual_seed(1)
    fields = dict(block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, sample_size=16)
    fields |= dict(down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)
    return AutoencoderKL(**{**fields, **changes}).eval()


def tiny_pipeline(folder: Path) -> Path:
    """A DiTPipeline with that VAE and DiT's DDIM schedule, saved by diffusers, with the names of its classes."""
    from diffusers import DDIMScheduler, DiTPipeline

    chain = DDIMScheduler(beta_start=1e-4, beta_end=0.02, clip_sample=False)
    DiTPipeline(tiny_dit(), tiny_vae(), chain).save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())
    index["id2label"] = {i: f"class {i}" for i in range(CLASSES)}  # as the public folder has it; diffusers saves none
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


LETTERS = "abcdefghijklmnopqrstuvwxyz"


def tiny_t5(seed: int = 0) -> tuple[Any, Any]:
    """A tokenizer of letters, which nobody has to download, and a T5 encoder of width 16."""
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    vocab = [*special, *((letter, -3.0) for letter in "\u2581" + LETTERS), ("\u2581cat", -2.0)]
    torch.manual_seed(seed)
    shape = T5Config(vocab_size=len(vocab), d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    return T5Tokenizer(vocab=vocab, extra_ids=0), T5EncoderModel(shape).eval()


def tiny_clip(seed: int = 0) -> tuple[Any, Any]:
    """A tokenizer of letters and a CLIP text encoder with projection, of width 8."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

    pieces = ["<|startoftext|>", "<|endoftext|>", *LETTERS, *(f"{letter}</w>" for letter in LETTERS)]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    torch.manual_seed(seed)
    shape = dict(vocab_size=len(vocab), hidden_size=8, intermediate_size=16, num_hidden_layers=2, projection_dim=8)
    shape |= dict(num_attention_heads=2, max_position_embeddings=16, bos_token_id=0, eos_token_id=1)
    tokenizer = CLIPTokenizer(vocab=vocab, merges=[], model_max_length=16)
    return tokenizer, CLIPTextModelWithProjection(CLIPTextConfig(**shape)).eval()


def tiny_pixart(folder: Path, sigma: bool = False, **changes) -> Path:
    """A PixArtAlphaPipeline, or PixArtSigmaPipeline, with learned sigma and DiT's chain, saved by diffusers."""
    from diffusers import DDIMScheduler, PixArtAlphaPipeline, PixArtSigmaPipeline, PixArtTransformer2DModel

    torch.manual_seed(2)
    fields = dict(num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2)
    fields |= dict(sample_size=8, patch_size=2, norm_num_groups=1, cross_attention_dim=16, caption_channels=16)
    transformer = shaken(PixArtTransformer2DModel(**{**fields, **changes}))
    chain = DDIMScheduler(beta_start=1e-4, beta_end=0.02, clip_sample=False)
    kind = PixArtSigmaPipeline if sigma else PixArtAlphaPipeline
    kind(*tiny_t5(), tiny_vae(), transformer, chain).save_pretrained(folder)
    return folder


def tiny_sd3(folder: Path, third: bool = True, **changes) -> Path:
    """A StableDiffusion3Pipeline of flow matching with its three text encoders, or two, saved by diffusers."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    torch.manual_seed(3)
    fields = dict(num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, num_layers=2)
    fields |= dict(sample_size=8, patch_size=2, joint_attention_dim=16, pooled_projection_dim=16)
    fields |= dict(caption_projection_dim=16, pos_embed_max_size=8)
    transformer = shaken(SD3Transformer2DModel(**{**fields, **changes}))
    vae = tiny_vae(shift_factor=0.0609, scaling_factor=1.5305)
    (one, clip), (two, clip_2), (three, t5) = tiny_clip(), tiny_clip(1), tiny_t5() if third else (None, None)
    StableDiffusion3Pipeline(
        transformer, FlowMatchEulerDiscreteScheduler(shift=3.0), vae, clip, one, clip_2, two, t5, three
    ).save_pretrained(folder)
    return folder


def tiny_gemma() -> tuple[Any, Any]:
    """A tokenizer of letters and a Gemma2Model of width 16."""
    from transformers import Gemma2Config, Gemma2Model, GemmaTokenizer

    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "\u2581", *LETTERS]
    torch.manual_seed(4)
    shape = dict(vocab_size=len(pieces), hidden_size=16, intermediate_size=32, num_hidden_layers=2, head_dim=8)
    shape |= dict(num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=2048)
    tokenizer = GemmaTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[])
    return tokenizer, Gemma2Model(Gemma2Config(**shape)).eval()


def tiny_dc() -> Any:
    """An AutoencoderDC from 3 x 32 x 32 images to 4 x 8 x 8 latents."""
    from diffusers import AutoencoderDC

    torch.manual_seed(5)
    fields: dict[str, Any] = dict(latent_channels=4, attention_head_dim=2, scaling_factor=0.41407)
    for part in ("encoder", "decoder"):
        fields |= {f"{part}_block_out_channels": (8, 8, 8), f"{part}_layers_per_block": (1, 1, 1)}
        fields |= {f"{part}_block_types": ("ResBlock", "ResBlock", "EfficientViTBlock")}
        fields |= {f"{part}_qkv_multiscales": ((), (), (5,))}
    return AutoencoderDC(**fields).eval()


def tiny_sana(folder: Path, **changes) -> Path:
    """A SanaPipeline with the flow scheduler of the public folders and AutoencoderDC, saved by diffusers."""
    from diffusers import DPMSolverMultistepScheduler, SanaPipeline, SanaTransformer2DModel

    torch.manual_seed(6)
    fields = dict(in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=2)
    fields |= dict(num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16)
    fields |= dict(caption_channels=16, sample_size=8, timestep_scale=0.5)
    transformer = shaken(SanaTransformer2DModel(**{**fields, **changes}))
    chain = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    SanaPipeline(*tiny_gemma(), tiny_dc(), transformer, chain).save_pretrained(folder)
    return folder


def tiny_flux(folder: Path, **changes) -> Path:
    """A FluxPipeline of 4 x 8 x 8 latents with guidance as an input, saved by diffusers."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import CLIPTextModel

    torch.manual_seed(7)
    fields = dict(in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=8, num_attention_heads=2)
    fields |= dict(joint_attention_dim=16, pooled_projection_dim=8, axes_dims_rope=(2, 2, 4), guidance_embeds=True)
    transformer = shaken(FluxTransformer2DModel(**{**fields, **changes}))
    (one, projected), (two, t5) = tiny_clip(), tiny_t5()
    clip = CLIPTextModel(projected.config).eval()
    vae, chain = tiny_vae(shift_factor=0.1159, scaling_factor=0.3611), FlowMatchEulerDiscreteScheduler(shift=3.0)
    FluxPipeline(chain, vae, clip, one, t5, two, transformer).save_pretrained(folder)
    return folder


def public_file(file: Path, config: SiTConfig = LATENT, prefix: str = "", **beside) -> SiT:
    """A tiny SiT written as the public training scripts do: {"ema": state dict, ...}; returns the network."""
    network = tiny_sit(config).eval()
    weights = {f"{prefix}{name}": value.clone() for name, value in network.state_dict().items()}
    torch.save({"ema": weights, **beside}, file)
    return network
