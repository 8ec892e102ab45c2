"""The router as one fused pass (arXiv:2605.20708 Eq. 5): GPU kernels with the meaning of `naive.route`.

One program owns a row, that is one token of the flattened (B T, d). It reads each of the n sources once, the next one
ahead of its use, with an online softmax in registers. The backward reads each source once more and writes its gradient;
for it the forward saves logit and reciprocal RMS of each source, the softmax's m and Z, and the mean
sum_i alpha_i v_i (in `convex` and `count` that is the result itself). No atomics: results repeat bit for bit.
Importing this file raises ImportError where Triton is not installed.

d is held as two tiles, columns `a` and `b`: the power of two below d and one for what remains (1152 = 1024 + 128). One
padded tile would waste up to half of registers and instructions.
"""

# pyright: reportOperatorIssue=false, reportCallIssue=false

import functools
import math
from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch._C import _functorch  # pyright: ignore[reportAttributeAccessIssue]
from torch.autograd.function import once_differentiable

from dmd_dar.routing.layout import Scale
from dmd_dar.routing.ops import naive
from dmd_dar.routing.router import RouterBank

EPS = tl.constexpr(naive.EPS)
MAX_WIDTH = 8192
LEAST_CAPABILITY = (7, 0)
BYTES_PER_THREAD = 160  # of one vector in registers: 40 values in float32
FORWARD_REGISTERS = 168  # per thread at most: three warps on each scheduler of an SM, at d = 1152 twelve rows under way
BACKWARD_PROGRAMS = 8192  # fills a GPU several times over; beyond it a program takes more rows, so query sums stay few
TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32, torch.float64: tl.float64}


@triton.jit
def _load(pointer, a, b, width):
    """Columns a and b of the row at `pointer`, zeros from `width` on."""
    return tl.load(pointer + a, mask=a < width, other=0), tl.load(pointer + b, mask=b < width, other=0)


@triton.jit
def _store(pointer, a, b, values_a, values_b, width):
    tl.store(pointer + a, values_a, mask=a < width)
    tl.store(pointer + b, values_b, mask=b < width)


@triton.jit
def _load_source(base, table, i, end, row, a, b, D: tl.constexpr, UNIT: tl.constexpr):
    """A row of source i, zeros if i is `end`. table (n, 3), in UNITs: its start after `base`, row stride, gradient."""
    start, stride = tl.load(table + 3 * i, mask=i < end, other=0), tl.load(table + 3 * i + 1, mask=i < end, other=0)
    return _load(base + (start + row * stride) * UNIT, a, b, D * (i < end).to(tl.int32))


@triton.jit
def _load_folded(query, gain, a, b, TYPE: tl.constexpr, D: tl.constexpr):
    """q' = q gain / sqrt(d), not the router's gain q: a logit is q' . v / RMS(v)."""
    query_a, query_b = _load(query, a, b, D)
    gain_a, gain_b = _load(gain, a, b, D)
    return query_a.to(TYPE) * gain_a.to(TYPE) * D**-0.5, query_b.to(TYPE) * gain_b.to(TYPE) * D**-0.5


