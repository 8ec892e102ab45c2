"""Routed models whose parameters are elsewhere between calls, moved there by accelerate or diffusers."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from dmd_dar.errors import UserError
from dmd_dar.routing import attach, load_routed
from dmd_dar.routing.examples import example_inputs
from tests.routing.tiny_models import NAMES, output, shaken, tiny_model

diffusers = pytest.importorskip("diffusers")
accelerate = pytest.importorskip("accelerate")
CPU = torch.device("cpu")


def grouped(model: nn.Module, folder: Path | None, level: str) -> None:
    diffusers.hooks.apply_group_offloading(  # the function: DiT has it too, though not the method
        model, CPU, CPU, level, 1, offload_to_disk_path=None if folder is None else str(folder)
    )


WAYS: dict[str, Callable[[nn.Module, Path], object]] = {
    "group, leaf": lambda model, folder: grouped(model, None, "leaf_level"),
    "group, leaf, disk": lambda model, folder: grouped(model, folder, "leaf_level"),
    "group, block": lambda model, folder: grouped(model, None, "block_level"),
    "group, block, disk": lambda model, folder: grouped(model, folder, "block_level"),
    "sequential": lambda model, folder: accelerate.cpu_offload(model, CPU),
    "sequential, buffers": lambda model, folder: accelerate.cpu_offload(model, CPU, offload_buffers=True),
    "disk": lambda model, folder: accelerate.disk_offload(model, str(folder), CPU),
    "model": lambda model, folder: accelerate.cpu_offload_with_hook(model, CPU),
}

# A plain DiT, which diffusers keeps from group offloading, computes noise where its groups of blocks lie on the disk.
WRONG_WITHOUT_ROUTERS = {("DiTTransformer2DModel", "group, block, disk")}
EVERY = [(name, way) for name in NAMES for way in WAYS if (name, way) not in WRONG_WITHOUT_ROUTERS]


@pytest.fixture(autouse=True)
def narrow_time(monkeypatch):
    """Z-Image's timestep embedding is narrower than the stream, as at its true size: `t_projection` exists."""
    monkeypatch.setattr(f"{diffusers.ZImageTransformer2DModel.__module__}.ADALN_EMBED_DIM", 8)


def equal_to_the_plain_call(name: str, way: str, first: str, folder: Path, **options) -> None:
    options = {"query": "timestep", "chunk_size": 2, **options}
    plain, model = tiny_model(name), tiny_model(name)
    inputs = example_inputs(plain)
    with torch.no_grad():
        expected = output(shaken(attach(plain, **options)), inputs)
        if first == "attach":
            shaken(attach(model, **options))
            WAYS[way](model, folder)
        else:
            WAYS[way](model, folder)
            shaken(attach(model, **options))
        assert model.dar.proof is None  # the check of `attach` ran, it did not wait
        assert all(torch.equal(output(model, inputs), expected) for _ in range(2))


@pytest.mark.parametrize("way", ["group, leaf, disk", "sequential"])
@pytest.mark.parametrize("name", NAMES)
def test_an_offloaded_model_computes_what_the_plain_call_does(name, way, tmp_path):
    equal_to_the_plain_call(name, way, "attach", tmp_path)


@pytest.mark.parametrize("way", WAYS)
def test_routers_may_come_after_the_offloading(way, tmp_path):
    equal_to_the_plain_call("FluxTransformer2DModel", way, "offload", tmp_path)


@pytest.mark.parametrize("backend", ["torch", "naive"])
@pytest.mark.parametrize("query", ["static", "dynamic"])
@pytest.mark.parametrize("way", ["group, leaf, disk", "sequential"])
def test_every_query_and_backend_finds_its_parameters(way, query, backend, tmp_path, monkeypatch):
    monkeypatch.setenv("DMD_DAR_ROUTING_BACKEND", backend)
    equal_to_the_plain_call("SD3Transformer2DModel", way, "attach", tmp_path, query=query)


@pytest.mark.slow
@pytest.mark.parametrize("granularity", ["sublayer", "block"])
@pytest.mark.parametrize("query", ["static", "timestep", "dynamic"])
@pytest.mark.parametrize("first", ["attach", "offload"])
@pytest.mark.parametrize(("name", "way"), EVERY)
def test_every_way_for_every_class(name, way, first, query, granularity, tmp_path):
    equal_to_the_plain_call(name, way, first, tmp_path, query=query, granularity=granularity)


