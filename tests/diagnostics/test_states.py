import pytest
import torch
from torch.nn import functional as F

from dmd_dar import flow
from dmd_dar.diagnostics.mixing import gate_gradients
from dmd_dar.diagnostics.states import Places, places_of, recording, trace
from dmd_dar.diagnostics.symptoms import SymptomSums, neighbour_cosine
from dmd_dar.draws import Draws, sample_range
from dmd_dar.errors import UserError
from dmd_dar.models.denoiser import velocity_of
from dmd_dar.models.diffusers_denoiser import DiffusersDenoiser, routed_copy
from dmd_dar.models.sit import SiT, with_routing
from dmd_dar.routing.layout import RoutingConfig
from tests.models.tiny_pipelines import tiny_dit
from tests.tiny import TINY, tiny_sit

LABELS = torch.tensor([0, 3, 6])


def pair(dtype=torch.float32):
    draws = Draws(0, "diagnostics", 0, sample_range(0, 3))
    return draws.normal("x0", 3, 32, 32, dtype=dtype), draws.normal("eps", 3, 32, 32, dtype=dtype)


def routed(query: str, **form) -> SiT:
    network = with_routing(tiny_sit(), RoutingConfig(query=query, chunk_size=2, **form), allow_change=True)
    with torch.no_grad():
        for parameter in network.dar.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return network


@pytest.mark.parametrize("query", ["residual", "static", "timestep", "dynamic"])
def test_reading_changes_no_bit_of_the_forward_pass(query):
    network = tiny_sit() if query == "residual" else routed(query)
    x0, _ = pair()
    t = torch.full((3,), 0.4)
    plain = network(x0, t, LABELS)
    with recording(places_of(network).consumers) as states:
        read = network(x0, t, LABELS)
    assert torch.equal(read, plain) and len(states.read) == 2 * TINY.depth + 1
    assert torch.equal(network(x0, t, LABELS), plain) and len(states.read) == 2 * TINY.depth + 1  # the hooks are gone


def test_states_are_the_stream_and_its_last_one_feeds_the_head():
    network, (x, _) = tiny_sit(), pair()
    t = torch.full((3,), 0.4)
    with recording(places_of(network).consumers) as states:
        velocity = network(x, t, LABELS)
    h = network.x_embedder(x) + network.pos_embed
    c = network.t_embedder(t) + network.y_embedder(LABELS)
    expected = [h]
    for block in network.blocks:
        m = block.modulation(c)
        expected.append(h := h + block.attention_output(h, *m[:3]))
        expected.append(h := h + block.mlp_output(h, *m[3:]))
    assert all(torch.equal(a, b) for a, b in zip(states.arrived, expected, strict=True))
    torch.testing.assert_close(network._unpatchify(network.final_layer(states.arrived[-1], c)), velocity)
    assert places_of(network).block_ends == (3, 5)


def test_a_network_that_skips_a_consumer_is_refused():
    network, (x, _) = tiny_sit(), pair()
    consumers = [*places_of(network).consumers, torch.nn.Identity()]
    with pytest.raises(RuntimeError, match="6 states were expected in one.* 5 were seen"), recording(consumers):
        network(x, torch.ones(3), LABELS)


class Toy(torch.nn.Module):
    """Two blocks of one sublayer on x (B, 2, 1, 1): z_1 = h + 2 h, z_2 = z_1 + R z_1, R a quarter turn; v = z_2."""

    def __init__(self):
        super().__init__()
        self.consumers = torch.nn.ModuleList(torch.nn.Identity() for _ in range(3))

    def forward(self, x, t, labels):
        first, second, head = self.consumers
        h = x.flatten(1)[:, None]  # (B, 1, 2)
        h = h + 2 * first(h)
        read = second(h)
        h = h + torch.stack([-read[..., 1], read[..., 0]], dim=-1)
        return head(h)[:, 0, :, None, None]


