"""`dmd_dar.load_student` puts a student, or its adapter and routers, into its base's pipeline of diffusers."""

import copy
from typing import Any

import pytest
import torch

import dmd_dar
from dmd_dar.distillation.networks import Memory, build_networks
from dmd_dar.models.adapters import write_adapter
from dmd_dar.models.saved import ModelCard, network_hash, save_network
from dmd_dar.models.shared_lora import LoraConfig, merged
from dmd_dar.models.teachers import codec_of, origin_of
from dmd_dar.routing.layout import RoutingConfig
from tests.models.student_pipelines import FLOW, TEXTS, loaded, noise_of


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("query", ["timestep", "residual"])
def test_a_student_in_the_pipeline_of_its_base(tmp_path, query: Any):
    import diffusers

    teacher, folder = loaded(tmp_path, "sd3"), tmp_path / "student"
    memory = Memory("shared_lora", LoraConfig(3, 6.0))
    student: Any = build_networks(copy.deepcopy(teacher.network), RoutingConfig(query, 2), memory=memory).student
    generator = torch.Generator().manual_seed(0)
    for p in student.parameters():
        p.add_(0.1 * torch.randn(p.shape, generator=generator))
    codec = codec_of(teacher)
    card = ModelCard(teacher.prediction, FLOW, (), {"teacher": teacher.digest, **origin_of(teacher, codec)})
    save_network(folder, merged(student.eval()), card, codec)
    write_adapter(folder / "adapter", student, card, network_hash(folder))
    ours = dmd_dar.load_pipeline(str(folder))
    noise = noise_of(ours.shape)
    expected = (ours([0, 1], noise=noise) / 2 + 0.5).clamp(0, 1)
    given = {"num_inference_steps": 4, "guidance_scale": 1.0, "height": 16, "width": 16, "output_type": "pt"}
    for path in (folder / "adapter", folder):
        pipe = dmd_dar.load_student(diffusers.DiffusionPipeline.from_pretrained(tmp_path / "sd3"), str(path))
        images = pipe(prompt=[*TEXTS], latents=noise.clone(), **given).images
        assert (images - expected).abs().max() <= 1e-5 and expected.std() > 0.02
