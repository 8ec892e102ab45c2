"""Weights as other tools leave them: under the names of wrappers, and in variants only."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dmd_dar.errors import DamagedFileError, MissingWeightsError
from dmd_dar.models.codecs import load_codec
from dmd_dar.models.sit import SiT
from dmd_dar.models.teachers import TeacherConfig, load_teacher
from dmd_dar.models.text import load_text_encoder
from tests.models.tiny_pipelines import LATENT, tiny_dit, tiny_pixart, tiny_vae
from tests.tiny import tiny_sit

PREFIXES = ("module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "_fsdp_wrapped_module.")
PREFIXES += ("module.module.", "_fsdp_wrapped_module._orig_mod.module.")


def wrapped(network: SiT, way: str) -> dict[str, torch.Tensor]:
    """Its weights under `way` before every name, or as torch's own wrappers name them."""
    if way == "averaged":
        return dict(torch.optim.swa_utils.AveragedModel(network).state_dict())
    if way == "blocks compiled":
        network = tiny_sit(LATENT)
        for i, block in enumerate(network.blocks):
            network.blocks[i] = torch.compile(block)
        return dict(network.state_dict())
    if way == "blocks sharded":
        middle = "_fsdp_wrapped_module._checkpoint_wrapped_module."
        names = {name: name.replace("blocks.1.", f"blocks.1.{middle}") for name in network.state_dict()}
        return {f"_fsdp_wrapped_module.{names[name]}": x for name, x in network.state_dict().items()}
    return {way + name: x for name, x in network.state_dict().items()}


@pytest.mark.parametrize("way", [*PREFIXES, "averaged", "blocks compiled", "blocks sharded"])
@pytest.mark.parametrize("holder", ["ema", "alone", "safetensors"])
@torch.no_grad()
def test_names_of_wrappers_are_taken_off(tmp_path, way, holder):
    network = tiny_sit(LATENT).eval()
    weights = {name: x.clone() for name, x in wrapped(network, way).items()}
    file = tmp_path / ("sit-a.safetensors" if holder == "safetensors" else "sit-a.pt")
    if holder == "safetensors":
        save_file(weights, file)
    else:
        torch.save({"ema": weights, "model": {"x": torch.zeros(1)}} if holder == "ema" else weights, file)
    teacher = load_teacher(TeacherConfig(str(file), heads=2)).network
    given = torch.randn(3, 4, 8, 8), torch.tensor([0.0, 0.3, 1.0]), torch.tensor([0, 3, 5])
    assert teacher.config == LATENT and torch.equal(teacher(*given), network(*given))


def test_one_weight_under_two_names_is_refused(tmp_path):
    weights = tiny_sit(LATENT).state_dict()
    torch.save({**weights, "module.x_embedder.proj.bias": torch.zeros(16)}, tmp_path / "sit-a.pt")
    with pytest.raises(DamagedFileError, match=r"sit-a.pt holds x_embedder.proj.bias twice, once as module\."):
        load_teacher(TeacherConfig(str(tmp_path / "sit-a.pt"), heads=2))


def save_as(model, folder: Path, variant: str | None = "fp16", sharded: bool = False):
    """A copy of `model` in float16, saved by its own library, in one file or in several."""
    half = type(model).from_config(model.config) if hasattr(type(model), "from_config") else type(model)(model.config)
    half.load_state_dict(model.state_dict())
    half.half().save_pretrained(folder, variant=variant, **({"max_shard_size": "8KB"} if sharded else {}))
    assert not sharded or any("00002-of" in file.name for file in folder.iterdir())
    return half.float().eval()


SHARDED = pytest.mark.parametrize("sharded", [False, True])


@SHARDED
@torch.no_grad()
def test_a_transformer_and_a_vae_of_a_variant_alone_are_read(tmp_path, sharded):
    network, vae = (save_as(m, tmp_path / n, sharded=sharded) for n, m in (("t", tiny_dit()), ("v", tiny_vae())))
    ours = load_teacher(TeacherConfig(str(tmp_path / "t"), prediction="dit")).network
    pairs = zip(ours.transformer.parameters(), network.parameters(), tiny_dit().parameters(), strict=True)
    assert all(torch.equal(own, half) and torch.equal(own, plain.half().float()) for own, half, plain in pairs)
    codec = load_codec(str(tmp_path / "v"))
    assert all(torch.equal(*pair) for pair in zip(codec.vae.parameters(), vae.parameters(), strict=True))
    assert {p.dtype for p in (*ours.parameters(), *codec.parameters())} == {torch.float32}


@SHARDED
@torch.no_grad()
def test_a_text_encoder_of_a_variant_alone_is_read(tmp_path, sharded):
    from transformers import T5EncoderModel

    folder = tiny_pixart(tmp_path / "pipeline")
    plain = load_text_encoder(str(folder)).encode(["a red cat"])
    model = T5EncoderModel.from_pretrained(folder / "text_encoder")
    shutil.rmtree(folder / "text_encoder")
    model.save_pretrained(folder / "text_encoder", variant="fp32", **({"max_shard_size": "4KB"} if sharded else {}))
    assert any("fp32" in file.name for file in (folder / "text_encoder").iterdir())
    half = load_text_encoder(str(folder)).encode(["a red cat"])
    assert all(torch.equal(half[name], plain[name]) for name in plain)


@torch.no_grad()
def test_the_plain_weights_go_before_their_variants(tmp_path):
    save_as(tiny_dit(), tmp_path)
    tiny_dit().save_pretrained(tmp_path)
    ours = load_teacher(TeacherConfig(str(tmp_path), prediction="dit")).network.transformer
    assert all(torch.equal(*pair) for pair in zip(ours.parameters(), tiny_dit().parameters(), strict=True))


@pytest.mark.parametrize("load", ["transformer", "vae"])
def test_variants_that_leave_a_choice_and_other_names_are_named(tmp_path, load):
    model = tiny_dit() if load == "transformer" else tiny_vae()

    def read() -> None:
        given = TeacherConfig(str(tmp_path), prediction="dit")
        load_teacher(given) if load == "transformer" else load_codec(str(tmp_path))

    for variant in ("fp16", "non_ema"):
        save_as(model, tmp_path, variant)
    with pytest.raises(MissingWeightsError, match=r"the variants fp16, non_ema, .*variant='fp16'\).save_pretrained"):
        read()
    for file in tmp_path.glob("*.safetensors"):
        file.unlink()
    save_file({"a": torch.zeros(1)}, tmp_path / "my_weights.safetensors")
    with pytest.raises(MissingWeightsError, match="holds no diffusion_pytorch_model.safetensors but my_weights"):
        read()
    assert json.loads((tmp_path / "config.json").read_text())["_class_name"] == type(model).__name__
