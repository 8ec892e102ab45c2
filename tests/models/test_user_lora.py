"""A teacher that carries a user's LoRA computes what diffusers and peft compute; another network's is refused."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dmd_dar.errors import DamagedFileError, MissingWeightsError, UserError
from dmd_dar.models.adapters import base_config, load_adapter, write_adapter
from dmd_dar.models.frozen import Kept
from dmd_dar.models.saved import ModelCard
from dmd_dar.models.teachers import TeacherConfig, load_teacher, origin_of
from dmd_dar.models.user_lora import FILE, fuse
from dmd_dar.routing.examples import example_inputs
from tests.models.test_adapters import inputs, trained
from tests.models.test_reading import HALF, read, stored
from tests.models.tiny_pipelines import tiny_pipeline
from tests.routing.tiny_models import output

SD3, QWEN = "SD3Transformer2DModel", "QwenImageTransformer2DModel"


def theirs(name: str, folder: Path, **more: Any) -> Any:
    """The transformer as diffusers loads it, with an active adapter of peft's whose factors are random."""
    import diffusers
    from peft import LoraConfig

    model = getattr(diffusers, name).from_pretrained(folder).float().eval()
    model.add_adapter(LoraConfig(r=3, lora_alpha=6.0, target_modules=["to_q", "to_v", "to_out.0"], **more))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def saved_by_diffusers(model: Any, folder: Path) -> Path:
    model.save_lora_adapter(folder)  # without the pipeline's prefix, and with its metadata
    tensors = {f"transformer.{key}": value for key, value in load_file(folder / FILE).items()}
    config = model.peft_config["default"].to_dict()
    names = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora")
    said = {f"transformer.{key}": config[key] for key in names}
    save_file(tensors, folder / FILE, {"format": "pt", "lora_adapter_metadata": json.dumps(said)})
    return folder


def saved_by_peft(model: Any, folder: Path) -> Path:
    from peft import get_peft_model_state_dict

    config = copy.deepcopy(model.peft_config["default"])
    config.save_pretrained(folder)
    state = get_peft_model_state_dict(model)
    save_file({f"base_model.model.{key}": x for key, x in state.items()}, folder / "adapter_model.safetensors")
    return folder


@torch.no_grad()
@pytest.mark.parametrize("save", [saved_by_diffusers, saved_by_peft])
@pytest.mark.parametrize(
    "name, more", [(SD3, {}), (QWEN, {"use_rslora": True, "alpha_pattern": {"to_v": 1.0}})], ids=["sd3", "qwen"]
)
def test_a_fused_lora_is_the_adapter_that_diffusers_runs(tmp_path, name, more, save):
    folder = stored(tmp_path / "base", name, routed=False)
    model, network = theirs(name, folder, **more), read(folder, name)
    adapter = save(model, tmp_path / "lora")
    given = example_inputs(network.transformer)
    before = output(network.transformer, given)
    fuse(network, str(adapter))
    expected = output(model, given)
    assert (before - expected).abs().max() > 1e-2
    torch.testing.assert_close(output(network.transformer, given), expected, rtol=1e-4, atol=1e-5)
    half = read(folder, name, Kept(HALF))
    fuse(half, str(adapter))
    for (key, value), narrow in zip(network.transformer.named_parameters(), half.transformer.parameters(), strict=True):
        assert torch.equal(value.to(narrow.dtype), narrow), key


def test_a_file_of_older_names_says_alpha_for_each_layer(tmp_path):
    folder = stored(tmp_path / "base", SD3, routed=False)
    one, other = read(folder, SD3), read(folder, SD3)
    layer = "transformer_blocks.0.attn.to_q"
    down, up = torch.randn(2, 16), torch.randn(16, 2)
    old = {"lora.down.weight": down, "lora.up.weight": up, "alpha": torch.tensor(6.0)}
    save_file({f"transformer.{layer}.{key}": x for key, x in old.items()}, tmp_path / "old.safetensors")
    fuse(one, str(tmp_path / "old.safetensors"))
    weight = other.transformer.get_submodule(layer).weight
    torch.testing.assert_close(one.transformer.get_submodule(layer).weight, weight + 3 * up @ down)


