"""What attach and detach refuse, with the model left as it was; the check; forms that change the function."""

import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from dmd_dar.routing import attach, detach
from dmd_dar.routing.examples import example_inputs
from dmd_dar.routing.history import History
from tests.routing.tiny_models import NAMES, output, shaken, tiny_model

diffusers = pytest.importorskip("diffusers")
ROOT = Path(__file__).parents[2]


def test_routing_does_not_import_diffusers():
    code = "import sys, dmd_dar.routing; sys.exit('diffusers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def everything(model: nn.Module) -> dict:
    """All that attach could leave behind."""
    found = {f"state {name}": value.clone() for name, value in model.state_dict().items()}
    for path, module in model.named_modules():
        own = {key: value for key, value in vars(module).items() if not key.startswith(("_parameters", "_buffers"))}
        hooks = {key: list(value) for key, value in own.items() if key.endswith(("_hooks", "_kwargs", "_called"))}
        found[f"module {path}"] = (type(module), module.training, sorted(own), hooks)
    func = getattr(model, "_gradient_checkpointing_func", None)
    return found | {"trainable": [p.requires_grad for p in model.parameters()], "func": func}


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(a[key], b[key]) if isinstance(a[key], torch.Tensor) else a[key] == b[key] for key in a
    )


GOOD = {"query": "static", "chunk_size": 2}
BAD = [
    ({"chunk_size": 0}, "chunk_size must be a whole number >= 1"),
    ({"chunk_size": 7}, "between 1 and the number of sublayers 6, got 7"),
    ({"query": "learned"}, "query must be one of .*, got 'learned'"),
    ({"query": "residual"}, "residual network has no routers"),
    ({"scale": "double"}, "scale must be one of"),
    ({"granularity": "layer"}, "granularity must be 'sublayer' or 'block', got 'layer'"),
    ({"scale": "convex"}, "scale 'convex' with summary 'sum' changes the function .* allow_change=True"),
    ({"scale": "count", "summary": "last"}, "summary 'last' changes the function"),
    ({"granularity": "block", "chunk_size": 4}, "between 1 and the number of sublayers 3, got 4"),
]


@pytest.mark.parametrize(
    ("options", "message"), BAD, ids=lambda x: "-".join(map(str, x)) if isinstance(x, dict) else ""
)
def test_options_that_do_not_fit(options, message):
    model = tiny_model("SD3Transformer2DModel")
    before = everything(model)
    with pytest.raises(ValueError, match=message):
        attach(model, **{**GOOD, **options})
    assert same(everything(model), before)


def test_attach_twice_and_detach_of_a_plain_model():
    model = attach(tiny_model("DiTTransformer2DModel"), **GOOD)
    before = everything(model)
    with pytest.raises(ValueError, match="already has routers at .dar: detach it first"):
        attach(model, **GOOD)
    assert same(everything(model), before)
    detach(model)
    with pytest.raises(ValueError, match="has no routers that attach put there"):
        detach(model)


def test_a_model_without_blocks():
    model = nn.Sequential(nn.Linear(3, 3), nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)]))
    before = everything(model)
    with pytest.raises(ValueError, match="Sequential has no list of transformer blocks"):
        attach(model, **GOOD)
    assert same(everything(model), before)


def test_what_holds_a_transformer_is_not_one():
    model = tiny_model("DiTTransformer2DModel")
    vae = diffusers.AutoencoderKL(block_out_channels=(4,), norm_num_groups=1, latent_channels=3)
    pipe = diffusers.DiTPipeline(model, vae, diffusers.DDIMScheduler())
    compiled = torch.compile(model, backend="eager")
    before = everything(model)
    with pytest.raises(ValueError, match="DiTPipeline is not a transformer: pass pipe.transformer"):
        attach(pipe, **GOOD)
    with pytest.raises(ValueError, match="str is not a transformer: pass an nn.Module"):
        attach("facebook/DiT-XL-2-256", **GOOD)
    with pytest.raises(ValueError, match=r"attach before torch.compile, or pass model\._orig_mod"):
        attach(compiled, **GOOD)
    assert same(everything(model), before)


