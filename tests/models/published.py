"""The published shapes of public text-to-image bases, as the configurations of their folders alone."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

KL: dict[str, Any] = {"block_out_channels": [128, 256, 512, 512]}
KL |= {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}


@dataclass(frozen=True)
class Published:
    """One base; of its transformer and VAE, what differs from the defaults of diffusers' class."""

    base: str  # hub id
    pipeline: str
    transformer: str
    billions: float  # parameters of the transformer, as its publisher says
    shape: dict[str, Any] = field(default_factory=dict)
    vae: tuple[str, dict[str, Any]] = ("AutoencoderKL", KL)

    def write(self, root: Path) -> Path:
        """ROOT/OWNER/NAME with model_index.json and the configurations of transformer and VAE."""
        folder, (vae, fields) = root / self.base, self.vae
        parts = {"transformer": ["diffusers", self.transformer], "vae": ["diffusers", vae]}
        for name, content in (
            ("model_index", {"_class_name": self.pipeline, **parts}),
            ("transformer/config", {"_class_name": self.transformer, **self.shape}),
            ("vae/config", {"_class_name": vae, **fields}),
        ):
            file = folder / f"{name}.json"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(content))
        return folder


SD35_MEDIUM = dict(num_layers=24, num_attention_heads=24, caption_projection_dim=1536, pos_embed_max_size=384)
SD35_MEDIUM |= dict(dual_attention_layers=[*range(13)], qk_norm="rms_norm")
KLEIN_4B = dict(num_layers=5, num_single_layers=20, num_attention_heads=24, joint_attention_dim=7680)
PUBLISHED = {
    "qwen_image": Published(
        "Qwen/Qwen-Image", "QwenImagePipeline", "QwenImageTransformer2DModel", 20.4, vae=("AutoencoderKLQwenImage", {})
    ),
    "z_image": Published("Tongyi-MAI/Z-Image", "ZImagePipeline", "ZImageTransformer2DModel", 6.15),
    "flux1_dev": Published(
        "black-forest-labs/FLUX.1-dev",
        "FluxPipeline",
        "FluxTransformer2DModel",
        11.9,
        {"guidance_embeds": True},
    ),
    "flux2_klein": Published(
        "black-forest-labs/FLUX.2-klein-base-4B",
        "Flux2KleinPipeline",
        "Flux2Transformer2DModel",
        3.9,
        {**KLEIN_4B, "guidance_embeds": False},
        ("AutoencoderKLFlux2", KL),
    ),
    "sd35": Published(
        "stabilityai/stable-diffusion-3.5-medium",
        "StableDiffusion3Pipeline",
        "SD3Transformer2DModel",
        2.47,
        SD35_MEDIUM,
    ),
    "sana": Published(
        "Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers",
        "SanaPipeline",
        "SanaTransformer2DModel",
        1.6,
        vae=("AutoencoderDC", {}),
    ),
    "pixart_sigma": Published(
        "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS",
        "PixArtSigmaPipeline",
        "PixArtTransformer2DModel",
        0.61,
        {"caption_channels": 4096, "interpolation_scale": 2, "use_additional_conditions": False},
    ),
}
