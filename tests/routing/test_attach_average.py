"""Averages of routed transformers: which keep the routers, on disk too, and which refuse."""

import copy
import tempfile

import pytest
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from dmd_dar.errors import UserError
from dmd_dar.routing import RoutedModel, attach, detach, load_routed
from dmd_dar.routing.examples import example_inputs
from tests.routing.tiny_models import output, shaken, tiny_model

diffusers = pytest.importorskip("diffusers")
EMAModel = pytest.importorskip("diffusers.training_utils").EMAModel
NAMES = ["DiTTransformer2DModel", "FluxTransformer2DModel"]


def routed(name: str = NAMES[0]):
    return shaken(attach(tiny_model(name), query="timestep", chunk_size=2))


def moved(model) -> dict[str, torch.Tensor]:
    """Every parameter moved, by another amount each; the parameters half way."""
    old = {key: value.detach().clone() for key, value in model.named_parameters()}
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return {key: (old[key] + value.detach()) / 2 for key, value in model.named_parameters()}


def same(model, expected: dict[str, torch.Tensor]) -> bool:
    found = dict(model.named_parameters())
    return found.keys() == expected.keys() and all(torch.allclose(found[key], expected[key]) for key in found)


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_diffusers_average_is_saved_with_its_routers(tmp_path, name, foreach):
    model = routed(name)
    average = EMAModel(
        model.parameters(), 0.5, min_decay=0.5, foreach=foreach, model_cls=RoutedModel, model_config=model.config
    )
    average.step(model.parameters())  # its first step copies
    expected = moved(model)
    average.step(model.parameters())
    average.save_pretrained(tmp_path)
    assert same(load_routed(tmp_path), expected)
    back = EMAModel.from_pretrained(tmp_path, model_cls=RoutedModel)
    assert (back.decay, back.min_decay, back.optimization_step) == (0.5, 0.5, 2)
    last = output(model, inputs := example_inputs(model))
    back.store(model.parameters())
    back.copy_to(model.parameters())
    assert same(model, expected)
    assert torch.equal(output(model, inputs), output(load_routed(tmp_path), inputs))
    back.restore(model.parameters())
    assert torch.equal(output(model, inputs), last)
    back.save_pretrained(tmp_path / "again")
    assert same(load_routed(tmp_path / "again"), expected)


def registered(model):
    model.register_to_config(sample_size=8)
    return model


def load_again(model):
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return load_routed(folder)


@pytest.mark.filterwarnings("ignore:It is deprecated to pass:FutureWarning")  # diffusers' EMAModel does
@pytest.mark.parametrize("make", [lambda model: model, copy.deepcopy, load_again, registered])
def test_an_average_by_the_transformer_s_own_class_is_refused(tmp_path, make):
    model = make(routed())
    average = EMAModel(model.parameters(), model_cls=type(model), model_config=model.config)
    with pytest.raises(UserError, match=r"without its routers: give EMAModel model_cls=dmd_dar\.routing\.RoutedModel"):
        average.save_pretrained(tmp_path / "average")
    assert not (tmp_path / "average").exists()
    model.save_pretrained(tmp_path / "average")
    with pytest.raises(ValueError, match=r"it has routers, load it with dmd_dar\.routing\.load_routed"):
        EMAModel.from_pretrained(tmp_path / "average", model_cls=type(model))


def test_a_configuration_makes_a_plain_model_only_when_told(tmp_path):
    model = routed()
    plain = type(model).from_config(dict(model.config))
    assert not hasattr(plain, "dar") and plain.config.num_layers == model.config.num_layers == 3
    assert model.config.get("num_layers") == 3 and model.config["num_layers"] == 3
    with pytest.raises(UserError, match="attach before EMAModel is made"):
        RoutedModel.from_config(plain.config)
    detach(model)
    assert type(model.config) is type(plain.config) and type(model).from_config(model.config)
    average = EMAModel(model.parameters(), model_cls=type(model), model_config=model.config)
    average.save_pretrained(tmp_path)
    assert torch.equal(
        output(type(model).from_pretrained(tmp_path), example_inputs(model)), output(model, example_inputs(model))
    )


@pytest.mark.parametrize("multi", [False, True])
def test_torch_s_average_has_routers_of_its_own(tmp_path, multi):
    model = routed()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5) if multi else None)
    average.update_parameters(model)
    expected = moved(model)
    average.update_parameters(model)
    assert same(average.module, expected)
    average.module.save_pretrained(tmp_path)
    inputs = example_inputs(model)
    assert torch.equal(output(average, inputs), output(load_routed(tmp_path), inputs))
    assert not torch.allclose(output(average, inputs), output(model, inputs))
