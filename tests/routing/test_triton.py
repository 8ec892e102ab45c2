"""The fused router against the equations: on the GPU where there is one, else in Triton's interpreter on the CPU.

The interpreter must be chosen before anything imports Triton, so without a GPU this file runs itself once more, in a
process of its own; the tests that take `device` are skipped outside it.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dmd_dar.routing.layout import RoutingConfig
from dmd_dar.routing.ops import naive
from dmd_dar.routing.router import RouterBank
from tests.routing.chain import chain, loss_of

fused = pytest.importorskip("dmd_dar.routing.ops.triton", exc_type=ImportError)

FORMS = ["convex", "count", "stream"]
QUERIES = ["static", "timestep", "dynamic"]
TYPES = [torch.float32, torch.bfloat16, torch.float16]
ROUNDING = {torch.float16: 2**-11, torch.bfloat16: 2**-7 if fused.INTERPRETED else 2**-8}  # the interpreter truncates


@pytest.fixture
def device() -> str:
    if not fused.INTERPRETED and not torch.cuda.is_available():
        pytest.skip("runs in the process that test_in_the_interpreter starts")
    return "cpu" if fused.INTERPRETED else "cuda"


@pytest.mark.skipif(fused.INTERPRETED or torch.cuda.is_available(), reason="the kernels run in this process")
def test_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", __file__]
    env = os.environ | {"TRITON_INTERPRET": "1"}
    run = subprocess.run(command, env=env, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-8000:]
    assert int(re.findall(r"(\d+) passed", run.stdout)[0]) > 50


def randn(*shape: int, seed: int = 0, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)


def inputs(device: str, query: str, *shape: int, dtype: torch.dtype = torch.float32) -> dict:
    """n sources, query and gain (fp32 or above), stream x, for shape (n, B, T, d); the sources differ in size."""
    n, batch, tokens, d = shape
    sources = [randn(batch, tokens, d, seed=i, device=device).mul(1 + i % 3).to(dtype) for i in range(n)]
    query_shape = {"static": (d,), "timestep": (batch, 1, d), "dynamic": (batch, tokens, d)}[query]
    above = torch.promote_types(dtype, torch.float32)
    return {
        "sources": sources,
        "query": randn(*query_shape, seed=n, device=device, dtype=above),
        "gain": 1 + 0.3 * randn(d, seed=n + 1, device=device, dtype=above),
        "stream": randn(batch, tokens, d, seed=n + 2, device=device, dtype=dtype),
    }


def run(route, scale: str, given: dict, dh: Tensor) -> list[Tensor]:
    """h and the gradients of query, gain, sources and (for `stream`) x, for the gradient dh of h."""
    leaves = {name: x.detach().requires_grad_() for name, x in given.items() if name != "sources"}
    sources = [v.detach().requires_grad_() for v in given["sources"]]
    h = route(sources, leaves["query"], leaves["gain"], scale=scale, stream=leaves["stream"])
    wanted = [leaves["query"], leaves["gain"], *sources] + [leaves["stream"]] * (scale == "stream")
    return [h.detach(), *torch.autograd.grad(h, wanted, dh.to(h.dtype))]


def compare(scale: str, given: dict, value: float, gradient: float) -> list[Tensor]:
    """Fused against naive, errors relative to the largest entry; what the fused route gives is returned."""
    dh = randn(*given["stream"].shape, seed=99, device=given["stream"].device.type)
    ours, theirs = run(fused.route, scale, given, dh), run(naive.route, scale, given, dh)
    for i, (x, expected) in enumerate(zip(ours, theirs, strict=True)):
        assert x.dtype == expected.dtype and x.shape == expected.shape
        error = (x - expected).abs().max() / expected.abs().max().clamp_min(1e-30)
        assert error <= (gradient if i else value), f"{'gradient ' + str(i - 1) if i else 'value'}: {error:.1e}"
    return ours


@pytest.mark.parametrize("query", QUERIES)
@pytest.mark.parametrize("scale", FORMS)
def test_values_and_every_gradient(device, scale, query):
    compare(scale, inputs(device, query, 4, 2, 3, 48), value=1e-5, gradient=1e-4)


@pytest.mark.parametrize("query", QUERIES)
@pytest.mark.parametrize("scale", FORMS)
def test_float64_is_computed_in_float64(device, scale, query):
    compare(scale, inputs(device, query, 3, 1, 2, 6, dtype=torch.float64), value=1e-13, gradient=1e-12)


@pytest.mark.parametrize("scale", FORMS)
@pytest.mark.parametrize("shape", [(2, 1, 2, 1), (2, 1, 1, 2), (3, 1, 5, 33)])
def test_odd_shapes(device, scale, shape):
    compare(scale, inputs(device, "static", *shape), value=1e-5, gradient=1e-4)


@pytest.mark.parametrize(("n", "scale", "query"), [(57, "stream", "timestep"), (128, "count", "static")])
def test_many_sources(device, n, scale, query):
    compare(scale, inputs(device, query, n, 2, 1, 5), value=1e-5, gradient=1e-4)


@pytest.mark.parametrize("scale", FORMS)
def test_a_single_source_has_no_choice(device, scale):
    given, dh = inputs(device, "dynamic", 1, 1, 2, 8), randn(1, 2, 8, seed=5, device=device)
    h, dquery, dgain, dv, *_ = run(fused.route, scale, given, dh)
    assert torch.allclose(h, given["stream"] if scale == "stream" else given["sources"][0], atol=1e-6)
    assert torch.allclose(dv, torch.zeros_like(dh) if scale == "stream" else dh, atol=1e-6)
    assert dquery.abs().max() < 1e-6 and dgain.abs().max() < 1e-6


@pytest.mark.parametrize("query", QUERIES)
def test_a_program_of_the_backward_takes_several_rows(device, query, monkeypatch):
    monkeypatch.setattr(fused, "BACKWARD_PROGRAMS", 4)  # of 10 rows: 3 in each program, the last one short
    compare("stream", inputs(device, query, 2, 2, 5, 33), value=1e-5, gradient=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scale", FORMS)
def test_half_precision_is_computed_in_float32_and_rounded_once(device, scale, dtype):
    given = inputs(device, "timestep", 4, 2, 2, 48, dtype=dtype)
    above = given | {"sources": [v.float() for v in given["sources"]], "stream": given["stream"].float()}
    dh = randn(2, 2, 48, seed=99, device=device, dtype=dtype).float()
    ours, exact = run(fused.route, scale, given, dh), run(naive.route, scale, above, dh)
    kinds = [dtype, torch.float32, torch.float32, *[dtype] * (len(ours) - 3)]
    assert [x.dtype for x in ours] == kinds
    within = 1.01 * ROUNDING[dtype] * exact[0].abs() + 1e-5
    assert ((ours[0] - exact[0]).abs() <= within).all()
    for x, expected in zip(ours[1:], exact[1:], strict=True):  # the mean too was rounded once
        assert (x - expected).abs().max() <= 3 * ROUNDING[dtype] * expected.abs().max()


@pytest.mark.parametrize("scale", FORMS)
def test_sources_of_two_dtypes(device, scale):
    given = inputs(device, "timestep", 5, 2, 2, 24)
    kinds = [torch.bfloat16, torch.float32, torch.bfloat16, torch.float32, torch.float32]
    given["sources"] = [v.to(kind) for v, kind in zip(given["sources"], kinds, strict=True)]
    ours = compare(scale, given, value=1e-5 if scale == "stream" else 2**-7, gradient=2**-7)
    assert ours[0].dtype == (torch.float32 if scale == "stream" else torch.bfloat16)


def scattered(device: str) -> tuple[list[Tensor], Tensor, Tensor]:
    """Sources (2, 3, 16), a query and a stream with strides of every kind."""
    base = randn(2, 3, 16, seed=7, device=device)
    sources = [
        base,
        randn(2, 16, 3, seed=8, device=device).transpose(1, 2),
        randn(2, 3, 32, seed=18, device=device)[..., ::2],  # values apart
        randn(2, 3, 40, seed=9, device=device)[..., 5:21],  # rows apart, not aligned
        randn(2, 5, 16, seed=10, device=device)[:, 1:4],  # no common stride of rows
        randn(16, seed=11, device=device).expand(2, 3, 16),  # one row for all
        randn(3, 2, 16, seed=12, device=device).transpose(0, 1),
        base,  # twice the same
    ]
    query = randn(16, 2, seed=13, device=device).T[:, None]
    return sources, query, randn(2, 16, 3, seed=14, device=device).transpose(1, 2)


def test_any_strides(device):
    sources, query, stream = scattered(device)
    gain, dh = randn(32, seed=15, device=device)[::2], randn(2, 16, 3, seed=16, device=device).transpose(1, 2)
    given = {"sources": sources, "query": query, "gain": gain, "stream": stream}
    dense = {"query": query.contiguous(), "gain": gain.contiguous(), "stream": stream.contiguous()}
    dense["sources"] = [v.contiguous() for v in sources]
    ours, expected = run(fused.route, "stream", given, dh), run(naive.route, "stream", dense, dh)
    for x, y in zip(ours, expected, strict=True):
        assert torch.allclose(x, y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("alike", ["zero query", "zero gain", "equal sources"])
def test_equal_logits_leave_the_stream_bit_for_bit(device, dtype, alike):
    given = inputs(device, "dynamic", 5, 1, 2, 33, dtype=dtype)
    given["sources"][2] *= 1000
    if alike == "equal sources":
        given["sources"] = [given["sources"][0]] * 5
    else:
        given[alike.split()[1]].zero_()
    h = fused.route(given["sources"], given["query"], given["gain"], scale="stream", stream=given["stream"])
    assert torch.equal(h, given["stream"])


@pytest.mark.parametrize("scale", FORMS)
def test_zero_sources_have_finite_gradients(device, scale):
    given = inputs(device, "static", 3, 1, 2, 8)
    given["sources"] = [torch.zeros_like(given["stream"])] * 2 + [torch.ones_like(given["stream"])]
    ours = compare(scale, given, value=1e-5, gradient=1e-4)
    assert all(torch.isfinite(x).all() for x in ours) and ours[3].abs().max() > 0


def test_large_logits_do_not_overflow(device):
    for order in ([1.0, -1.0, 2.0], [2.0, 1.0, -1.0]):  # the largest at the front, or met on the way
        v = [torch.full((1, 1, 8), x, device=device) for x in order]
        query, gain, stream = (
            torch.full((8,), 1e4, device=device),
            torch.ones(8, device=device),
            torch.full_like(v[0], 10),
        )
        for scale, expected in (("convex", 1.5), ("count", 4.5), ("stream", 10 + 0.5 + 1 + 1)):
            h = fused.route(v, query, gain, scale=scale, stream=stream)
            assert torch.allclose(h, torch.full_like(h, expected), atol=1e-2), (scale, order)


def test_repeats_bit_for_bit_and_keeps_two_forwards_apart(device):
    first, second = inputs(device, "timestep", 3, 2, 2, 16), inputs(device, "timestep", 3, 2, 2, 16)
    second["stream"], dh = second["stream"] + 1, randn(2, 2, 16, seed=5, device=device)
    second["query"], second["sources"] = -second["query"], second["sources"][::-1]
    once, other = run(fused.route, "stream", first, dh), run(fused.route, "stream", second, 2 * dh)
    assert all(torch.equal(x, y) for x, y in zip(once, run(fused.route, "stream", first, dh), strict=True))
    leaves = [[x.detach().requires_grad_() for x in (g["query"], g["gain"], *g["sources"])] for g in (first, second)]
    h = [
        fused.route(v, q, gain, scale="stream", stream=g["stream"])
        for (q, gain, *v), g in zip(leaves, (first, second), strict=True)
    ]
    ((h[0] + 2 * h[1]) * dh).sum().backward()
    for inside, expected in zip(leaves, (once, other), strict=True):
        assert all(torch.equal(x.grad, y) for x, y in zip(inside, expected[1:], strict=False))


def test_only_wanted_gradients_are_made_and_nothing_is_kept_without_them(device):
    given = inputs(device, "static", 3, 1, 2, 8)
    sources, query, gain, stream = given["sources"], given["query"], given["gain"], given["stream"]
    before = [v.clone() for v in sources]
    with torch.no_grad():
        quiet = fused.route(sources, query.requires_grad_(), gain, scale="stream", stream=stream)
    assert not quiet.requires_grad
    sources[1].requires_grad_()
    expected = run(fused.route, "stream", given, torch.ones_like(stream))
    h = fused.route(sources, query, gain, scale="stream", stream=stream)
    h.sum().backward()
    assert torch.equal(h, quiet) and torch.equal(query.grad, expected[1]) and torch.equal(sources[1].grad, expected[4])
    assert gain.grad is None and stream.grad is None and sources[0].grad is None
    assert all(torch.equal(v, unchanged) for v, unchanged in zip(sources, before, strict=True))
    alone = stream.clone().requires_grad_()
    fused.route([v.detach() for v in sources], query.detach(), gain, scale="stream", stream=alone).sum().backward()
    assert torch.equal(alone.grad, torch.ones_like(stream))


@pytest.mark.parametrize("scale", FORMS)
def test_the_backward_keeps_one_state_and_two_numbers_for_each_source(device, scale):
    given, kept = inputs(device, "static", 4, 2, 2, 64), {}
    given["sources"] = [v.requires_grad_() for v in given["sources"]]
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.setdefault(x.data_ptr(), x), lambda x: x):
        fused.route(given["sources"], given["query"], given["gain"], scale=scale, stream=given["stream"])
    own = {x.data_ptr() for x in (*given["sources"], given["query"], given["gain"])}
    rows, size = 4, sum(x.numel() for pointer, x in kept.items() if pointer not in own)
    assert size == rows * (64 + 2 * 4 + 2)


@pytest.mark.parametrize("query", ["static", "timestep", "dynamic"])
def test_a_network_of_routers(device, query):
    """A whole history on the fused kernels: values 1e-5 and every gradient 1e-4 of the equations'."""
    one = chain(RoutingConfig(query, chunk_size=2), 4, 24, tokens=3, dtype=torch.float32, device=device)
    ours, theirs = one.states("triton"), one.states("naive")
    assert all((a - b).abs().max() <= 1e-5 * b.abs().max() for a, b in zip(ours, theirs, strict=True))
    found, expected = one.gradients(loss_of(ours)), one.gradients(loss_of(theirs))
    assert found.keys() == expected.keys()
    assert all((found[name] - g).abs().max() <= 1e-4 * g.abs().max() for name, g in expected.items())