@pytest.mark.parametrize("first", ["attach", "offload"])
def test_a_pipeline_with_sequential_offload(first):
    def image(offloaded: bool) -> torch.Tensor:
        model = tiny_model("DiTTransformer2DModel", out_channels=3, num_embeds_ada_norm=1000)
        torch.manual_seed(0)
        vae = diffusers.AutoencoderKL(block_out_channels=(4,), norm_num_groups=1, latent_channels=3)
        pipe = diffusers.DiTPipeline(model, vae, diffusers.DDIMScheduler())
        pipe.set_progress_bar_config(disable=True)
        for step in ("offload", "attach") if first == "offload" else ("attach", "offload"):
            if step == "attach":
                shaken(attach(pipe.transformer, query="dynamic", chunk_size=2))
            elif offloaded:  # as enable_sequential_cpu_offload does, which does not take the CPU itself
                for part in (pipe.transformer, pipe.vae):
                    accelerate.cpu_offload(part, CPU, offload_buffers=len(part._parameters) > 0)
        made = pipe([1, 2], num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="np")
        return torch.from_numpy(made.images)

    assert torch.equal(image(True), image(False))


@pytest.mark.parametrize("way", ["group, leaf, disk", "sequential"])
def test_the_check_of_a_model_that_was_on_meta_runs_offloaded(way, tmp_path):
    plain = tiny_model("ZImageTransformer2DModel")
    with torch.device("meta"):
        model = attach(type(plain).from_config(plain.config).eval(), query="timestep", chunk_size=2)
    model.to_empty(device="cpu").load_state_dict(plain.state_dict(), strict=False)
    model.dar.reset()
    for name, buffer in plain.named_buffers():
        model.get_buffer(name).copy_(buffer)
    WAYS[way](model, tmp_path)
    inputs = example_inputs(plain)
    with torch.no_grad():
        assert model.dar.proof is not None and torch.equal(output(model, inputs), output(plain, inputs))
    assert model.dar.proof is None


@pytest.mark.parametrize("way", ["group, leaf, disk", "sequential"])
def test_a_reset_that_would_be_lost_is_refused(way, tmp_path):
    model = shaken(attach(tiny_model("SD3Transformer2DModel"), query="timestep", chunk_size=2))
    WAYS[way](model, tmp_path)
    with pytest.raises(ValueError, match="routers are offloaded, to reset them changes nothing: end the offloading"):
        model.dar.reset()
    grouped(model := attach(tiny_model("SD3Transformer2DModel"), query="static", chunk_size=2), None, "leaf_level")
    shaken(model).dar.reset()
    assert model.dar.was_reset


@pytest.mark.parametrize("first", ["attach", "offload"])
@pytest.mark.parametrize("way", ["group, leaf, disk", "group, block, disk", "sequential", "disk"])
def test_values_that_an_offloader_keeps_are_not_saved(way, first, tmp_path):
    model = tiny_model("SD3Transformer2DModel")
    for step in ("attach", "offload") if first == "attach" else ("offload", "attach"):
        attach(model, query="static", chunk_size=2) if step == "attach" else WAYS[way](model, tmp_path / "kept")
    with pytest.raises(UserError, match="does not hold its values, .*(save the model before|remove_hook_from_module)"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_values_come_back_with_the_end_of_accelerates_offloading_and_groups_in_memory_hold_them(tmp_path):
    model = shaken(attach(tiny_model("SD3Transformer2DModel"), query="static", chunk_size=2))
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    WAYS["sequential"](model, tmp_path)
    accelerate.hooks.remove_hook_from_module(model, recurse=True)
    WAYS["group, leaf"](model, tmp_path)
    model.save_pretrained(tmp_path / "saved")
    held = load_routed(tmp_path / "saved").state_dict()
    assert held.keys() == expected.keys() and all(torch.equal(held[name], expected[name]) for name in held)


@pytest.mark.parametrize("query", ["static", "timestep", "dynamic"])
def test_gradients_reach_parameters_that_come_for_the_call(query):
    """A group on the CPU keeps its Parameters: training goes on, with the gradients of the plain model."""
    plain, model = (
        shaken(attach(tiny_model("SD3Transformer2DModel", torch.float64), query=query, chunk_size=2)) for _ in range(2)
    )
    grouped(model, None, "leaf_level")
    inputs, found = example_inputs(plain), []
    for one in (plain, model):
        output(one, inputs).square().sum().backward()
        found.append({name: x.grad for name, x in one.dar.named_parameters()})
    assert all(torch.allclose(found[1][name], grad, rtol=1e-12, atol=0) for name, grad in found[0].items())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("first", ["attach", "offload"])
@pytest.mark.parametrize("level", ["leaf_level", "block_level"])
def test_groups_from_the_cpu_to_the_gpu(level, first, streams):
    model, plain = tiny_model("FluxTransformer2DModel"), tiny_model("FluxTransformer2DModel").cuda()
    inputs, options = example_inputs(plain), {"query": "dynamic", "chunk_size": 2}
    with torch.no_grad():
        expected = output(shaken(attach(plain.cpu(), **options)).cuda(), inputs)
        if first == "attach":
            shaken(attach(model, **options))
        diffusers.hooks.apply_group_offloading(model, torch.device("cuda"), CPU, level, 1, use_stream=streams)
        if first == "offload":
            shaken(attach(model, **options).dar.cpu())
        assert all(torch.allclose(output(model, inputs), expected, atol=1e-5) for _ in range(3))
