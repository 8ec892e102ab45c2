"""Routers that PEFT trains and saves with an adapter, by modules_to_save."""

import copy

import pytest
import torch
from safetensors.torch import load_file

from dmd_dar.errors import UserError
from dmd_dar.routing import attach, detach, load_routed
from dmd_dar.routing.examples import example_inputs
from tests.routing.tiny_models import distance, gradients, output, shaken, tiny_model

pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")
CASES = [
    ("DiTTransformer2DModel", {"query": "static", "granularity": "block"}),
    ("SD3Transformer2DModel", {"query": "dynamic"}),
    ("FluxTransformer2DModel", {"query": "timestep"}),
]


def base(name: str, **options):
    return attach(tiny_model(name), **{"query": "timestep", "chunk_size": 2} | options)


def config(**options):
    return peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], modules_to_save=["dar"], **options)


def trained(model, inputs, steps: int = 3) -> torch.Tensor:
    """Every trainable parameter moved by its gradient; all must have one. The output afterwards."""
    for _ in range(steps):
        model.zero_grad(set_to_none=True)
        output(model, inputs).square().mean().backward()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    assert parameter.grad is not None, name
                    parameter -= 0.5 * parameter.grad / parameter.grad.norm().clamp(min=1e-6)
    return output(model, inputs).detach()


@pytest.mark.parametrize(("name", "options"), CASES, ids=[name for name, _ in CASES])
def test_an_adapter_trains_its_routers_and_brings_them_back(tmp_path, name, options):
    model = base(name, **options)
    inputs, routers = example_inputs(model), {key: x.clone() for key, x in model.dar.state_dict().items()}
    plain = output(model, inputs).detach()
    adapted = peft.get_peft_model(model, config())
    assert torch.equal(output(adapted, inputs), plain)
    after = trained(adapted, inputs)
    copied = model.dar.in_use
    assert copied is not model.dar.original_module and not copied.at_start
    with adapted.disable_adapter():
        assert torch.equal(output(adapted, inputs), plain)

    adapted.save_pretrained(tmp_path)
    held = load_file(tmp_path / "adapter_model.safetensors")
    assert {key for key in held if ".dar." in key} == {f"base_model.model.dar.{key}" for key in routers}
    back = peft.PeftModel.from_pretrained(base(name, **options), tmp_path)
    assert torch.equal(output(back, inputs), after)
    without = {key: value for key, value in held.items() if ".dar." not in key}
    assert not torch.allclose(after, output(peft_with(name, options, without), inputs), rtol=1e-3)

    with pytest.raises(ValueError, match="an adapter holds the routers .* merge or unload it first"):
        detach(model)
    with pytest.raises(UserError, match="has adapters"):
        model.save_pretrained(tmp_path / "routed")
    merged = back.merge_and_unload()
    merged.save_pretrained(tmp_path / "routed")
    for twin in (merged, copy.deepcopy(merged), load_routed(tmp_path / "routed")):
        assert torch.allclose(output(twin, inputs), after, rtol=1e-4, atol=1e-5)
        twin.dar.reset()
        assert torch.allclose(output(detach(twin), inputs), output(twin, inputs))


def peft_with(name: str, options: dict, weights: dict):
    """The adapter with `weights` alone: its routers at their start."""
    model = peft.get_peft_model(base(name, **options), config())
    peft.set_peft_model_state_dict(model, {**peft.get_peft_model_state_dict(model), **weights})
    return model


def test_diffusers_own_adapter_files_hold_the_routers(tmp_path):
    model = base("FluxTransformer2DModel")
    inputs = example_inputs(model)
    model.add_adapter(config())
    after = trained(model, inputs)
    model.save_lora_adapter(tmp_path)
    back = base("FluxTransformer2DModel")
    back.load_lora_adapter(tmp_path, prefix=None, weight_name="pytorch_lora_weights.safetensors")
    assert torch.equal(output(back, inputs), after) and not back.dar.in_use.at_start


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_copy_has_the_gradients_that_the_routers_would_have(checkpointing):
    plain = shaken(base("SD3Transformer2DModel").double())
    inputs = example_inputs(plain)
    expected = {key: value for key, value in gradients(plain, inputs).items() if key.startswith("dar.")}
    model, seen = copy.deepcopy(plain), []
    peft.get_peft_model(model, config(), autocast_adapter_dtype=False)
    if checkpointing:
        model.enable_gradient_checkpointing()
    model.dar.observe = lambda stream, router, alpha: seen.append((stream, router))
    found = gradients(model, inputs)
    held = "dar.modules_to_save.default."
    assert (
        distance({f"dar.{k.removeprefix(held)}": x for k, x in found.items() if k.startswith(held)}, expected) < 1e-12
    )
    assert sorted(seen) == sorted((name, l) for name, bank in plain.dar.streams.items() for l in bank.routers)  # noqa: E741


def test_each_adapter_has_routers_of_its_own():
    model = base("DiTTransformer2DModel")
    inputs = example_inputs(model)
    adapted = peft.get_peft_model(model, config())
    first = trained(adapted, inputs)
    adapted.add_adapter("second", config())
    adapted.set_adapter("second")
    plain = output(adapted, inputs)
    with adapted.disable_adapter():
        assert torch.equal(output(adapted, inputs), plain)
    adapted.set_adapter("default")
    assert torch.equal(output(adapted, inputs), first) and not torch.allclose(first, plain, rtol=1e-3)


@pytest.mark.parametrize("filled", [True, False])
def test_a_model_from_meta_is_proved_under_an_adapter(filled):
    plain = tiny_model("FluxTransformer2DModel")
    with torch.device("meta"):
        model = type(plain).from_config(plain.config).eval()
    attach(model, query="timestep", chunk_size=2).to_empty(device="cpu")
    model.load_state_dict(plain.state_dict(), strict=False)
    with torch.no_grad():
        for parameter in model.dar.parameters():
            parameter.fill_(0.5)
    if filled:
        model.dar.reset()
    adapted, inputs = peft.get_peft_model(model, config()), example_inputs(plain)
    if filled:
        assert torch.equal(output(adapted, inputs), output(plain, inputs)) and model.dar.original_module.proof is None
    else:
        with pytest.raises(ValueError, match=r"is the first to differ.*call model\.dar\.reset\(\)"):
            adapted(**inputs)


def test_advice_names_modules_to_save():
    model = base("DiTTransformer2DModel")
    peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear"))
    with pytest.warns(UserWarning, match=r"routers are frozen.*modules_to_save=\['dar'\].*file does not hold it"):
        output(model, example_inputs(model))