def test_autocast_changes_nothing(device):
    given, dh = inputs(device, "timestep", 3, 1, 2, 16), randn(1, 2, 16, seed=5, device=device)
    plain = run(fused.route, "stream", given, dh)
    with torch.autocast(device, dtype=torch.bfloat16):
        inside = run(fused.route, "stream", given, dh)
    assert all(torch.equal(x, y) for x, y in zip(plain, inside, strict=True))


def test_what_the_kernels_do_not_serve_is_named(device, monkeypatch):
    given = inputs(device, "static", 3, 2, 3, 8)
    v, query, gain = given["sources"], given["query"], given["gain"]
    assert fused.supports(v, query, gain) is None
    wide = torch.zeros(1, 1, fused.MAX_WIDTH + 1, device=device)
    for words, sources, q in [
        ("on meta", [x.to("meta") for x in v], query),
        ("2 devices", [v[0], v[1].to("meta")], query),
        ("two floating", [v[0].half(), v[1].bfloat16(), v[2]], query),
        ("int32", [x.int() for x in v], query),
        ("alike", [v[0], v[1][:1]], query),
        ("alike", [x[:0] for x in v], query),
        ("does not fit", v, query[:4]),
        ("does not fit", v, query.expand(3, 1, 8)),
        ("width", [wide], torch.zeros(wide.shape[-1], device=device)),
    ]:
        g = gain if sources[0].shape[-1] == 8 else q
        assert words in (fused.supports(sources, q, g) or "served"), words
        with pytest.raises(ValueError, match=words):
            fused.route(sources, q, g, scale="convex")
    with pytest.raises(ValueError, match="needs the residual stream"):
        fused.route(v, query, gain, scale="stream")
    with pytest.raises(ValueError, match="not like"):
        fused.route(v, query, gain, scale="stream", stream=v[0][:1])
    bank = RouterBank(RoutingConfig("static", 2), num_sublayers=4, width=8).to(device)
    assert fused.refusal(bank, v[0], torch.bfloat16) is None
    assert "on meta" in fused.refusal(bank, v[0].to("meta"), torch.bfloat16)
    assert "int8" in fused.refusal(bank, v[0], torch.int8)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert "torch.compile" in fused.supports(v, query, gain)


