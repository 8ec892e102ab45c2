"""Conversion keeps the function: nine diffusers classes, before and after, and against the explicit history."""

import copy

import pytest
import torch
from torch import nn

from dmd_dar.models.sit import SiT, SiTConfig
from dmd_dar.routing import attach, detach
from dmd_dar.routing.attach import install
from dmd_dar.routing.consumers import Form, sublayer_plan
from dmd_dar.routing.examples import example_inputs
from dmd_dar.routing.history import History
from dmd_dar.routing.layout import RoutingConfig
from dmd_dar.routing.router import RouterBank
from tests.routing.tiny_models import NAMES, distance, gradients, output, shaken, tiny_model

diffusers = pytest.importorskip("diffusers")
THREE = ["DiTTransformer2DModel", "SD3Transformer2DModel", "FluxTransformer2DModel"]
QUERIES = ["static", "timestep", "dynamic"]


@pytest.mark.parametrize("chunk_size", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", NAMES)
def test_conversion_keeps_every_bit(name, dtype, chunk_size):
    model = tiny_model(name, dtype)
    inputs = example_inputs(model)
    plain = output(model, inputs)
    attach(model, query="timestep", chunk_size=chunk_size)
    assert torch.equal(output(model, inputs), plain) and plain.isfinite().all()
    assert not torch.equal(output(shaken(model), inputs), plain)


@pytest.mark.slow
@pytest.mark.parametrize("granularity", ["sublayer", "block"])
@pytest.mark.parametrize("form", [("stream", "last"), ("count", "sum")], ids="-".join)
@pytest.mark.parametrize("query", QUERIES)
@pytest.mark.parametrize("chunk_size", [1, 2, "auto"])
@pytest.mark.parametrize("name", NAMES)
def test_every_form_keeps_the_function(name, chunk_size, query, form, granularity):
    model = tiny_model(name, torch.float64)
    inputs = example_inputs(model)
    plain, before = output(model, inputs), gradients(model, inputs)
    scale, summary = form
    attach(model, query=query, chunk_size=chunk_size, summary=summary, scale=scale, granularity=granularity)
    assert torch.allclose(output(model, inputs), plain, rtol=1e-11, atol=1e-12 * float(plain.abs().max()))
    after = gradients(model, inputs)
    assert distance({name: after[name] for name in before}, before) < 1e-12


def test_a_form_is_given_whole_or_by_its_fields():
    form = RoutingConfig("static", 2, "last", "stream", "reuse_last")
    by_fields = attach(tiny_model(NAMES[0]), query="static", chunk_size=2, summary="last", final="reuse_last")
    assert attach(tiny_model(NAMES[0]), form).dar.config == by_fields.dar.config == form
    with pytest.raises(ValueError, match="scale beside a whole form"):
        attach(tiny_model(NAMES[0]), form, scale="count")
    with pytest.raises(TypeError, match="chunks"):
        attach(tiny_model(NAMES[0]), query="static", chunks=2)


def test_norms_kept_in_float32_are_served_in_the_stream_s_dtype():
    model = tiny_model("WanTransformer3DModel", torch.bfloat16)
    for name, parameter in model.named_parameters():
        if any(part in name for part in model._keep_in_fp32_modules):
            parameter.data = parameter.data.float()
    inputs = example_inputs(model)
    plain = output(model, inputs)
    attach(model, query="dynamic", chunk_size=2)
    assert torch.equal(output(model, inputs), plain)
    seen = []
    model.blocks[1].norm3.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    output(shaken(model), inputs)
    assert seen[0].dtype == torch.float32 and torch.equal(seen[0], seen[0].bfloat16().float())


@pytest.mark.parametrize("name", NAMES)
def test_at_the_start_the_backbone_s_gradients_are_the_plain_model_s(name):
    model = tiny_model(name, torch.float64)
    inputs = example_inputs(model)
    plain = gradients(model, inputs)
    attach(model, query="dynamic", chunk_size=2)
    routed = gradients(model, inputs)
    assert distance({name: routed[name] for name in plain}, plain) < 1e-12


@pytest.mark.parametrize("query", QUERIES)
@pytest.mark.parametrize("name", NAMES)
def test_every_router_learns_within_two_steps(name, query, monkeypatch):
    if name == "ZImageTransformer2DModel":  # a timestep embedding narrower than the stream, as at its true size
        monkeypatch.setattr(f"{diffusers.ZImageTransformer2DModel.__module__}.ADALN_EMBED_DIM", 8)
    model = attach(tiny_model(name), query=query, chunk_size=2)
    assert hasattr(model.dar, "t_projection") == (name == "ZImageTransformer2DModel" and query == "timestep")
    inputs, moved = example_inputs(model), {}
    for _ in range(2):
        gradients(model, inputs)
        with torch.no_grad():
            for key, parameter in model.dar.named_parameters():
                moved[key] = moved.get(key, False) | parameter.grad.flatten(1).any(dim=1)
                parameter -= 1e-2 * parameter.grad / parameter.grad.norm().clamp(min=1e-12)
    assert all(bool(rows.all()) for rows in moved.values()), moved


VARIANTS = [
    ("QwenImageTransformer2DModel", {"zero_cond_t": True, "use_additional_t_cond": True}),
    ("SanaTransformer2DModel", {"guidance_embeds": True}),
    ("WanTransformer3DModel", {"image_dim": 8, "added_kv_proj_dim": 24, "cross_attn_norm": False}),
    ("SD3Transformer2DModel", {"num_layers": 1, "dual_attention_layers": ()}),
    ("FluxTransformer2DModel", {"num_single_layers": 0, "guidance_embeds": False}),
    ("PixArtTransformer2DModel", {"use_additional_conditions": False, "caption_channels": None}),
]


@pytest.mark.parametrize(("name", "changes"), VARIANTS)
def test_variants_of_a_class(name, changes):
    model = tiny_model(name, **changes)
    inputs = example_inputs(model)
    plain = output(model, inputs)
    attach(model, query="timestep", chunk_size=1)
    assert torch.equal(output(model, inputs), plain)
    gradients(shaken(model), inputs)
    rows = [parameter.grad.flatten(1).any(dim=1) for parameter in model.dar.parameters()]
    assert all(bool(row.all()) for row in rows)


@pytest.mark.parametrize("name", NAMES)
def test_conversion_keeps_every_bit_under_autocast(name):
    model = tiny_model(name)
    inputs = example_inputs(model)
    with torch.autocast("cpu", torch.bfloat16):
        plain = output(model, inputs)
        attach(model, query="timestep", chunk_size=2)
        assert torch.equal(output(model, inputs), plain)
        found = gradients(shaken(model), inputs)
    assert all(found[name].isfinite().all() for name in found) and any("dar." in name for name in found)


def test_text_routers_are_made_only_where_the_text_still_reaches_the_image():
    banks = {name: attach(tiny_model(name), query="static", chunk_size=2).dar.streams for name in THREE}
    assert banks[THREE[0]]["image"].routers == range(2, 8)
    assert banks[THREE[1]]["text"].routers == range(2, 6) and banks[THREE[1]]["image"].routers == range(2, 8)
    flux = {stream: bank.routers for stream, bank in banks[THREE[2]].items()}
    assert flux == {"image": range(2, 5), "text": range(2, 5), "joint": range(5, 9)}


@pytest.mark.parametrize("name", THREE)
def test_a_trained_router_weighs_the_sources_by_the_time(name):
    model = attach(tiny_model(name), query="timestep", chunk_size=2)
    inputs = example_inputs(model)
    optimizer = torch.optim.Adam(model.dar.parameters(), lr=0.05)
    for _ in range(4):
        optimizer.zero_grad()
        (output(model, inputs).view(2, -1) * torch.tensor([[1.0], [-1.0]])).sum().backward()
        optimizer.step()
    seen = {}
    model.dar.observe = lambda stream, router, alpha: seen.__setitem__((stream, router), alpha)
    inputs = {key: _second_like_the_first(key, value) for key, value in inputs.items()}  # they differ in t alone
    with torch.no_grad():
        output(model, inputs)
    assert set(seen) == {(stream, router) for stream, bank in model.dar.streams.items() for router in bank.routers}
    for alpha in seen.values():
        assert torch.allclose(alpha.sum(dim=0), torch.ones(alpha.shape[1:]), atol=1e-5)
    apart = [float((alpha[:, 0] - alpha[:, 1]).abs().max()) for alpha in seen.values()]
    assert min(apart) > 1e-4 and max(apart) > 1e-2


def _second_like_the_first(key: str, value):
    batched = isinstance(value, torch.Tensor) and key not in ("timestep", "img_ids", "txt_ids")
    return value[:1].expand_as(value) if batched else value


class ResidualSiT(SiT):
    """Our SiT without its explicit history: its routers, if any, sit in hooks."""

    def forward(self, x, t, labels):
        c = self.t_embedder(t) + self.y_embedder(labels)
        return self._unpatchify(self.final_layer(self._residual(self.x_embedder(x) + self.pos_embed, c), c))


FORM = Form("Block", "blocks", "norm1 norm2", head="final_layer.norm_final", width="width")
SIT_INPUTS = {
    "x": torch.randn(2, 2, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3)),
    "t": torch.tensor([0.1, 0.9], dtype=torch.float64),
    "labels": torch.zeros(2, dtype=torch.long),
}


