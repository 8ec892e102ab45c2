"""A saved network comes back bit for bit, and what is wrong with a folder is said with the file's name."""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dmd_dar.errors import DamagedFileError, MissingWeightsError, UserError
from dmd_dar.models.saved import ModelCard, load_network, network_hash, save_network
from dmd_dar.models.sit import SiT, SiTConfig
from dmd_dar.routing.layout import RoutingConfig

CARD = ModelCard("sit", (1.0, 0.9, 0.1 + 0.2), ("a", "b"), {"step": 3, "command": ["python", "-m", "x"]})
SIT_FILES = {"denoiser.json", "model_index.json", "transformer", "scheduler"}


def network(query: str = "timestep", dtype: torch.dtype = torch.float32) -> SiT:
    torch.manual_seed(0)
    routing = RoutingConfig(query, 3, "last", "count", "reuse_last")
    model = SiT(SiTConfig(8, 2, 4, 16, 2, 2, num_classes=2, learn_sigma=True, routing=routing)).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.3 * torch.randn(p.shape)
    return model


def save_before(folder: Path, model: SiT, card: ModelCard) -> None:
    """The folder of before: runs that users still have, and the shipped teacher."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), folder / "model.safetensors")
    said = {name: value for name, value in asdict(card).items() if name != "sampler"}
    (folder / "model.json").write_text(json.dumps({"format": 1, "model": asdict(model.config), **said}))


Save = Callable[[Path, SiT, ModelCard], None]
FORMS = pytest.mark.parametrize("save", [save_network, save_before])


@FORMS
@pytest.mark.parametrize("query", ["residual", "static", "timestep", "dynamic"])
def test_round_trip(tmp_path, query, save: Save):
    model = network(query)
    save(tmp_path / "new" / "folder", model, CARD)
    loaded, card = load_network(tmp_path / "new" / "folder")
    assert card == CARD and loaded.config == model.config
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())
    given = torch.randn(2, 2, 8, 8), torch.tensor([0.2, 1.0]), torch.tensor([0, 2])
    assert torch.equal(loaded(*given), model(*given))


def test_an_automatic_chunk_size_is_saved_as_a_number(tmp_path):
    save_network(tmp_path, SiT(SiTConfig(8, 2, 4, 16, 2, 2, routing=RoutingConfig("static", "auto"))), CARD)
    assert config_of(tmp_path)["routing"]["chunk_size"] == 1
    assert load_network(tmp_path)[0].config.routing == RoutingConfig("static", 1)


@FORMS
def test_saving_again_replaces_all_files_of_before_but_a_users_own(tmp_path, save: Save):
    save(tmp_path / "student", network("dynamic"), CARD)
    (tmp_path / "student" / "notes.txt").write_text("mine")
    save_network(tmp_path / "student", network("residual"), ModelCard())
    loaded, card = load_network(tmp_path / "student")
    assert loaded.dar is None and card == ModelCard()
    assert {file.name for file in (tmp_path / "student").iterdir()} == SIT_FILES | {"notes.txt"}
    assert [file.name for file in tmp_path.iterdir()] == ["student"]


@FORMS
def test_the_hash_is_that_of_all_that_decides_the_function(tmp_path, save: Save):
    save(tmp_path / "a", network(), CARD)
    save_network(tmp_path / "b", network(), replace(CARD, label_names=(), origin={}))
    assert network_hash(tmp_path / "a") == network_hash(str(tmp_path / "b"))
    changed = network()
    changed.blocks[0].mlp.fc1.bias.data[0] += 1e-3
    save(tmp_path / "weights", changed, CARD)
    other = {"flow": "sit", "sit": "flow"}[CARD.prediction]
    save(tmp_path / "prediction", network(), replace(CARD, prediction=other))
    shape = network()
    shape.config = replace(shape.config, heads=4)
    save(tmp_path / "shape", shape, CARD)
    assert len({network_hash(tmp_path / name) for name in ("a", "b", "weights", "prediction", "shape")}) == 4


def test_the_shipped_teacher_keeps_its_form_and_hash():
    """Results in the repository name it by this hash."""
    folder = Path(__file__).parents[2] / "teachers" / "photos32"
    assert network_hash(folder) == json.loads((folder / "quality.json").read_text())["network"]
    assert load_network(folder)[1].prediction == "flow"


def card_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "denoiser.json").read_text())


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "transformer" / "config.json").read_text())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda it: it.update(format=3), "format is not 2"),
        (lambda it: it.pop("format"), "format"),
        (lambda it: it.pop("network"), "network"),
        (lambda it: it.pop("prediction"), "prediction"),
        (lambda it: it.update(auto_map={"AutoModel": "evil.Model"}), "auto_map"),
        (lambda it: it.update(prediction="eps"), "prediction must be one of"),
        (lambda it: it.update(prediction={"predicts": "eps"}), "schedule"),
        (lambda it: it.update(rungs=[0.9, 0.5]), "rungs must start at 1"),
        (lambda it: it.update(sampler="ddim"), "sampler must be one of"),
    ],
)
def test_a_wrong_card_names_the_file_and_what_is_wrong(tmp_path, change, said):
    save_network(tmp_path, network(), CARD)
    it = card_of(tmp_path)
    change(it)
    (tmp_path / "denoiser.json").write_text(json.dumps(it))
    with pytest.raises(DamagedFileError, match=f"{tmp_path / 'denoiser.json'} .*{said}"):
        load_network(tmp_path)


SHAPES = [
    (lambda it: it.pop("routing"), "routing"),
    (lambda it: it.update(auto_map={"AutoModel": "evil.Model"}), "auto_map"),
    (lambda it: it.update(width=18), "divisible"),
    (lambda it: it["routing"].update(query="dense"), "query must be one of"),
    (lambda it: it["routing"].update(chunk_size="dense"), "chunk_size must be a whole number"),
]


@pytest.mark.parametrize(("change", "said"), SHAPES)
def test_a_wrong_shape_names_the_file_and_what_is_wrong(tmp_path, change, said):
    save_before(tmp_path, network(), CARD)
    it = json.loads((tmp_path / "model.json").read_text())
    change(it["model"])
    (tmp_path / "model.json").write_text(json.dumps(it))
    with pytest.raises(DamagedFileError, match=f"{tmp_path / 'model.json'} .*{said}"):
        load_network(tmp_path)


@pytest.mark.parametrize("change", [change for change, _ in SHAPES])
def test_a_config_that_the_card_was_not_saved_with_is_refused(tmp_path, change):
    save_network(tmp_path, network(), CARD)
    it = config_of(tmp_path)
    change(it)
    (tmp_path / "transformer" / "config.json").write_text(json.dumps(it))
    with pytest.raises(DamagedFileError, match=f"{tmp_path / 'transformer'} is not the network"):
        load_network(tmp_path)


@pytest.mark.parametrize("name", ["os.system", "dmd_dar.evil", "FluxTransformer2DModel", "", None])
def test_a_class_that_is_none_of_ours_is_never_looked_up(tmp_path, name):
    save_network(tmp_path, network(), CARD)
    (tmp_path / "transformer" / "config.json").write_text(json.dumps({**config_of(tmp_path), "_class_name": name}))
    with pytest.raises(UserError, match=str(tmp_path / "transformer")):
        load_network(tmp_path)


def test_rungs_that_card_and_scheduler_do_not_share_are_refused(tmp_path):
    save_network(tmp_path, network(), CARD)
    file = tmp_path / "scheduler" / "scheduler_config.json"
    said = json.loads(file.read_text())
    assert said["trained_at"] == list(CARD.rungs)
    said["trained_at"][1] *= 1.003
    file.write_text(json.dumps(said))
    with pytest.raises(DamagedFileError, match=rf"{file}: trained_at = \[1.0, 0.9027.* where .*json says \[1.0, 0.9"):
        load_network(tmp_path)


def test_a_scheduler_of_another_chain_is_refused(tmp_path):
    save_network(tmp_path, network(), replace(CARD, prediction="dit"))
    file = tmp_path / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "beta_end": 0.012}))
    with pytest.raises(DamagedFileError, match=f"{file}: beta_end = 0.012"):
        load_network(tmp_path)


@FORMS
@pytest.mark.parametrize("text", ["", "{", "[]", "3"])
def test_a_description_that_is_no_json_object_is_named(tmp_path, text, save: Save):
    save(tmp_path, network(), CARD)
    file = tmp_path / ("denoiser.json" if save is save_network else "model.json")
    file.write_text(text)
    with pytest.raises(DamagedFileError, match=str(file)):
        load_network(tmp_path)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def drop_a_tensor(file: Path) -> None:
    weights = load_file(file)
    del weights["dar.gate"]
    save_file(weights, file)


def change_a_shape(file: Path) -> None:
    save_file({**load_file(file), "dar.gate": torch.zeros(2, 2)}, file)


@FORMS
@pytest.mark.parametrize("damage", [cut, drop_a_tensor, change_a_shape])
def test_weights_that_are_damaged_or_do_not_fit_are_named(tmp_path, damage, save: Save):
    save(tmp_path, network(), CARD)
    file = next(tmp_path.rglob("model.safetensors"))
    damage(file)
    with pytest.raises(DamagedFileError, match=str(file.parent)):
        load_network(tmp_path)


@pytest.mark.parametrize("name", ["denoiser.json", "transformer/config.json", "scheduler/scheduler_config.json"])
def test_a_missing_file_is_named(tmp_path, name):
    save_network(tmp_path, network(), CARD)
    (tmp_path / name).unlink()
    with pytest.raises(MissingWeightsError, match=str(tmp_path / name)):
        load_network(tmp_path)


@pytest.mark.parametrize("stop_at", ["model.safetensors", "config.json", "scheduler_config.json", "denoiser.json"])
def test_an_export_that_dies_leaves_the_old_student(tmp_path, monkeypatch, stop_at):
    from dmd_dar.models import saved

    save_network(tmp_path / "student", network("residual"), CARD)
    write = saved.write_atomic

    def dying(path, content):
        if path.name == stop_at:
            raise KeyboardInterrupt
        write(path, content)

    monkeypatch.setattr(saved, "write_atomic", dying)
    with pytest.raises(KeyboardInterrupt):
        save_network(tmp_path / "student", network("timestep"), CARD)
    assert load_network(tmp_path / "student")[0].dar is None
    assert [file.name for file in tmp_path.iterdir()] == ["student"]
