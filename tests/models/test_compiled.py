"""Networks compiled in place compute what they did, and are what they were to all that reads or copies them."""

import copy

import pytest
import torch
from torch import Tensor, nn

from dmd_dar.distillation.networks import Memory, build_networks
from dmd_dar.models.compiled import compile_network, eagerly
from dmd_dar.models.denoiser import velocity_of
from dmd_dar.models.diffusers_denoiser import DiffusersDenoiser, routed_copy
from dmd_dar.models.discriminator import features_of
from dmd_dar.models.frozen import Kept
from dmd_dar.models.shared_lora import LoraConfig
from dmd_dar.routing.layout import RoutingConfig
from tests.models.tiny_pipelines import tiny_dit
from tests.tiny import tiny_sit

DAR = RoutingConfig("timestep", chunk_size=2)
FORMS = {
    "full": Memory(),
    "shared_lora": Memory("shared_lora", LoraConfig(rank=2)),
    "checkpointing": Memory(checkpointing=True),
    "offload": Memory("shared_lora", LoraConfig(rank=2), Kept(torch.bfloat16, offload=True)),
}
slow = pytest.mark.slow


@pytest.fixture(autouse=True)
def fresh():
    """Dynamo counts the graphs of a function, whoever asks for them."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def pair(routing: RoutingConfig, form: str) -> tuple[nn.Module, nn.Module]:
    """Student and fake score, the latter of three rungs, away from their start."""
    networks = build_networks(tiny_sit().eval().requires_grad_(False), routing, memory=FORMS[form], rungs=3)
    torch.manual_seed(4)
    for network in (networks.student, networks.fake_score):
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.data.add_(0.05 * torch.randn_like(parameter))
    return networks.student, networks.fake_score


def inputs_of(network, batch: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(batch, *network.shape, generator=generator)
    return x, torch.rand(batch, generator=generator), torch.arange(batch)


def computed(network, *rungs: int) -> list[Tensor]:
    """Outputs with and without gradients, and the gradients of each parameter, at each rung."""
    velocity, inputs, found = velocity_of(network), inputs_of(network), []
    for rung in [(rung,) for rung in rungs] or [()]:
        with torch.no_grad():
            found.append(velocity(*inputs, *rung))
        network.zero_grad(set_to_none=True)
        output = velocity(*inputs, *rung)
        output.square().mean().backward()
        found += [output.detach(), *(p.grad for p in network.parameters() if p.grad is not None)]
    network.zero_grad(set_to_none=True)
    return found


def farthest(found: list[Tensor], expected: list[Tensor]) -> float:
    pairs = zip(found, expected, strict=True)
    return max(((a - b).norm() / b.norm().clamp_min(1e-12)).item() for a, b in pairs)


def check(network, backend: str, *rungs: int) -> None:
    expected = computed(network, *rungs)
    compile_network(network, backend)
    assert farthest(computed(network, *rungs), expected) < 1e-4
    with eagerly():
        assert all(map(torch.equal, computed(network, *rungs), expected))


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]  # type: ignore[attr-defined]


def test_one_graph_with_gradients_and_one_without_serve_every_rung():
    _, fake_score = pair(RoutingConfig(), "full")
    before = graphs()
    check(fake_score, "eager", 0, 2, 1)
    assert graphs() - before == 2


@slow
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("query", ["residual", "timestep", "dynamic"])
def test_outputs_and_gradients_are_those_of_the_eager_network(query, form):
    student, fake_score = pair(RoutingConfig() if query == "residual" else RoutingConfig(query, 2), form)
    check(student, "aot_eager")
    check(fake_score, "aot_eager", 0, 2, 1)


@slow
@pytest.mark.parametrize("routing", [RoutingConfig(), DAR], ids=["residual", "DAR"])
def test_inductor_computes_the_same(routing):
    student, fake_score = pair(routing, "full")
    check(student, "inductor")
    check(fake_score, "inductor", 0, 2, 1)


@slow
@pytest.mark.parametrize("routing", [RoutingConfig(), DAR], ids=["plain", "DAR"])
def test_a_diffusers_transformer_is_one_graph_whatever_the_rung(routing):
    network = DiffusersDenoiser(tiny_dit(num_embeds_ada_norm=6, num_layers=3))
    if routing is DAR:
        network = routed_copy(network, routing)
    network.tell_rungs_apart(3)
    for table in network.rungs.tables:
        table.weight.data.normal_()
    before = graphs()
    check(network, "aot_eager", 0, 2, 1)
    assert graphs() - before == 2  # with gradients and without


def test_names_copies_and_features_are_those_of_the_network():
    _, network = pair(RoutingConfig(), "shared_lora")
    plain = copy.deepcopy(network)
    features = features_of(network, velocity_of(network), (1, 2))
    inputs = (*inputs_of(network), 1)
    expected = features(*inputs)

    compile_network(network, "eager")
    before = graphs()
    with torch.no_grad():
        velocity_of(network)(*inputs)
    assert graphs() == before + 1
    assert list(network.state_dict()) == list(plain.state_dict())
    assert all(map(torch.equal, features(*inputs), expected))
    copied = copy.deepcopy(network)
    for parameter in copied.parameters():
        parameter.data.zero_()
    with torch.no_grad():
        found = velocity_of(network)(*inputs)
        assert not torch.equal(velocity_of(copied)(*inputs), found)
    assert graphs() == before + 1
    assert torch.allclose(found, velocity_of(plain)(*inputs), rtol=1e-5, atol=1e-6)
