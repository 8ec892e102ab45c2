"""A run reads its data folder once: what it learns from, what it is checked by, and its hash come of one look."""

from pathlib import Path

import pytest
import torch

from dmd_dar import config, pretrain
from dmd_dar.data import folder, latents, sources
from dmd_dar.data.batches import Batches
from dmd_dar.data.config import DataConfig
from dmd_dar.data.photos import NAMES
from dmd_dar.data.shards import ShardFolder, fill
from dmd_dar.data.sources import data_hash
from dmd_dar.distillation import job as distill
from tests import test_pretrain
from tests.distillation.test_job import arguments
from tests.tiny import TINY, tiny_teacher


@pytest.fixture
def looks(monkeypatch) -> list[str]:
    """A folder of images is hashed by each call of list_images, one of latents by each that is made of it."""
    seen: list[str] = []
    for module in (folder, sources):
        own = module.list_images
        monkeypatch.setattr(module, "list_images", lambda path, own=own: seen.append(path) or own(path))
    own_shards = latents.Shards
    monkeypatch.setattr(latents, "Shards", lambda path: seen.append(path) or own_shards(path))
    return seen


def filled(name: str, place: Path) -> list[str]:
    """The keys of such a folder, of what would be the tiny teacher's."""
    if name == "folder":
        test_pretrain.own_images(place, {f"class {i}": 2 for i in range(7)})
    else:
        shape = (TINY.in_channels, TINY.input_size, TINY.input_size)
        layout = latents.layout_of({"codec": "", "held_out": False}, NAMES, (1,) * 7, shape, 7)
        made = {"mean": torch.zeros(7, *shape), "std": torch.zeros(7, *shape), "cond": torch.arange(7)}
        with ShardFolder(place, layout) as shards:
            fill(shards, Batches(lambda first, stop: made, 7), stopped=lambda: False)
    return [f"data.name={name}", f"data.path={place}"]


@pytest.mark.parametrize("name", ["folder", "latents"])
@pytest.mark.parametrize("keys", [(), ("gan.weight=0.1",), ("preflight=true",), ("gan.weight=0.1", "preflight=true")])
def test_a_distillation_looks_into_its_data_once(tmp_path, monkeypatch, looks, name, keys):
    monkeypatch.setattr(distill, "preflight", lambda *given: None)
    told: dict[str, str] = {}
    monkeypatch.setattr(distill, "run_cycle", lambda cfg, run, *given, **more: told.update(run.identity))
    data = filled(name, tmp_path / "data")
    teacher = tiny_teacher(tmp_path / "teacher")
    distill.main(arguments(teacher, tmp_path / "run", "regression.weight=0", *data, *keys))
    assert looks == [str(tmp_path / "data")]
    assert told["data"] == data_hash(DataConfig(name, path=str(tmp_path / "data")))


def test_a_pretraining_looks_into_its_data_once(tmp_path, monkeypatch, looks):
    told: dict[str, str] = {}
    monkeypatch.setattr(pretrain, "run_cycle", lambda cfg, run, *given, **more: told.update(run.identity))
    data = filled("folder", tmp_path / "data")
    pretrain.pretrain(config.load(pretrain.PretrainConfig, test_pretrain.arguments(tmp_path / "run", *data)))
    assert looks == [str(tmp_path / "data")]
    assert told["data"] == data_hash(DataConfig("folder", path=str(tmp_path / "data")))
