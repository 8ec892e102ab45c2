"""SiT: the public names and counts, its parts against independent formulas, and a routed start that changes nothing."""

import json
import math
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import nn

from dmd_dar.models.denoiser import velocity_of
from dmd_dar.models.sit import Attention, SiT, SiTConfig, TimestepEmbedder, build_sit, with_routing
from dmd_dar.routing.layout import RoutingConfig

PUBLIC = json.loads((Path(__file__).parent / "sit_xl_2_shapes.json").read_text())
SIZES = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}
SMALL = SiTConfig(input_size=8, in_channels=2, patch=4, width=16, depth=3, heads=2, num_classes=3, learn_sigma=True)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def perturbed(config: SiTConfig = SMALL, dtype: torch.dtype = torch.float64) -> SiT:
    """No weight is zero: under adaLN-Zero's own start nearly every test would pass."""
    torch.manual_seed(0)
    model = SiT(config).to(dtype)
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p += 0.3 * randn(*p.shape, seed=i, dtype=dtype)
    return model


def inputs(dtype: torch.dtype = torch.float64, seed: int = 0):
    return randn(4, 2, 8, 8, seed=seed, dtype=dtype), torch.tensor([0.0, 0.3, 0.7, 1.0], dtype=dtype), torch.arange(4)


def backbone_count(d: int, depth: int, patch: int, channels: int, out: int, classes: int, side: int) -> int:
    tokens, pixels = (side // patch) ** 2, patch * patch
    embedders = tokens * d + (pixels * channels + 1) * d + (256 + 1) * d + (d + 1) * d + (classes + 1) * d
    block = 3 * (d * d + d) + (d * d + d) + (4 * d * d + 4 * d) + (4 * d * d + d) + 6 * (d * d + d)
    return embedders + depth * block + (d + 1) * pixels * out + 2 * (d * d + d)


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_names_and_shapes_are_those_of_the_public_xl_2():
    with torch.device("meta"):
        model = build_sit("XL/2")
    assert {name: list(value.shape) for name, value in model.state_dict().items()} == PUBLIC
    assert count(model) == 675_129_632
    assert not model.pos_embed.requires_grad and model.router_parameters() == []
    assert sum(p.numel() for p in model.backbone_parameters()) == 675_129_632 - 256 * 1152


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("patch", [2, 4, 8])
@pytest.mark.parametrize("learn_sigma", [True, False])
def test_presets(size, patch, learn_sigma):
    d, depth, heads = SIZES[size]
    with torch.device("meta"):
        model = build_sit(f"{size}/{patch}", learn_sigma=learn_sigma, input_size=64, in_channels=3, num_classes=10)
    assert count(model) == backbone_count(d, depth, patch, 3, 6 if learn_sigma else 3, 10, 64)
    assert {block.attn.heads for block in model.blocks} == {heads}


@pytest.mark.parametrize("preset", ["XL", "XL/3", "M/2", "xl/2", "XL/2/2", ""])
def test_an_unknown_preset_is_refused(preset):
    with pytest.raises(ValueError, match="unknown preset"):
        build_sit(preset)


@pytest.mark.parametrize(
    ("query", "added", "total"),
    [
        ("static", 56 * 2 * 1152, 675_258_656),
        ("timestep", 56 * 3 * 1152, 675_323_168),
        ("dynamic", 56 * (1152 * 1152 + 1152), 749_511_968),
    ],
)
def test_what_routing_adds_to_xl_2(query, added, total):
    with torch.device("meta"):
        model = build_sit("XL/2", routing=query)
    assert sum(p.numel() for p in model.router_parameters()) == added
    assert count(model) == 675_129_632 + added == total
    assert set(PUBLIC) == {name for name in model.state_dict() if not name.startswith("dar.")}
    assert query == "dynamic" or added < 500_000


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"input_size": 30}, "multiple of patch"),
        ({"heads": 3}, "divisible by heads"),
        ({"width": 18, "heads": 1}, "by 4"),
        ({"routing": RoutingConfig("static", chunk_size=13)}, "exceeds the 12 sublayers"),
    ],
)
def test_bad_sizes_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        SiTConfig(**values)


