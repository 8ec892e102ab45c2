"""Qwen-Image: asked, guided, encoded and decoded as QwenImagePipeline does; distilled from."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dmd_dar.errors import UserError
from dmd_dar.models.codecs import load_codec
from dmd_dar.models.families.form import packed, unpacked
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
from tests.models.tiny_language import tiny_qwen2_5_vl
from tests.models.tiny_pipelines import shaken, tiny_flux

ROWS, COLUMNS = 4, 6  # latent cells


def tiny_vae() -> Any:
    """From 3 x 2 H x 2 W images to 4 x H x W latents."""
    from diffusers import AutoencoderKLQwenImage

    torch.manual_seed(1)
    scale = dict(latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.5, 0.5, 2.0, 1.0])
    shape = dict(base_dim=8, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[False])
    return shaken(AutoencoderKLQwenImage(**shape, **scale))


def tiny_qwen_image(folder: Path, **changes) -> Path:
    """A QwenImagePipeline saved by diffusers."""
    from diffusers import FlowMatchEulerDiscreteScheduler, QwenImagePipeline, QwenImageTransformer2DModel

    torch.manual_seed(8)
    fields = dict(in_channels=16, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2)
    fields |= dict(joint_attention_dim=16, axes_dims_rope=(2, 2, 4))
    transformer = shaken(QwenImageTransformer2DModel(**{**fields, **changes}))
    chain = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.02)  # as the public folder's
    tokenizer, encoder = tiny_qwen2_5_vl()
    QwenImagePipeline(chain, tiny_vae(), encoder, tokenizer, transformer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tiny_qwen_image(tmp_path_factory.mktemp("qwen") / "pipe")
    encoded(folder)
    return folder


def start() -> Tensor:
    return torch.randn(3, 4, ROWS, COLUMNS, generator=torch.Generator().manual_seed(0))


def theirs(pipe: Any, x: Tensor, g: float, **prompts: Any) -> Tensor:
    """Latents of two steps from x."""
    size = dict(height=2 * ROWS, width=2 * COLUMNS, num_inference_steps=2, output_type="latent")
    prompts = prompts or {"prompt": TEXTS, "negative_prompt": [" "] * len(TEXTS)}
    return unpacked(pipe(**prompts, true_cfg_scale=g, latents=packed(x), **size)[0], ROWS // 2, COLUMNS // 2)


@pytest.mark.stages("teacher", "encode", "guidance", family="qwen_image")
def test_two_guided_steps_are_the_pipeline_s_own(folder):
    pipe, x = pipeline_of(folder), start()
    expected = theirs(pipe, x, 4.0)
    ours = two_steps(load(folder), x, pipe.scheduler.sigmas, 4.0, [0, 1, 2])
    assert distance(ours, expected, x) < 1e-5
    assert distance(theirs(pipe, x, 1.0), expected, x) > 0.03  # guidance is no small thing here
    plain = two_steps(load(folder), x, pipe.scheduler.sigmas, 1.0, [0, 1, 2])
    assert distance(plain, theirs(pipe, x, 1.0), x) < 1e-5


def with_gaps(rows: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same without every third token of each prompt, in its middle and at its end."""
    kept = (torch.arange(rows["mask"].shape[1]) % 3 > 0).long()
    return {**rows, "mask": rows["mask"] * kept}


@torch.no_grad()
def test_masks_may_have_gaps(folder):
    pipe, x, teacher = pipeline_of(folder), start(), load(folder)
    table = teacher.network.prompts
    table.rows(torch.tensor([0]))
    table.held = {place: with_gaps(rows) for place, rows in table.held.items()}
    cond, uncond = table.rows(torch.tensor([0, 1, 2])), table.rows(torch.tensor([3, 3, 3]))
    given = {"prompt_embeds": cond["embedding"], "prompt_embeds_mask": cond["mask"]}
    given |= {f"negative_{name}": uncond[rows] for name, rows in zip(given, ("embedding", "mask"), strict=True)}
    # of up to 512 tokens: the pipeline cuts none off
    expected = theirs(pipe, x, 3.0, **given)
    assert distance(two_steps(teacher, x, pipe.scheduler.sigmas, 3.0, [0, 1, 2]), expected, x) < 1e-5
    assert distance(theirs(pipe, x, 3.0), expected, x) > 1e-3


@pytest.mark.slow
@pytest.mark.stages("teacher", "guidance", family="qwen_image")
def test_in_a_fresh_process(folder):
    pipe, x = pipeline_of(folder), start()
    expected = theirs(pipe, x, 4.0)
    assert distance(in_a_fresh_process(folder, x, pipe.scheduler.sigmas, (4.0, [0, 1, 2])), expected, x) < 1e-5


@torch.no_grad()
@pytest.mark.stages("codec", family="qwen_image")
def test_the_codec_is_the_pipeline_s_own_and_does_not_clamp(folder):
    codec = load_codec(str(folder))
    mean, std = (
        torch.tensor(getattr(codec.vae.config, f"latents_{name}")).view(1, 4, 1, 1, 1) for name in ("mean", "std")
    )
    images = torch.rand(2, 3, 2 * ROWS, 2 * COLUMNS) * 2 - 1
    law = codec.vae.encode(images[:, :, None]).latent_dist
    for ours, raw in zip(codec.encode(images), ((law.mean - mean) / std, law.std / std), strict=True):
        torch.testing.assert_close(ours, raw[:, :, 0])
    latents = 3 * torch.randn(2, 4, ROWS, COLUMNS)
    decoded, clamped = codec.decode(latents), codec.vae.decode(latents[:, :, None] * std + mean).sample[:, :, 0]
    torch.testing.assert_close(decoded.clamp(-1, 1), clamped, rtol=1e-4, atol=1e-5)
    assert decoded.abs().max() > 1.2 and (codec.channels, codec.factor) == (4, 2)


@pytest.mark.parametrize(
    ("query", "weights"),
    [
        ("timestep", "full"),
        *(pytest.param(q, w, marks=pytest.mark.slow) for q, w in (("residual", "full"), ("timestep", "shared_lora"))),
    ],
)
@pytest.mark.stages("distil", family="qwen_image")
def test_students_are_distilled_and_drawn_from(folder, tmp_path, query, weights):
    distilled(folder, tmp_path, query, weights, input_size=8)


def test_what_it_does_not_take_is_one_line(folder, tmp_path):
    with pytest.raises(UserError, match="input_size = 7: .* must be even"):
        load(folder, input_size=7)
    other = tiny_qwen_image(tmp_path / "layered", use_additional_t_cond=True)
    shutil.copytree(f"{folder}_prompts", f"{other}_prompts")
    with pytest.raises(UserError, match="makes layers or takes further inputs .use_additional_t_cond."):
        load(other)
    flux = tiny_flux(tmp_path / "flux")
    shutil.copytree(f"{folder}_prompts", f"{flux}_prompts")
    with pytest.raises(UserError, match="prompts of another pipeline .*QwenImagePipeline.*of FluxPipeline"):
        load(flux, embedded_guidance=1.0)