@triton.jit
def _mix(
    base, table, begin, end, row, a, b, q_a, q_b, logits, m, z, mix_a, mix_b, sum_a, sum_b,
    TYPE: tl.constexpr, D: tl.constexpr, UNIT: tl.constexpr, SCALE: tl.constexpr, SAVE: tl.constexpr,
):  # fmt: skip
    """Takes sources begin .. end - 1 into m = max s, Z = sum p and mix = sum p v, where p = exp(s - m).

    For `stream` mix is D = sum (p - 1) v, beside b = sum v: equal logits leave it exactly zero.
    """
    next_a, next_b = _load_source(base, table, begin, end, row, a, b, D, UNIT)
    for i in range(begin, end):
        v_a, v_b = next_a.to(TYPE), next_b.to(TYPE)
        next_a, next_b = _load_source(base, table, i + 1, end, row, a, b, D, UNIT)
        inverse_rms = tl.rsqrt((tl.sum(v_a * v_a) + tl.sum(v_b * v_b)) * (1 / D) + EPS)
        s = (tl.sum(v_a * q_a) + tl.sum(v_b * q_b)) * inverse_rms
        if SAVE:
            tl.store(logits + 2 * i, s)
            tl.store(logits + 2 * i + 1, inverse_rms)
        if s > m:
            r = tl.exp(m - s)
            m, z, mix_a, mix_b = s, r * z, r * mix_a, r * mix_b
            if SCALE == "stream":
                mix_a += (r - 1) * sum_a
                mix_b += (r - 1) * sum_b
        p = tl.exp(s - m)
        z += p
        if SCALE == "stream":
            mix_a += (p - 1) * v_a
            mix_b += (p - 1) * v_b
            sum_a += v_a
            sum_b += v_b
        else:
            mix_a += p * v_a
            mix_b += p * v_b
    return m, z, mix_a, mix_b, sum_a, sum_b


