import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from dmd_dar import config, flow, pretrain
from dmd_dar.data import textures
from dmd_dar.data.photos import Photos
from dmd_dar.distillation import job as distill
from dmd_dar.draws import Draws, sample_range
from dmd_dar.errors import UserError
from dmd_dar.models.saved import load_network
from dmd_dar.models.sit import SiTConfig
from dmd_dar.train.disk import log
from tests.tiny import ON_CPU, tiny_sit

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "configs" / "photos32" / "teacher.yaml"


def arguments(out: Path, *more: str) -> list[str]:
    argv = [f"config={RECIPE}", f"out_dir={out}", "steps=5", "batch_size=6", "log.every=1", *ON_CPU]
    return [*argv, "model.width=16", "model.depth=2", "model.heads=2", "model.patch=8", "optimiser.warmup=0", *more]


def run(out: Path, *more: str) -> dict[str, torch.Tensor]:
    pretrain.pretrain(config.load(pretrain.PretrainConfig, arguments(out, *more)))
    return load_file(out / "student" / "transformer" / "model.safetensors")


@pytest.mark.parametrize("query", ["residual", "timestep"])
def test_resumed_equals_uninterrupted_bit_for_bit(tmp_path, query):
    routing = f"model.routing.query={query}"
    whole = run(tmp_path / "whole", routing)
    run(tmp_path / "parts", "steps=2", routing)
    parts = run(tmp_path / "parts", routing)
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert [record["step"] for record in log.read(tmp_path / "parts" / "log.jsonl")] == [1, 2, 3, 4, 5]


def test_two_processes_of_the_command_equal_one(tmp_path):
    """Without any key of a CPU, and with as many threads as they take by themselves."""
    one, few = run(tmp_path / "one", "steps=2", "log.wandb=disabled"), ("steps=2", "log.wandb=disabled")
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    command = [sys.executable, "-m", "dmd_dar.pretrain", *arguments(tmp_path / "two", *few), "launch.processes=2"]
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0 and "OMP_NUM_THREADS" not in ran.stderr, ran.stderr[-2000:]
    two = load_file(tmp_path / "two" / "student" / "transformer" / "model.safetensors")
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=2e-5, msg=f"{name} differs")
    records = [log.read(tmp_path / name / "log.jsonl") for name in ("one", "two")]
    for alone, both in zip(*records, strict=True):
        assert both["pretrain/loss"] == pytest.approx(alone["pretrain/loss"], rel=1e-5)


def test_a_dar_teacher_trains_in_the_papers_form(tmp_path):
    weights = run(tmp_path, "model.routing.query=timestep", "steps=8", "optimiser.lr=1e-2", "router_lr=1e-2")
    network, card = load_network(tmp_path / "student")
    assert (network.config.routing.scale, network.config.routing.summary) == ("convex", "last")
    assert weights["dar.query"].any() and weights["dar.gate"].any() and card.rungs == ()


def test_the_loss_falls(tmp_path):
    run(tmp_path, "steps=250", "batch_size=16", "optimiser.lr=3e-3", "model.patch=4")
    losses = [record["pretrain/loss"] for record in log.read(tmp_path / "log.jsonl")]
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])


