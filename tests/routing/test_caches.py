"""Routed models under diffusers' step caches: the routed function, as far as the plain one is kept."""

import pytest
import torch
from torch import Tensor, nn

from dmd_dar.routing import attach, detach
from dmd_dar.routing.examples import example_inputs
from tests.routing.tiny_models import output, shaken, tiny_model

diffusers = pytest.importorskip("diffusers")
from diffusers import hooks  # noqa: E402
from diffusers.models.cache_utils import CacheMixin  # noqa: E402


def first_block(model: nn.Module) -> None:
    hooks.apply_first_block_cache(model, hooks.FirstBlockCacheConfig(threshold=10.0))


def magnitude(model: nn.Module) -> None:
    config = {"threshold": 10.0, "max_skip_steps": 9, "retention_ratio": 0.25, "num_inference_steps": 4}
    hooks.apply_mag_cache(model, hooks.MagCacheConfig(**config, mag_ratios=[1.0] * 4))


SKIPPING = [
    (first_block, name) for name in ("DiT", "PixArt", "Flux", "QwenImage")
]  # classes that the plain cache takes
SKIPPING += [(magnitude, name) for name in ("DiT", "PixArt", "SD3", "Flux", "QwenImage")]
FULL = {"QwenImage": "QwenImageTransformer2DModel", "Wan": "WanTransformer3DModel"}


def routed(name: str, **options) -> tuple[nn.Module, dict]:
    model = tiny_model(FULL.get(name, f"{name}Transformer2DModel"), torch.float64)
    attach(model, **{"query": "timestep", "chunk_size": 2, **options})
    return shaken(model), example_inputs(model)


@torch.no_grad()
def called(model: nn.Module, inputs: dict, context: str = "cond", **place) -> Tensor:
    hooks.HookRegistry.check_if_exists_or_initialize(model).invalidate_child_registries_cache()  # as enable_cache does
    with CacheMixin.cache_context(model, context, **place):  # type: ignore[arg-type]
        return output(model, inputs)


