"""What stands in a student's model_index.json: a part of its base, a routed transformer from the hub's cache."""

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import huggingface_hub
import pytest
import torch

from dmd_dar.errors import UserError
from dmd_dar.models.pipeline_classes import BasePart, routed_class
from dmd_dar.routing.attach import attach
from tests.models.tiny_pipelines import tiny_dit

COMMIT = "0" * 40


def test_a_routed_transformer_fetches_what_diffusers_left_out(tmp_path, monkeypatch):
    model = attach(tiny_dit(), "timestep", chunk_size=2, check=False)
    model.save_pretrained(tmp_path / "whole")
    folder = tmp_path / "hub" / "models--me--few--steps" / "snapshots" / COMMIT / "transformer"
    folder.mkdir(parents=True)
    shutil.copy(tmp_path / "whole" / "config.json", folder)
    asked: list[Any] = []

    def download(repo: str, **given: Any) -> str:
        asked.append((repo, given))
        shutil.copytree(tmp_path / "whole", folder, dirs_exist_ok=True)
        return str(folder.parent)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    kind = routed_class("DiTTransformer2DModel")
    loaded = kind.from_pretrained(str(folder), device_map={"": "cpu"})
    (repo, given), state = asked[0], model.state_dict()
    assert repo == "me/few--steps" and given["revision"] == COMMIT and given["allow_patterns"] == ["transformer/*"]
    assert given["cache_dir"] == tmp_path / "hub" and not given["local_files_only"]
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())
    kind.from_pretrained(str(folder))
    assert len(asked) == 1
    assert kind.from_pretrained(str(folder), device_map="meta").pos_embed.proj.weight.is_meta
    for several in ("balanced", {"a": 0, "b": 1}):
        with pytest.raises(UserError, match="goes to one device"):
            kind.from_pretrained(str(folder), device_map=several)


def test_a_part_of_a_base_takes_diffusers_options(tmp_path, monkeypatch):
    named = {"base": "me/base", "revision": "", "part": "vae", "class": ["diffusers", "AutoencoderKL"]}
    (tmp_path / "base_part.json").write_text(json.dumps(named))
    asked: list[Any] = []
    monkeypatch.setattr(diffusers.AutoencoderKL, "from_pretrained", lambda *args, **given: asked.append(given))
    BasePart.from_pretrained(Path(tmp_path), torch_dtype=torch.float16, device_map={"": 0}, variant=None, other=1)
    expected = {"subfolder": "vae", "revision": None, "torch_dtype": torch.float16, "device_map": {"": 0}}
    assert asked == [expected]
