"""Sana, Flux and an SD3 of two text encoders: asked as diffusers' own pipelines ask them, distilled, drawn from."""

import copy
import json
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dmd_dar import config, load_pipeline
from dmd_dar.distillation import job as distill
from dmd_dar.distillation.config import DistillConfig
from dmd_dar.encode import EncodeConfig, encode
from dmd_dar.errors import UserError
from dmd_dar.models.codecs import load_codec
from dmd_dar.models.denoiser import velocity_of
from dmd_dar.models.diffusers_denoiser import routed_copy
from dmd_dar.models.discriminator import features_of, width_of
from dmd_dar.models.families.form import packed, unpacked
from dmd_dar.models.teachers import Teacher, TeacherConfig, load_teacher
from dmd_dar.plan import plan_of
from dmd_dar.routing.layout import RoutingConfig
from tests.models.tiny_pipelines import tiny_flux, tiny_sana, tiny_sd3

ROOT = Path(__file__).parents[2]
TEXTS = ["a red cat", "dogs on the grass"]
MAKERS = {"sana": tiny_sana, "flux": tiny_flux, "sd3": partial(tiny_sd3, third=False)}
OPEN = {"flux": {"input_size": 8, "embedded_guidance": 2.5}}  # what the files leave open
SIDE = {"sana": 32, "flux": 16, "sd3": 16}  # pixels, of 8 latent cells


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """The three pipelines, each beside its encoded prompts."""
    root = tmp_path_factory.mktemp("families")
    (root / "prompts.txt").write_text("\n".join(TEXTS) + "\n")
    for name, make in MAKERS.items():
        make(root / name)
        given = [f"prompts={root / 'prompts.txt'}", f"pipeline={root / name}", f"out={root / name}_prompts"]
        encode(config.load(EncodeConfig, [*given, "batch_size=3", "cpu=true", "dtype=float32"]))
    return root


def load(folder: Path, **given) -> Teacher:
    return load_teacher(TeacherConfig(str(folder), prompts=f"{folder}_prompts", **given))


def calls_of(folder: Path, name: str, text: str) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(latents, timestep of the chain, answer) of each call of the pipeline in two steps, at 8 x 16 cells."""
    import diffusers

    without = {"text_encoder_3": None, "tokenizer_3": None} if name == "sd3" else {}
    pipe, calls = diffusers.DiffusionPipeline.from_pretrained(folder, **without), []
    pipe.set_progress_bar_config(disable=True)

    def keep(module, args, given, answer):
        x = args[0] if args else given["hidden_states"]
        both = (unpacked(value, 4, 8) if name == "flux" else value for value in (x, answer[0]))
        calls.append(tuple(value.clone() for value in both))

    pipe.transformer.register_forward_hook(keep, with_kwargs=True)
    given = {"guidance_scale": 2.5, "num_inference_steps": 2, "generator": torch.Generator().manual_seed(0)}
    given |= {"height": SIDE[name], "width": 2 * SIDE[name], "output_type": "latent"}
    pipe(text, **given, **({"use_resolution_binning": False} if name == "sana" else {}))
    return [(x, time, y) for (x, y), time in zip(calls, pipe.scheduler.timesteps, strict=True)]


@torch.no_grad()
@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.stages("teacher", "encode", by="name")
def test_a_teacher_is_asked_as_diffusers_own_pipeline_asks_it(root, name):
    teacher = load(root / name, **OPEN.get(name, {}))
    assert teacher.network.config.in_channels == 4 and teacher.network.config.input_size == 8
    for x, time, expected in calls_of(root / name, name, TEXTS[1]):
        # the pipelines that guide ask at the empty prompt first
        cond = torch.tensor([1] if name == "flux" else [2, 1])
        times = time.expand(len(x))
        out = teacher.network(x, times, cond)
        # its own rows are padded to the longest of the batch alone: other sums, up to rounding
        assert (out - expected).abs().max() <= 5e-6 and expected.abs().mean() > 0.05
        assert (teacher.network(x, times, torch.zeros_like(cond)) - expected).abs().max() > 1e-4
        v = velocity_of(teacher.network, teacher.prediction)(x, times / 1000, cond)
        torch.testing.assert_close(v, expected, rtol=1e-3, atol=1e-4)


def test_packing_is_diffusers_own():
    from diffusers import FluxPipeline

    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(packed(x), FluxPipeline._pack_latents(x, 2, 3, 8, 8))
    assert torch.equal(unpacked(packed(x), 4, 4), x)


@torch.no_grad()
@pytest.mark.stages("guidance", family="flux")
def test_guidance_of_a_flux_is_an_input_and_part_of_its_hash(root):
    x, time, cond = torch.randn(2, 4, 8, 8), torch.tensor([500.0, 900.0]), torch.tensor([0, 1])
    one, two = (load(root / "flux", input_size=8, embedded_guidance=g) for g in (2.5, 7.0))
    assert (one.network(x, time, cond) - two.network(x, time, cond)).abs().max() > 1e-4
    larger = load(root / "flux", embedded_guidance=2.5)
    assert larger.network.config.input_size == 128
    assert len({one.digest, two.digest, larger.digest}) == 3


@torch.no_grad()
@pytest.mark.stages("codec", family="sana")
def test_latents_of_an_autoencoder_dc_are_no_distribution(root):
    codec = load_codec(str(root / "sana"))
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    mean, std = codec.encode(images)
    torch.testing.assert_close(mean, codec.vae.encode(images).latent * 0.41407)
    assert mean.shape == (2, 4, 8, 8) and (codec.channels, codec.factor) == (4, 4) and not std.any()
    torch.testing.assert_close(codec.decode(mean), codec.vae.decode(mean / 0.41407).sample)


SMALL = "steps=2 batch_size=4 rungs=[1.0,0.5] fake_score.updates=1 student.routing.query=timestep"
SMALL += " student.routing.chunk_size=2 regression.weight=1 regression.solver_steps=2 regression.count=4 log.every=1"
SMALL += " log.wandb=disabled launch.cpu=true log.health_samples=2 guidance_scale=2.0"

FRESH = """
import sys
import torch
from safetensors.torch import save_file
import dmd_dar
for folder in sys.argv[1:]:
    images = dmd_dar.load_pipeline(folder)([0, 1], seed=3).contiguous()
    save_file({"images": images}, folder + "/drawn.safetensors")