class Holder(nn.Module):
    def __init__(self, transformer):
        super().__init__()
        self.transformer = transformer


@pytest.mark.parametrize(
    ("wrap", "path"),
    [
        (nn.DataParallel, "module"),
        (torch.optim.swa_utils.AveragedModel, "module"),
        (Holder, "transformer"),
        (lambda model: Holder(nn.DataParallel(model)), "transformer.module"),
    ],
)
def test_a_wrapper_is_told_what_it_wraps(wrap, path):
    model = wrap(tiny_model("DiTTransformer2DModel"))
    with pytest.raises(ValueError, match=rf"only wraps a DiTTransformer2DModel: attach to that, model\.{path}, before"):
        attach(model, **GOOD)
    assert not hasattr(attach(model.get_submodule(path), **GOOD), "transformer")


def test_an_adapter_s_wrapper_is_told_how_its_file_holds_the_routers():
    peft = pytest.importorskip("peft")
    model = tiny_model("DiTTransformer2DModel")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["to_q"]))
    before = everything(model)
    with pytest.raises(ValueError, match=r"PeftModel is an adapter .*modules_to_save=\['dar'\].*get_base_model\(\)"):
        attach(wrapped, **GOOD)
    assert same(everything(model), before)
    assert attach(wrapped.get_base_model(), **GOOD) is model


def test_hooks_that_find_no_place_leave_nothing_behind():
    model = tiny_model("DiTTransformer2DModel")
    del model.norm_out
    before = everything(model)
    with pytest.raises(AttributeError, match="norm_out"):
        attach(model, **GOOD, check=False)
    assert same(everything(model), before)


@pytest.mark.parametrize("name", NAMES)
def test_detach_takes_all_of_it_away(name):
    model = tiny_model(name)
    model.enable_gradient_checkpointing()
    before = everything(model)
    attach(model, query="timestep", chunk_size=2)
    keys = set(before) - set(everything(model))
    assert not keys and type(model) is getattr(diffusers, name)
    output(model, example_inputs(model)).sum().backward()
    model.zero_grad(set_to_none=True)
    assert same(everything(detach(model)), before)


def test_the_check_restores_randomness_and_modes():
    model = tiny_model("DiTTransformer2DModel")
    model.train()
    model.transformer_blocks[1].eval()
    modes = [module.training for module in model.modules()]
    torch.manual_seed(7)
    random.seed(7)
    state, python = torch.get_rng_state(), random.getstate()
    attach(model, **GOOD)
    assert torch.equal(torch.get_rng_state(), state) and random.getstate() == python
    assert [module.training for module in detach(model).modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_check_seeds_no_device_that_it_does_not_use(monkeypatch):
    model, seeded = tiny_model("DiTTransformer2DModel"), []
    for device in (torch.cuda, torch.mps, torch.xpu):
        for name in ("manual_seed", "manual_seed_all"):
            monkeypatch.setattr(device, name, seeded.append, raising=False)
    attach(model, **GOOD)
    assert seeded == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
def test_the_check_restores_the_device_s_randomness():
    model = tiny_model("DiTTransformer2DModel").cuda()
    torch.manual_seed(7)
    state = torch.cuda.get_rng_state()
    attach(model, **GOOD)
    assert torch.equal(torch.cuda.get_rng_state(), state)


def faulty(monkeypatch, router: int, by: float) -> None:
    state, slope = History.state, torch.linspace(-by, by, 16)  # a constant would be lost in the norms
    monkeypatch.setattr(History, "state", lambda self: state(self) + slope * (self.count + 1 == router))


@pytest.mark.parametrize(("router", "block"), [(2, 0), (4, 1), (5, 2), (7, None)])
def test_the_check_names_the_first_block_that_differs(router, block, monkeypatch):
    model = tiny_model("DiTTransformer2DModel")
    before = everything(model)
    faulty(monkeypatch, router, 1e-6)
    where = "output" if block is None else rf"transformer_blocks\.{block}"
    with pytest.raises(ValueError, match=f"function of DiTTransformer2DModel: {where} is the first to differ"):
        attach(model, query="static", chunk_size=1)
    assert same(everything(model), before)


def test_rounding_passes_for_count_and_more_does_not(monkeypatch):
    model = tiny_model("FluxTransformer2DModel")
    detach(attach(model, query="static", chunk_size=2, scale="count"))
    faulty(monkeypatch, 4, 1e-2)
    with pytest.raises(ValueError, match="transformer_blocks.1 is the first to differ"):
        attach(model, query="static", chunk_size=2, scale="count")


@pytest.mark.parametrize("chunk_size", [1, 2])
def test_a_change_that_is_wanted_is_measured(chunk_size, capsys):
    model = tiny_model("PixArtTransformer2DModel", torch.float64)
    inputs = example_inputs(model)
    plain = output(model, inputs)
    attach(model, query="static", chunk_size=chunk_size, scale="convex", allow_change=True)
    change = ((output(model, inputs) - plain).norm() / plain.norm()).item()
    assert f"changes the output of PixArtTransformer2DModel by {change:.3g}" in capsys.readouterr().err
    assert change > 1e-3


def test_the_proof_needs_finite_numbers():
    model = tiny_model("DiTTransformer2DModel")
    model.transformer_blocks[1].ff.net[2].bias.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="transformer_blocks.1 of the plain network is not finite"):
        attach(model, **GOOD)
    assert not hasattr(model, "dar")