def hooked_names(named: dict) -> dict:
    return {name.replace("dar.", "dar.streams.image."): value for name, value in named.items()}


def sit_pair(explicit_class: type[SiT], hooked_class: type[SiT], routing: RoutingConfig) -> tuple[SiT, SiT]:
    """The same random network with its routers explicit and in hooks."""
    torch.manual_seed(0)
    shape = dict(input_size=8, in_channels=2, patch=4, width=16, depth=4, heads=2)
    explicit = explicit_class(SiTConfig(**shape, routing=routing)).double()
    hooked = hooked_class(SiTConfig(**shape)).double()
    with torch.no_grad():
        for parameter in explicit.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    install(hooked, routing, sublayer_plan(hooked, FORM))
    hooked.load_state_dict(hooked_names(explicit.state_dict()))
    return explicit, hooked


@pytest.mark.parametrize("final", ["dedicated", "reuse_last"])
@pytest.mark.parametrize(("scale", "summary"), [("stream", "sum"), ("stream", "last"), ("convex", "last")])
@pytest.mark.parametrize("query", QUERIES)
def test_hooks_and_explicit_history_agree(query, scale, summary, final):
    explicit, hooked = sit_pair(SiT, ResidualSiT, RoutingConfig(query, 3, summary, scale, final))
    assert torch.allclose(output(hooked, SIT_INPUTS), output(explicit, SIT_INPUTS), rtol=0, atol=1e-12)
    ours = hooked_names(gradients(explicit, SIT_INPUTS))
    assert distance(gradients(hooked, SIT_INPUTS), ours) < 1e-12


