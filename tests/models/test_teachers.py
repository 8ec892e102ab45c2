"""Teachers by path: they compute what their makers' code computes, and what is wrong is said with its remedy."""

import argparse
import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dmd_dar import flow
from dmd_dar.errors import DamagedFileError, MissingWeightsError, UserError
from dmd_dar.models.codecs import load_codec
from dmd_dar.models.denoiser import MEANINGS, velocity_of
from dmd_dar.models.diffusers_denoiser import routed_copy
from dmd_dar.models.guided import guided_velocity
from dmd_dar.models.hub import resolve
from dmd_dar.models.saved import ModelCard, save_network
from dmd_dar.models.sit import SiT, build_sit
from dmd_dar.models.teachers import TeacherConfig, load_teacher, public_shape
from dmd_dar.routing.layout import RoutingConfig
from tests.models.tiny_pipelines import LATENT, public_file, tiny_dit, tiny_pipeline
from tests.tiny import tiny_sit

ROOT = Path(__file__).parents[2]
FLOWING = dict(_class_name="FlowMatchEulerDiscreteScheduler", num_train_timesteps=1000)


def load(path: Path, **fields):
    return load_teacher(TeacherConfig(str(path), **{"heads": 2, **fields}))


def inputs(channels: int = 4) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = torch.randn(3, channels, 8, 8, generator=torch.Generator().manual_seed(0))
    return x, torch.tensor([0.0, 250.0, 999.0]), torch.tensor([0, 3, 5])


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> Path:
    return tiny_pipeline(tmp_path_factory.mktemp("teachers") / "pipeline")


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize(("name", "prediction"), [("SiT-tiny-256.pt", "sit"), ("DiT-tiny.pt", "dit")])
@torch.no_grad()
def test_a_public_file_is_its_network(tmp_path, prefix, name, prediction):
    network = public_file(tmp_path / name, prefix=prefix, opt={"lr": 1e-4})
    teacher = load(tmp_path / name)
    assert teacher.prediction == prediction and teacher.network.config == LATENT and len(teacher.digest) == 64
    assert torch.equal(teacher.network(*inputs()), network(*inputs()))
    assert not teacher.network.training and not any(p.requires_grad for p in teacher.network.parameters())


@torch.no_grad()
def test_weights_may_stand_alone_or_in_safetensors_and_in_half(tmp_path):
    network = tiny_sit(LATENT).eval()
    torch.save(network.state_dict(), tmp_path / "dit.pt")
    save_file(network.state_dict(), tmp_path / "dit-alone.safetensors")
    torch.save(network.bfloat16().state_dict(), tmp_path / "half.pt")
    expected = network.float()(*inputs())
    for name in ("dit.pt", "dit-alone.safetensors", "half.pt"):
        teacher = load(tmp_path / name, **({"prediction": "dit"} if name == "half.pt" else {}))
        assert torch.allclose(teacher.network(*inputs()), expected, rtol=0.05, atol=0.05), name
        assert teacher.prediction == "dit" and {p.dtype for p in teacher.network.parameters()} == {torch.float32}


@pytest.mark.parametrize("preset", ["XL/2", "B/4"])
def test_a_public_size_is_known_by_its_shapes(preset):
    with torch.device("meta"):
        network = build_sit(preset)
    weights = {**network.state_dict(), "pos_embed": build_positions(network)}
    assert public_shape(weights, 0, Path("SiT.pt")) == network.config
    assert network.config.num_classes == 1000 and network.config.learn_sigma


def build_positions(network: SiT) -> torch.Tensor:
    small = dataclasses.replace(network.config, depth=1, num_classes=1)
    return SiT(small).pos_embed.data