@pytest.mark.parametrize(
    ("hip", "capability", "reason"),
    [("6.4", (9, 4), "written for NVIDIA"), (None, (6, 1), "capability 6.1 is below 7.0"), (None, (7, 0), "unbuilt")],
)
def test_gpus_that_cannot_run_them_say_why(monkeypatch, hip, capability, reason):
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(fused, "_unbuilt", lambda device: "unbuilt")
    assert reason in fused._unfit.__wrapped__(torch.device("cuda"))


def test_kernels_that_cannot_be_built_say_why(device, monkeypatch):
    assert fused._unbuilt(torch.device(device)) is None

    def failing(*_: object, **__: object) -> None:
        raise RuntimeError("Failed to find C compiler.\nmore lines")

    monkeypatch.setattr(fused, "_run", failing)
    reason = fused._unbuilt(torch.device(device))
    assert reason == "its kernels cannot be built here: RuntimeError: Failed to find C compiler."


@pytest.mark.skipif(fused.INTERPRETED or torch.cuda.is_available(), reason="needs kernels to compile and no device")
def test_tensors_on_the_cpu_are_declined():
    v = [torch.ones(1, 1, 4)] * 2
    assert fused.supports(v, v[0][0, 0], v[0][0, 0]) == "tensors are on cpu"