class FrozenSiT(SiT):
    """Block `frozen` runs without a graph. With `dar` the history is explicit; without, routers may sit in hooks."""

    frozen = 0

    def forward(self, x, t, labels):
        t_embedding = self.t_embedder(t)
        c, x = t_embedding + self.y_embedder(labels), self.x_embedder(x) + self.pos_embed
        history = History(self.dar, x, t_embedding) if isinstance(self.dar, RouterBank) else None
        for k, block in enumerate(self.blocks):
            m = block.modulation(c)
            with torch.set_grad_enabled(k != self.frozen):
                for sublayer, parts in ((block.attention_output, m[:3]), (block.mlp_output, m[3:])):
                    v = sublayer(history.state() if history else x, *parts)
                    x = x + v
                    if history:
                        with torch.enable_grad():
                            history.append(v, x)
        return self._unpatchify(self.final_layer(history.state() if history else x, c))


@pytest.mark.parametrize("frozen", [0, 1, 3])
@pytest.mark.parametrize(("scale", "chunk_size"), [("stream", 3), ("stream", 1), ("convex", 2)])
@pytest.mark.parametrize("query", QUERIES)
def test_what_a_block_under_no_grad_adds_is_a_constant(query, scale, chunk_size, frozen, monkeypatch):
    monkeypatch.setattr(FrozenSiT, "frozen", frozen)
    explicit, hooked = sit_pair(FrozenSiT, FrozenSiT, RoutingConfig(query, chunk_size, "sum", scale))
    explicit.dar.backend = "naive"
    ours, found = gradients(explicit, SIT_INPUTS), gradients(hooked, SIT_INPUTS)
    assert not any(f"blocks.{frozen}." in name for name in found) and "x_embedder.proj.weight" in found
    assert distance(found, hooked_names(ours)) < 1e-12


