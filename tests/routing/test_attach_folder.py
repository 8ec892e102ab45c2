"""Routed transformers on disk: they come back whole, and plain diffusers refuses them."""

import copy
import inspect
import json
import os
import pickle
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from dmd_dar.errors import DamagedFileError, MissingWeightsError, UserError
from dmd_dar.routing import attach, detach, load_routed
from dmd_dar.routing.examples import example_inputs
from dmd_dar.routing.folder import SAVE_OPTIONS
from tests.routing.tiny_models import NAMES, gradients, output, shaken, tiny_model

diffusers = pytest.importorskip("diffusers")
DIT = "DiTTransformer2DModel"


def saved(folder: Path, name: str = DIT, dtype: torch.dtype = torch.float32, **options):
    model = shaken(attach(tiny_model(name, dtype), **({"query": "timestep", "chunk_size": 2} | options)))
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", NAMES)
def test_a_saved_model_comes_back_bit_for_bit(tmp_path, name, dtype):
    model = saved(tmp_path, name, dtype)
    back = load_routed(tmp_path)
    assert type(back) is type(model) and back.dar.config == model.dar.config and not back.training
    assert {key: value.dtype for key, value in back.state_dict().items()} == {
        key: value.dtype for key, value in model.state_dict().items()
    }
    inputs = example_inputs(model)
    assert torch.equal(output(back, inputs), output(model, inputs))
    assert gradients(back, inputs).keys() == gradients(model, inputs).keys()


def test_other_forms_travel_too(tmp_path):
    model = saved(tmp_path, query="dynamic", chunk_size="auto", summary="last", granularity="block")
    back = load_routed(tmp_path)
    assert back.dar.config == model.dar.config and back.dar.config.chunk_size == 1
    assert back.dar.plan.granularity == "block"
    assert torch.equal(output(back, example_inputs(model)), output(model, example_inputs(model)))
    back.save_pretrained(tmp_path / "again")
    assert load_file(tmp_path / "again" / "dar_weights.safetensors").keys() == model.state_dict().keys()


def test_plain_diffusers_refuses_the_folder(tmp_path):
    saved(tmp_path)
    for load in (diffusers.DiTTransformer2DModel.from_pretrained, diffusers.AutoModel.from_pretrained):
        for options in ({}, {"use_safetensors": True}, {"low_cpu_mem_usage": False}, {"torch_dtype": torch.float16}):
            with pytest.raises(ValueError, match="it has routers, load it with dmd_dar.routing.load_routed"):
                load(tmp_path, **options)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": None}))
    with pytest.raises(OSError, match="diffusion_pytorch_model"):  # the second barrier, alone
        diffusers.DiTTransformer2DModel.from_pretrained(tmp_path)


def test_a_pipeline_saves_it_and_is_refused_without_its_routers(tmp_path):
    vae = diffusers.AutoencoderKL(block_out_channels=(4,), norm_num_groups=1, latent_channels=3)
    transformer = saved(tmp_path / "alone")
    pipe = diffusers.DiTPipeline(transformer, vae, diffusers.DDIMScheduler())
    pipe.save_pretrained(tmp_path / "pipe")
    assert sorted(path.name for path in (tmp_path / "pipe" / "transformer").iterdir()) == [
        "config.json",
        "dar.json",
        "dar_weights.safetensors",
    ]
    with pytest.raises(ValueError, match="it has routers, load it with dmd_dar.routing.load_routed"):
        diffusers.DiTPipeline.from_pretrained(tmp_path / "pipe")
    with pytest.raises(ValueError, match="it has routers"):
        diffusers.DiffusionPipeline.from_pretrained(tmp_path / "pipe")
    with pytest.raises(ValueError, match="it has routers"):
        diffusers.AutoModel.from_pretrained(tmp_path / "pipe", subfolder="transformer")
    whole = diffusers.DiTPipeline.from_pretrained(
        tmp_path / "pipe", transformer=load_routed(tmp_path / "pipe" / "transformer")
    )
    inputs = example_inputs(transformer)
    assert torch.equal(output(whole.transformer, inputs), output(transformer, inputs))