def test_the_time_of_sit_and_the_chain_of_dit_reach_the_velocity(tmp_path):
    network = public_file(tmp_path / "SiT-a.pt")
    x, labels, t = inputs()[0], inputs()[2], torch.tensor([0.1, 0.5, 0.9])
    sit = load(tmp_path / "SiT-a.pt")
    v = velocity_of(sit.network, sit.prediction)(x, t, labels)
    torch.testing.assert_close(v, -network(x, 1 - t, labels)[:, :4])
    dit = load(tmp_path / "SiT-a.pt", prediction="dit")
    v = velocity_of(dit.network, dit.prediction)(x, t, labels)
    wide = t.reshape(3, 1, 1, 1).double()
    scaled = (x / ((1 - wide) ** 2 + wide**2).sqrt()).float()
    eps = network(scaled, flow.Schedule().timestep(t).float(), labels)[:, :4]
    torch.testing.assert_close(v, ((eps - x) / (1 - wide)).float(), rtol=1e-4, atol=1e-4)
    assert sit.digest != dit.digest


@torch.no_grad()
def test_a_file_without_labels_is_unconditional_and_has_no_guidance(tmp_path):
    network = tiny_sit(dataclasses.replace(LATENT, num_classes=1)).eval()
    weights = network.state_dict()
    table = "y_embedder.embedding_table.weight"
    torch.save({"ema": {**weights, table: weights[table][:1].clone()}}, tmp_path / "SiT-one.pt")
    teacher = load(tmp_path / "SiT-one.pt")
    x, t, _ = inputs()
    zero = torch.zeros(3, dtype=torch.int64)
    assert teacher.network.config.num_classes == 1
    assert torch.equal(teacher.network(x, t, zero), network(x, t, zero))
    assert torch.equal(teacher.network(x, t, zero + 1), network(x, t, zero))
    guided_velocity(teacher.network, teacher.prediction, 1.0)
    with pytest.raises(UserError, match="guidance_scale = 2: the teacher knows one class.*set guidance_scale=1"):
        guided_velocity(teacher.network, teacher.prediction, 2.0)


class Foreign:
    pass


@pytest.mark.parametrize("beside", [{"args": argparse.Namespace(lr=1)}, {"model": Foreign()}])
def test_a_file_that_needs_unpickling_is_refused_with_the_remedy(tmp_path, beside):
    public_file(tmp_path / "SiT-a.pt", **beside)
    with pytest.raises(UserError, match=r"holds the class \S*(Namespace|Foreign).*torch.save\(\{'ema'"):
        load(tmp_path / "SiT-a.pt")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda w: w.update(pos_embed=w["pos_embed"].flip(1)), "pos_embed is not DiT's table"),
        (lambda w: w.update(pos_embed=w["pos_embed"] + 0.01), "pos_embed is not DiT's table"),
        (lambda w: w.update({"projector.weight": torch.zeros(2)}), "projector.weight"),
        (lambda w: w.pop("blocks.1.mlp.fc2.bias"), "blocks.1.mlp.fc2.bias"),
        (lambda w: w.pop("x_embedder.proj.weight"), "x_embedder"),
        (lambda w: w.update({"final_layer.linear.weight": torch.zeros(12, 16)}), "3 output channels for 4"),
    ],
)
def test_weights_that_do_not_fit_are_named(tmp_path, change, said):
    weights = tiny_sit(LATENT).state_dict()
    change(weights)
    torch.save({"ema": weights}, tmp_path / "sit-a.pt")
    with pytest.raises(DamagedFileError, match=f"{tmp_path / 'sit-a.pt'}.*{said}"):
        load(tmp_path / "sit-a.pt")


@pytest.mark.parametrize("content", [b"", b"no checkpoint", None])
def test_a_file_that_is_no_checkpoint_is_named(tmp_path, content):
    file = tmp_path / "sit-a.pt"
    torch.save({"steps": 3}, file) if content is None else file.write_bytes(content)
    with pytest.raises(DamagedFileError, match=str(file)):
        load(file)


def test_what_a_file_does_not_say_must_be_set(tmp_path):
    public_file(tmp_path / "0400000.pt")
    with pytest.raises(UserError, match="set teacher.prediction"):
        load(tmp_path / "0400000.pt")
    assert load(tmp_path / "0400000.pt", prediction="sit").prediction == "sit"
    with pytest.raises(UserError, match="set teacher.heads"):
        load(tmp_path / "0400000.pt", prediction="sit", heads=0)