@triton.jit(do_not_specialize=["n_first", "n", "rows_per_query"])
def _forward(
    first, second, table, query, gain, x, out, mean, logits, norms, n_first, n, rows_per_query,
    TYPE: tl.constexpr, D: tl.constexpr, A: tl.constexpr, B: tl.constexpr, UNIT_1: tl.constexpr, UNIT_2: tl.constexpr,
    TWO_DTYPES: tl.constexpr, SCALE: tl.constexpr, SAVE: tl.constexpr,
):  # fmt: skip
    """One program per row. The first n_first sources have the dtype of `first`, the others that of `second`."""
    row = tl.program_id(0).to(tl.int64)
    a, b = tl.arange(0, A), A + tl.arange(0, B)
    q_a, q_b = _load_folded(query + row // rows_per_query * D, gain, a, b, TYPE, D)
    logits += row * n * 2
    m, z = tl.full((), float("-inf"), TYPE), tl.full((), 0.0, TYPE)
    mix_a, mix_b, sum_a, sum_b = tl.zeros((A,), TYPE), tl.zeros((B,), TYPE), tl.zeros((A,), TYPE), tl.zeros((B,), TYPE)
    m, z, mix_a, mix_b, sum_a, sum_b = _mix(
        first, table, 0, n_first, row, a, b, q_a, q_b, logits, m, z, mix_a, mix_b, sum_a, sum_b,
        TYPE, D, UNIT_1, SCALE, SAVE,
    )  # fmt: skip
    if TWO_DTYPES:
        m, z, mix_a, mix_b, sum_a, sum_b = _mix(
            second, table, n_first, n, row, a, b, q_a, q_b, logits, m, z, mix_a, mix_b, sum_a, sum_b,
            TYPE, D, UNIT_2, SCALE, SAVE,
        )  # fmt: skip
    if SCALE == "stream":
        x_a, x_b = _load(x + row * D, a, b, D)
        h_a = x_a.to(TYPE) + (n * mix_a + (n - z) * sum_a) / z
        h_b = x_b.to(TYPE) + (n * mix_b + (n - z) * sum_b) / z
        if SAVE:
            _store(mean + row * D, a, b, (mix_a + sum_a) / z, (mix_b + sum_b) / z, D)
    elif SCALE == "count":
        h_a, h_b = n * mix_a / z, n * mix_b / z
    else:
        h_a, h_b = mix_a / z, mix_b / z
    _store(out + row * D, a, b, h_a, h_b, D)
    if SAVE:
        tl.store(norms + 2 * row, m)
        tl.store(norms + 2 * row + 1, z)


@triton.jit
def _unmix(
    base, table, begin, end, row, a, b, q_a, q_b, dh_a, dh_b, logits, m, z, n, delta, dq_a, dq_b,
    TYPE: tl.constexpr, D: tl.constexpr, UNIT: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    """Writes the gradients of sources begin .. end - 1 and adds those of q' to dq.

    With w the weight of v in h, c = n (1 if convex), r = 1 / RMS(v) and delta = dh . mean:
    ds = c alpha (dh . v - delta),  dv = w dh + ds dlogit/dv,  dlogit/dv = r (q' - v r s / d),  dq' = sum ds r v.
    """
    next_a, next_b = _load_source(base, table, begin, end, row, a, b, D, UNIT)
    for i in range(begin, end):
        v_a, v_b = next_a.to(TYPE), next_b.to(TYPE)
        next_a, next_b = _load_source(base, table, i + 1, end, row, a, b, D, UNIT)
        s, r = tl.load(logits + 2 * i), tl.load(logits + 2 * i + 1)
        p = tl.exp(s - m)
        if SCALE != "convex":
            p *= n
        w = (p - z) / z if SCALE == "stream" else p / z
        ds_r = p / z * (tl.sum(dh_a * v_a) + tl.sum(dh_b * v_b) - delta) * r
        along = ds_r * r * s * (1 / D)
        dv_a, dv_b = w * dh_a + ds_r * q_a - along * v_a, w * dh_b + ds_r * q_b - along * v_b
        start = tl.load(table + 3 * i + 2)
        _store(base + start * UNIT + row * D, a, b, dv_a, dv_b, D * (start != 0).to(tl.int32))
        dq_a += ds_r * v_a
        dq_b += ds_r * v_b
    return dq_a, dq_b


@triton.jit(do_not_specialize=["n_first", "n", "rows_per_query", "rows_per_group", "rows_per_program"])
def _backward(
    first, second, table, query, gain, dh, mean, logits, norms, dquery, partial,
    n_first, n, rows_per_query, rows_per_group, rows_per_program,
    TYPE: tl.constexpr, D: tl.constexpr, A: tl.constexpr, B: tl.constexpr, UNIT_1: tl.constexpr, UNIT_2: tl.constexpr,
    TWO_DTYPES: tl.constexpr, SCALE: tl.constexpr, DYNAMIC: tl.constexpr,
):  # fmt: skip
    """One program per (group, some of its rows); a group is a run of rows with one query, or all rows if DYNAMIC.

    partial, one row for each program: its sum of dq', or if DYNAMIC (which writes each row's dquery) that of dgain.
    """
    group, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    a, b = tl.arange(0, A), A + tl.arange(0, B)
    end = (group + 1) * rows_per_group
    begin = group * rows_per_group + chunk * rows_per_program
    total_a, total_b = tl.zeros((A,), TYPE), tl.zeros((B,), TYPE)
    for row in range(begin, tl.minimum(begin + rows_per_program, end)):
        q_a, q_b = _load_folded(query + row // rows_per_query * D, gain, a, b, TYPE, D)
        dh_a, dh_b = _load(dh + row * D, a, b, D)
        dh_a, dh_b = dh_a.to(TYPE), dh_b.to(TYPE)
        mean_a, mean_b = _load(mean + row * D, a, b, D)
        delta = tl.sum(dh_a * mean_a.to(TYPE)) + tl.sum(dh_b * mean_b.to(TYPE))
        if SCALE == "count":
            delta = delta / n
        m, z = tl.load(norms + 2 * row), tl.load(norms + 2 * row + 1)
        dq_a, dq_b = tl.zeros((A,), TYPE), tl.zeros((B,), TYPE)
        if not DYNAMIC:
            dq_a, dq_b = total_a, total_b
        dq_a, dq_b = _unmix(
            first, table, 0, n_first, row, a, b, q_a, q_b, dh_a, dh_b, logits + row * n * 2, m, z, n, delta, dq_a, dq_b,
            TYPE, D, UNIT_1, SCALE,
        )  # fmt: skip
        if TWO_DTYPES:
            dq_a, dq_b = _unmix(
                second, table, n_first, n, row, a, b, q_a, q_b, dh_a, dh_b, logits + row * n * 2, m, z, n, delta,
                dq_a, dq_b, TYPE, D, UNIT_2, SCALE,
            )  # fmt: skip
        if DYNAMIC:
            query_a, query_b = _load(query + row * D, a, b, D)
            gain_a, gain_b = _load(gain, a, b, D)
            dq_a, dq_b = dq_a * D**-0.5, dq_b * D**-0.5
            _store(dquery + row * D, a, b, dq_a * gain_a.to(TYPE), dq_b * gain_b.to(TYPE), D)
            total_a += dq_a * query_a.to(TYPE)
            total_b += dq_b * query_b.to(TYPE)
        else:
            total_a, total_b = dq_a, dq_b
    program = group * tl.num_programs(1) + chunk
    _store(partial + program * D, a, b, total_a, total_b, D)


INTERPRETED = not isinstance(_forward, triton.JITFunction)  # TRITON_INTERPRET=1 was set before Triton was imported


def _by_rows(x: Tensor) -> tuple[Tensor, int]:
    """x (B, T, d) and the stride of its B T rows; a copy where they have no common one or are not dense themselves."""
    if x.is_contiguous():
        return x, x.shape[-1]
    rows = x.flatten(0, 1)
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    return rows, rows.stride(0)


def _addresses(rows: list[tuple[Tensor, int]], gradients: list[Tensor | None]) -> tuple[list[int], int]:
    """The table that `_load_source` reads, of sources of one dtype, and its unit: the most elements, up to 16 bytes."""
    size, base = rows[0][0].element_size(), rows[0][0].data_ptr()
    entries = []
    for (v, stride), dv in zip(rows, gradients, strict=True):
        entries += [v.data_ptr() - base, stride * size, 0 if dv is None else dv.data_ptr() - base]
    unit = math.gcd(16, *entries)
    return [entry // unit for entry in entries], unit // size


def _arguments(
    sources: Sequence[Tensor], gradients: Sequence[Tensor | None], query: Tensor, gain: Tensor, dtype: torch.dtype
) -> tuple[dict[str, Any], list[tuple[Tensor, int]]]:
    """What both kernels take, for arithmetic in `dtype`; and the rows it points to, to be held until that is queued."""
    rows, gradients, n_first = [_by_rows(v) for v in sources], list(gradients), len(sources)
    if any(v.dtype != sources[0].dtype for v in sources):
        order = sorted(range(len(sources)), key=lambda i: sources[i].dtype != sources[0].dtype)
        rows, gradients = [rows[i] for i in order], [gradients[i] for i in order]
        n_first = sum(v.dtype == sources[0].dtype for v in sources)
    table, unit = _addresses(rows[:n_first], gradients[:n_first])
    second, unit_2 = 0, unit
    if n_first < len(rows):
        second = n_first
        entries, unit_2 = _addresses(rows[n_first:], gradients[n_first:])
        table += entries
    table = torch.tensor(table)
    if query.is_cuda:
        table = table.pin_memory().to(query.device, non_blocking=True)  # the host does not wait for the device
    d = gain.shape[0]
    main = 1 << max(d - 1, 1).bit_length() - 1
    rest = triton.next_power_of_2(max(d - main, 1))
    warps = triton.next_power_of_2(triton.cdiv((main + rest) * dtype.itemsize, 32 * BYTES_PER_THREAD))
    query = query.reshape(-1, d).contiguous()
    arguments = {
        "first": rows[0][0], "second": rows[second][0], "table": table, "query": query, "gain": gain.contiguous(),
        "n_first": n_first, "n": len(rows), "rows_per_query": sources[0].numel() // query.numel(),
        "TYPE": TYPES[dtype], "D": d, "A": main, "B": rest, "UNIT_1": unit, "UNIT_2": unit_2,
        "TWO_DTYPES": second > 0, "num_warps": warps, "enable_fp_fusion": True,
    }  # fmt: skip
    return arguments, rows


def _run(
    scale: Scale, query: Tensor, gain: Tensor, stream: Tensor | None, sources: Sequence[Tensor], save: bool
) -> list[Tensor]:
    """[h], and with `save` what the backward needs: the mean (h itself but for `stream`), logits and norms."""
    h = torch.empty_like(sources[0] if stream is None else stream, memory_format=torch.contiguous_format)
    dtype = reduce(torch.promote_types, (v.dtype for v in (h, *sources)), torch.float32)
    arguments, _held = _arguments(sources, [None] * len(sources), query, gain, dtype)
    rows, n = h.numel() // h.shape[-1], len(sources)
    logits, norms, mean = h, h, h
    if save:
        logits, norms = (h.new_empty(rows, k, 2, dtype=dtype) for k in (n, 1))
        mean = torch.empty_like(h) if scale == "stream" else h
    with torch.cuda.device_of(h):
        _forward[(rows,)](
            **arguments, x=h if stream is None else stream.contiguous(), out=h, mean=mean, logits=logits,
            norms=norms, SCALE=scale, SAVE=save, maxnreg=min(FORWARD_REGISTERS, 2048 // arguments["num_warps"]),
        )  # fmt: skip
    return [h, mean, logits, norms] if save else [h]


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(ctx, scale: Scale, query: Tensor, gain: Tensor, stream: Tensor | None, *sources: Tensor) -> Tensor:
        h, mean, logits, norms = _run(scale, query, gain, stream, sources, save=True)
        ctx.scale = scale
        ctx.save_for_backward(query, gain, mean, logits, norms, *sources)
        return h

    @staticmethod
    @once_differentiable
    def backward(ctx, dh: Tensor) -> tuple[Tensor | None, ...]:
        query, gain, mean, logits, norms, *sources = ctx.saved_tensors
        _, query_wanted, gain_wanted, stream_wanted, *wanted = ctx.needs_input_grad
        gradients = [v.new_empty(v.shape) if want else None for v, want in zip(sources, wanted, strict=True)]
        arguments, _held = _arguments(sources, gradients, query, gain, logits.dtype)
        d, per_query = gain.shape[0], arguments["rows_per_query"]
        rows = dh.numel() // d
        dynamic = per_query == 1
        per_group = rows if dynamic else per_query
        per_program = triton.cdiv(rows, BACKWARD_PROGRAMS)
        grid = (rows // per_group, triton.cdiv(per_group, per_program))
        partial = dh.new_empty(*grid, d, dtype=logits.dtype)
        dquery = query.new_empty(query.shape) if dynamic else partial
        with torch.cuda.device_of(dh):
            _backward[grid](
                **arguments, dh=dh.contiguous(), mean=mean, logits=logits, norms=norms, dquery=dquery,
                partial=partial, rows_per_group=per_group, rows_per_program=per_program,
                SCALE=ctx.scale, DYNAMIC=dynamic,
            )  # fmt: skip
        if dynamic:
            dgain = partial.sum(dim=(0, 1))
        else:
            dfolded = partial.sum(dim=1) * d**-0.5  # (queries, d)
            dquery = (dfolded * gain).to(query.dtype).reshape(query.shape)
            dgain = (dfolded * query.reshape(-1, d)).sum(dim=0)
        return (
            None,
            dquery if query_wanted else None,
            dgain.to(gain.dtype) if gain_wanted else None,
            dh if stream_wanted else None,
            *gradients,
        )


@functools.cache
def _unfit(device: torch.device) -> str | None:
    """Why a GPU cannot run these kernels."""
    if torch.version.hip is not None:
        return "the kernels are written for NVIDIA's GPUs"
    found, least = torch.cuda.get_device_capability(device), LEAST_CAPABILITY
    if found < least:
        return f"compute capability {found[0]}.{found[1]} is below {least[0]}.{least[1]}"
    return _unbuilt(device)


def _unbuilt(device: torch.device) -> str | None:
    """Why the smallest call fails on a device, as for want of a C compiler or of a folder for Triton's cache."""
    v = torch.ones(1, 1, 32, device=device)
    try:
        _run("convex", v[0, 0], v[0, 0], None, [v, v], save=False)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        return f"its kernels cannot be built here: {type(error).__name__}: {error}".splitlines()[0][:300]
    return None


def supports(sources: list[Tensor], query: Tensor, gain: Tensor) -> str | None:
    """Why these kernels cannot serve a call of `route`, in words for a log; None where they can."""
    x = sources[0]
    if torch.compiler.is_compiling() or _functorch.peek_interpreter_stack() is not None:
        return "torch.compile or torch.func is tracing: tensors have no addresses"
    tensors = [*sources, query, gain]
    devices, dtypes = {tensor.device for tensor in tensors}, {tensor.dtype for tensor in tensors}
    if not {type(tensor) for tensor in tensors} <= {Tensor, torch.nn.Parameter}:
        return "a subclass of Tensor has no address"
    if x.device.type != ("cpu" if INTERPRETED else "cuda"):
        return f"tensors are on {x.device.type}" + (", Triton is interpreted on the CPU" if INTERPRETED else "")
    if len(devices) > 1:
        return f"tensors are on {len(devices)} devices"
    if not dtypes <= TYPES.keys() or len({v.dtype for v in sources}) > 2:
        return f"dtypes are {sorted(map(str, dtypes))}, sources may have two floating ones"
    shapes = {v.shape for v in sources}
    if x.dim() != 3 or x.numel() == 0 or len(shapes) > 1:
        return f"sources must be alike (B, T, d) and not empty, got {sorted(map(tuple, shapes))}"
    batch, tokens, d = x.shape
    if query.shape not in ((d,), (batch, 1, d), (batch, tokens, d)) or gain.shape != (d,):
        return f"query {tuple(query.shape)} or gain {tuple(gain.shape)} does not fit sources {tuple(x.shape)}"
    if d > MAX_WIDTH:
        return f"width {d} is above {MAX_WIDTH}"
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        return "a CUDA graph would keep this call's addresses"
    return _unfit(x.device) if x.is_cuda else None


def refusal(bank: RouterBank, v_0: Tensor, dtype: torch.dtype) -> str | None:
    """`supports` for a whole forward pass, whose sources are like v_0 (B, T, d), in its dtype or in `dtype`."""
    gain = v_0.new_empty(v_0.shape[-1], dtype=bank.gain.dtype)
    return supports([v_0, v_0.new_empty((), dtype=dtype).expand(v_0.shape)], gain, gain)


def route(sources: list[Tensor], query: Tensor, gain: Tensor, *, scale: Scale, stream: Tensor | None = None) -> Tensor:
    """`naive.route` in one pass: h (B, T, d) from its sources, each (B, T, d).

    query: (d,), (B, 1, d) or (B, T, d); gain: (d,); any strides, sources of up to two dtypes. Arithmetic is in float32
    (float64 if a source is), under autocast too; the result has the dtype of `stream` in that form, else of sources[0].
    Raises ValueError where `supports` gives a reason, or where the form `stream` has no stream like sources[0].
    """
    if (reason := supports(sources, query, gain)) is not None:
        raise ValueError(f"the fused router cannot serve this call: {reason}")
    if scale != "stream":
        stream = None
    elif stream is None:
        raise ValueError("scale 'stream' needs the residual stream x")
    elif stream.shape != sources[0].shape or stream.device != sources[0].device or stream.dtype not in TYPES:
        raise ValueError(f"stream {tuple(stream.shape)} {stream.dtype} on {stream.device} is not like sources[0]")
    inputs = [query, gain, *sources] if stream is None else [query, gain, *sources, stream]
    if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
        return _Route.apply(scale, query, gain, stream, *sources)
    return _run(scale, query, gain, stream, sources, save=False)[0]
