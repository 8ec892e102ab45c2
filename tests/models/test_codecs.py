"""Latents have the VAE's scale and shift once, whichever way they are written down."""

import pytest
import torch
from torch import Tensor

from dmd_dar.errors import DamagedFileError, MissingWeightsError
from dmd_dar.models.codecs import CHUNK, Codec, load_codec, sample_latents, scale_and_shift
from tests.models.tiny_pipelines import tiny_vae

WAYS = {
    "scale": (dict(scaling_factor=0.18215), [0.18215] * 4, [0.0] * 4),
    "scale and shift": (dict(scaling_factor=1.5, shift_factor=0.06), [1.5] * 4, [0.06] * 4),
    "per channel": (
        dict(scaling_factor=0.5, latents_mean=(0.1, 0.2, 0.3, 0.4), latents_std=(1.0, 2.0, 4.0, 5.0)),
        [0.5, 0.25, 0.125, 0.1],
        [0.1, 0.2, 0.3, 0.4],
    ),
}


def images(count: int = 3) -> Tensor:
    return 2 * torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(0)) - 1


@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
@pytest.mark.stages("codec", family=("pixart", "sd3", "flux", "z_image"))
def test_scale_and_shift_are_applied_once(way):
    fields, scale, shift = WAYS[way]
    vae = tiny_vae(**fields)
    codec = Codec(tiny_vae(**fields))
    scale, shift = (torch.tensor(values).reshape(4, 1, 1) for values in (scale, shift))
    raw = vae.encode(images()).latent_dist
    mean, std = codec.encode(images())
    assert mean.shape == (3, 4, 8, 8) and codec.channels == 4 and codec.factor == 2
    assert torch.allclose(mean, (raw.mean - shift) * scale, rtol=1e-5, atol=1e-6)
    assert torch.allclose(std, raw.std * scale, rtol=1e-5, atol=0) and std.min() > 0
    eps = torch.randn(mean.shape, generator=torch.Generator().manual_seed(1))
    latents = sample_latents(mean, std, eps)
    assert torch.allclose(latents, (raw.mean + raw.std * eps - shift) * scale, rtol=1e-5, atol=1e-6)
    assert torch.allclose(codec.decode(latents), vae.decode(latents / scale + shift).sample, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.stages("codec", family="dit")
def test_the_scale_is_the_pipeline_s():
    """DiTPipeline decodes latents / scaling_factor."""
    vae, latents = tiny_vae(), torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    theirs = vae.decode(1 / vae.config.scaling_factor * latents).sample
    assert torch.allclose(Codec(tiny_vae()).decode(latents), theirs, rtol=0, atol=1e-6)


def test_gradients_reach_the_latents_and_no_weight_and_autocast_stays_outside():
    codec = Codec(tiny_vae())
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(2)).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        decoded = codec.decode(latents)
    assert decoded.dtype == torch.float32 and torch.equal(decoded, codec.decode(latents))
    decoded.square().sum().backward()
    assert latents.grad.abs().min() > 0 and all(p.grad is None and not p.requires_grad for p in codec.parameters())


@torch.no_grad()
def test_chunks_change_nothing():
    codec, many = Codec(tiny_vae()), images(CHUNK + 3)
    mean, _ = codec.encode(many)
    assert torch.allclose(mean[-1:], codec.encode(many[-1:])[0], rtol=1e-5, atol=1e-6)
    assert torch.allclose(codec.decode(mean)[-1:], codec.decode(mean[-1:]), rtol=1e-5, atol=1e-5)


def test_two_shifts_are_refused():
    with pytest.raises(ValueError, match="latents_mean and shift_factor"):
        scale_and_shift(tiny_vae(shift_factor=0.1, latents_mean=(0.1, 0.1, 0.1, 0.1)).config)


@torch.no_grad()
def test_a_codec_comes_from_its_folder_or_a_pipeline_s(tmp_path):
    tiny_vae(shift_factor=0.3).save_pretrained(tmp_path / "vae")
    expected = Codec(tiny_vae(shift_factor=0.3)).encode(images())[0]
    for path in (tmp_path, tmp_path / "vae"):
        codec = load_codec(str(path))
        assert torch.equal(codec.encode(images())[0], expected) and not codec.vae.training
    file = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    with pytest.raises(DamagedFileError, match=str(tmp_path / "vae")):
        load_codec(str(tmp_path))
    file.rename(file.with_suffix(".bin"))
    with pytest.raises(MissingWeightsError, match="safetensors"):
        load_codec(str(tmp_path))
    tiny_vae(up_block_types=("UpDecoderBlock2D",) * 2, layers_per_block=2).save_pretrained(tmp_path / "vae")
    tiny_vae(layers_per_block=1).save_config(tmp_path / "vae")
    with pytest.raises(DamagedFileError, match="do not fit"):
        load_codec(str(tmp_path))
