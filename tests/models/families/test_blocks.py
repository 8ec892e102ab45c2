"""Blocks of Qwen-Image, Z-Image and FLUX.2: read by a discriminator, told the rung, computed again, sharded."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from dmd_dar.models.diffusers_denoiser import DiffusersDenoiser, routed_copy
from dmd_dar.models.discriminator import features_of, width_of
from dmd_dar.models.families.form import FixedInputs
from dmd_dar.routing.layout import RoutingConfig
from tests.routing.tiny_models import tiny_model

LENGTHS = (5, 9, 3)
# blocks, tokens of what each hands on and of the head's input, for 9 text tokens and 4 x 6 cells
EXPECTED = {
    "QwenImageTransformer2DModel": (3, [6, 6, 6]),
    "ZImageTransformer2DModel": (3, [64, 64, 64]),  # 6 image tokens and 9 of text, each filled up to 32
    "Flux2Transformer2DModel": (5, [24, 33, 33, 33, 24]),
}
NAMES = list(EXPECTED)


class Table:
    """Three prompts of different length in the place of an encoded folder."""

    count = 2

    def __init__(self, masked: bool):
        generator = torch.Generator().manual_seed(0)
        self.tensors: dict[str, Tensor] = {"embedding": torch.randn(3, 9, 6, generator=generator)}
        if masked:
            self.tensors["mask"] = (torch.arange(9) < torch.tensor(LENGTHS)[:, None]).long()

    def rows(self, cond: Tensor) -> dict[str, Tensor]:
        return {name: table[cond] for name, table in self.tensors.items()}


def network_of(name: str, dtype: torch.dtype = torch.float32) -> tuple[DiffusersDenoiser, tuple[Any, ...]]:
    """A tiny network and inputs of 4 x 6 cells for it."""
    transformer = tiny_model(name, dtype, **({"out_channels": 1} if "Qwen" in name else {}))
    network = DiffusersDenoiser(transformer, Table("Flux2" not in name), FixedInputs(embedded_guidance=2.0))  # type: ignore[arg-type]
    x = torch.randn(3, network.shape[0], 4, 6, generator=torch.Generator().manual_seed(1), dtype=dtype)
    return network, (x, torch.tensor([200.0, 500.0, 900.0], dtype=dtype), torch.arange(3))


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_a_discriminator_reads_every_block(name):
    network, inputs = network_of(name)
    depth, tokens = EXPECTED[name]
    outputs: list[Any] = []
    for block in network.shards():
        block.register_forward_hook(lambda module, given, out: outputs.append(out))
    assert len(network.block_readers()) == depth == len(network.shards()) + 1 and width_of(network) == 16
    features = features_of(network, network, tuple(range(1, depth + 1)))(*inputs)
    assert [h.shape for h in features] == [(3, n, 16) for n in tokens]
    for h, out in zip(features[1:], outputs, strict=True):  # (text, image) of blocks with two streams
        image = out if isinstance(out, Tensor) else out[1]
        assert torch.equal(h[:, -image.shape[1] :], image[:, -h.shape[1] :])


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_a_network_is_told_the_rung_at_its_time_embedding(name):
    network, inputs = network_of(name)
    plain = network(*inputs)
    network.tell_rungs_apart(2)
    assert len(network.rung_parameters()) == 1 and torch.equal(network(*inputs, 1), plain)
    network.rung_parameters()[0][1] += 1.0
    assert torch.equal(network(*inputs, 0), plain) and (network(*inputs, 1) - plain).abs().max() > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_blocks_computed_again_give_the_same_values_and_gradients(name):
    network, inputs = network_of(name, torch.float64)
    plain = routed_copy(network.requires_grad_(), RoutingConfig(query="timestep", chunk_size=2))
    for parameter in plain.router_parameters():
        torch.nn.init.normal_(parameter)
    again = copy.deepcopy(plain)
    again.checkpoint_activations()
    outputs = [one.train()(*inputs) for one in (plain, again)]
    assert torch.equal(*outputs) and outputs[0].shape == inputs[0].shape
    for output in outputs:
        output.sin().square().sum().backward()
    pairs = list(zip(again.parameters(), plain.parameters(), strict=True))
    assert sum(theirs.grad is not None for _, theirs in pairs) > 0.9 * len(pairs)
    for ours, theirs in pairs:
        if theirs.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-6, atol=1e-9)
