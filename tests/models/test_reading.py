"""Weights read straight to their place are those of diffusers' own from_pretrained, in every family and form."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from dmd_dar.distillation.networks import Memory, build_networks
from dmd_dar.errors import DamagedFileError
from dmd_dar.models.diffusers_denoiser import DiffusersDenoiser, Reading, load_transformer
from dmd_dar.models.families import FAMILIES
from dmd_dar.models.families.form import FixedInputs
from dmd_dar.models.frozen import Kept, block_layers, release
from dmd_dar.models.shared_lora import LoraConfig
from dmd_dar.models.unencoded import Unencoded
from dmd_dar.routing import tensor_files
from dmd_dar.routing.attach import attach, load_routed
from dmd_dar.routing.examples import example_inputs
from dmd_dar.routing.folder import computed_buffers
from dmd_dar.routing.layout import RoutingConfig
from tests.routing.tiny_models import output, shaken, tiny_model

HALF = torch.bfloat16


def stored(folder: Path, name: str, routed: bool) -> Path:
    """A tiny transformer in bfloat16: in several files, or with routers in one."""
    model = tiny_model(name).to(HALF)
    if routed:
        shaken(attach(model, "timestep", chunk_size=2)).save_pretrained(folder)
    else:
        model.save_pretrained(folder, max_shard_size="8KB")
        assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


def read(folder: Path, name: str, kept: Kept | None = None) -> DiffusersDenoiser:
    """As a run reads it, with the form of prompts that the family needs."""
    family, config = FAMILIES[name], tiny_model(name).config
    prompts = Unencoded(family, config) if family.width else None
    fixed = FixedInputs(8 if family.side else 0, 2.0 if config.get("guidance_embeds") else 0.0)
    return load_transformer(folder, prompts, fixed, reading=Reading(kept or Kept()))


def diffusers_own(folder: Path, name: str, dtype: torch.dtype, routed: bool) -> Any:
    import diffusers

    if routed:
        return load_routed(folder).to(dtype) if dtype == torch.float32 else load_routed(folder)
    return getattr(diffusers, name).from_pretrained(folder, torch_dtype=dtype).eval()


def values(model: nn.Module) -> dict[str, Tensor]:
    return {**model.state_dict(), **computed_buffers(model)}


@torch.no_grad()
@pytest.mark.parametrize("routed", [False, True], ids=["plain", "routed"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_network_is_diffusers_own_in_float32_and_with_its_blocks_in_bfloat16(tmp_path, name, routed, monkeypatch):
    monkeypatch.setattr(tensor_files, "PIECE", 5000)
    folder = stored(tmp_path / "t", name, routed)
    whole, half = read(folder, name).transformer, read(folder, name, Kept(HALF)).transformer
    theirs, theirs_half = (diffusers_own(folder, name, dtype, routed) for dtype in (torch.float32, HALF))
    expected, inputs = values(theirs), example_inputs(theirs)
    assert values(whole).keys() == expected.keys()
    for key, value in values(whole).items():
        assert value.device.type == "cpu" and torch.equal(value, expected[key]), key
        assert value.dtype == torch.float32 or not value.is_floating_point(), key
    answer = output(theirs, inputs)
    assert answer.std() > 1e-2 and torch.equal(output(whole, inputs), answer)
    assert torch.equal(output(half, inputs), answer)  # the files hold bfloat16, so that nothing was rounded
    narrow = {id(p) for layer in block_layers(half) for p in layer.parameters(recurse=False)}
    assert all((p.dtype == HALF) == (id(p) in narrow) for p in half.parameters()) and narrow
    release(half)
    for key, value in values(theirs_half).items():  # not routers, and not tables that diffusers, too, keeps in float32
        own = {**half.state_dict(keep_vars=True), **computed_buffers(half)}[key]
        own.data = own.data.to(value.dtype)
    inputs = tree_map(lambda x: x.to(HALF) if isinstance(x, Tensor) and x.is_floating_point() else x, inputs)
    torch.testing.assert_close(output(half, inputs), output(theirs_half, inputs), rtol=0, atol=0)


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_a_routed_lora_student_starts_as_its_base_in_bfloat16(tmp_path, name):
    base = read(stored(tmp_path / "t", name, routed=False), name, Kept(HALF))
    given = example_inputs(base.transformer)
    expected = output(base.transformer, given)
    memory = Memory("shared_lora", LoraConfig(rank=2), Kept(HALF))
    networks = build_networks(base, RoutingConfig("timestep", 2), memory=memory)
    for network in (networks.student, networks.fake_score):
        assert torch.equal(output(network.network.transformer, given), expected)  # type: ignore[union-attr]
    assert {p.dtype for p in networks.student.parameters()} == {torch.float32}


def test_what_does_not_fit_the_configuration_is_named(tmp_path):
    folder = stored(tmp_path / "t", "QwenImageTransformer2DModel", routed=False)
    file = sorted(folder.glob("*.safetensors"))[0]
    weights = load_file(file)
    name = sorted(weights)[0]
    for wrong, kind in (({"other": weights[name]}, "missing_keys"), ({name: torch.zeros(3, 7)}, "mismatched_keys")):
        shutil.copytree(folder, tmp_path / kind)
        save_file({**{key: x for key, x in weights.items() if key != name}, **wrong}, tmp_path / kind / file.name)
        with pytest.raises(DamagedFileError, match=f"the weights do not fit config.json: .*{kind}.*{name}"):
            read(tmp_path / kind, "QwenImageTransformer2DModel")
    (folder / file.name).write_bytes(file.read_bytes()[:100])
    with pytest.raises(DamagedFileError, match=f"{file.name} cannot be read"):
        read(folder, "QwenImageTransformer2DModel")
    (folder / file.name).unlink()
    with pytest.raises(DamagedFileError, match=f"names {file.name}, not here"):
        read(folder, "QwenImageTransformer2DModel")


def test_a_file_is_byte_for_byte_what_safetensors_writes(tmp_path):
    kinds = (torch.bfloat16, torch.float32, torch.int64, torch.bool, torch.float16, torch.float64, torch.uint8)
    tensors = {f"x{i}": torch.randn(3, i).mul(9).to(kind) for i, kind in enumerate(kinds)} | {"one": torch.tensor(2.0)}
    save_file(tensors, tmp_path / "theirs", {"format": "pt"})
    entries = {name: (x.dtype, tuple(x.shape)) for name, x in tensors.items()}
    tensor_files.write(tmp_path / "ours", entries, lambda name: tensors[name])
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    with pytest.raises(KeyError):
        tensor_files.write(tmp_path / "ours", entries, {}.__getitem__)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes() and len(list(tmp_path.iterdir())) == 2