@pytest.mark.parametrize("granularity", ["sublayer", pytest.param("block", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("enable", "name"), SKIPPING)
def test_blocks_that_a_cache_skips_keep_their_routing(enable, name, granularity):
    model, first = routed(name, granularity=granularity)
    second = first | {"hidden_states": 1.5 * first["hidden_states"]}
    expected, ran = {"cond": called(model, first), "uncond": called(model, second)}, []
    enable(model)
    last = model.get_submodule(model.dar.plan.blocks[-1])
    next(part for part in last.modules() if isinstance(part, nn.Linear)).register_forward_hook(lambda *a: ran.append(1))
    for _ in range(3):
        for context, inputs in (("cond", first), ("uncond", second)):
            found = called(model, inputs, context)
            assert (found - expected[context]).norm() < 1e-12 * expected[context].norm()
    assert len(ran) == 2  # one of three passes of each context ran the blocks
    moved = first | {"hidden_states": 1.1 * first["hidden_states"]}
    assert 1e-4 < (called(model, moved) - expected["cond"]).norm() / expected["cond"].norm() < 1


@pytest.mark.parametrize("granularity", ["sublayer", "block"])
@pytest.mark.parametrize("enable", [first_block, magnitude])
def test_a_skipped_pass_adds_what_routing_made_for_the_head_before(enable, granularity):
    """On another input: the head is given the plain cache's stream and h - x of the pass that ran."""
    model, first = routed("PixArt", granularity=granularity)
    second, head, streams = first | {"hidden_states": 1.1 * first["hidden_states"]}, [], []
    model.transformer_blocks[-1].register_forward_hook(lambda module, args, y: streams.append(y), prepend=True)
    model.norm_out.register_forward_pre_hook(lambda module, args: head.append(args[0]))
    enable(model)
    called(model, first)
    called(model, second)
    assert not torch.allclose(streams[1], streams[0]) and not torch.allclose(head[0], streams[0])
    assert torch.allclose(head[1] - streams[1], head[0] - streams[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("granularity", ["sublayer", "block"])
@pytest.mark.parametrize("name", ["Flux", "Wan"])
def test_sea_cache_keeps_the_routing_too(name, granularity):
    model, inputs = routed(name, granularity=granularity)
    expected, ran = called(model, inputs), []
    given = {"threshold": 10.0, "cache_end_steps": 0, "max_consecutive_cached": 9}
    raw = {"raw_vision_callback": lambda module, *args, **kwargs: [inputs["hidden_states"]]}
    hooks.apply_sea_cache(model, hooks.SeaCacheConfig(**given, **raw))
    last = model.get_submodule(model.dar.plan.blocks[-1])
    next(part for part in last.modules() if isinstance(part, nn.Linear)).register_forward_hook(lambda *a: ran.append(1))
    for step in range(3):
        place = {"step_index": step, "num_inference_steps": 9, "timestep": 500.0, "sigma": 0.9 - 0.1 * step}
        assert (called(model, inputs, **place) - expected).norm() < 1e-6 * expected.norm()  # Wan's head is float32
    assert len(ran) == 1


def broadcast(model: nn.Module) -> None:
    config = {"spatial_attention_block_skip_range": 2, "cross_attention_block_skip_range": 2}
    config["current_timestep_callback"] = lambda: 500
    hooks.apply_pyramid_attention_broadcast(model, hooks.PyramidAttentionBroadcastConfig(**config))


def taylor(model: nn.Module, **options) -> None:
    options = {"cache_identifiers": [r".*\.attn1?"], **options}
    config = {"disable_cache_before_step": 1, "taylor_factors_dtype": torch.float64}
    hooks.apply_taylorseer_cache(model, hooks.TaylorSeerCacheConfig(**config, **options))


def faster(model: nn.Module) -> None:
    times = [999]
    calls = {"current_timestep_callback": lambda: times[0], "attention_weight_callback": lambda module: 0.3}
    model.register_forward_hook(lambda *a: times.__setitem__(0, 500))
    ranges = {"spatial_attention_block_skip_range": 3, "spatial_attention_timestep_skip_range": (-1, 901)}
    config = hooks.FasterCacheConfig(**ranges, **calls, is_guidance_distilled=True, tensor_format="BCHW")
    hooks.apply_faster_cache(model, config)


@pytest.mark.parametrize("granularity", ["sublayer", pytest.param("block", marks=pytest.mark.slow)])
@pytest.mark.parametrize("enable", [broadcast, taylor, faster])
@pytest.mark.parametrize("name", ["PixArt", "Flux", *(pytest.param(x, marks=pytest.mark.slow) for x in ("DiT", "SD3"))])
def test_caches_of_attentions_keep_working(enable, name, granularity):
    """The second call is a routed call in which every cached attention gives what it gave in the first."""
    (model, first), (by_hand, _) = (routed(name, granularity=granularity) for _ in range(2))
    second, kept = first | {"hidden_states": 1.1 * first["hidden_states"]}, {}
    enable(model)
    keys = [
        path for path, part in model.named_modules() if getattr(getattr(part, "_diffusers_hook", None), "hooks", {})
    ]
    keys = [path for path in keys if path]
    handles = [
        by_hand.get_submodule(path).register_forward_hook(lambda m, args, y, path=path: kept.__setitem__(path, y))
        for path in keys
    ]
    ours = [called(by_hand, first)]
    for handle in handles:
        handle.remove()
    for path in keys:
        by_hand.get_submodule(path).register_forward_hook(lambda m, args, y, path=path: kept[path])
    ours.append(called(by_hand, second))
    theirs = [called(model, first), called(model, second)]
    assert keys and all(torch.allclose(a, b, rtol=0, atol=1e-10) for a, b in zip(theirs, ours, strict=True))
    assert not torch.allclose(ours[1], called(routed(name, granularity=granularity)[0], second), atol=1e-4)


@pytest.mark.parametrize("name", ["PixArt", "Flux"])
def test_taylorseer_s_lite_mode_predicts_past_all_blocks(name):
    model, inputs = routed(name)
    expected = called(model, inputs)
    taylor(model, use_lite_mode=True)
    assert all(torch.allclose(called(model, inputs), expected, rtol=0, atol=1e-10) for _ in range(2))


def test_taylorseer_on_whole_blocks_is_refused_by_name():
    model, inputs = routed("Flux")
    taylor(model, cache_identifiers=[r"transformer_blocks\.\d+"])
    with pytest.raises(ValueError, match=r"TaylorSeerCache predicts whole blocks .*disable_cache\(\), .*use_lite_mode"):
        called(model, inputs)


def test_routers_may_come_after_a_cache_but_not_into_its_passes():
    model = tiny_model("FluxTransformer2DModel", torch.float64)
    inputs = example_inputs(model)
    plain = called(model, inputs)
    model.enable_cache(hooks.FirstBlockCacheConfig(threshold=10.0))
    attach(model, query="static", chunk_size=2)
    assert model.dar.proof is not None  # a check now would be the cache's first passes
    assert all(torch.allclose(called(model, inputs), plain, rtol=0, atol=1e-12) for _ in range(2))
    attach(detach(model), query="dynamic", chunk_size=2)
    assert model.dar.proof is not None
    model._reset_stateful_cache()
    called(detach(model), inputs)
    attach(model, query="static", chunk_size=2)
    with pytest.raises(ValueError, match=r"remembers a pass without routers: disable_cache\(\) and enable it again"):
        called(model, inputs)
    model.disable_cache()
    assert torch.equal(called(model, inputs), plain) and model.dar.proof is None
