"""A run in a folder that it may not use ends before any file of its teacher, data or networks is opened."""

import os
import sys
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from dmd_dar import config, encode, pairs, pretrain
from dmd_dar.data import latents
from dmd_dar.data.shards import ShardFolder
from dmd_dar.distillation import job as distill
from dmd_dar.methods.solvers import Solver
from dmd_dar.train.disk.folder import FolderError, RunFolder
from tests.tiny import ON_CPU

CPU = tuple(word.removeprefix("launch.") for word in ON_CPU)
watched: set[Path] = set()
opened: list[str] = []


def hear(event: str, given: tuple) -> None:
    if watched and event in ("open", "os.listdir", "os.scandir") and isinstance(given[0], str | bytes | Path):
        path = Path(os.fsdecode(given[0])).absolute()
        opened.extend(str(path) for root in watched if path.is_relative_to(root))


sys.addaudithook(hear)


@pytest.fixture
def inputs(tmp_path, monkeypatch):
    """Folders and files that nobody may read; they hold nothing that could be read, either."""
    root = tmp_path / "inputs"
    for place in ("teacher", "images/cats", "latents", "vae", "pipeline"):
        (root / place).mkdir(parents=True)
        for name in ("manifest.json", "0.png", "model.json", "model_index.json", "config.json"):
            (root / place / name).write_text("no")
    (root / "prompts.txt").write_text("a cat\n")
    monkeypatch.setattr(nn.Module, "__init__", lambda *given, **more: pytest.fail("a network is built"))
    opened.clear()
    watched.add(root)
    yield root
    watched.clear()


def jobs(root: Path) -> dict[str, tuple[type, Any, list[str]]]:
    images = [f"data.path={root}/images", "data.name=folder"]
    stored = [f"data.path={root}/latents", "data.name=latents"]
    return {
        "distill": (distill.DistillConfig, distill.distill, [f"teacher.path={root}/teacher", *images]),
        "distill latents": (distill.DistillConfig, distill.distill, [f"teacher.path={root}/teacher", *stored]),
        "pretrain": (pretrain.PretrainConfig, pretrain.pretrain, images),
        "pretrain latents": (pretrain.PretrainConfig, pretrain.pretrain, [f"codec={root}/vae", *stored]),
    }


@pytest.mark.parametrize("fault", ["in use by another run", "another configuration", "already holds a run", "a file"])
@pytest.mark.parametrize("name", jobs(Path()))
def test_a_used_run_folder_is_refused_first(tmp_path, inputs, capsys, name, fault):
    schema, job, keys = jobs(inputs)[name]
    out = tmp_path / "run"
    argv = [f"out_dir={out}", "log.wandb=disabled", *keys, *ON_CPU]
    more = {"another configuration": ["seed=1"], "already holds a run": ["resume=never"]}.get(fault, [])
    if fault == "a file":
        out.write_text("mine")
    else:
        held = RunFolder.open(out, config.to_dict(config.load(schema, argv)))
        if fault != "in use by another run":
            held.close()
    kept = {path: path.read_bytes() for path in out.parent.glob("run/*") if path.is_file()}
    with pytest.raises(SystemExit) as stop:
        config.run_job(schema, job, [*argv, *more])
    assert stop.value.code == 2 and fault in capsys.readouterr().err and opened == []
    assert {path: path.read_bytes() for path in kept if path.name != ".lock"} == {
        path: content for path, content in kept.items() if path.name != ".lock"
    }


def begun_pairs(out: Path) -> None:
    recipe = pairs.Recipe("digest", 1.0, (1.0, 0.5), Solver(solver_steps=2), 0, 8, 7, (3, 32, 32))
    ShardFolder(out, pairs.layout_of(recipe, 4)).close()


def begun_latents(out: Path) -> None:
    content = {"codec": "digest", "held_out": False, "images": "middle", "data": "hash", "size": 32}
    content |= {"shorter_side": 0, "copies": 1, "held_out_share": 0.1}
    ShardFolder(out, latents.layout_of(content, ("cats",), (5,), (4, 4, 4), 1024)).close()


