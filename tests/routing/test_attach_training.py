"""Routed transformers under what trains them: checkpointing, adapters, torch.compile, sharding over processes."""

import os
import subprocess
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from dmd_dar.errors import UserError
from dmd_dar.routing import attach, detach
from dmd_dar.routing.examples import example_inputs
from tests.routing.tiny_models import NAMES, distance, gradients, output, shaken, tiny_model

pytest.importorskip("diffusers")
THREE = ["DiTTransformer2DModel", "SD3Transformer2DModel", "FluxTransformer2DModel"]
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("granularity", ["sublayer", "block"])
@pytest.mark.parametrize("name", NAMES)
def test_checkpointing_changes_no_gradient(name, granularity):
    model = attach(tiny_model(name, torch.float64), query="timestep", chunk_size=2, granularity=granularity)
    inputs = example_inputs(shaken(model))
    plain = gradients(model, inputs)
    model.enable_gradient_checkpointing()
    assert distance(gradients(model, inputs), plain) < 1e-12
    model.disable_gradient_checkpointing()
    assert distance(gradients(model, inputs), plain) < 1e-12


@pytest.mark.parametrize("chunk_size", [1, 4])
@pytest.mark.parametrize("query", ["static", "dynamic"])
@pytest.mark.parametrize("name", THREE)
def test_checkpointing_of_two_forwards_at_once(name, query, chunk_size):
    model = shaken(attach(tiny_model(name, torch.float64), query=query, chunk_size=chunk_size))
    first = example_inputs(model)
    second = first | {"hidden_states": 1.5 * first["hidden_states"]}
    one, other = gradients(model, first), gradients(model, second)
    model.enable_gradient_checkpointing()
    model.zero_grad(set_to_none=True)
    (output(model, first).square().sum() + output(model, second).square().sum()).backward()
    both = {key: parameter.grad for key, parameter in model.named_parameters() if parameter.grad is not None}
    assert distance(both, {key: one[key] + other[key] for key in one}) < 1e-12


def test_checkpointing_frees_what_a_block_computes():
    def kept(checkpointing: bool) -> int:
        model = attach(tiny_model(THREE[0]), query="static", chunk_size=3)
        if checkpointing:
            model.enable_gradient_checkpointing()
        sizes = {}
        pack = lambda x: sizes.__setitem__(x.untyped_storage().data_ptr(), x.untyped_storage().nbytes()) or x  # noqa: E731
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            output(model, example_inputs(model))
        return sum(sizes.values())

    assert kept(True) < kept(False) / 3


def test_recomputation_may_run_in_another_thread():
    model = shaken(attach(tiny_model(THREE[1], torch.float64), query="timestep", chunk_size=2))
    inputs = example_inputs(model)
    expected = gradients(model, inputs)
    model.enable_gradient_checkpointing()
    model.zero_grad(set_to_none=True)
    loss = output(model, inputs).square().sum()
    with ThreadPoolExecutor(1) as other:
        other.submit(loss.backward).result()
    assert distance({key: x.grad for key, x in model.named_parameters() if x.grad is not None}, expected) < 1e-12


def test_threads_have_passes_of_their_own():
    model = shaken(attach(tiny_model(THREE[1], torch.float64), query="timestep", chunk_size=2))
    first = example_inputs(model)
    second = first | {"hidden_states": 1.5 * first["hidden_states"]}
    expected = [output(model, inputs).detach() for inputs in (first, second)]
    meet = threading.Barrier(2, timeout=20)

    def both_are_here(module, args):
        meet.wait()

    model.transformer_blocks[1].register_forward_pre_hook(both_are_here)
    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(lambda inputs: output(model, inputs).detach(), (first, second)))
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("backend", ["torch", "naive"])
def test_the_observer_sees_every_router_once_and_no_graph(backend, checkpointing):
    model = shaken(attach(tiny_model(THREE[2], torch.float64), query="dynamic", chunk_size=2))
    inputs, seen = example_inputs(model), []
    for bank in model.dar.streams.values():
        bank.backend = backend
    expected = gradients(model, inputs)
    if checkpointing:
        model.enable_gradient_checkpointing()
    model.dar.observe = lambda stream, router, alpha: seen.append((stream, router, alpha.requires_grad))
    assert distance(gradients(model, inputs), expected) < 1e-12
    assert sorted(seen) == sorted((name, l, False) for name, bank in model.dar.streams.items() for l in bank.routers)  # noqa: E741