@pytest.mark.parametrize("name", THREE)
def test_a_forward_without_gradients_makes_no_graph(name, monkeypatch):
    model = shaken(attach(tiny_model(name), query="timestep", chunk_size=2))
    made, append = [], History.append
    monkeypatch.setattr(History, "append", lambda self, v, x: (made.extend([v, x]), append(self, v, x))[1])
    with torch.no_grad():
        result = output(model, example_inputs(model))
    assert made and not any(x.requires_grad for x in [*made, result])


@pytest.mark.parametrize("final", ["dedicated", "reuse_last"])
def test_the_head_s_router_can_be_the_last_one(final):
    model = attach(tiny_model("FluxTransformer2DModel"), query="static", chunk_size=3, final=final)
    assert len(model.dar.streams["joint"].query) == (4 if final == "dedicated" else 3)
    assert len(model.dar.streams["text"].query) == 3


@pytest.mark.parametrize("name", THREE)
def test_a_copy_uses_its_own_routers(name):
    model = shaken(attach(tiny_model(name), query="static", chunk_size=2))
    inputs = example_inputs(model)
    model.enable_gradient_checkpointing()
    routed, found = output(model, inputs), gradients(model, inputs)
    twin = copy.deepcopy(model)
    model.dar.reset()
    plain = output(model, inputs)
    assert torch.equal(output(twin, inputs), routed) and not torch.equal(plain, routed)
    assert distance(gradients(twin, inputs), found) < 1e-5
    assert torch.equal(output(detach(twin), inputs), plain)
    shaken(model)
    assert torch.equal(output(model, inputs), routed)


@pytest.mark.parametrize("name", THREE)
def test_two_forwards_before_one_backward(name):
    model = shaken(attach(tiny_model(name, torch.float64), query="timestep", chunk_size=2))
    first = example_inputs(model)
    second = {key: value * 1.5 if key == "hidden_states" else value for key, value in first.items()}
    one, other = gradients(model, first), gradients(model, second)
    apart = {name: one[name] + other[name] for name in one}
    model.zero_grad(set_to_none=True)
    a, b = output(model, first), output(model, second)
    (a.square().sum() + b.square().sum()).backward()
    together = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert distance(together, apart) < 1e-12


@pytest.mark.parametrize("name", THREE)
def test_nothing_of_a_forward_is_kept(name, monkeypatch):
    import gc
    import weakref

    born = []
    start = History.__init__
    monkeypatch.setattr(History, "__init__", lambda self, *a: (born.append(weakref.ref(self)), start(self, *a))[1])
    model = attach(tiny_model(name), query="dynamic", chunk_size=2)
    inputs, born[:] = example_inputs(model), []
    with torch.no_grad():
        output(model, inputs)
    gc.collect()
    assert born and not any(reference() for reference in born)
    with pytest.raises(TypeError):
        model(**inputs, unknown=1)
    assert model.dar.current is None


def controlled(name: str, model: nn.Module) -> dict:
    """Inputs with ControlNet residuals, of the shape of the image tokens."""
    inputs, noise = example_inputs(model), torch.Generator().manual_seed(5)
    tokens = {"SD3": 16, "Flux": 16, "QwenImage": 16, "Sana": 16, "ZImage": 64}
    key = {"SD3": "block_controlnet_hidden_states"}
    short = name.split("Transformer")[0]
    make = [torch.randn(2, tokens[short], model.dar.plan.width, generator=noise) for _ in range(2)]
    inputs[key.get(short, "controlnet_block_samples")] = dict(enumerate(make)) if short == "ZImage" else make
    if short == "Flux":
        inputs["controlnet_single_block_samples"] = [3 * x for x in make]
    return inputs


@pytest.mark.parametrize("chunk_size", [1, 4])
@pytest.mark.parametrize("name", ["SD3", "Flux", "QwenImage", "Sana", "ZImage"])
def test_controlnet_residuals_are_part_of_the_stream(name, chunk_size):
    name = next(full for full in NAMES if full.startswith(f"{name}Transformer"))
    model = attach(tiny_model(name), query="static", chunk_size=chunk_size)
    inputs = controlled(name, model)
    routed = output(model, inputs)
    without = output(model, example_inputs(model))
    assert torch.equal(routed, output(detach(model), inputs)) and not torch.equal(routed, without)


def test_a_skipped_block_adds_nothing():
    model = attach(tiny_model("SD3Transformer2DModel"), query="static", chunk_size=2)
    inputs = example_inputs(model) | {"skip_layers": [1]}
    routed = output(model, inputs)
    assert torch.equal(routed, output(detach(model), inputs))