def on_meta(name: str, garbage: float = 0.5, **options) -> nn.Module:
    """A model attached on the meta device, then filled with the weights of `tiny_model`; routers are garbage."""
    plain = tiny_model(name)
    with torch.device("meta"):
        model = type(plain).from_config(plain.config).eval()
    attach(model, query="timestep", chunk_size=2, **options)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.dar.parameters():
            parameter.fill_(garbage)
    assert model.load_state_dict(plain.state_dict(), strict=False).unexpected_keys == []
    return model


def test_on_the_meta_device_the_check_waits_for_the_first_forward():
    model, plain = on_meta("FluxTransformer2DModel"), tiny_model("FluxTransformer2DModel")
    inputs = example_inputs(plain)
    model.dar.reset()
    assert model.dar.proof is not None
    assert torch.equal(output(model, inputs), output(plain, inputs)) and model.dar.proof is None
    output(shaken(model), inputs)

    model = on_meta("FluxTransformer2DModel")
    with pytest.raises(ValueError, match=r"transformer_blocks\.0 is the first to differ.*model\.dar\.reset\(\)"):
        model(**inputs)
    assert not hasattr(model, "dar") and torch.equal(output(model, inputs), output(plain, inputs))


@pytest.mark.parametrize("options", [{}, {"scale": "convex", "allow_change": True}], ids=["keeps", "changes"])
@pytest.mark.parametrize(("garbage", "said"), [(float("nan"), "is not finite"), (0.0, "are not at their start")])
def test_routers_that_nothing_filled_are_found(garbage, said, options):
    model = on_meta("FluxTransformer2DModel", garbage, **options)
    with pytest.raises(ValueError, match=rf"router.* {said}.*call model\.dar\.reset\(\)|routed .* {said}.*reset"):
        model(**example_inputs(tiny_model("FluxTransformer2DModel")))
    assert not hasattr(model, "dar")


def test_blocks_run_only_within_the_model_s_call():
    model = attach(tiny_model("DiTTransformer2DModel"), **GOOD)
    with pytest.raises(RuntimeError, match="outside of the model's call"):
        model.transformer_blocks[0](torch.zeros(1, 4, 16), timestep=torch.zeros(1), class_labels=torch.zeros(1).long())


