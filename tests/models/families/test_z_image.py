"""Z-Image: asked, guided and encoded as ZImagePipeline does; distilled from."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dmd_dar.guidance import convert
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
from tests.models.tiny_language import tiny_qwen3
from tests.models.tiny_pipelines import shaken, tiny_vae

ROWS, COLUMNS = 8, 12  # latent cells, 24 tokens: no multiple of 32, to which the network fills them up


def tiny_z_image(folder: Path, **changes) -> Path:
    """A ZImagePipeline saved by diffusers."""
    from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel

    torch.manual_seed(9)
    fields: dict[str, Any] = dict(in_channels=4, dim=16, n_layers=2, n_refiner_layers=2, n_heads=2, n_kv_heads=2)
    fields |= dict(cap_feat_dim=16, axes_dims=[4, 2, 2], axes_lens=[600, 16, 16])
    transformer = shaken(ZImageTransformer2DModel(**{**fields, **changes}))
    vae, chain = tiny_vae(shift_factor=0.1159, scaling_factor=0.3611), FlowMatchEulerDiscreteScheduler(shift=3.0)
    tokenizer, encoder = tiny_qwen3()
    ZImagePipeline(chain, vae, encoder, tokenizer, transformer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tiny_z_image(tmp_path_factory.mktemp("z_image") / "pipe")
    encoded(folder)
    return folder


def start() -> Tensor:
    return torch.randn(3, 4, ROWS, COLUMNS, generator=torch.Generator().manual_seed(0))


def theirs(pipe: Any, x: Tensor, w: float, **prompts: Any) -> Tensor:
    """Latents of two steps from x."""
    size = dict(height=2 * ROWS, width=2 * COLUMNS, num_inference_steps=2, output_type="latent")
    return pipe(**(prompts or {"prompt": [*TEXTS]}), guidance_scale=w, latents=x.clone(), **size)[0]


@pytest.mark.stages("teacher", "encode", "guidance", family="z_image")
def test_two_guided_steps_are_the_pipeline_s_own(folder):
    pipe, x, teacher = pipeline_of(folder), start(), load(folder)
    expected, plain = theirs(pipe, x, 2.0), theirs(pipe, x, 0.0)
    g = convert(2.0, "z_image")
    assert g == 3.0 and distance(plain, expected, x) > 0.05
    assert distance(two_steps(teacher, x, pipe.scheduler.sigmas, g, [0, 1, 2]), expected, x) < 1e-5
    assert distance(two_steps(teacher, x, pipe.scheduler.sigmas, 1.0, [0, 1, 2]), plain, x) < 1e-5
    assert distance(two_steps(teacher, x, pipe.scheduler.sigmas, 1.0, [1, 0, 2]), plain, x) > 1e-3


@torch.no_grad()
def test_masks_may_have_gaps(folder):
    """A prompt is the tokens that its mask keeps, wherever they stand."""
    pipe, x, teacher = pipeline_of(folder), start(), load(folder)
    table = teacher.network.prompts
    table.rows(torch.tensor([0]))
    kept = (torch.arange(512) % 3 > 0).long()
    table.held = {place: {**rows, "mask": rows["mask"] * kept} for place, rows in table.held.items()}
    rows = table.rows(torch.tensor([0, 1, 2]))
    texts = [row[mask.bool()] for row, mask in zip(rows["embedding"], rows["mask"], strict=True)]
    expected = theirs(pipe, x, 0.0, prompt_embeds=texts)
    assert distance(two_steps(teacher, x, pipe.scheduler.sigmas, 1.0, [0, 1, 2]), expected, x) < 1e-5


@pytest.mark.slow
@pytest.mark.stages("teacher", "guidance", family="z_image")
def test_in_a_fresh_process(folder):
    pipe, x = pipeline_of(folder), start()
    expected = theirs(pipe, x, 2.0)
    assert distance(in_a_fresh_process(folder, x, pipe.scheduler.sigmas, (3.0, [0, 1, 2])), expected, x) < 1e-5


@pytest.mark.parametrize(
    ("query", "weights"),
    [
        ("timestep", "shared_lora"),
        pytest.param("residual", "full", marks=pytest.mark.slow),
        pytest.param("timestep", "full", marks=pytest.mark.slow),
    ],
)
@pytest.mark.stages("distil", family="z_image")
def test_students_are_distilled_and_drawn_from(folder, tmp_path, query, weights):
    distilled(folder, tmp_path, query, weights, input_size=8)