FRESH = """
import sys
import torch
from safetensors.torch import load_file, save_file
from dmd_dar.models.denoiser import velocity_of
from dmd_dar.models.teachers import TeacherConfig, load_teacher
given = load_file(sys.argv[2])
teacher = load_teacher(TeacherConfig(sys.argv[1]))
with torch.no_grad():
    out = teacher.network(given["x"], given["time"], given["labels"])
    v = velocity_of(teacher.network, teacher.prediction)(given["x_t"], given["t"], given["labels"])
save_file({"out": out, "v": v}, sys.argv[3])
"""


@torch.no_grad()
@pytest.mark.stages("teacher", family="dit")
def test_a_pipeline_loaded_in_a_fresh_process_is_diffusers_own(pipeline, tmp_path):
    from diffusers import DiTPipeline

    theirs = DiTPipeline.from_pretrained(pipeline)
    (x, time, labels), steps = inputs(), (1, 250, 999)
    t = flow.Schedule().level(torch.tensor(steps))
    x_t = (x * ((1 - t) ** 2 + t**2).sqrt().reshape(3, 1, 1, 1)).double()
    save_file(dict(x=x, time=time, labels=labels, x_t=x_t.float(), t=t), tmp_path / "given.safetensors")
    command = [
        sys.executable,
        "-c",
        FRESH,
        str(pipeline),
        tmp_path / "given.safetensors",
        tmp_path / "made.safetensors",
    ]
    subprocess.run(command, cwd=ROOT, check=True, timeout=150)
    made = load_file(tmp_path / "made.safetensors")
    expected = theirs.transformer(x, timestep=time, class_labels=labels).sample
    assert expected.abs().mean() > 0.1 and (made["out"] - expected).abs().max() <= 1e-6

    theirs.scheduler.set_timesteps(1000)
    x0 = flow.velocity_to_x0(made["v"].double(), x_t, t)
    for i, step in enumerate(steps):  # and x0 is what diffusers' scheduler reads out of the network at that step
        eps = theirs.transformer(x[i : i + 1], torch.tensor([step]), class_labels=labels[i : i + 1]).sample[:, :4]
        original = theirs.scheduler.step(eps, step, x[i : i + 1]).pred_original_sample
        torch.testing.assert_close(x0[i : i + 1].float(), original, rtol=2e-3, atol=2e-3)


@torch.no_grad()
def test_what_a_pipeline_says_of_itself(pipeline):
    teacher = load(pipeline)
    shape = teacher.network.config
    assert teacher.prediction == MEANINGS["dit"] and teacher.codec == str(pipeline / "vae")
    assert (shape.in_channels, shape.input_size, shape.num_classes, shape.learn_sigma) == (4, 8, 1000, True)
    assert teacher.label_names[:2] == ("class 0", "class 1") and len(teacher.label_names) == 1000
    alone = load(pipeline / "transformer", prediction="dit")
    assert torch.equal(alone.network(*inputs()), teacher.network(*inputs())) and alone.digest == teacher.digest
    with pytest.raises(UserError, match="set teacher.prediction"):
        load(pipeline / "transformer")
    with pytest.raises(UserError, match="leave teacher.prediction out"):
        load(pipeline, prediction="sit")


