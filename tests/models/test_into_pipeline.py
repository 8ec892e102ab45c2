"""`dmd_dar.load_student` puts a student, or its adapter and routers, into its base's pipeline of diffusers."""

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import dmd_dar
from dmd_dar.distillation.networks import Memory, build_networks
from dmd_dar.errors import DamagedFileError, UserError
from dmd_dar.models.adapters import CARD, CONFIG, ROUTERS, WEIGHTS, write_adapter
from dmd_dar.models.saved import ModelCard, network_hash, save_network
from dmd_dar.models.shared_lora import LoraConfig, merged
from dmd_dar.models.teachers import TeacherConfig, codec_of, load_teacher, origin_of
from dmd_dar.routing.layout import RoutingConfig
from tests.models.student_pipelines import FLOW, TEXTS, loaded, noise_of

LAYER = "transformer_blocks.0.attn.to_q"


def user_lora(network: Any, folder: Path) -> str:
    """One of diffusers', of one layer of the network."""
    folder.mkdir()
    layer = network.transformer.get_submodule(LAYER)
    factors = {"A": torch.full((2, layer.in_features), 0.3), "B": torch.full((layer.out_features, 2), 0.2)}
    weights = {f"transformer.{LAYER}.lora_{name}.weight": value for name, value in factors.items()}
    save_file(weights, folder / "pytorch_lora_weights.safetensors")
    return str(folder)


def as_before(adapter: Path, place: Path) -> Path:
    """The adapter in the form in which the scale, 2, was no part of B."""
    shutil.copytree(adapter, place)
    weights = load_file(place / WEIGHTS)
    save_file({name: x / 2 if ".lora_B." in name else x for name, x in weights.items()}, place / WEIGHTS)
    config = json.loads((place / CONFIG).read_text())
    (place / CONFIG).write_text(json.dumps({**config, "lora_alpha": 2 * config["r"]}))
    return place


def changed(adapter: Path, place: Path, **values: Any) -> Path:
    """The adapter with other values in its adapter.json."""
    shutil.copytree(adapter, place)
    described = json.loads((place / CARD).read_text())
    (place / CARD).write_text(json.dumps({**described, **values}))
    return place


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize(("query", "lora"), [("timestep", False), ("residual", True)], ids=["routed sd3", "lora sd3"])
def test_a_student_in_the_pipeline_of_its_base(tmp_path, query: Any, lora: bool):
    import diffusers

    teacher, folder = loaded(tmp_path, "sd3"), tmp_path / "student"
    if lora:
        given = {"lora": user_lora(teacher.network, tmp_path / "lora"), "prompts": str(tmp_path / "sd3_prompts")}
        teacher = load_teacher(TeacherConfig(str(tmp_path / "sd3"), **given))
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
    for path in (folder / "adapter", folder, as_before(folder / "adapter", tmp_path / "before")):
        pipe = dmd_dar.load_student(diffusers.DiffusionPipeline.from_pretrained(tmp_path / "sd3"), str(path))
        images = pipe(prompt=[*TEXTS], latents=noise.clone(), **given).images
        assert (images - expected).abs().max() <= 1e-5 and expected.std() > 0.02

    pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "sd3")
    was, weights = pipe.scheduler, {name: value.clone() for name, value in pipe.transformer.state_dict().items()}
    save_network(tmp_path / "teacher", merged(student), replace(card, rungs=()), codec)
    wrong = {tmp_path / "teacher": "no rungs", changed(folder / "adapter", tmp_path / "new", format=2): "format"}
    if lora:
        user_lora(teacher.network, tmp_path / "other")
        origin = {**card.origin, "lora": str(tmp_path / "other"), "lora_hash": "0" * 64}
        described = json.loads((folder / "adapter" / CARD).read_text())["card"]
        wrong[changed(folder / "adapter", tmp_path / "off", card={**described, "origin": origin})] = "has changed since"
        wrong[changed(folder / "adapter", tmp_path / "bare", base="0" * 64)] = "is an adapter of the network 000000"
    else:
        damaged = shutil.copytree(folder / "adapter", tmp_path / "damaged")
        (damaged / ROUTERS).write_bytes(b"no tensors")
        wrong[damaged] = "cannot be read"
    for path, said in wrong.items():
        with pytest.raises((UserError, DamagedFileError), match=said):
            dmd_dar.load_student(pipe, str(path))
        held = pipe.transformer.state_dict()
        assert pipe.scheduler is was and held.keys() == weights.keys() and not hasattr(pipe.transformer, "dar")
        assert all(torch.equal(value, weights[name]) for name, value in held.items())
    if lora:  # a second adapter of the same teacher: what was fused stays, and is fused once
        for _ in range(2):
            dmd_dar.load_student(pipe, str(folder / "adapter"))
            images = pipe(prompt=[*TEXTS], latents=noise.clone(), **given).images
            assert (images - expected).abs().max() <= 1e-5
            pipe.unload_lora_weights()
    pipe.transformer.enable_group_offload(torch.device("cpu"), torch.device("cpu"), "leaf_level")
    with pytest.raises(UserError, match="the student in before enable_"):
        dmd_dar.load_student(pipe, str(folder))
