"""A merged student is written as its merged copy would be, in the base's types, with no such copy made."""

import json

import pytest
import torch
from safetensors.torch import load_file

from dmd_dar.models import merging
from dmd_dar.models.diffusers_denoiser import DiffusersDenoiser
from dmd_dar.models.frozen import Kept
from dmd_dar.models.merging import write_merged
from dmd_dar.models.shared_lora import LoraConfig, LoraDenoiser, merged, parameter_count
from tests.models.test_reading import HALF, read, stored


def moved(network: DiffusersDenoiser) -> LoraDenoiser:
    student = LoraDenoiser(network, LoraConfig(rank=2, alpha=4.0))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return student


def test_eight_bits_hold_no_update():
    assert [merging._wide(x) for x in (torch.float8_e4m3fn, torch.float8_e5m2)] == [torch.bfloat16] * 2
    assert [merging._wide(x) for x in (torch.bfloat16, torch.float16, torch.int8)] == [HALF, torch.float16, torch.int8]


@torch.no_grad()
@pytest.mark.parametrize("routed", [False, True], ids=["plain", "routed"])
@pytest.mark.parametrize("name", ["QwenImageTransformer2DModel", "DiTTransformer2DModel"])
def test_a_merged_student_is_written_tensor_by_tensor_in_the_types_of_its_base(tmp_path, name, routed, monkeypatch):
    folder = stored(tmp_path / "base", name, routed)
    student = moved(read(folder, name, Kept(HALF)))
    expected = merged(student)
    assert parameter_count(student.network) == parameter_count(expected)
    before, made = read(folder, name).transformer.state_dict(), []
    keep = merging.Lora.merged
    monkeypatch.setattr(merging.Lora, "merged", lambda lora, layer: made.append(layer) or keep(lora, layer))
    (tmp_path / "out").mkdir()
    write_merged(tmp_path / "out", student, shard=8000)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    found = {key: value for file in files for key, value in load_file(file).items()}
    assert (len(files) > 1) != routed and made
    for key, value in expected.transformer.state_dict().items():
        kind = torch.float32 if key.startswith("dar.") else HALF
        assert found[key].dtype == kind and torch.equal(found.pop(key), value.to(kind)), key
    assert not found
    changed = [
        key
        for key, value in read(tmp_path / "out", name).transformer.state_dict().items()
        if not torch.equal(value, before[key])
    ]
    assert len(changed) == len(made) + len([key for key in before if key.startswith("dar.")])
    if not routed:
        index = json.loads((tmp_path / "out" / "diffusion_pytorch_model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == 2 * parameter_count(student.network)