def toy_facts(batches: int = 1):
    toy = Toy().double()
    places = Places(tuple(toy.consumers), (2, 3))
    x0 = torch.tensor([[1.0, 2.0], [0.5, -1.0]], dtype=torch.float64)[..., None, None]
    eps = torch.tensor([[0.0, 1.0], [2.0, 1.0]], dtype=torch.float64)[..., None, None]
    sums, labels = SymptomSums(), torch.zeros(2, dtype=torch.long)
    for rows in torch.arange(2).split(2 // batches):
        sums.add(trace(toy, places, x0[rows], eps[rows], 0.0, labels[rows]), places)  # t = 0: x_t = x0
    return sums.facts(), x0[..., 0, 0], eps[..., 0, 0]


def test_magnitudes_by_hand():
    facts, x0, eps = toy_facts()
    turned = torch.stack([-x0[:, 1], x0[:, 0]], dim=1)
    z_1, z_2 = 3 * x0, 3 * x0 + 3 * turned
    error = z_2 - (eps - x0)  # v minus its target; a sample's loss is the mean of its square over 2 entries
    turned_back = torch.stack([error[:, 1], -error[:, 0]], dim=1)

    def rms(x):
        return x.square().mean().sqrt().item()

    assert facts["loss"] == pytest.approx(error.square().mean().item())
    assert facts["forward_rms"] == pytest.approx([rms(z_1), rms(z_2)])
    assert facts["gradient_rms"] == pytest.approx([rms(error + turned_back), rms(error)])
    assert facts["sublayer_gradient_rms"] == pytest.approx([rms(turned_back), rms(error)])
    assert facts["block_cosine"] == pytest.approx([2**-0.5])
    assert facts["inflation"] == pytest.approx(2**0.5) and facts["gradient_decay"] == pytest.approx(2**0.5)
    assert facts["cosine_mean"] == pytest.approx(2**-0.5)


def test_statistics_do_not_depend_on_the_batch_split():
    whole, halves = toy_facts(1)[0], toy_facts(2)[0]
    assert all(whole[name] == pytest.approx(halves[name]) for name in whole)


def test_cosine_is_taken_per_token_before_the_mean():
    a = torch.tensor([[[1.0, 0.0], [0.0, 5.0]]])
    b = torch.tensor([[[-2.0, 0.0], [0.0, 1.0]]])
    assert neighbour_cosine([a, b]).tolist() == [0.0]  # one -1, one +1; a cosine of flattened states would be 3 / 11.4
    assert F.cosine_similarity(a.flatten(), b.flatten(), dim=0) > 0.2


@pytest.mark.parametrize("query", ["residual", "timestep"])
def test_stream_gradient_is_the_slope_of_the_loss_along_the_block_output(query):
    network = (tiny_sit() if query == "residual" else routed(query, scale="convex", summary="last")).double()
    (x0, eps), places = pair(torch.float64), places_of(network)
    traced = trace(velocity_of(network), places, x0, eps, 0.3, LABELS)
    direction = torch.randn(traced.states[2].shape, dtype=torch.float64)
    target, t = eps - x0, torch.full((3,), 0.3, dtype=torch.float64)

    def loss_with(step: float, network: SiT) -> float:
        """h_3 = z_1 moved along `direction`, in the network's code as written, not through the recording."""
        moved = MovedState(network, step * direction)
        v = moved(flow.interpolate(x0, eps, t), t, LABELS)
        return (v - target).square().flatten(1).mean(dim=1).sum().item()

    slope = (loss_with(1e-5, network) - loss_with(-1e-5, network)) / 2e-5
    assert (traced.stream_gradients[2] * direction).sum().item() == pytest.approx(slope, rel=1e-6)
    if query == "residual":
        assert not torch.allclose(traced.stream_gradients[2], traced.sublayer_gradients[2])
    else:
        torch.testing.assert_close(traced.stream_gradients[2], traced.sublayer_gradients[2], rtol=0, atol=0)


class MovedState:
    """The network with block 1's output moved: in the stream where it has one, else in the state of router 3."""

    def __init__(self, network: SiT, offset: torch.Tensor):
        self.network, self.offset = network, offset

    def __call__(self, x, t, labels):
        if self.network.dar is not None:
            norm = self.network.blocks[1].norm1
            hook = norm.register_forward_pre_hook(lambda _, inputs: (inputs[0] + self.offset,))
            try:
                return self.network(x, t, labels)
            finally:
                hook.remove()
        first, second = self.network.blocks
        c = self.network.t_embedder(t) + self.network.y_embedder(labels)
        h = self.network.x_embedder(x) + self.network.pos_embed
        for block in (first, second):
            m = block.modulation(c)
            h = h + block.attention_output(h, *m[:3])
            h = h + block.mlp_output(h, *m[3:])
            h = h + self.offset if block is first else h
        return self.network._unpatchify(self.network.final_layer(h, c))


def test_an_untrained_network_is_named_as_such():
    x0, eps = pair()
    network = SiT(TINY)
    sums, places = SymptomSums(), places_of(network)
    sums.add(trace(velocity_of(network), places, x0, eps, 0.5, LABELS), places)
    with pytest.raises(UserError, match="train the network first"):
        sums.facts()


@pytest.mark.parametrize("query", ["residual", "timestep"])
def test_a_diffusers_transformer_is_read_where_its_routers_act(query):
    """Stream, gradients and gates of a DiT: what each consumer reads, and one forward pass unchanged by reading it."""
    network = DiffusersDenoiser(tiny_dit()).eval()
    if query != "residual":
        network = routed_copy(network, RoutingConfig(query=query, chunk_size=1))
    places = places_of(network)
    assert places.block_ends == (3, 5) and len(places.consumers) == 5
    x, t, labels = torch.randn(2, 4, 8, 8), torch.tensor([3, 500]), torch.tensor([1, 7])
    block, seen = network.transformer.transformer_blocks[0], []
    parts = (block.norm1, block.attn1)
    hooks = [part.register_forward_hook(lambda part, args, out: seen.append(out)) for part in parts]
    with torch.no_grad():
        plain = network(x, t, labels)
        del seen[:]
        with recording(places.consumers) as states:
            read = network(x, t, labels)
    assert torch.equal(plain, read)
    (_, gate, *_), attention = seen
    v_1 = states.arrived[1] - states.arrived[0]
    torch.testing.assert_close(v_1, gate[:, None] * attention, rtol=1e-4, atol=1e-5)
    for hook in hooks:
        hook.remove()
    velocity = velocity_of(network, "dit")
    traced = trace(velocity, places, torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), 0.5, labels)
    assert len(traced.states) == 5 and all(gradient.abs().sum() > 0 for gradient in traced.stream_gradients)
    if query == "residual":  # the stream through later blocks counts as well as the sublayer itself
        assert not torch.allclose(traced.stream_gradients[0], traced.sublayer_gradients[0])
        gates = gate_gradients(traced.states, traced.sublayer_gradients)
        assert gates.shape == (2, 5, 5) and (gates[:, 0, 1:] == 0).all()
