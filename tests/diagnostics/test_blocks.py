"""Diagnostics of diffusers transformers whose routers read whole blocks."""

import json
import shutil
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from dmd_dar import config, flow
from dmd_dar.diagnostics import command as command
from dmd_dar.diagnostics.measure import measure
from dmd_dar.diagnostics.states import Inputs, places_of, recording, trace
from dmd_dar.diagnostics.summary import lines
from dmd_dar.draws import Draws, sample_range
from dmd_dar.models.denoiser import velocity_of
from dmd_dar.models.diffusers_denoiser import DiffusersDenoiser
from dmd_dar.routing.attach import attach
from tests.models.tiny_pipelines import shaken, tiny_dit, tiny_vae
from tests.pictures import noise

DEPTH, LABELS = 3, torch.tensor([1, 7])


def tiny_sd3() -> DiffusersDenoiser:
    """Its blocks take the stream by name and return two; prompts from a table of random ones."""
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(3)
    fields = dict(num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, num_layers=DEPTH)
    fields |= dict(sample_size=8, patch_size=2, joint_attention_dim=16, pooled_projection_dim=16)
    transformer = shaken(SD3Transformer2DModel(**fields, caption_projection_dim=16, pos_embed_max_size=8))
    table = {"embedding": torch.randn(9, 5, 16), "pooled": torch.randn(9, 16)}
    prompts = SimpleNamespace(count=8, rows=lambda cond: {name: rows[cond] for name, rows in table.items()})
    return DiffusersDenoiser(transformer, prompts).eval()


