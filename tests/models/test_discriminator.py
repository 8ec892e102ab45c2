"""Features are what the blocks hand on, value for value, for both kinds of denoiser; heads start at zero."""

import copy

import pytest
import torch

from dmd_dar.models.denoiser import MEANINGS, velocity_of
from dmd_dar.models.diffusers_denoiser import DiffusersDenoiser
from dmd_dar.models.discriminator import Heads, chosen_layers, features_of, width_of
from dmd_dar.models.shared_lora import LoraConfig, LoraDenoiser, shared_copy
from dmd_dar.models.sit import with_routing
from dmd_dar.routing.layout import RoutingConfig
from tests.models.tiny_pipelines import tiny_dit
from tests.tiny import tiny_sit


def inputs(channels: int, side: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, channels, side, side, generator=generator), torch.tensor([0.2, 0.5, 0.9]), torch.arange(3)


def test_features_of_a_sit_are_its_stream_after_each_block():
    network, (x, t, cond) = tiny_sit(), inputs(3, 32)
    h, expected = network.x_embedder(x) + network.pos_embed, []
    c = network.t_embedder(t) + network.y_embedder(cond)
    for block in network.blocks:
        m = block.modulation(c)
        h = h + block.attention_output(h, *m[:3])
        h = h + block.mlp_output(h, *m[3:])
        expected.append(h)
    seen = features_of(network, velocity_of(network), (1, 2))(x, t, cond)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(seen, expected, strict=True))
    assert width_of(network) == 16 and len(network.block_readers()) == 2
    assert not any(module._forward_pre_hooks for module in network.modules())


def test_features_of_a_diffusers_transformer_are_its_blocks_outputs():
    network, (x, t, cond) = DiffusersDenoiser(tiny_dit()), inputs(4, 8)
    outputs = []
    for block in network.transformer.transformer_blocks:
        block.register_forward_hook(lambda module, given, out: outputs.append(out))
    seen = features_of(network, velocity_of(network, MEANINGS["dit"]), (1, 2))(x, t, cond)
    assert len(outputs) == 2 and all(torch.equal(ours, theirs) for ours, theirs in zip(seen, outputs, strict=True))
    assert width_of(network) == seen[0].shape[-1] == 16


def test_features_of_a_routed_network_are_what_is_read_and_carry_gradients_to_the_input():
    plain = tiny_sit()
    routed, (x, t, cond) = with_routing(plain, RoutingConfig(query="timestep", chunk_size=2)), inputs(3, 32)
    x.requires_grad_()
    ours, theirs = (features_of(n, velocity_of(n), (1, 2))(x, t, cond) for n in (routed, plain))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))  # the routers' queries are zero
    (gradient,) = torch.autograd.grad(ours[1].square().sum(), x)
    assert gradient.abs().min() > 0


@pytest.mark.parametrize("view", [False, True])
def test_checkpointed_blocks_and_views_with_adapters_give_the_same_features_and_gradients(view):
    plain, (x, t, cond) = tiny_sit().requires_grad_(False), inputs(3, 32)
    other = LoraDenoiser(shared_copy(plain), LoraConfig(rank=2)) if view else copy.deepcopy(plain)
    other.checkpoint_activations()
    x.requires_grad_()
    ours, theirs = (features_of(n, velocity_of(n), (1, 2))(x, t, cond) for n in (other, plain))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)) and width_of(other) == 16
    (a,), (b,) = (torch.autograd.grad(sum(h.square().sum() for h in found), x) for found in (ours, theirs))
    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("pool", "logits"), [("mean", 2), ("tokens", 2 * 5)])
def test_heads_start_at_zero_and_can_leave_it(pool, logits):
    heads, features = Heads(16, 2, pool, hidden=8), [torch.randn(3, 5, 16, dtype=torch.bfloat16) for _ in range(2)]
    out = heads(features)
    assert out.shape == (3, logits) and out.dtype == torch.float32 and not out.any()
    out.sum().backward()
    assert all(head[-1].weight.grad.any() for head in heads.heads)


def test_layers_are_checked_and_thirds_by_default():
    assert chosen_layers((), 12) == (4, 8, 12) and chosen_layers((), 2) == (1, 2) and chosen_layers((3,), 12) == (3,)
    for wrong in ((0,), (13,), (2, 1), (2, 2)):
        with pytest.raises(ValueError, match="layers must rise within 1 to 12"):
            chosen_layers(wrong, 12)