def test_timesteps_per_token_are_for_other_queries():
    model = attach(tiny_model("WanTransformer3DModel"), query="timestep", chunk_size=2)
    inputs = example_inputs(model)
    inputs["timestep"] = inputs["timestep"][:, None].expand(-1, 32)
    with pytest.raises(ValueError, match="one timestep per sample: use query static or dynamic"):
        model(**inputs)
    detach(model)
    plain = output(model, inputs)
    assert torch.equal(output(attach(model, query="dynamic", chunk_size=2), inputs), plain)


AURA = dict(
    sample_size=8, patch_size=2, in_channels=3, num_mmdit_layers=2, num_single_dit_layers=3, attention_head_dim=8,
    num_attention_heads=2, joint_attention_dim=6, caption_projection_dim=16, out_channels=3, pos_embed_max_size=16,
)  # fmt: skip


@pytest.mark.parametrize("tokens", [5, 16])
def test_aura_flow_is_refused_by_sublayer_and_served_by_block(tokens):
    torch.manual_seed(0)
    model = diffusers.AuraFlowTransformer2DModel(**AURA).eval()
    before = everything(model)
    with pytest.raises(
        ValueError, match="attention's output never enters the residual stream; use granularity='block'"
    ):
        attach(model, **GOOD)
    with pytest.raises(ValueError, match="cannot make inputs for AuraFlow.*: pass example_inputs, or check=False"):
        attach(model, **GOOD, granularity="block")
    assert same(everything(model), before)
    inputs = {"hidden_states": torch.randn(2, 3, 8, 8), "encoder_hidden_states": torch.randn(2, tokens, 6)}
    inputs["timestep"] = torch.tensor([0.1, 0.9])
    plain = output(model, inputs)
    attach(model, query="timestep", chunk_size=3, granularity="block", example_inputs=inputs)
    assert torch.equal(output(model, inputs), plain)
    lists = {name: bank.num_sublayers for name, bank in model.dar.streams.items()}
    assert lists == {"joint_transformer_blocks": 2, "single_transformer_blocks": 3}
    assert not torch.allclose(output(shaken(model), inputs), plain)


def test_another_class_is_routed_by_block_and_says_so():
    torch.manual_seed(0)
    model = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, time_embed_dim=2, text_embed_dim=8,
        num_layers=2, sample_width=8, sample_height=8, sample_frames=9, max_text_seq_length=8,
    ).eval()  # fmt: skip
    inputs = {"hidden_states": torch.randn(1, 3, 4, 8, 8), "encoder_hidden_states": torch.randn(1, 8, 8)}
    inputs["timestep"] = torch.tensor([3])
    plain = output(model, inputs)
    with pytest.warns(UserWarning, match="sublayers of CogVideoX.* are not known: routing its 2 whole blocks"):
        attach(model, query="timestep", chunk_size=1, example_inputs=inputs)
    assert torch.equal(output(model, inputs), plain) and model.dar.t_projection.shape == (16, 2)


def test_block_outputs_by_hand():
    """h_{k+1} = sum_i n alpha_i v_i with v_k = Block(h_k) - h_k, for a router that prefers v_0."""
    model = attach(
        tiny_model("DiTTransformer2DModel", torch.float64), query="static", chunk_size=1, granularity="block"
    )
    inputs, seen = example_inputs(model), {}
    for k, block in enumerate(model.transformer_blocks):
        hook = lambda module, args, kwargs, y, k=k: seen.__setitem__(k, (args[0], y))  # noqa: E731
        block.register_forward_hook(hook, with_kwargs=True, prepend=True)
    alphas = {}
    model.dar.observe = lambda stream, router, alpha: alphas.__setitem__(router, alpha)
    shaken(model)
    head = []
    model.norm_out.register_forward_pre_hook(lambda module, args: head.append(args[0]))
    output(model, inputs)
    v = [seen[0][0]] + [y - h for h, y in (seen[k] for k in range(3))]
    states = [seen[1][0], seen[2][0], head[0]]
    for n, h in enumerate(states, start=2):
        assert torch.allclose(h, sum(n * a[..., None] * x for a, x in zip(alphas[n], v[:n], strict=True)), atol=1e-10)
