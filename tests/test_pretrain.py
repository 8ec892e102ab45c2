from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dmd_dar import config, flow, pretrain
from dmd_dar.data.photos import Photos
from dmd_dar.draws import Draws, sample_range
from dmd_dar.models.saved import load_network
from dmd_dar.train import log
from tests.tiny import tiny_sit

RECIPE = Path(__file__).parents[1] / "configs" / "photos32" / "teacher.yaml"


def run(out: Path, *more: str) -> dict[str, torch.Tensor]:
    argv = [f"config={RECIPE}", f"out_dir={out}", "steps=5", "batch_size=6", "log.every=1", "launch.cpu=true"]
    argv += ["model.width=16", "model.depth=2", "model.heads=2", "model.patch=8", "optimiser.warmup=0", *more]
    pretrain.pretrain(config.load(pretrain.PretrainConfig, argv))
    return load_file(out / "student" / "model.safetensors")


@pytest.mark.parametrize("query", ["residual", "timestep"])
def test_resumed_equals_uninterrupted_bit_for_bit(tmp_path, query):
    routing = f"model.routing.query={query}"
    whole = run(tmp_path / "whole", routing)
    run(tmp_path / "parts", "steps=2", routing)
    parts = run(tmp_path / "parts", routing)
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert [record["step"] for record in log.read(tmp_path / "parts" / "log.jsonl")] == [1, 2, 3, 4, 5]


def test_a_dar_teacher_trains_in_the_papers_form(tmp_path):
    weights = run(tmp_path, "model.routing.query=timestep", "steps=8", "optimiser.lr=1e-2", "router_lr=1e-2")
    network, card = load_network(tmp_path / "student")
    assert (network.config.routing.scale, network.config.routing.summary) == ("convex", "last")
    assert weights["dar.query"].any() and weights["dar.gate"].any() and card.rungs == ()


def test_the_loss_falls(tmp_path):
    run(tmp_path, "steps=250", "batch_size=16", "optimiser.lr=3e-3", "model.patch=4")
    losses = [record["pretrain/loss"] for record in log.read(tmp_path / "log.jsonl")]
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])


@pytest.mark.parametrize("dropout, expected", [(0.0, 0), (1.0, 200), (0.25, 50)])
def test_label_dropout_hides_that_share_of_the_labels(dropout, expected, monkeypatch):
    seen = []

    def recording(network, prediction="flow"):
        return lambda x_t, t, cond: seen.append(cond) or torch.zeros_like(x_t)

    monkeypatch.setattr(pretrain, "velocity_of", recording)
    loss = pretrain.flow_matching(tiny_sit(), Photos(32), flow.TimeLaw(), dropout)
    loss(Draws(0, "pretrain", 0, sample_range(0, 200)))
    assert (seen[0] == Photos.num_classes).sum().item() == pytest.approx(expected, abs=20 if 0 < dropout < 1 else 0)