def own_images(root: Path, counts: dict[str, int]) -> Path:
    for label, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True)
        for i in range(count):
            pixels = np.random.default_rng([label, i]).integers(0, 256, (40, 48, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    return root


def test_a_teacher_of_ones_own_images(tmp_path, capsys):
    root = own_images(tmp_path / "images", {"cats": 4, "dogs": 3})
    mine = ("data.name=folder", f"data.path={root}", "model.num_classes=0", "data.cache_gb=1e-5")
    whole = run(tmp_path / "whole", *mine)
    assert "data: 7 images in 2 classes, 2 held out; 1 of 5 in memory" in capsys.readouterr().err
    run(tmp_path / "parts", "steps=2", *mine)
    parts = run(tmp_path / "parts", *mine)
    assert all(torch.equal(parts[name], value) for name, value in whole.items())
    network, card = load_network(tmp_path / "whole" / "student")
    assert type(network.config) is SiTConfig and network.config.num_classes == 2
    assert card.label_names == ("cats", "dogs") and len(card.origin["data"]) == 64
    assert Image.open(tmp_path / "whole" / "samples" / "data.png").size[0] > 8 * 32
    (root / "cats" / "0.png").unlink()
    with pytest.raises(UserError, match="this run's data has changed since"):
        run(tmp_path / "parts", "steps=6", *mine)


def test_two_commands_lead_from_a_folder_to_a_student(tmp_path):
    root = own_images(tmp_path / "images", {"cats": 4, "dogs": 3})
    mine = ("data.name=folder", f"data.path={root}")
    run(tmp_path / "teacher", *mine, "model.num_classes=0")
    recipe = f"config={RECIPE.parent / 'demo_dar.yaml'}"
    few = ("batch_size=2", "regression.count=2", "regression.solver_steps=4", "student.routing.chunk_size=2")
    places = (f"teacher.path={tmp_path / 'teacher' / 'student'}", f"regression.cache={tmp_path / 'pairs'}")
    argv = [
        recipe,
        *mine,
        *few,
        *places,
        f"out_dir={tmp_path / 'dar'}",
        *ON_CPU,
        "preflight=false",
        "log.health_samples=4",
        "matching.start=0",
    ]
    distill.main([*argv, "steps=1"])
    network, card = load_network(tmp_path / "dar" / "student")
    assert network.config.num_classes == 2 and card.label_names == ("cats", "dogs") and len(card.rungs) == 4
    assert card.origin["data"] == load_network(tmp_path / "teacher" / "student")[1].origin["data"]
    (root / "cats" / "0.png").unlink()
    with pytest.raises(SystemExit, match="2"):
        distill.main([*argv, "steps=2"])


def test_textures_make_a_teacher(tmp_path):
    run(tmp_path, "data.name=textures", "model.num_classes=0")
    card = load_network(tmp_path / "student")[1]
    assert card.label_names == textures.NAMES and card.origin["data"] == textures.data_hash()


def test_a_network_for_other_data_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(config.ConfigError, match="model.num_classes = 3: the data has 7"):
        run(tmp_path / "run", "model.num_classes=3")
    for wrong, told in (("data.size=64", "model.input_size 32 must equal"), ("model.in_channels=4", "must be 3")):
        with pytest.raises(config.ConfigError, match=told):
            run(tmp_path / "run", wrong)
    root = own_images(tmp_path / "images", {"cats": 1})
    (root / "cats" / "1.png").write_bytes(b"no image")
    with pytest.raises(UserError, match="'cats/1.png': not one of"):
        run(tmp_path / "run", "data.name=folder", f"data.path={root}", "model.num_classes=0")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("recipe", ["folder64", "latents256"])
def test_the_recipes_for_ones_own_images_need_only_the_folder(tmp_path, monkeypatch, recipe):
    monkeypatch.chdir(RECIPE.parents[2])
    file = f"config=configs/{recipe}/teacher.yaml"
    cfg = config.load(pretrain.PretrainConfig, [file, f"data.path={tmp_path}"])
    dar, residual = (
        config.load(distill.DistillConfig, [f"config=configs/{recipe}/{arm}.yaml", f"data.path={tmp_path}"])
        for arm in ("dar", "residual")
    )
    assert dar.data == cfg.data and dar.teacher.path == f"{cfg.out_dir}/student"
    keys = {key for key, _, _ in config.differences(dar, residual)}
    assert "student.routing.query" in keys and keys <= {"out_dir", "student.routing.query"}
    with pytest.raises(config.ConfigError, match="name the folder of your (images|latents), data.path=FOLDER"):
        config.load(pretrain.PretrainConfig, [file])


@pytest.mark.parametrize("dropout, expected", [(0.0, 0), (1.0, 200), (0.25, 50)])
def test_label_dropout_hides_that_share_of_the_labels(dropout, expected, monkeypatch):
    seen = []

    def recording(network, prediction="flow"):
        return lambda x_t, t, cond: seen.append(cond) or torch.zeros_like(x_t)

    monkeypatch.setattr(pretrain, "velocity_of", recording)
    loss = pretrain.flow_matching(tiny_sit(), Photos(32), flow.TimeLaw(), dropout)
    loss(Draws(0, "pretrain", 0, sample_range(0, 200)))
    assert (seen[0] == Photos.num_classes).sum().item() == pytest.approx(expected, abs=20 if 0 < dropout < 1 else 0)