@torch.no_grad()
def test_the_public_folders_name_of_the_class_is_known(pipeline, tmp_path):
    """facebook/DiT-XL-2-256 was saved before diffusers gave DiT a class of its own."""
    shutil.copytree(pipeline, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "transformer" / "config.json"
    old = {"_class_name": "Transformer2DModel", "norm_type": "ada_norm_zero", "cross_attention_dim": None}
    file.write_text(json.dumps({**json.loads(file.read_text()), **old, "num_vector_embeds": None}))
    assert torch.equal(load(tmp_path).network(*inputs()), load(pipeline).network(*inputs()))
    file.write_text(json.dumps({**json.loads(file.read_text()), "norm_type": "ada_norm_single"}))
    with pytest.raises(UserError, match="Transformer2DModel.*class labels"):
        load(tmp_path)


def test_labels_are_not_dropped_in_training(pipeline):
    network = load(pipeline).network
    x, time, labels = inputs()
    expected = network(x, time, labels)
    network.train()
    assert all(torch.equal(network(x, time, labels), expected) for _ in range(20))


@pytest.mark.parametrize("query", ["residual", "static", "timestep"])
@torch.no_grad()
def test_a_routed_copy_computes_the_same_and_is_saved_and_loaded(pipeline, tmp_path, query):
    plain = load(pipeline)
    routed = routed_copy(plain.network, RoutingConfig(query, 2))
    assert torch.equal(routed(*inputs()), plain.network(*inputs()))
    assert bool(routed.router_parameters()) == (query != "residual") and not plain.network.router_parameters()
    for p in routed.router_parameters():
        p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    card = ModelCard(plain.prediction, (1.0, 0.5), ("a", "b"), {"step": 3})
    save_network(tmp_path / "student", routed, card, load_codec(plain.codec))
    back = load(tmp_path / "student")
    assert torch.equal(back.network(*inputs()), routed(*inputs())) and back.network.config == routed.config
    assert back.rungs == (1.0, 0.5) and back.label_names == ("a", "b")
    assert back.codec == str(tmp_path / "student" / "vae")
    assert back.prediction == plain.prediction and (query == "residual") == (back.digest == plain.digest)
    if query != "residual":
        with pytest.raises(ValueError, match="drop the network's routers"):
            routed_copy(routed, RoutingConfig())
        again = routed_copy(routed, RoutingConfig(query, 2))
        assert torch.equal(again(*inputs()), routed(*inputs()))


def test_weights_that_diffusers_would_leave_random_are_refused(tmp_path):
    tiny_dit().save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    del weights["proj_out_2.bias"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(DamagedFileError, match="proj_out_2.bias"):
        load(tmp_path, prediction="dit")


def test_pickled_weights_and_other_conditions_are_refused(tmp_path):
    tiny_dit().save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(MissingWeightsError, match="no safetensors.*save_pretrained"):
        load(tmp_path, prediction="dit")
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "CogView4Transformer2DModel"}))
    with pytest.raises(UserError, match="CogView4Transformer2DModel.*class labels or prompts"):
        load(tmp_path, prediction="flow")
    with pytest.raises(UserError, match="holds no teacher"):
        load(tmp_path.parent)


def test_a_flow_matching_pipeline_is_asked_at_a_thousand_t(tmp_path):
    tiny_dit(out_channels=4).save_pretrained(tmp_path / "transformer")
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(FLOWING))
    teacher = load(tmp_path)
    x, _, labels = inputs()
    t = torch.tensor([0.1, 0.5, 1.0])
    v = velocity_of(teacher.network, teacher.prediction)(x, t, labels)
    torch.testing.assert_close(v, tiny_dit(out_channels=4)(x, timestep=1000 * t, class_labels=labels).sample)


def test_a_hub_id_is_fetched_at_its_revision_without_pickles(pipeline, monkeypatch):
    import huggingface_hub

    asked = {}
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, **given: (asked.update(given, name=name), str(pipeline))[1]
    )
    assert load(Path("facebook/DiT-XL-2-256"), revision="refs/pr/1").codec == str(pipeline / "vae")
    assert asked["name"] == "facebook/DiT-XL-2-256" and asked["revision"] == "refs/pr/1"
    assert not asked["local_files_only"]
    assert all(pattern.endswith((".json", ".safetensors", "README.md")) for pattern in asked["allow_patterns"])
    resolve("owner/name")
    assert asked["revision"] is None


def test_offline_asks_the_cache_alone_and_says_so(monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        MissingWeightsError, match="nobody/nothing at revision v2: HF_HUB_OFFLINE is set.*fetch it once"
    ):
        resolve("nobody/nothing", "v2")


@pytest.mark.parametrize("path", ["/nowhere", "nowhere.pt", "a/b/c", "../x/y", "tests/nothing"])
def test_a_path_that_is_nothing_is_not_looked_for_on_the_hub(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(MissingWeightsError, match="no such file or folder"):
        resolve(path)


def test_a_revision_of_a_local_path_is_refused(tmp_path):
    with pytest.raises(UserError, match="leave revision out"):
        resolve(str(tmp_path), "main")