"""


def distilled(folder: Path, out: Path, *more: str) -> Path:
    given = [f"teacher.path={folder}", f"teacher.prompts={folder}_prompts", f"out_dir={out}"]
    given += [f"teacher.{name}={value}" for name, value in OPEN.get(folder.name, {}).items()]
    distill.main([*given, f"regression.cache={out}/pairs", *SMALL.split(), *more])
    return out / "student"


@pytest.mark.stages("DAR", family=("sana", "flux", "sd3"))
def test_students_are_routed_and_drawn_from_in_a_fresh_process(root, tmp_path):
    students = {name: distilled(root / name, tmp_path / name) for name in MAKERS}
    subprocess.run([sys.executable, "-c", FRESH, *map(str, students.values())], cwd=ROOT, check=True, timeout=150)
    for name, student in students.items():
        pipeline, start = load_pipeline(str(student)), load(root / name, **OPEN.get(name, {})).network
        network = pipeline.student.network
        assert network.config.routing.query == "timestep" and network.fixed == start.fixed
        images = load_file(student / "drawn.safetensors")["images"]
        assert images.shape == (2, 3, SIDE[name], SIDE[name]) and images[0].std() > 0
        torch.testing.assert_close(pipeline([0, 1], seed=3), images, rtol=0, atol=1e-6)
        moved = network.state_dict()
        assert any(not torch.equal(moved[key], value) for key, value in start.state_dict().items())
        assert any(value.any() for key, value in moved.items() if ".dar." in key and key.endswith("query"))
    assert json.loads((students["sana"] / "model_index.json").read_text())["vae"] == ["diffusers", "AutoencoderDC"]


@torch.no_grad()
def test_the_discriminator_reads_every_block_of_a_flux_and_of_a_sana(root):
    """Single blocks of a FLUX read text tokens, then image tokens; the head image tokens alone."""
    x, t, cond = torch.randn(3, 4, 8, 8), torch.tensor([0.2, 0.5, 0.9]), torch.arange(3)
    for name, tokens in (("flux", [16, 512 + 16, 512 + 16, 16]), ("sana", [64, 64])):
        teacher, outputs = load(root / name, **OPEN.get(name, {})), []
        network, transformer = teacher.network, teacher.network.transformer
        for block in [*transformer.transformer_blocks, *getattr(transformer, "single_transformer_blocks", [])]:
            block.register_forward_hook(lambda module, given, out, seen=outputs: seen.append(out))
        layers = tuple(range(1, len(network.block_readers()) + 1))
        features = features_of(network, velocity_of(network, teacher.prediction), layers)(x, t, cond)
        assert [h.shape for h in features] == [(3, n, 16) for n in tokens] and width_of(network) == 16
        for h, out in zip(features, outputs, strict=True):  # (text, image) of a FLUX's blocks
            image = out if name == "sana" else out[1]
            assert torch.equal(h[:, -image.shape[1] :], image)


@pytest.mark.parametrize("name", ["sana", "flux"])
def test_blocks_computed_again_give_the_same_values_and_gradients(root, name):
    network = load(root / name, **OPEN.get(name, {})).network.requires_grad_()
    plain = routed_copy(network, RoutingConfig(query="timestep", chunk_size=2)).double()
    for parameter in plain.router_parameters():
        torch.nn.init.normal_(parameter)
    again = copy.deepcopy(plain)
    again.checkpoint_activations()
    x, t, cond = torch.randn(2, 4, 8, 8).double(), torch.tensor([300.0, 800.0]).double(), torch.tensor([0, 2])
    outputs = [one.train()(x, t, cond) for one in (plain, again)]
    assert torch.equal(*outputs)
    for output in outputs:
        (output.sin() * x).sum().backward()
    for ours, theirs in zip(again.parameters(), plain.parameters(), strict=True):
        if theirs.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("name", MAKERS)
def test_a_run_is_planned_without_computing(root, name):
    given = [f"teacher.{key}={value}" for key, value in OPEN.get(name, {}).items()]
    given += [f"teacher.path={root / name}", f"teacher.prompts={root / name}_prompts", "out_dir=unused", *SMALL.split()]
    cfg = config.load(DistillConfig, given)
    plan, network = plan_of(cfg), load(root / name, **OPEN.get(name, {})).network
    count = sum(p.numel() for p in network.parameters())
    network.tell_rungs_apart(len(cfg.rungs))
    vectors = sum(p.numel() for p in network.rung_parameters())
    assert plan.parameters["teacher"] == count < plan.trained["student"] and vectors > 0
    assert plan.trained["fake_score"] == count + vectors
    assert plan.activations > plan.history > 0


@pytest.mark.stages("DAR", "shared_lora", family="flux")
def test_an_adapter_of_a_flux_brings_what_its_base_leaves_open(root, tmp_path):
    student = distilled(root / "flux", tmp_path, "weights=shared_lora", "lora.rank=2", "regression.weight=0")
    adapter = load_pipeline(str(student / "adapter"), base=str(root / "flux"), prompts=f"{root / 'flux'}_prompts")
    torch.testing.assert_close(adapter([0, 1]), load_pipeline(str(student))([0, 1]), rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_flow_transformer_alone_counts_its_time_as_its_pipeline_does(root, tmp_path):
    shutil.copytree(root / "sana" / "transformer", tmp_path / "alone")
    shutil.copytree(root / "sana_prompts", tmp_path / "alone_prompts")
    whole, alone = load(root / "sana"), load(tmp_path / "alone", prediction="flow")
    x, t, cond = torch.randn(2, 4, 8, 8), torch.tensor([0.3, 0.8]), torch.tensor([0, 1])
    assert torch.equal(*(velocity_of(of.network, of.prediction)(x, t, cond) for of in (whole, alone)))


def test_what_a_family_does_not_take_is_said_with_the_remedy(root, tmp_path):
    with pytest.raises(UserError, match=r"set teacher.embedded_guidance .*3.5"):
        load(root / "flux")
    with pytest.raises(UserError, match="input_size = 7: .* must be even"):
        load(root / "flux", input_size=7, embedded_guidance=1.0)
    with pytest.raises(UserError, match="leave embedded_guidance out"):
        load(root / "sana", embedded_guidance=1.0)
    with pytest.raises(UserError, match="leave input_size out"):
        load(root / "sana", input_size=16)
    with pytest.raises(UserError, match="that leaves them open: leave input_size"):
        load_teacher(TeacherConfig(str(ROOT / "teachers" / "photos32"), input_size=16))
    tiny_sana(tmp_path / "sprint", guidance_embeds=True)
    shutil.copytree(root / "sana_prompts", tmp_path / "sprint_prompts")
    with pytest.raises(UserError, match="SANA-Sprint"):
        load(tmp_path / "sprint", embedded_guidance=1.0)
    index = json.loads((root / "sana" / "vae" / "config.json").read_text())
    shutil.copytree(root / "sana" / "vae", tmp_path / "vae")
    (tmp_path / "vae" / "config.json").write_text(json.dumps({**index, "_class_name": "AutoencoderOobleck"}))
    with pytest.raises(UserError, match="AutoencoderOobleck: a codec must be one of AutoencoderKL, AutoencoderDC"):
        load_codec(str(tmp_path / "vae"))
