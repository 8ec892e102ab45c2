"""A LoRA student's adapter: on its base it is the merged student, for us and for peft; on another it is refused."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

import dmd_dar
from dmd_dar import config
from dmd_dar.distillation.networks import Memory, build_networks
from dmd_dar.encode import EncodeConfig, encode
from dmd_dar.errors import DamagedFileError, UserError
from dmd_dar.models.adapters import load_adapter, write_adapter
from dmd_dar.models.codecs import Codec
from dmd_dar.models.saved import ModelCard, network_hash, save_network
from dmd_dar.models.shared_lora import LoraConfig, LoraDenoiser, merged
from dmd_dar.models.teachers import Teacher, TeacherConfig, codec_of, load_teacher, origin_of
from dmd_dar.routing.layout import RoutingConfig
from dmd_dar.sample import SampleConfig, sample
from tests.models.tiny_pipelines import public_file, tiny_pipeline, tiny_pixart, tiny_vae
from tests.tiny import tiny_teacher

RUNGS = (1.0, 0.5)


def trained(teacher: Teacher, query: str) -> LoraDenoiser:
    """A student whose adapters and routers have moved."""
    memory = Memory("shared_lora", LoraConfig(rank=3, alpha=6.0))
    student = build_networks(copy.deepcopy(teacher).network, RoutingConfig(query, 2), memory=memory).student
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in student.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=generator))
    return student.eval()


@pytest.fixture(scope="module")
def teachers(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("teachers")
    return {"sit": tiny_teacher(root / "sit"), "dit": tiny_pipeline(root / "dit")}


def exported(folder: Path, path: Path, query: str) -> tuple[Teacher, LoraDenoiser]:
    teacher = load_teacher(TeacherConfig(str(path)))
    student = trained(teacher, query)
    card = ModelCard(teacher.prediction, RUNGS, teacher.label_names, {"teacher": teacher.digest})
    save_network(folder / "student", merged(student), card)
    write_adapter(folder / "adapter", student, card, network_hash(folder / "student"))
    return teacher, student


def inputs(network) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    config = network.config
    x = torch.randn(
        2, config.in_channels, config.input_size, config.input_size, generator=torch.Generator().manual_seed(1)
    )
    return x, torch.tensor([0.3, 1.0]), torch.tensor([0, 3])


@torch.no_grad()
@pytest.mark.parametrize("kind", ["sit", "dit"])
@pytest.mark.parametrize("query", ["residual", "timestep"])
def test_an_adapter_on_its_base_is_the_student(teachers, tmp_path, kind, query):
    teacher, student = exported(tmp_path, teachers[kind], query)
    back = load_adapter(tmp_path / "adapter", teacher)
    given = inputs(student)
    expected = student(*given)
    assert (expected - teacher.network(*given)).abs().max() > 1e-2
    torch.testing.assert_close(back.network(*given), expected, rtol=1e-5, atol=1e-5)
    linear = [module for module in back.network.modules() if isinstance(module, nn.Linear)]
    assert linear and not any(
        hasattr(layer, "lora") or layer._forward_hooks for layer in linear
    )  # a call is a plain one
    assert back.rungs == RUNGS and back.digest == network_hash(tmp_path / "student")
    assert (tmp_path / "adapter" / "routers.safetensors").exists() == (query != "residual")
    assert bool(back.network.router_parameters()) == (query != "residual")


@torch.no_grad()
@pytest.mark.parametrize("kind", ["sit", "dit"])
def test_peft_reads_the_adapter(teachers, tmp_path, kind):
    from peft import PeftModel

    teacher, student = exported(tmp_path, teachers[kind], "residual")
    plain = copy.deepcopy(teacher.network)
    given = inputs(student)
    expected = student(*given)
    if kind == "sit":
        theirs = PeftModel.from_pretrained(plain, tmp_path / "adapter")(*given)
    else:
        plain.transformer = PeftModel.from_pretrained(plain.transformer, tmp_path / "adapter").base_model.model
        theirs = plain(*given)
    torch.testing.assert_close(theirs, expected, rtol=1e-5, atol=1e-5)


def test_a_pipeline_of_an_adapter_needs_its_own_base(teachers, tmp_path):
    exported(tmp_path, teachers["sit"], "timestep")
    adapter = tmp_path / "adapter"
    ours = dmd_dar.load_pipeline(adapter, base=str(teachers["sit"]))
    whole = dmd_dar.load_pipeline(tmp_path / "student")
    torch.testing.assert_close(ours(n=3, seed=1), whole(n=3, seed=1), rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match="an adapter; name the teacher"):
        dmd_dar.load_pipeline(adapter)
    with pytest.raises(UserError, match="is an adapter of the network"):
        dmd_dar.load_pipeline(adapter, base="teachers/photos32")


def change_config(folder: Path) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "r": 4}))


def drop_a_router(folder: Path) -> None:
    routers = load_file(folder / "routers.safetensors")
    routers.popitem()
    save_file(routers, folder / "routers.safetensors")


def change_card(folder: Path) -> None:
    file = folder / "adapter.json"
    said = json.loads(file.read_text())
    file.write_text(json.dumps({**said, "card": {**said["card"], "auto_map": "evil"}}))


@pytest.mark.parametrize("damage", [change_config, drop_a_router, change_card])
def test_a_damaged_adapter_is_named(teachers, tmp_path, damage):
    teacher, _ = exported(tmp_path, teachers["sit"], "timestep")
    damage(tmp_path / "adapter")
    with pytest.raises(DamagedFileError, match=str(tmp_path / "adapter")):
        load_adapter(tmp_path / "adapter", teacher)


def read_png(file: Path) -> torch.Tensor:
    return torch.from_numpy(np.asarray(Image.open(file)).astype(np.int64))


def of_public_file(root: Path) -> tuple[Path, LoraDenoiser, Codec]:
    """An adapter of latents on a base that does not say its meaning, heads or codec, all of which were given."""
    public_file(root / "0400000.pt")
    tiny_vae(scaling_factor=0.5).save_pretrained(root / "vae")
    given = TeacherConfig(str(root / "0400000.pt"), prediction="sit", heads=2, codec=str(root / "vae"))
    teacher = load_teacher(given)
    codec, student = codec_of(teacher), trained(teacher, "residual")
    assert codec is not None
    origin = {"teacher": teacher.digest, **origin_of(teacher, codec)}
    card = ModelCard(teacher.prediction, RUNGS, teacher.label_names, origin)
    save_network(root / "student", merged(student), card, codec)
    write_adapter(root / "student" / "adapter", student, card, network_hash(root / "student"))
    return root / "student", student, codec


def test_an_adapter_says_what_the_files_of_its_base_leave_open(tmp_path):
    folder, _, _ = of_public_file(tmp_path)
    ours = dmd_dar.load_pipeline(str(folder / "adapter"), base=str(tmp_path / "0400000.pt"))
    whole = dmd_dar.load_pipeline(str(folder))
    assert ours(n=1).shape == (1, 3, 16, 16) and ours.student.prediction == "sit"
    torch.testing.assert_close(ours(n=3, seed=1), whole(n=3, seed=1), rtol=1e-4, atol=1e-4)
    for name, more in (("adapter", {"base": str(tmp_path / "0400000.pt")}), ("", {})):
        sample(SampleConfig(student=str(folder / name), out=str(tmp_path / f"images{name}"), n=2, cpu=True, **more))
    pictures = [read_png(tmp_path / f"images{name}" / "000001.png") for name in ("adapter", "")]
    assert (pictures[0] - pictures[1]).abs().max() <= 1
    tiny_vae(scaling_factor=0.6).save_pretrained(tmp_path / "vae")
    with pytest.raises(UserError, match="another VAE than the one that the network was trained with"):
        dmd_dar.load_pipeline(str(folder / "adapter"), base=str(tmp_path / "0400000.pt"))


@torch.no_grad()
def test_an_adapter_draws_the_prompts_it_was_trained_on_or_others_of_their_encoder(tmp_path):
    def encoded(name: str, text: str) -> str:
        (tmp_path / f"{name}.txt").write_text(text)
        given = [f"prompts={tmp_path / name}.txt", f"pipeline={base}", f"out={tmp_path / name}", "cpu=true"]
        encode(config.load(EncodeConfig, given))
        return str(tmp_path / name)

    base = tiny_pixart(tmp_path / "base")
    first, other = encoded("first", "a red cat\ndogs\n"), encoded("other", "two\n")
    teacher = load_teacher(TeacherConfig(str(base), prompts=first))
    student, origin = trained(teacher, "residual"), {"teacher": teacher.digest, **origin_of(teacher, codec_of(teacher))}
    write_adapter(tmp_path / "adapter", student, ModelCard(teacher.prediction, RUNGS, (), origin), "digest")
    ours = dmd_dar.load_pipeline(str(tmp_path / "adapter"), base=str(base))
    given = inputs(student)[:2] + (torch.tensor([0, 2]),)
    torch.testing.assert_close(ours.student.network(*given), student(*given), rtol=1e-5, atol=1e-5)
    others = dmd_dar.load_pipeline(str(tmp_path / "adapter"), base=str(base), prompts=other)
    assert (ours.num_classes, others.num_classes) == (2, 1) and ours.student.digest != others.student.digest
    tiny_pixart(tmp_path / "large", num_layers=3)
    with pytest.raises(UserError, match="is an adapter of the network"):
        dmd_dar.load_pipeline(str(tmp_path / "adapter"), base=str(tmp_path / "large"), prompts=other)
