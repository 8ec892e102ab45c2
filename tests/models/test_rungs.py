"""A fake score that is told which rung made a sample."""

import copy
import dataclasses

import pytest
import torch
from torch import Tensor

from dmd_dar.distillation.networks import Memory, build_networks
from dmd_dar.errors import UserError
from dmd_dar.models.diffusers_denoiser import DiffusersDenoiser
from dmd_dar.models.shared_lora import LoraConfig
from dmd_dar.routing.layout import RoutingConfig
from tests.models.tiny_pipelines import tiny_dit, tiny_pixart
from tests.tiny import tiny_sit


def network_of(kind: str):
    network = tiny_sit() if kind == "sit" else DiffusersDenoiser(tiny_dit(num_embeds_ada_norm=6))
    return network.eval().requires_grad_(False)


def inputs_of(network) -> tuple[Tensor, Tensor, Tensor]:
    generator, size = torch.Generator().manual_seed(3), network.config.input_size
    x = torch.randn(3, network.config.in_channels, size, size, generator=generator)
    return x, torch.rand(3, generator=generator), torch.tensor([0, 3, network.config.num_classes])


@pytest.mark.parametrize("kind", ["sit", "dit"])
@torch.no_grad()
def test_every_rung_starts_as_the_plain_network_and_its_vector_moves_that_rung_alone(kind):
    plain = network_of(kind)
    network = copy.deepcopy(plain)
    network.tell_rungs_apart(3)
    x, t, cond = inputs_of(network)
    expected = plain(x, t, cond)
    for rung in range(3):
        assert torch.equal(network(x, t, cond, rung), expected)
    for table in network.rungs.tables:
        table.weight[1].normal_()
    moved = [network(x, t, cond, rung) for rung in range(3)]
    assert torch.equal(moved[0], expected) and torch.equal(moved[2], expected)
    assert (moved[1] - expected).abs().amax((1, 2, 3)).min() > 1e-3


@torch.no_grad()
def test_a_vector_is_added_to_the_time_embedding():
    plain = network_of("sit")
    network = copy.deepcopy(plain)
    network.tell_rungs_apart(2)
    vector = network.rungs.tables[0].weight[1].normal_()
    x, t, cond = inputs_of(network)
    plain.t_embedder.register_forward_hook(lambda module, inputs, embedding: embedding + vector)
    assert torch.equal(network(x, t, cond, 1), plain(x, t, cond))


@pytest.mark.parametrize("memory", [Memory(), Memory("shared_lora", LoraConfig(rank=2)), Memory(checkpointing=True)])
@pytest.mark.parametrize("kind", ["sit", "dit"])
def test_the_fake_score_alone_has_vectors_and_they_are_trained_and_saved(kind, memory):
    networks = build_networks(network_of(kind), RoutingConfig("timestep", 2), memory=memory, rungs=3)
    names = {
        name: [n for n, _ in getattr(networks, name).named_parameters() if "rungs." in n] for name in vars(networks)
    }
    assert names["fake_score"] and not names["teacher"] and not names["student"]
    fake, (x, t, cond) = networks.fake_score, inputs_of(networks.teacher)
    fake(x, t, cond, 2).square().mean().backward()
    own, backbone = ({id(p) for p in some} for some in (fake.rung_parameters(), fake.backbone_parameters()))
    assert own and not own & backbone
    assert own | backbone == {id(p) for p in fake.parameters() if p.requires_grad}
    for name, parameter in fake.named_parameters():
        if "rungs." in name:
            assert id(parameter) in own and name in fake.state_dict()
            assert parameter.grad[2].any() and not parameter.grad[:2].any()
    twin = copy.deepcopy(fake)
    with torch.no_grad():
        next(p for n, p in twin.named_parameters() if "rungs." in n)[1].add_(1.0)
        before, after = (network(x, t, cond, 1) for network in (fake, twin))
    assert (before - after).abs().max() > 1e-4  # the copy's hooks read the copy's table


@pytest.mark.parametrize("kind", ["sit", "dit"])
def test_two_calls_in_one_backward_pass_may_be_computed_again(kind):
    """As the fake score's own loss and the GAN's on its features, of other batch sizes, in one step."""
    gradients = []
    for checkpointing in (False, True):
        memory = Memory(checkpointing=checkpointing)
        torch.manual_seed(0)
        fake = build_networks(network_of(kind), RoutingConfig(), memory=memory, rungs=3).fake_score
        x, t, cond = inputs_of(fake)
        first = fake(x, t, cond, 1).square().mean()
        second = fake(x.repeat(2, 1, 1, 1), t.repeat(2), cond.repeat(2), 1).abs().mean()
        (first + second).backward()
        assert all(p.grad[1].any() and not p.grad[[0, 2]].any() for p in fake.rung_parameters())
        gradients.append([p.grad for p in fake.parameters() if p.grad is not None])
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(again, plain, rtol=1e-5, atol=1e-7)


def test_one_rung_needs_no_vectors():
    assert not build_networks(network_of("sit"), RoutingConfig()).fake_score.rung_parameters()


@torch.no_grad()
def test_a_pixart_is_told_in_its_one_time_embedding(tmp_path):
    from diffusers import PixArtTransformer2DModel

    pipeline = tiny_pixart(tmp_path / "pixart")
    network = DiffusersDenoiser(PixArtTransformer2DModel.from_pretrained(pipeline / "transformer"))
    embedders = [name for name, _ in network.named_modules() if name.endswith("timestep_embedder")]
    assert embedders == ["transformer.adaln_single.emb.timestep_embedder"]


def test_a_network_whose_time_embedding_is_not_known_is_refused():
    network = network_of("dit")
    network.family = dataclasses.replace(network.family, time_embedder="clock")
    with pytest.raises(UserError, match="fake_score.per_rung: no time embedding is known"):
        network.tell_rungs_apart(2)


@pytest.mark.parametrize("kind", ["sit", "dit"])
@pytest.mark.parametrize("rung", [None, -1, 3])
def test_a_network_that_knows_rungs_must_be_told_one_of_them(kind, rung):
    network = network_of(kind)
    network.tell_rungs_apart(3)
    with pytest.raises(ValueError, match=f"rung {rung}: this network tells 3 rungs apart"):
        network(*inputs_of(network), rung)


@pytest.mark.parametrize("memory", [Memory(), Memory("shared_lora", LoraConfig(rank=2))])
@pytest.mark.parametrize("kind", ["sit", "dit"])
def test_every_network_answers_the_one_protocol(kind, memory):
    networks = build_networks(network_of(kind), RoutingConfig("timestep", 2), memory=memory)
    for network in vars(networks).values():
        shape = network.config
        assert network.shape == (shape.in_channels, shape.input_size, shape.input_size)
        assert network.num_conditions == shape.num_classes and network.prompts is None
        assert network.routing == shape.routing and len(network.block_readers()) == 2
    assert networks.student.routing.query == "timestep" and networks.teacher.routing.query == "residual"