def of_one_layer(folder: Path) -> Path:
    """A peft folder for a tiny DiT, into which diffusers itself loads none."""
    from peft import LoraConfig

    layer = "transformer_blocks.0.attn1.to_v"
    LoraConfig(r=2, lora_alpha=8.0, target_modules=[layer]).save_pretrained(folder)
    factors = {"lora_A": torch.randn(2, 16), "lora_B": torch.randn(16, 2)}
    saved = {f"base_model.model.{layer}.{name}.weight": value for name, value in factors.items()}
    save_file(saved, folder / "adapter_model.safetensors")
    return folder


def refusals(root: Path) -> dict[str, tuple[type[UserError], str]]:
    """Files that cannot be fused into a tiny SD3, by what is said of them."""
    down, up = torch.randn(2, 16), torch.randn(16, 2)
    layer = "transformer.transformer_blocks.0.attn.to_q"
    both = {f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up}
    made = {
        "other": {key.replace("to_q", "to_qkv"): x for key, x in both.items()},
        "wide": {f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": torch.randn(20, 2)},
        "ranks": {**both, f"{layer}.lora_B.weight": torch.randn(16, 3)},
        "dora": {**both, f"{layer}.lora_magnitude_vector": torch.ones(16)},
        "text": {**both, "text_encoder.layer.lora_A.weight": down.clone()},
        "half": {f"{layer}.lora_A.weight": down},
    }
    for name, tensors in made.items():
        save_file(tensors, root / f"{name}.safetensors")
    (root / "torn.safetensors").write_bytes(b"nothing")
    (root / "empty.safetensors").mkdir()
    another = "is a LoRA of another network than a SD3Transformer2DModel"
    return {
        "other": (UserError, another),
        "wide": (UserError, another),
        "ranks": (UserError, another),
        "dora": (UserError, "lora_magnitude_vector, which is no low-rank update"),
        "text": (UserError, "text_encoder.layer.lora_A.weight, which is no"),
        "half": (DamagedFileError, "one factor only"),
        "torn": (DamagedFileError, "cannot be read"),
        "empty": (MissingWeightsError, "holds no LoRA"),
    }


def test_what_does_not_belong_to_the_network_is_refused_and_leaves_it_alone(tmp_path):
    network = read(stored(tmp_path / "base", SD3, routed=False), SD3)
    before = copy.deepcopy(network.state_dict())
    for name, (kind, said) in refusals(tmp_path).items():
        with pytest.raises(kind, match=said) as error:
            fuse(network, str(tmp_path / f"{name}.safetensors"))
        assert "\n" not in str(error.value)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


@torch.no_grad()
def test_a_teacher_with_a_lora_is_another_teacher_and_its_students_adapter_finds_it(tmp_path):
    pipeline = tiny_pipeline(tmp_path / "pipeline")
    adapter = of_one_layer(tmp_path / "lora")
    bare = load_teacher(TeacherConfig(str(pipeline)))
    teacher = load_teacher(TeacherConfig(str(pipeline), lora=str(adapter)))
    assert teacher.digest != bare.digest and teacher.digest == teacher.digest_with("")
    student = trained(teacher, "timestep")
    origin = {"teacher": teacher.digest, **origin_of(teacher, None)}
    write_adapter(tmp_path / "adapter", student, ModelCard(teacher.prediction, (1.0,), (), origin), "digest")
    with pytest.raises(UserError, match="is an adapter of the network"):
        load_adapter(tmp_path / "adapter", bare)
    found = load_adapter(tmp_path / "adapter", load_teacher(base_config(tmp_path / "adapter", str(pipeline))))
    given = inputs(student)
    expected = student(*given)
    assert (expected - bare.network(*given)).abs().max() > 1e-2
    torch.testing.assert_close(found.network(*given), expected, rtol=1e-4, atol=1e-4)