def test_a_detached_model_is_saved_as_plain(tmp_path):
    model = detach(saved(tmp_path / "routed"))
    model.save_pretrained(tmp_path / "plain")
    plain = diffusers.DiTTransformer2DModel.from_pretrained(tmp_path / "plain")
    assert torch.equal(output(plain, example_inputs(model)), output(model, example_inputs(model)))
    with pytest.raises(UserError, match="holds the weights of a plain model, diffusion_pytorch_model.safetensors"):
        attach(model, query="static", chunk_size=2).save_pretrained(tmp_path / "plain")


def test_a_plain_model_saved_over_a_routed_one_is_not_taken_for_it(tmp_path):
    model = detach(saved(tmp_path))
    model.save_pretrained(tmp_path)
    plain = diffusers.DiTTransformer2DModel.from_pretrained(tmp_path)
    assert torch.equal(output(plain, example_inputs(model)), output(model, example_inputs(model)))
    with pytest.raises(DamagedFileError, match="config.json was not saved with dar.json, they differ in quantization"):
        load_routed(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(MissingWeightsError, match="config.json is missing"):
        load_routed(tmp_path)


def test_copies_and_pickles_are_saved_with_their_own_weights(tmp_path):
    model = saved(tmp_path / "first")
    inputs, routed = example_inputs(model), output(model, example_inputs(model))
    twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    model.dar.reset()
    plain = output(model, inputs)
    for i, twin in enumerate(twins):
        assert torch.equal(output(twin, inputs), routed) and not torch.equal(plain, routed)
        assert gradients(twin, inputs).keys() == gradients(model, inputs).keys()
        twin.save_pretrained(tmp_path / str(i))
        assert torch.equal(output(load_routed(tmp_path / str(i)), inputs), routed)
        assert torch.equal(output(detach(twin), inputs), plain) and "save_pretrained" not in vars(twin)


REFUSED = [
    ({"safe_serialization": False}, "safe_serialization=False: .* saved as safetensors alone"),
    ({"variant": "fp16"}, "variant='fp16': .* without a variant: leave it out"),
    ({"push_to_hub": True}, r"push_to_hub=True: .* saved locally: .* then call model\.push_to_hub\(repo_id\)"),
    ({"use_flashpack": True}, "use_flashpack=True: .* saved as safetensors alone"),
    ({"state_dict": {}}, "has no option state_dict: leave it out"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=lambda x: next(iter(x)) if isinstance(x, dict) else "")
def test_what_saving_does_not_offer(tmp_path, options, message):
    model = attach(tiny_model(DIT), query="static", chunk_size=2)
    with pytest.raises(UserError, match=message):
        model.save_pretrained(tmp_path, **options)
    assert list(tmp_path.iterdir()) == []


def test_every_option_of_diffusers_is_known():
    own = inspect.signature(diffusers.ModelMixin.save_pretrained).parameters.values()
    defaults = {p.name: p.default for p in own if p.default is not p.empty and p.name != "is_main_process"}
    assert defaults.items() <= SAVE_OPTIONS.items()
    pops = re.findall(r'kwargs\.pop\("(\w+)"', inspect.getsource(diffusers.ModelMixin.save_pretrained))
    assert pops and {*pops} <= SAVE_OPTIONS.keys()


def test_saving_takes_every_option_at_its_default(tmp_path):
    model = attach(tiny_model(DIT), query="static", chunk_size=2)
    model.save_pretrained(tmp_path / "other_process", is_main_process=False, **SAVE_OPTIONS)
    assert list(tmp_path.iterdir()) == []
    model.save_pretrained(tmp_path, **SAVE_OPTIONS | {"token": "t", "save_function": torch.save, "max_shard_size": 9})
    inputs = example_inputs(model)
    assert torch.equal(output(load_routed(tmp_path), inputs), output(model, inputs))


def test_pushing_uploads_the_routed_form(monkeypatch):
    model, pushed = attach(tiny_model(DIT), query="static", chunk_size=2), []
    hub = type(model).push_to_hub.__globals__
    monkeypatch.setitem(hub, "create_repo", lambda repo, **options: SimpleNamespace(repo_id=repo))
    monkeypatch.setattr(
        type(model), "_upload_folder", lambda self, folder, *a, **k: pushed.append(sorted(os.listdir(folder)))
    )
    model.push_to_hub("me/routed", subfolder="transformer")
    assert pushed == [["config.json", "dar.json", "dar_weights.safetensors"]]


SIMPLE = {"qk_norm": None, "dual_attention_layers": ()}  # diffusers' fused processor knows neither
FUSABLE = [
    ("PixArtTransformer2DModel", {}),
    ("SD3Transformer2DModel", SIMPLE),
    ("FluxTransformer2DModel", {}),
    ("WanTransformer3DModel", {"image_dim": 8, "added_kv_proj_dim": 24}),
]


@pytest.mark.parametrize("then", ["train", "set back"])
@pytest.mark.parametrize(("name", "changes"), FUSABLE, ids=[name for name, _ in FUSABLE])
def test_fused_projections_are_saved_as_they_compute(tmp_path, name, changes, then):
    model = shaken(attach(tiny_model(name, torch.float64, **changes), query="static", chunk_size=2))
    inputs, keys = example_inputs(model), model.state_dict().keys()
    before = output(model, inputs).detach()
    model.fuse_qkv_projections()
    fused = [value for key, value in model.named_parameters() if key not in keys]
    assert fused and torch.allclose(output(model, inputs), before, rtol=1e-10)
    with torch.no_grad():
        for value in fused:
            value += 0.1 * torch.randn(value.shape, generator=torch.Generator().manual_seed(3)).double()
    if then == "set back":
        model.unfuse_qkv_projections()
    expected = output(model, inputs)
    assert torch.equal(expected, before) == (then == "set back")
    model.save_pretrained(tmp_path)
    back = load_routed(tmp_path)
    assert back.state_dict().keys() == keys
    assert torch.allclose(output(back, inputs), expected, rtol=1e-10)


def grown(model) -> None:
    model.proj_out_2 = nn.Linear(model.proj_out_2.in_features, 2 * model.proj_out_2.out_features)


def extended(model) -> None:
    model.transformer_blocks[0].attn1.processor = nn.Linear(2, 3)


@pytest.mark.parametrize(("change", "names"), [(grown, "proj_out_2.bias, proj_out_2.weight"), (extended, "processor")])
def test_weights_that_nobody_could_load_are_not_saved(tmp_path, change, names):
    model = saved(tmp_path / "first")
    change(model)
    with pytest.raises(UserError, match=rf"not what {DIT} has by its configuration: .*{names}.*register_to_config"):
        model.save_pretrained(tmp_path / "first")
    load_routed(tmp_path / "first")
    other = attach(tiny_model(DIT), query="static", chunk_size=2)
    other.__class__ = type("MyTransformer", (type(other),), {})
    with pytest.raises(UserError, match="MyTransformer is no class of diffusers', so load_routed could not make one"):
        other.save_pretrained(tmp_path / "other")
    assert not (tmp_path / "other").exists()


def rewrite(folder: Path, **changes) -> None:
    """Change dar.json; `backbone` is updated, in config.json too."""
    form, config = (json.loads((folder / name).read_text()) for name in ("dar.json", "config.json"))
    backbone = changes.pop("backbone", {})
    form["backbone"] |= backbone
    (folder / "dar.json").write_text(json.dumps(form | changes))
    (folder / "config.json").write_text(json.dumps(config | backbone))


ROUTING = {"query": "timestep", "chunk_size": 2, "summary": "sum", "scale": "stream", "final": "dedicated"}
TABLE = "pos_embed.pos_embed"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "dar.json: format is 2, not 1"),
        ({"extra": 1}, "dar.json has unknown keys: extra"),
        ({"routing": ROUTING | {"query": "learned"}}, "dar.json: routing: query must be one of .* got 'learned'"),
        ({"routing": ROUTING | {"depth": 3}}, "dar.json: routing has unknown keys: depth"),
        ({"routing": {"query": "timestep"}}, "dar.json: routing lacks: chunk_size, final, scale, summary"),
        ({"routing": []}, r"dar.json: routing must be of type dict, got \[\]"),
        ({"routing": ROUTING | {"chunk_size": 4}}, "chunk_size=4.*but the weights were saved with.*chunk_size=2"),
        ({"backbone": {"_class_name": None}}, "dar.json: backbone._class_name must name a class, got None"),
        ({"backbone": {"_class_name": 3}}, "dar.json: backbone._class_name must name a class, got 3"),
        ({"backbone": {"_class_name": "DDIMScheduler"}}, "_class_name: diffusers has no model class 'DDIMScheduler'"),
        ({"backbone": {"_class_name": "ModelMixin"}}, "_class_name: diffusers has no model class 'ModelMixin'"),
        ({"backbone": {"patch_size": 0}}, "dar.json: backbone: ZeroDivisionError"),
        ({"backbone": {"num_layers": 0}}, "dar.json: granularity: ValueError: .*found none"),
        ({"backbone": {"num_layers": 2}}, "dar_weights.safetensors: the weights do not fit what dar.json says"),
        ({"granularity": "block"}, "dar_weights.safetensors: the weights do not fit what dar.json says"),
        ({"granularity": "layer"}, "dar.json: granularity: .*must be 'sublayer' or 'block', got 'layer'"),
        ({"buffer_dtypes": {TABLE: "load"}}, f"dar.json: buffer_dtypes.{TABLE} is no dtype: 'load'"),
        ({"buffer_dtypes": {TABLE: ["float32"]}}, rf"buffer_dtypes.{TABLE} is no dtype: \['float32'\]"),
        ({"buffer_dtypes": {}}, rf"dar.json: buffer_dtypes must name \['{TABLE}'\], got \[\]"),
        ({"buffer_dtypes": {TABLE: "float32", "nope.x": "float32"}}, rf"must name \['{TABLE}'\], got .*'nope.x'"),
        ({"buffer_dtypes": {"pos_embed.proj.weight": "float16"}}, rf"must name \['{TABLE}'\], got .*proj.weight"),
    ],
)
def test_a_form_that_does_not_fit(tmp_path, change, message):
    saved(tmp_path)
    rewrite(tmp_path)
    load_routed(tmp_path)
    rewrite(tmp_path, **change)
    with pytest.raises(DamagedFileError, match=message):
        load_routed(tmp_path)


@pytest.mark.parametrize("content", [b"[]", b"{", b"\xff\xfe", b"3"])
@pytest.mark.parametrize("name", ["dar.json", "config.json"])
def test_a_file_that_is_no_mapping(tmp_path, name, content):
    saved(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DamagedFileError, match=name):
        load_routed(tmp_path)


def test_files_that_are_damaged_or_missing(tmp_path):
    saved(tmp_path)
    weights = tmp_path / "dar_weights.safetensors"
    tensors = load_file(weights)
    save_file({key: value for key, value in tensors.items() if key != "dar.streams.image.gain"}, weights)
    with pytest.raises(DamagedFileError, match="is not a routed transformer's: KeyError\\('routing'\\)"):
        load_routed(tmp_path)
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(DamagedFileError, match="dar_weights.safetensors is not a routed transformer's"):
        load_routed(tmp_path)
    (tmp_path / "dar.json").write_text("{")
    with pytest.raises(DamagedFileError, match="dar.json cannot be read as JSON"):
        load_routed(tmp_path)
    weights.unlink()
    with pytest.raises(MissingWeightsError, match="dar_weights.safetensors is missing"):
        load_routed(tmp_path)
