"""Latents decoded one image at a time or in tiles: what diffusers' own slicing and tiling give."""

import pytest
import torch
from torch import Tensor

from dmd_dar.models.codecs import Codec
from tests.models.families.test_flux2 import tiny_vae as flux2_vae
from tests.models.families.test_qwen_image import tiny_vae as qwen_vae
from tests.models.tiny_pipelines import shaken, tiny_vae

LARGE = (12, 20)  # latent cells, more than a tile's


def codecs(kind: str) -> tuple[Codec, Codec]:
    """The same VAE twice, whose tiles are 8 cells of latents a side."""
    made = []
    for _ in range(2):
        if kind == "qwen":
            vae = qwen_vae()
            vae.tile_sample_min_height = vae.tile_sample_min_width = 16
            vae.tile_sample_stride_height = vae.tile_sample_stride_width = 12
        elif kind == "flux2":
            vae = flux2_vae()
            vae.tile_sample_min_size, vae.tile_latent_min_size = 16, 8
        else:
            vae = shaken(tiny_vae())
        made.append(Codec(vae))
    return made[0], made[1]


def latents(codec: Codec, size: tuple[int, int]) -> Tensor:
    return torch.randn(3, codec.channels, *size, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["kl", "qwen", "flux2"])
def test_slices_are_the_whole_and_tiles_are_the_vae_s_own(kind):
    whole, other = codecs(kind)
    x = latents(whole, LARGE)
    images = whole.decode(x)
    other.decode_in("slices")
    assert other.chunk == 1
    torch.testing.assert_close(other.decode(x), images, rtol=0, atol=1e-5)
    other.decode_in("tiles")
    tiled = other.decode(x)
    assert tiled.shape == images.shape and (tiled - images).abs().max() > 1e-3  # tiles are blended where they meet
    assert (tiled - images).abs().mean() < 0.5 * images.std()
    if kind == "kl":
        expected = other.vae.tiled_decode(x / other.scale + other.shift).sample
    elif kind == "qwen":  # whose own decode does not clamp in tiles
        expected = other.vae.decode((x / other.scale + other.shift)[:, :, None]).sample[:, :, 0]
    else:
        raw = torch.nn.functional.pixel_shuffle(x / other.scale + other.shift, 2)
        expected = other.vae.tiled_decode(raw).sample
    torch.testing.assert_close(tiled, expected, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["kl", "qwen", "flux2"])
def test_a_small_image_is_one_tile_and_none_is_encoded_in_tiles(kind):
    whole, other = codecs(kind)
    x = latents(whole, (6, 8) if kind == "kl" else (4, 4))
    other.decode_in("tiles")
    images = whole.decode(latents(whole, LARGE)).clamp(-1, 1)
    for one, moment in zip(other.encode(images), whole.encode(images), strict=True):
        torch.testing.assert_close(one, moment, rtol=0, atol=1e-5)
    assert other.vae.use_tiling
    torch.testing.assert_close(other.decode(x), whole.decode(x), rtol=0, atol=1e-5)
    assert other.digest() == whole.digest()
