"""FLUX.2: asked, guided, encoded and decoded as Flux2Pipeline (dev) and Flux2KleinPipeline do; distilled from."""

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dmd_dar.errors import UserError
from dmd_dar.guidance import GuidanceConfig
from dmd_dar.models.codecs import load_codec
from dmd_dar.models.guided import guided_velocity
from tests.models.families.euler import (
    TEXTS,
    distance,
    distilled,
    encoded,
    in_a_fresh_process,
    load,
    pipeline_of,
    two_steps,
)
from tests.models.tiny_language import tiny_mistral3, tiny_qwen3
from tests.models.tiny_pipelines import shaken

ROWS, COLUMNS = 4, 6  # latent cells, of 2 x 2 cells of the VAE
NAMES = ("klein", "dev")
OPEN: dict[str, dict[str, Any]] = {"klein": {}, "dev": {"embedded_guidance": 2.5}}


def tiny_vae() -> Any:
    """From 3 x 4 H x 4 W images to 16 x H x W latents."""
    from diffusers import AutoencoderKLFlux2

    torch.manual_seed(1)
    fields: dict[str, Any] = dict(block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, layers_per_block=1)
    fields |= dict(down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)
    vae = shaken(AutoencoderKLFlux2(**fields))
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.2, 3.0)
    return vae


def tiny_flux2(folder: Path, dev: bool = False, **changes) -> Path:
    """A Flux2Pipeline or Flux2KleinPipeline saved by diffusers."""
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        Flux2KleinPipeline,
        Flux2Pipeline,
        Flux2Transformer2DModel,
    )

    torch.manual_seed(10)
    fields = dict(in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=8, num_attention_heads=2)
    fields |= dict(joint_attention_dim=48, axes_dims_rope=(2, 2, 2, 2), guidance_embeds=dev)
    transformer = shaken(Flux2Transformer2DModel(**{**fields, **changes}))
    chain = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    tokenizer, encoder = tiny_mistral3() if dev else tiny_qwen3(layers=28)
    kind = Flux2Pipeline if dev else Flux2KleinPipeline
    kind(chain, tiny_vae(), encoder, tokenizer, transformer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("flux2")
    for name in NAMES:
        encoded(tiny_flux2(root / name, dev=name == "dev"))
    return {name: root / name for name in NAMES}


def start() -> Tensor:
    return torch.randn(3, 16, ROWS, COLUMNS, generator=torch.Generator().manual_seed(0))


def theirs(pipe: Any, x: Tensor, g: float) -> Tensor:
    """Latents of two steps from x; klein gives them without its VAE's scale, in cells of the VAE."""
    size = dict(height=4 * ROWS, width=4 * COLUMNS, num_inference_steps=2, output_type="latent")
    made = pipe(prompt=[*TEXTS], guidance_scale=g, latents=x.clone(), **size)[0]
    if made.ndim == 3:
        return made.mT.reshape(x.shape)
    norm = pipe.vae.bn
    return torch.nn.functional.batch_norm(
        pipe._patchify_latents(made), norm.running_mean, norm.running_var, eps=pipe.vae.config.batch_norm_eps
    )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.stages("teacher", "encode", "guidance", by="name")
def test_two_guided_steps_are_the_pipeline_s_own(folders, name):
    pipe, x, teacher = pipeline_of(folders[name]), start(), load(folders[name], **OPEN[name])
    steps = partial(two_steps, teacher, x)
    expected, other = theirs(pipe, x, 2.5), theirs(pipe, x, 1.0)
    assert distance(other, expected, x) > 1e-3
    g = 1.0 if name == "dev" else 2.5
    assert distance(steps(pipe.scheduler.sigmas, g, [0, 1, 2]), expected, x) < 1e-5
    assert distance(steps(pipe.scheduler.sigmas, g, [1, 0, 2]), expected, x) > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.stages("teacher", "guidance", by="name")
def test_in_a_fresh_process(folders, name):
    pipe, x, g = pipeline_of(folders[name]), start(), 1.0 if name == "dev" else 2.5
    expected = theirs(pipe, x, 2.5)
    ours = in_a_fresh_process(folders[name], x, pipe.scheduler.sigmas, (g, [0, 1, 2]), **OPEN[name])
    assert distance(ours, expected, x) < 1e-5


@torch.no_grad()
@pytest.mark.stages("codec", family="flux2")
def test_the_codec_normalises_patches_as_the_pipeline_does(folders):
    codec, pipe = load_codec(str(folders["klein"])), pipeline_of(folders["klein"])
    images = torch.rand(2, 3, 4 * ROWS, 4 * COLUMNS) * 2 - 1
    mean, std = codec.encode(images)
    torch.testing.assert_close(mean, pipe._encode_vae_image(images, None), rtol=1e-4, atol=1e-5)
    raw = codec.vae.encode(images).latent_dist
    assert std.shape == mean.shape == (2, 16, ROWS, COLUMNS) and (codec.channels, codec.factor) == (16, 4)
    scale = (codec.vae.bn.running_var + codec.vae.config.batch_norm_eps).sqrt().view(1, -1, 1, 1)
    torch.testing.assert_close(std, pipe._patchify_latents(raw.std) / scale)
    torch.testing.assert_close(codec.decode(mean), codec.vae.decode(raw.mean).sample, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "query", "weights"),
    [
        pytest.param("klein", "timestep", "full", marks=pytest.mark.slow),
        pytest.param("klein", "residual", "full", marks=pytest.mark.slow),
        pytest.param("dev", "timestep", "shared_lora", marks=pytest.mark.slow),
    ],
)
@pytest.mark.stages("distil", by="name")
def test_students_are_distilled_and_drawn_from(folders, tmp_path, name, query, weights):
    student = distilled(folders[name], tmp_path, query, weights, input_size=4, **OPEN[name])
    assert (student / "vae" / "config.json").is_file()


def test_what_it_does_not_take_is_one_line(folders, tmp_path):
    with pytest.raises(UserError, match="set teacher.embedded_guidance .*gives 4"):
        load(folders["dev"])
    klein, dev = load(folders["klein"]), load(folders["dev"], embedded_guidance=2.0)
    with pytest.raises(UserError, match="the teacher takes no guidance as an input; set guidance.form=auto"):
        guided_velocity(klein.network, klein.prediction, 1.0, GuidanceConfig("embedded"))
    with pytest.raises(UserError, match="guidance_scale = 2: .* set guidance_scale=1"):
        guided_velocity(dev.network, dev.prediction, 2.0, GuidanceConfig("embedded"))
    shutil.copytree(folders["klein"], tmp_path / "other")
    shutil.copytree(f"{folders['dev']}_prompts", tmp_path / "other_prompts")
    with pytest.raises(UserError, match="encoded for Flux2Pipeline.*Flux2KleinPipeline"):
        load(tmp_path / "other")
