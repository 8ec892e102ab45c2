"""A saved network comes back bit for bit, and what is wrong with a folder is said with the file's name."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dmd_dar.models.saved import ModelCard, load_network, network_hash, save_network
from dmd_dar.models.sit import SiT, SiTConfig
from dmd_dar.routing.layout import RoutingConfig

CARD = ModelCard("sit", (1.0, 0.9, 0.1 + 0.2), ("a", "b"), {"step": 3, "command": ["python", "-m", "x"]})


def network(query: str = "timestep", dtype: torch.dtype = torch.float32) -> SiT:
    torch.manual_seed(0)
    routing = RoutingConfig(query, 3, "last", "count", "reuse_last")
    model = SiT(SiTConfig(8, 2, 4, 16, 2, 2, num_classes=2, learn_sigma=True, routing=routing)).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.3 * torch.randn(p.shape)
    return model


@pytest.mark.parametrize("query", ["residual", "static", "timestep", "dynamic"])
def test_round_trip(tmp_path, query):
    model = network(query)
    save_network(tmp_path / "new" / "folder", model, CARD)
    loaded, card = load_network(tmp_path / "new" / "folder")
    assert card == CARD and loaded.config == model.config
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())
    given = torch.randn(2, 2, 8, 8), torch.tensor([0.2, 1.0]), torch.tensor([0, 2])
    assert torch.equal(loaded(*given), model(*given))
    assert {file.name for file in (tmp_path / "new" / "folder").iterdir()} == {"model.json", "model.safetensors"}


def test_an_automatic_chunk_size_is_saved_as_a_number(tmp_path):
    save_network(tmp_path, SiT(SiTConfig(8, 2, 4, 16, 2, 2, routing=RoutingConfig("static", "auto"))), CARD)
    assert described(tmp_path)["model"]["routing"]["chunk_size"] == 1
    assert load_network(tmp_path)[0].config.routing == RoutingConfig("static", 1)


def test_saving_again_replaces_both_files(tmp_path):
    save_network(tmp_path, network("dynamic"), CARD)
    save_network(tmp_path, network("residual"), ModelCard())
    loaded, card = load_network(tmp_path)
    assert loaded.dar is None and card == ModelCard()


def test_the_hash_is_that_of_all_that_decides_the_function(tmp_path):
    save_network(tmp_path / "a", network(), CARD)
    save_network(tmp_path / "b", network(), replace(CARD, label_names=(), origin={}))
    assert network_hash(tmp_path / "a") == network_hash(str(tmp_path / "b"))
    changed = network()
    changed.blocks[0].mlp.fc1.bias.data[0] += 1e-3
    save_network(tmp_path / "weights", changed, CARD)
    other = {"flow": "sit", "sit": "flow"}[CARD.prediction]
    save_network(tmp_path / "prediction", network(), replace(CARD, prediction=other))
    described = json.loads((tmp_path / "b" / "model.json").read_text())
    described["model"]["heads"] += 1
    (tmp_path / "b" / "model.json").write_text(json.dumps(described))
    hashes = {network_hash(tmp_path / name) for name in ("a", "b", "weights", "prediction")}
    assert len(hashes) == 4


def described(folder: Path) -> dict:
    return json.loads((folder / "model.json").read_text())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda it: it.update(format=2), "format is not 1"),
        (lambda it: it.pop("format"), "format"),
        (lambda it: it.pop("model"), "model"),
        (lambda it: it["model"].pop("routing"), "routing"),
        (lambda it: it["model"].update(colour="red"), "colour"),
        (lambda it: it["model"].update(width=18), "divisible"),
        (lambda it: it["model"]["routing"].update(query="dense"), "query must be one of"),
        (lambda it: it["model"]["routing"].update(chunk_size="dense"), "chunk_size must be a whole number"),
        (lambda it: it.update(weather="fine"), "weather"),
        (lambda it: it.update(prediction="eps"), "prediction must be one of"),
    ],
)
def test_a_wrong_description_names_the_file_and_what_is_wrong(tmp_path, change, said):
    save_network(tmp_path, network(), CARD)
    it = described(tmp_path)
    change(it)
    (tmp_path / "model.json").write_text(json.dumps(it))
    with pytest.raises(ValueError, match=f"{tmp_path / 'model.json'} .*{said}"):
        load_network(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "3"])
def test_a_description_that_is_no_json_object_is_named(tmp_path, text):
    save_network(tmp_path, network(), CARD)
    (tmp_path / "model.json").write_text(text)
    with pytest.raises(ValueError, match=str(tmp_path / "model.json")):
        load_network(tmp_path)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def drop_a_tensor(file: Path) -> None:
    weights = load_file(file)
    del weights["dar.gate"]
    save_file(weights, file)


def change_a_shape(file: Path) -> None:
    save_file({**load_file(file), "dar.gate": torch.zeros(2, 2)}, file)


@pytest.mark.parametrize("damage", [cut, drop_a_tensor, change_a_shape])
def test_weights_that_are_damaged_or_do_not_fit_are_named(tmp_path, damage):
    save_network(tmp_path, network(), CARD)
    damage(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=str(tmp_path / "model.safetensors")):
        load_network(tmp_path)
