"""The network's own timestep embedding, which `timestep` queries read, found in every form that diffusers has."""

import pytest
import torch

from dmd_dar.routing import attach
from dmd_dar.routing.consumers import time_embedder
from tests.routing.tiny_models import gradients, output

diffusers = pytest.importorskip("diffusers")
FLUX2 = dict(
    in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=8, num_attention_heads=2,
    joint_attention_dim=6, axes_dims_rope=(2, 2, 2, 2), timestep_guidance_channels=8,
)  # fmt: skip


@pytest.mark.parametrize("guidance", [True, False])
def test_flux_2_is_routed_by_its_timestep(guidance):
    torch.manual_seed(0)
    model = diffusers.Flux2Transformer2DModel(**FLUX2, guidance_embeds=guidance).eval()
    inputs = {"hidden_states": torch.randn(2, 16, 4), "encoder_hidden_states": torch.randn(2, 5, 6)}
    inputs |= {"img_ids": torch.zeros(2, 16, 4), "txt_ids": torch.zeros(2, 5, 4), "timestep": torch.tensor([0.1, 0.9])}
    inputs["guidance"] = torch.tensor([3.0, 1.0]) if guidance else None
    plain = output(model, inputs)
    attach(model, query="timestep", chunk_size=2, example_inputs=inputs)
    assert torch.equal(output(model, inputs), plain)
    embedded = []
    model.time_guidance_embed.timestep_embedder.register_forward_hook(lambda module, args, e: embedded.append(e))
    found = gradients(model, {key: None if value is None else value[:1] for key, value in inputs.items()})
    assert embedded[0].shape == (1, 16)
    for stream in ("image", "text", "joint"):  # q = query + gate * e(t), for one sample
        query, gate = (found[f"dar.streams.{stream}.{name}"] for name in ("query", "gate"))
        assert gate.any() and torch.allclose(gate, query * embedded[0].detach(), rtol=1e-4, atol=1e-7)


MAIN = {
    "FluxTransformer2DModel": ("time_text_embed.timestep_embedder", {"num_layers": 1, "num_single_layers": 1}),
    "HunyuanVideoTransformer3DModel": (
        "time_text_embed.timestep_embedder", {"num_layers": 1, "num_single_layers": 1, "num_refiner_layers": 1}
    ),
    "HunyuanVideo15Transformer3DModel": ("time_embed.timestep_embedder", {"num_layers": 1, "num_refiner_layers": 1}),
    "HunyuanImageTransformer2DModel": (
        "time_guidance_embed.timestep_embedder", {"num_layers": 1, "num_single_layers": 1}
    ),
    "AceStepTransformer1DModel": ("time_embed.linear_2", {}),
    "CosmosTransformer3DModel": ("time_embed.t_embedder", {"num_layers": 1}),
    "Ideogram4Transformer2DModel": ("t_embedding", {"num_layers": 1}),
    "Krea2Transformer2DModel": ("time_embed", {"num_layers": 1}),
    "PRXTransformer2DModel": ("time_in", {"depth": 1}),
    "StableAudioDiTModel": ("timestep_proj", {"num_layers": 1}),
    "WanAnimate2Transformer3DModel": ("time_embedding", {"num_layers": 1}),
    "ChromaTransformer2DModel": (None, {"num_layers": 1, "num_single_layers": 1}),
}  # fmt: skip


@pytest.mark.parametrize("name", MAIN)
def test_the_embedder_of_the_whole_network_is_found(name):
    path, changes = MAIN[name]
    if not hasattr(diffusers, name):
        pytest.skip(f"this diffusers has no {name}")
    with torch.device("meta"):
        model = getattr(diffusers, name)(**changes)
    assert time_embedder(model) == path
    if path is not None:
        model.get_submodule(path)