@pytest.mark.parametrize("cast", [nn.Module.half, nn.Module.bfloat16, lambda model: model.to(torch.bfloat16)])
def test_routers_stay_float32_when_the_model_is_cast(cast):
    model = shaken(attach(tiny_model(THREE[0]), query="timestep", chunk_size=2))
    routers, pointer = {key: x.clone() for key, x in model.dar.state_dict().items()}, model.dar.streams["image"].gain
    cast(model)
    assert next(model.parameters()).dtype in (torch.float16, torch.bfloat16)
    assert all(torch.equal(x, routers[key]) and x.dtype == torch.float32 for key, x in model.dar.state_dict().items())
    assert model.dar.streams["image"].gain is pointer
    assert output(model, example_inputs(model)).isfinite().all()
    assert {x.dtype for x in model.double().dar.parameters()} == {torch.float64}
    assert {x.dtype for x in model.half().dar.parameters()} == {torch.float32}
    assert {(x.dtype, x.is_meta) for x in model.to("meta").dar.parameters()} == {(torch.float32, True)}


def test_reentrant_checkpointing_is_refused():
    model = attach(tiny_model(THREE[0]), query="static", chunk_size=2)
    model.enable_gradient_checkpointing(lambda module, *args: checkpoint(module, *args, use_reentrant=True))
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        output(model, example_inputs(model))
    detach(model)
    assert output(model, example_inputs(model)).isfinite().all()


@pytest.mark.parametrize("targets", [["to_q", "to_v"], "all-linear"], ids=str)
@pytest.mark.parametrize("name", THREE)
def test_adapters_find_the_same_targets_and_routers_stay_trainable(tmp_path, name, targets):
    peft = pytest.importorskip("peft")
    plain, routed = tiny_model(name), attach(tiny_model(name), query="dynamic", chunk_size=2)
    for model in (plain, routed):
        peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=targets))  # in place
    adapted = [[key for key, _ in model.named_modules() if "lora_A" in key] for model in (plain, routed)]
    assert adapted[0] and adapted[0] == adapted[1]
    assert not any(parameter.requires_grad for parameter in routed.dar.parameters())
    routed.dar.requires_grad_(True)
    inputs = example_inputs(routed)
    assert torch.equal(output(routed, inputs), output(plain, inputs))
    found = gradients(routed, inputs)
    trained = {key for key, parameter in routed.named_parameters() if parameter.requires_grad}
    assert found.keys() == trained and all(found[key].any() for key in trained if key.endswith("w_q"))
    assert sum(key.endswith("w_q") for key in trained) == len(routed.dar.streams)
    with pytest.raises(UserError, match="has adapters"):
        routed.save_pretrained(tmp_path)


@pytest.mark.parametrize("name", THREE)
def test_routers_attached_after_an_adapter_are_trainable(name):
    peft = pytest.importorskip("peft")
    model = tiny_model(name)
    peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear"))
    before = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    attach(model, query="timestep", chunk_size=2)
    after = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    assert after - before == {f"dar.{key}" for key, _ in model.dar.named_parameters()} and before < after


def test_frozen_routers_in_training_are_said_once():
    model = attach(tiny_model(THREE[0]), query="static", chunk_size=2)
    inputs = example_inputs(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        output(model, inputs)
        output(model.requires_grad_(False), inputs)
        model.proj_out_1.requires_grad_(True)
        with torch.no_grad():
            output(model, inputs)
        model.dar.requires_grad_(True)
        output(model, inputs)
        model.dar.requires_grad_(False)
    with pytest.warns(UserWarning, match=r"routers are frozen.*call model\.dar\.requires_grad_\(True\)"):
        output(model, inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        output(model, inputs)


SHALLOW = {
    THREE[0]: {"num_layers": 2},
    THREE[1]: {"num_layers": 2},
    THREE[2]: {"num_layers": 1, "num_single_layers": 1},
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) for name in THREE[:2]] + [THREE[2]])
def test_the_whole_model_compiles_to_one_graph(name):
    model = tiny_model(name, torch.float64, **SHALLOW[name])
    shaken(attach(model, query="timestep", chunk_size=2))
    inputs = example_inputs(model)
    result, found = output(model, inputs), gradients(model, inputs)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert torch.allclose(output(compiled, inputs), result, rtol=1e-12, atol=1e-12)
    prefixed = {f"_orig_mod.{key}": value for key, value in found.items()}
    assert distance(gradients(compiled, inputs), prefixed) < 1e-12


def test_two_processes_find_the_gradients_of_one(tmp_path):
    command = [sys.executable, "-m", "tests.routing.sharded", str(tmp_path), *THREE]
    ran = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=200
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert ran.stdout.split() == [*THREE, "FluxTransformer2DModel", "from", "meta"]