SAME = ["rungs=[1.0,0.5]", "solver_steps=2", "n=8", "shard_size=4"]
FILLED = {
    "pairs": (pairs.PairsConfig, pairs.make_pairs, begun_pairs, SAME),
    "encode": (encode.EncodeConfig, encode.encode, begun_latents, ["data.name=folder"]),
}
OTHER = [
    ("pairs", "seed=1", "seed: 0 -> 1"),
    ("pairs", "n=9", "n: 8 -> 9"),
    ("pairs", "guidance_scale=2", "guidance_scale: 1.0 -> 2.0"),
    ("pairs", "rungs=[1.0]", "rungs: [1.0, 0.5] -> [1.0]"),
    ("encode", "data.size=64", "size: 32 -> 64"),
    ("encode", "held_out=true", "held_out: false -> true"),
    ("encode", "data.flip=true", "copies: 1 -> 2"),
    ("encode", "n=100", 'images: "middle" -> "random"'),
    ("encode", "shard_size=7", "shard_size: 1024 -> 7"),
]


@pytest.mark.parametrize(("name", "key", "told"), OTHER, ids=str)
def test_a_folder_of_other_samples_is_refused_first(tmp_path, inputs, capsys, name, key, told):
    schema, job, begin, keys = FILLED[name]
    begin(tmp_path / "out")
    places = [f"codec={inputs}/vae", f"data.path={inputs}/images"]
    places = [f"teacher.path={inputs}/teacher"] if name == "pairs" else places
    with pytest.raises(SystemExit) as stop:
        config.run_job(schema, job, [f"out={tmp_path / 'out'}", *places, *keys, *CPU, key])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and "holds other samples" in said and told in said and opened == []


def test_prompts_of_another_form_are_refused_first(tmp_path, inputs, capsys):
    begun_latents(tmp_path / "out")
    argv = [f"prompts={inputs}/prompts.txt", f"pipeline={inputs}/pipeline", f"out={tmp_path / 'out'}", *CPU]
    with pytest.raises(SystemExit):
        config.run_job(encode.EncodeConfig, encode.encode, argv)
    assert 'kind: "latents" -> "prompts"' in capsys.readouterr().err and opened == []


@pytest.mark.parametrize("there", [(), ("run",), ("run", "run/notes.txt"), ("deep",)], ids=str)
def test_a_refusal_of_what_is_opened_leaves_the_folder_as_it_was(tmp_path, capsys, there):
    for name in there:
        (tmp_path / name).write_text("mine") if name.endswith("txt") else (tmp_path / name).mkdir()
    out = tmp_path / ("deep/er/run" if there == ("deep",) else "run")
    with pytest.raises(SystemExit) as stop:
        distill.main([f"out_dir={out}", f"teacher.path={tmp_path / 'none'}", "data.name=textures", *ON_CPU])
    assert stop.value.code == 2 and "teacher.path" in capsys.readouterr().err
    left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.name != ".lock")
    assert left == sorted(there)
    distill_again = config.load(distill.DistillConfig, [f"out_dir={out}", "data.name=textures"])
    with RunFolder.claim(out, config.to_dict(distill_again)) as folder:
        assert not folder.resumed


def test_a_lock_that_its_holder_took_away_locks_nobody_out(tmp_path):
    """Two that claim one new folder: the second is refused while the first is there, and comes in when it is gone."""
    first = RunFolder.claim(tmp_path / "run", {"steps": 1})
    with pytest.raises(FolderError, match="in use by another run"):
        RunFolder.claim(tmp_path / "run", {"steps": 1})
    first.close()
    assert not (tmp_path / "run").exists()
    second = RunFolder.claim(tmp_path / "run", {"steps": 1})
    second.begin()
    second.close()
    assert (tmp_path / "run" / "config.yaml").is_file() and (tmp_path / "run" / ".lock").is_file()