def routed(network: DiffusersDenoiser, shake: float = 0.0, **form) -> DiffusersDenoiser:
    """Its routers read whole blocks; `shake` moves them off their start."""
    attach(network.transformer, granularity="block", **{"query": "timestep", "chunk_size": 1, **form})
    with torch.no_grad():
        for parameter in network.dar.parameters():
            parameter.add_(shake * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    return network


def plain(name: str) -> DiffusersDenoiser:
    return tiny_sd3() if name == "sd3" else DiffusersDenoiser(tiny_dit(num_layers=DEPTH)).eval()


def noised(dtype=torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    draws = Draws(0, "diagnostics", 0, sample_range(0, 2))
    return draws.normal("x0", 4, 8, 8, dtype=dtype), draws.normal("eps", 4, 8, 8, dtype=dtype)


@pytest.mark.parametrize("name", ["dit", "sd3"])
def test_routers_of_blocks_at_their_start_leave_the_states_of_the_plain_network(name):
    network = plain(name)
    blocks = [*network.transformer.transformer_blocks, network.transformer.norm_out]
    x, t = noised()[0], torch.tensor([3, 500])
    with torch.no_grad():
        with recording(blocks) as before:
            expected = network(x, t, LABELS)
        places = places_of(routed(network))
        with recording(places.consumers) as states:
            out = network(x, t, LABELS)
    assert (places.unit, places.block_ends) == ("block", (2, 3, 4)) and places.consumers == tuple(blocks)
    assert torch.equal(out, expected)
    for ours, theirs in zip(states.arrived, before.arrived, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", ["dit", "sd3"])
def test_a_state_is_the_mixture_of_the_blocks_own_outputs(name):
    """h_l = sum_i alpha_i v_i with v_k = Block_k(h_k) - h_k and alpha as observed, for trained convex routers."""
    network = routed(plain(name), 0.5, scale="convex", summary="last", allow_change=True)
    places, seen, sources, hooks = places_of(network), {}, [], []

    def output(block, args, kwargs, out):  # before the last block's own hook, which the router has
        h = args[0] if args else kwargs["hidden_states"]
        sources.append((out if isinstance(out, torch.Tensor) else out[-1]) - h)

    *inner, last = places.consumers[:-1]
    for block in (*inner, last):
        hooks.append(block.register_forward_hook(output, with_kwargs=True, prepend=True))
    with torch.no_grad(), recording(places.consumers) as states:
        network(noised()[0], torch.tensor([3, 500]), LABELS, observe=seen.__setitem__)
    sources = [states.arrived[0], *sources]
    assert sorted(seen) == [2, 3, 4] and [len(seen[router]) for router in sorted(seen)] == [2, 3, 4]
    for router, alpha in seen.items():
        mixed = sum(weight[..., None] * v for weight, v in zip(alpha, sources, strict=False))
        torch.testing.assert_close(states.arrived[router - 1], mixed, rtol=1e-4, atol=1e-5)
        assert (alpha - 1 / router).abs().max() > 0.02  # not the start


@pytest.mark.parametrize("name", ["dit", "sd3"])
def test_the_gradient_in_a_block_s_input_is_the_slope_of_the_loss_along_it(name):
    """h_2 moved where its router hands it over, so that what the router takes off again moves with it."""
    network = plain(name)
    if name == "sd3":
        table = {key: rows.double() for key, rows in network.prompts.rows(torch.arange(8)).items()}
        network.prompts.rows = lambda cond: {key: rows[cond] for key, rows in table.items()}
    network = routed(network.double(), 0.5, scale="convex", summary="last", allow_change=True)
    (x0, eps), places = noised(torch.float64), places_of(network)
    traced = trace(velocity_of(network), places, x0, eps, 0.3, LABELS)
    direction = torch.randn(traced.states[1].shape, dtype=torch.float64)
    bank, state = network.dar, network.dar._state

    def loss_with(step: float) -> float:
        offset = {2: step * direction}
        bank._state = lambda now, stream, router, x: state(now, stream, router, x) + offset.get(router, 0)
        t = torch.full((2,), 0.3, dtype=torch.float64)
        with torch.no_grad():
            v = velocity_of(network)(flow.interpolate(x0, eps, t), t, LABELS)
        return (v - (eps - x0)).square().flatten(1).mean(dim=1).sum().item()

    slope = (loss_with(1e-5) - loss_with(-1e-5)) / 2e-5
    assert (traced.stream_gradients[1] * direction).sum().item() == pytest.approx(slope, rel=1e-5)
    assert torch.equal(traced.stream_gradients[1], traced.sublayer_gradients[1])  # there is no other path


def test_zero_queries_weigh_all_blocks_alike():
    network = routed(plain("dit"))
    draws = Draws(0, "diagnostics", 0, sample_range(0, 2))
    facts = measure(
        lambda observe: velocity_of(partial(network, observe=observe)),
        places_of(network),
        network.config.routing,
        Inputs(noised()[0], LABELS, draws, batch_size=1),
        (0.2, 0.8),
    )
    mixing = facts["mixing"]
    assert (mixing["kind"], mixing["unit"]) == ("alpha", "block")
    assert [row["router"] for row in mixing["routers"]] == [2, 3, 4]
    for row in mixing["routers"]:
        count = row["router"]  # v_0 .. v_{l-1}
        assert row["sources"] == [[i, i] for i in range(count)]
        assert np.allclose(row["weights"], 1 / count) and np.allclose(row["effective_sources"], count)
        assert np.allclose(row["share_v0"], 1 / count) and np.allclose(row["deviation"], 0, atol=1e-6)
        assert np.allclose(row["distance_back"], (count + 1) / 2)
    assert all(len(values) == DEPTH and min(values) > 0 for values in facts["symptoms"]["forward_rms"])
    assert all(len(values) == DEPTH - 1 for values in facts["symptoms"]["block_cosine"])


def test_the_command_reads_a_pipeline_whose_blocks_are_routed(tmp_path, capsys):
    from diffusers import DDIMScheduler, DiTPipeline

    for i in range(4):
        (tmp_path / "images" / f"class{i % 2}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise(16, 16, seed=i)).resize((64, 64)).save(tmp_path / "images" / f"class{i % 2}" / f"{i}.png")
    network = tiny_dit(num_layers=4, sample_size=32, patch_size=8, num_embeds_ada_norm=2)
    DiTPipeline(network, tiny_vae(sample_size=64), DDIMScheduler(clip_sample=False)).save_pretrained(tmp_path / "dit")
    attach(network, query="static", chunk_size=2, granularity="block")
    shutil.rmtree(tmp_path / "dit" / "transformer")
    network.save_pretrained(tmp_path / "dit" / "transformer")
    argv = [f"run={tmp_path / 'dit'}", f"out={tmp_path / 'out'}", "cpu=true", "samples=4", "times=[0.1,0.9]"]
    argv += ["data.name=folder", f"data.path={tmp_path / 'images'}", "data.size=64", "data.held_out_share=0"]
    config.run_job(command.DiagnosticsConfig, command.diagnose, [*argv, "probe_pairs=8", "probe_times=1"])
    result = json.loads((tmp_path / "out" / "diagnostics.json").read_text())
    (model,) = result["models"]
    assert model["kind"] == "DAR" and "(DAR of whole blocks static, S = 2, stream)" in model["name"]
    c_0, c_1 = [0, 0], [1, 2]
    sources = {row["router"]: row["sources"] for row in model["mixing"]["routers"]}
    assert sources == {2: [c_0, [1, 1]], 3: [c_0, c_1], 4: [c_0, c_1, [3, 3]], 5: [c_0, c_1, [3, 3], [4, 4]]}
    effective = [row["effective_sources"] for row in model["mixing"]["routers"]]
    assert effective == pytest.approx(np.array([[2.0] * 2, [2.0] * 2, [3.0] * 2, [4.0] * 2]))
    assert len(model["probe"]["states"]) == 5 and "blocks" in "\n".join(lines(result))
    assert (tmp_path / "out" / "mixing.png").is_file() and "sublayers" not in capsys.readouterr().out