def test_positions_are_dit_s():
    d, side = 16, 3
    model = SiT(SiTConfig(input_size=side, patch=1, width=d, depth=1, heads=1))
    assert model.pos_embed.shape == (1, side * side, d)
    for row, column in product(range(side), range(side)):
        expected = []
        for coordinate in (column, row):  # the first half of the channels holds the column
            angles = [coordinate / 10000 ** (i / (d // 4)) for i in range(d // 4)]
            expected += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
        assert model.pos_embed[0, row * side + column].tolist() == pytest.approx(expected, abs=1e-7)


def test_the_timestep_embedding_is_cosines_then_sines_of_t_itself():
    embedder, seen = TimestepEmbedder(8), []
    embedder.mlp[0].register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    embedder(torch.tensor([0.0, 0.3]))
    rates = [10000 ** (-k / 128) for k in range(128)]
    assert seen[0][0].tolist() == [1.0] * 128 + [0.0] * 128
    expected = [math.cos(0.3 * r) for r in rates] + [math.sin(0.3 * r) for r in rates]
    assert seen[0][1].tolist() == pytest.approx(expected, abs=1e-6)


def test_attention_is_softmax_over_keys_per_head():
    attention, x = Attention(12, 3).double(), randn(2, 5, 12)
    q, k, v = (part.reshape(2, 5, 3, 4) for part in attention.qkv(x).split(12, dim=-1))
    weights = (torch.einsum("bihc,bjhc->bhij", q, k) / 2).softmax(-1)
    mixed = torch.einsum("bhij,bjhc->bihc", weights, v).reshape(2, 5, 12)
    assert torch.allclose(attention(x), attention.proj(mixed), atol=1e-12)


def dit(w: dict[str, torch.Tensor], x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Tokens (B, T, p p C) of the plain network of SMALL's shape, from its weights by their public names."""

    def linear(name, given):
        return given @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def silu(given):
        return given / (1 + torch.exp(-given))

    def modulated(given, shift, scale):
        centred = given - given.mean(-1, keepdim=True)
        normal = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return normal * (1 + scale[:, None]) + shift[:, None]

    p, d, heads = SMALL.patch, SMALL.width, SMALL.heads
    patches = x.unfold(2, p, p).unfold(3, p, p).permute(0, 2, 3, 1, 4, 5).reshape(len(x), -1, SMALL.in_channels * p * p)
    h = patches @ w["x_embedder.proj.weight"].flatten(1).T + w["x_embedder.proj.bias"] + w["pos_embed"]
    angles = t[:, None].float() * 10000.0 ** (-torch.arange(128) / 128)
    waves = torch.cat([angles.cos(), angles.sin()], dim=1).double()
    c = linear("t_embedder.mlp.2", silu(linear("t_embedder.mlp.0", waves)))
    c = c + w["y_embedder.embedding_table.weight"][labels]
    for i in range(SMALL.depth):
        block = f"blocks.{i}."
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = linear(f"{block}adaLN_modulation.1", silu(c)).split(d, 1)
        q, k, v = linear(f"{block}attn.qkv", modulated(h, shift_1, scale_1)).split(d, dim=-1)
        mixed = []
        for q_i, k_i, v_i in zip(*(part.split(d // heads, dim=-1) for part in (q, k, v)), strict=True):
            mixed.append((q_i @ k_i.mT / math.sqrt(d // heads)).softmax(-1) @ v_i)
        h = h + gate_1[:, None] * linear(f"{block}attn.proj", torch.cat(mixed, dim=-1))
        hidden = linear(f"{block}mlp.fc1", modulated(h, shift_2, scale_2))
        hidden = 0.5 * hidden * (1 + torch.tanh(math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)))
        h = h + gate_2[:, None] * linear(f"{block}mlp.fc2", hidden)
    shift, scale = linear("final_layer.adaLN_modulation.1", silu(c)).split(d, 1)
    return linear("final_layer.linear", modulated(h, shift, scale))


def test_the_plain_network_is_dit_read_by_its_public_names():
    model, tokens = perturbed(), []
    model.final_layer.register_forward_hook(lambda _, __, out: tokens.append(out))
    with torch.no_grad():
        model(*inputs())
        expected = dit(model.state_dict(), *inputs())
    assert torch.allclose(tokens[0], expected, rtol=1e-6, atol=1e-6)  # the waves of t are computed in float32


class IdentityHead(nn.Module):
    def __init__(self, positions: torch.Tensor):
        super().__init__()
        self.positions = positions

    def forward(self, h: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        return h - self.positions


def test_the_stream_is_laid_out_token_by_token():
    """Everything that is added takes the layout of the first summand: channel by channel, all of it would be slow."""
    assert SiT(SiTConfig()).x_embedder(torch.randn(2, 3, 32, 32)).is_contiguous()


def test_unpatchify_is_the_inverse_of_patchify():
    p, channels, d = 2, 3, 12
    model = SiT(SiTConfig(input_size=8, in_channels=channels, patch=p, width=d, depth=1, heads=1)).double()
    weight = torch.zeros_like(model.x_embedder.proj.weight.data)
    for row, column, c in product(range(p), range(p), range(channels)):  # the public head's order: row, column, channel
        weight[(row * p + column) * channels + c, c, row, column] = 1
    model.x_embedder.proj.weight.data = weight
    model.final_layer = IdentityHead(model.pos_embed)  # all gates are zero: the blocks pass v_0 through
    x = randn(2, channels, 8, 8)
    assert torch.allclose(model(x, torch.zeros(2), torch.zeros(2, dtype=torch.long)), x, atol=1e-14)


@pytest.mark.parametrize("query", ["residual", "static", "timestep", "dynamic"])
@pytest.mark.parametrize("scale", ["convex", "stream"])
def test_a_fresh_network_outputs_zero_and_only_its_head_learns(query, scale):
    torch.manual_seed(0)
    model = SiT(SiTConfig(8, 2, 4, 16, 3, 2, num_classes=3, routing=RoutingConfig(query, scale=scale))).double()
    out = model(*inputs())
    assert out.shape == (4, 2, 8, 8) and torch.equal(out, torch.zeros_like(out))
    (out - 1).square().mean().backward()
    learns = {name for name, p in model.named_parameters() if p.requires_grad and p.grad.abs().max() > 0}
    assert learns == {"final_layer.linear.weight", "final_layer.linear.bias"}
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("query", ["static", "timestep", "dynamic"])
@pytest.mark.parametrize("chunk_size", [1, 4, 6])
@pytest.mark.parametrize("final", ["dedicated", "reuse_last"])
@torch.no_grad()
def test_a_converted_network_computes_the_same_function(query, chunk_size, final):
    for dtype, summary in product((torch.float32, torch.float64, torch.bfloat16), ("sum", "last")):
        plain, given = perturbed(dtype=dtype), inputs(dtype)
        converted = with_routing(plain, RoutingConfig(query, chunk_size, summary, "stream", final))
        assert converted.dar is not None and torch.equal(converted(*given), plain(*given))
    plain, given = perturbed(), inputs()
    counted = with_routing(plain, RoutingConfig(query, chunk_size, "sum", "count", final))
    convex = with_routing(plain, RoutingConfig(query, chunk_size, "sum", "convex", final), allow_change=True)
    assert torch.allclose(counted(*given), plain(*given), rtol=1e-12, atol=1e-12)
    assert torch.allclose(convex(*given), plain(*given), rtol=1e-3, atol=1e-3)  # off by the norms' eps alone
    if chunk_size == 4:
        dropping = RoutingConfig(query, chunk_size, "last", "count", final)
        with pytest.raises(ValueError, match="does not keep the network's function"):
            with_routing(plain, dropping)
        dropped = with_routing(plain, dropping, allow_change=True)
        assert not torch.allclose(dropped(*given), plain(*given), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("query", ["static", "timestep", "dynamic"])
@pytest.mark.parametrize("summary", ["sum", "last"])
def test_a_converted_backbone_has_the_plain_network_s_gradients(query, summary):
    plain, given = perturbed(), inputs()
    converted = with_routing(plain, RoutingConfig(query, 4, summary, "stream"))
    for model in (plain, converted):
        model(*given).square().sum().backward()
    theirs = dict(plain.named_parameters())
    for name, p in converted.named_parameters():
        if name == "dar.gain":
            assert p.grad.eq(0).all()
        elif name.startswith("dar."):
            assert p.grad.flatten(1).abs().amax(1).gt(0).all()
        elif p.requires_grad:
            assert torch.allclose(p.grad, theirs[name].grad, rtol=1e-11, atol=1e-13), name


@torch.no_grad()
def test_a_router_s_query_changes_the_function_and_its_reset_restores_it():
    plain, given = perturbed(), inputs()
    for query in ("static", "timestep", "dynamic"):
        model = with_routing(plain, RoutingConfig(query, 4))
        for row in range(6):
            for name, p in model.dar.named_parameters():
                if name != "gain":
                    p[row] = randn(*p[row].shape, seed=row)
            assert not torch.allclose(model(*given), plain(*given), atol=1e-3), (query, row)
            model.dar.reset()
            assert torch.equal(model(*given), plain(*given))


def test_an_automatic_chunk_size_is_a_number_in_the_network():
    auto, fixed = RoutingConfig("static", "auto"), RoutingConfig("static", 1)  # L = 6: S* = 1.41, and 2 costs more
    assert SiT(SiTConfig(8, 2, 4, 16, 3, 2, num_classes=3, routing=auto)).config.routing == fixed
    converted = with_routing(perturbed(), auto)
    assert converted.config.routing == converted.dar.config == fixed
    converted.dar.query.data += 1
    again = with_routing(converted, auto)  # the same form: trained routers are kept
    assert torch.equal(again.dar.query, converted.dar.query)
    assert build_sit("S/8", routing="static", chunk_size="auto").config.routing.chunk_size == 3


def test_a_preset_takes_a_form_whole_or_by_its_fields():
    form = RoutingConfig("dynamic", 6, "last", "count", "reuse_last")
    by_fields = build_sit("S/8", routing="dynamic", chunk_size=6, summary="last", scale="count", final="reuse_last")
    assert build_sit("S/8", routing=form).config == by_fields.config and by_fields.config.routing == form
    with pytest.raises(ValueError, match="chunk_size beside a whole form: set them in that form"):
        build_sit("S/8", routing=form, chunk_size=2)


def test_a_conversion_leaves_its_original_alone_and_may_be_undone():
    plain = perturbed()
    converted = with_routing(plain, RoutingConfig("static", 4))
    back = with_routing(converted, RoutingConfig())
    assert back.dar is None and plain.dar is None and back.state_dict().keys() == plain.state_dict().keys()
    with torch.no_grad():
        converted.blocks[0].mlp.fc1.weight.zero_()
    assert torch.equal(back(*inputs()), plain(*inputs()))


@pytest.mark.parametrize("query", ["residual", "static", "timestep", "dynamic"])
def test_two_forwards_before_one_backward(query):
    model = with_routing(perturbed(), RoutingConfig(query, 4))
    for parameter in model.router_parameters():
        parameter.data += 0.2 * randn(*parameter.shape, seed=9)

    def gradients(*seeds):
        model.zero_grad()
        sum(output.square().sum() for output in [model(*inputs(seed=seed)) for seed in seeds]).backward()
        return [p.grad.clone() for p in model.parameters() if p.requires_grad]

    both, first, second = gradients(1, 2), gradients(1), gradients(2)
    for together, a, b in zip(both, first, second, strict=True):
        assert torch.allclose(together, a + b, rtol=1e-10, atol=1e-12)


@torch.no_grad()
def test_every_input_counts_and_samples_do_not_mix():
    model = with_routing(perturbed(), RoutingConfig("timestep", 4))
    model.dar.gate += 0.5
    x, t, labels = inputs()
    out = model(x, t, labels)
    for other in [(x, t.flip(0), labels), (x, t, labels.flip(0)), (x.flip(0), t, labels)]:
        assert not torch.allclose(model(*other), out, atol=1e-3)
    assert torch.allclose(model(x.flip(0), t.flip(0), labels.flip(0)), out.flip(0), atol=1e-12)


@torch.no_grad()
def test_a_timestep_query_sees_t_and_no_label():
    model = with_routing(perturbed(), RoutingConfig("timestep", 4))
    model.dar.gate += 0.5
    for block in model.blocks:
        block.adaLN_modulation[1].weight.zero_()  # nothing but the query can now carry t or the label to a router
    x, t, labels = inputs()
    seen = [], [], []
    for alphas, given in zip(seen, [(x, t, labels), (x, t, labels.flip(0)), (x, t.flip(0), labels)], strict=True):
        model(*given, observe=lambda _, alpha, alphas=alphas: alphas.append(alpha))
    for here, other_label, other_t in zip(*seen, strict=True):
        assert torch.equal(here, other_label) and not torch.allclose(here, other_t, atol=1e-3)


def test_what_an_output_means():
    x, t, cond = randn(3, 2, 4, 4), torch.tensor([0.1, 0.5, 1.0]).double(), torch.arange(3)
    x0, eps = randn(3, 2, 4, 4, seed=1), randn(3, 2, 4, 4, seed=2)
    seen = []

    def public(x, t, labels):  # public SiT: t = 1 is data, the first half of the channels is x0 - eps
        seen.append(t)
        return torch.cat([x0 - eps, x], dim=1)

    assert torch.equal(velocity_of(public, "sit")(x, t, cond), eps - x0)
    assert torch.equal(velocity_of(public, "flow")(x, t, cond), x0 - eps)
    assert torch.equal(seen[0], 1 - t) and torch.equal(seen[1], t)