KINDS = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.float64: "*fp64", torch.int64: "*i64"}


def compiled(kernel: str, sources: list[Tensor], **constants):
    """A kernel as it would be built for an H100 or H200 that is not there."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    v, query = sources[0], torch.empty(sources[0].shape[-1])
    dtype = torch.promote_types(v.dtype, torch.float32)
    statistics = query.to(dtype)
    given, _ = fused._arguments(sources, sources[::-1], query, query, dtype)
    given |= dict.fromkeys(("x", "out", "dh", "mean"), v) | {"logits": statistics, "norms": statistics}
    given |= {"dquery": query, "partial": statistics, "SCALE": "stream", "SAVE": True, "maxnreg": 168} | constants
    function = getattr(fused, kernel)
    names = {name: given.get(name) for name in function.arg_names}
    types = {
        n: KINDS[x.dtype] if isinstance(x, Tensor) else "constexpr" if n.isupper() else "i32" for n, x in names.items()
    }
    values = {(i,): given[name] for i, name in enumerate(names) if name.isupper()}
    aligned = {(i,): [["tt.divisibility", 16]] for i, x in enumerate(names.values()) if isinstance(x, Tensor)}
    options = {name: given[name] for name in ("num_warps", "enable_fp_fusion")}
    return compile(ASTSource(function, types, values, aligned), target=GPUTarget("cuda", 90, 32), options=options)


@pytest.mark.skipif(fused.INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("kernel", ["_forward", "_backward"])
def test_kernels_compile(kernel, tmp_path, monkeypatch):
    """SiT-XL/2 in bf16: a row lives in the registers of one warp, no load or store is narrower than 32 bits."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    wide = compiled(kernel, [torch.empty(2, 3, 1152, dtype=torch.bfloat16)] * 3, DYNAMIC=False)
    assert wide.metadata.num_warps == 1 and wide.metadata.shared == 0
    assert not re.search(r"(ld|st)\.global(\.\w+)*\.b16|bar\.sync|local", wide.asm["ptx"])
    odd = [torch.empty(2, 3, 33, dtype=torch.bfloat16), torch.empty(2, 3, 33)]
    assert compiled(kernel, odd, DYNAMIC=True, SCALE="count").asm["cubin"]
    assert compiled(kernel, [v.double() for v in odd], DYNAMIC=True, SCALE="convex").asm["cubin"]


def test_no_parameter_of_a_kernel_is_an_option_of_its_launch():
    """Triton on a device refuses such a keyword, its interpreter does not."""
    options = {"grid", "warmup", "stream", "device", "device_type", "num_warps", "num_stages", "num_ctas", "maxnreg"}
    for kernel in (fused._forward, fused._backward):
        assert options.isdisjoint(kernel.arg_names)
