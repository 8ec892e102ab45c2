"""Random diffusers transformers small enough for tests, one per class whose sublayers are known."""

from typing import Any

import torch
from torch import Tensor, nn

from dmd_dar.routing.check import tensors

CONFIGS = {
    "DiTTransformer2DModel": dict(
        num_attention_heads=2, attention_head_dim=8, in_channels=3, num_layers=3, sample_size=8, norm_num_groups=1,
        num_embeds_ada_norm=5,
    ),
    "PixArtTransformer2DModel": dict(
        num_attention_heads=2, attention_head_dim=12, in_channels=3, num_layers=2, sample_size=8, norm_num_groups=1,
        cross_attention_dim=24, caption_channels=6, use_additional_conditions=True,
    ),
    "SanaTransformer2DModel": dict(
        in_channels=3, out_channels=3, num_attention_heads=2, attention_head_dim=8, num_layers=2,
        num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=6,
        sample_size=8,
    ),
    "SD3Transformer2DModel": dict(
        sample_size=8, in_channels=3, num_layers=3, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=6, caption_projection_dim=16, pooled_projection_dim=7, out_channels=3,
        pos_embed_max_size=8, dual_attention_layers=(0,), qk_norm="rms_norm",
    ),
    "FluxTransformer2DModel": dict(
        in_channels=4, num_layers=2, num_single_layers=3, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=6, pooled_projection_dim=7, axes_dims_rope=(2, 2, 4), guidance_embeds=True,
    ),
    "Flux2Transformer2DModel": dict(
        in_channels=4, num_layers=2, num_single_layers=3, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=6, axes_dims_rope=(2, 2, 2, 2),
    ),
    "QwenImageTransformer2DModel": dict(
        in_channels=4, out_channels=4, num_layers=3, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=6, axes_dims_rope=(2, 2, 4),
    ),
    "ZImageTransformer2DModel": dict(
        in_channels=3, dim=16, n_layers=3, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=6,
        axes_dims=[4, 2, 2], axes_lens=[80, 16, 16],
    ),
    "Lumina2Transformer2DModel": dict(
        sample_size=8, in_channels=3, hidden_size=16, num_layers=3, num_refiner_layers=1, num_attention_heads=2,
        num_kv_heads=1, multiple_of=8, axes_dim_rope=(4, 2, 2), axes_lens=(40, 16, 16), cap_feat_dim=6,
    ),
    "WanTransformer3DModel": dict(
        num_attention_heads=2, attention_head_dim=12, in_channels=3, out_channels=3, text_dim=6, freq_dim=8,
        ffn_dim=32, num_layers=2, rope_max_seq_len=16,
    ),
}  # fmt: skip
NAMES = list(CONFIGS)


def tiny_model(name: str, dtype: torch.dtype = torch.float32, **changes) -> nn.Module:
    """A model of diffusers class `name`, every weight random and none at its zero start, in eval mode."""
    import diffusers

    torch.manual_seed(0)
    model = getattr(diffusers, name)(**{**CONFIGS[name], **changes})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.to(dtype).eval()


def shaken(model: nn.Module) -> nn.Module:
    """The same routed model with its routers away from their start."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.dar.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def output(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """All that the model returns, in one flat tensor."""
    return torch.cat([x.flatten() for x in tensors(model(**inputs))])


def gradients(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Name -> gradient of the output's squared norm."""
    model.zero_grad(set_to_none=True)
    output(model, inputs).square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """The largest difference of two sets of tensors, relative to the largest entry of all."""
    assert a.keys() == b.keys(), a.keys() ^ b.keys()
    largest = max(float(x.abs().max()) for x in b.values())
    return max(float((a[name] - b[name]).abs().max()) for name in a) / largest
