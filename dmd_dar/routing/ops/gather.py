"""The autograd side of the torch backend: routers hand on dh_l, sources gather their gradient from it.

A router's backward only leaves its dh_l; when all readers of a source are through, one pass over their dh_l gives

    dv_i = sum_l w_{l,i} dh_l + u - v_i (v_i . u) r_i^2 / d,    u = r_i sum_l ds_{l,i} q_l,

as FlashAttention's dK and dV: r_i = 1 / RMS(v_i), q_l with gain and 1 / sqrt(d) folded in,
ds_{l,i} = c alpha_{l,i} (dh_l . v_i - delta_l), delta_l = dh_l . sum_j alpha_{l,j} v_j, c = 1 (convex) or n (count,
stream), w = c alpha, less 1 in `stream`. In half precision delta_l carries one rounding of h_l.
Legend as in torch.py: M = B T tokens, d width, R routers, n sources of one router.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dmd_dar.routing.layout import Scale

BLOCK_BYTES = 2**23  # half-precision sources are widened this much at a time
SMALL = 400  # products of fewer terms are slow as batched matrix products on a CPU


def mix(w: Tensor, v: Tensor) -> Tensor:
    """sum_i w_ki v_i: w (M, k, n), v (M, n, d) of any float dtype -> (M, k, d) in w's dtype."""
    n, terms = v.shape[1], w.shape[1] * v.shape[1] * v.shape[2]
    if n == 0 or (n > 1 and terms >= SMALL):
        return _product(w, v)
    return add_mix(w[:, :, :1] * v[:, :1], w[:, :, 1:], v[:, 1:])


def add_mix(total: Tensor, w: Tensor, v: Tensor) -> Tensor:
    """total (M, k, d) += sum_i w_ki v_i in place, as `mix`."""
    n, terms = v.shape[1], w.shape[1] * v.shape[1] * v.shape[2]
    if n > 1 and terms >= SMALL:
        return total.baddbmm_(w, v) if v.dtype == w.dtype else total.add_(_product(w, v))
    for i in range(n):
        total.addcmul_(w[:, :, i : i + 1], v[:, i : i + 1].to(w.dtype))
    return total


def dots(v: Tensor, x: Tensor) -> Tensor:
    """v_i . x of every token: v (M, n, d), x (M, d) -> (M, n) in x's dtype."""
    if v.shape[1] * v.shape[2] < SMALL:
        return (v * x[:, None]).sum(dim=-1)
    return _product(x[:, None], v.transpose(1, 2))[:, 0]


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Batched matrix product in a's dtype; b is widened block by block where it is narrower."""
    if a.dtype == b.dtype:
        return torch.bmm(a, b)
    product = a.new_empty(len(a), a.shape[1], b.shape[2])
    rows = max(1, BLOCK_BYTES // (a.element_size() * b[0].numel() + 1))
    for start in range(0, len(a), rows):
        block = slice(start, start + rows)
        torch.bmm(a[block], b[block].to(a.dtype), out=product[block])
    return product


@dataclass(frozen=True)
class Form:
    """What the backward pass needs to know of a bank."""

    scale: Scale
    counts: tuple[int, ...]  # n of every row
    learns: bool  # whether the queries want a gradient


class Sources(Protocol):
    """The sources of one forward pass, as `Source` and `Route` find them; TorchReader is one."""

    form: Form
    passes: "Passes"
    shape: torch.Size  # of v_0
    dtype: torch.dtype  # the sources'
    wide: torch.dtype  # in which they are computed with

    def store(self, v: Tensor, summary: bool) -> tuple[Tensor, Tensor, Tensor | None, range, int]:
        """Keeps v: its slot (M, d), RMS^-1 (M,), the folded queries of its readers, their rows, its column in alpha."""
        ...

    def merged(self, row: int, x: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """h (M, d) of a router whose logits are known, alpha (M, n), and sum alpha_i v_i where h does not tell it."""
        ...

    def mixed(self, row: int, x: Tensor | None, folded: Tensor) -> tuple[Tensor, Tensor]:
        """h (M, d) and alpha (M, n) of a router whose query comes with the token: folded (M, d)."""
        ...

    def seen(self) -> list[Tensor]:
        """RMS^-1 (M, n) and the sources of the next router, (M, chunks, d) and (M, outputs, d)."""
        ...


class Gathered:
    """What one backward pass has left on its way through one forward's routers."""

    def __init__(self, shape: tuple[int, int, int], like: Tensor):
        self.dh = like.new_empty(shape)  # (M, R, d)
        self.queries: Tensor | None = None  # (M, R, d) the folded queries; dynamic only
        self.query_grad: Tensor | None = None  # like the bank's folded queries
        self.rows: dict[int, tuple[Tensor, Tensor]] = {}  # row -> alpha (M, n) and delta (M,), dynamic: ds (M, n)

    def take(self, row: int, dh: Tensor, alpha: Tensor, rest: Tensor, query: Tensor | None) -> None:
        """A router's part; what it leaves is linear in dh, so a router that was asked twice adds up."""
        if row in self.rows:
            self.dh[:, row] += dh
            self.rows[row] = (alpha, self.rows[row][1] + rest)
            return
        self.dh[:, row] = dh
        self.rows[row] = (alpha, rest)
        if query is not None:
            if self.queries is None:
                self.queries = query.new_zeros(self.dh.shape)
            self.queries[:, row] = query

    def read(self, rows: range) -> Tensor:
        """dh of the routers `rows`, (M, readers, d); zero where the pass did not reach one."""
        for row in rows:
            if row not in self.rows:
                self.dh[:, row] = 0
                alpha, rest = next(iter(self.rows.values()))
                blank = alpha.new_zeros(1, 1).expand(len(alpha), self.dh.shape[1] + 1)
                self.rows[row] = (blank, blank if rest.ndim == 2 else blank[:, 0])
        return self.dh[:, rows.start : rows.stop]


class Passes:
    """The backward passes that are on their way through one forward: one, or several where hooks nest them."""

    def __init__(self, tokens: int, routers: int, width: int):
        self.shape = (tokens, routers, width)
        self.running: dict[int, Gathered] = {}

    def now(self) -> Gathered | None:
        return self.running.get(torch._C._current_graph_task_id())

    def begin(self, like: Tensor) -> Gathered:
        """This pass's; made at its first router, let go when it ends. One that failed is never found again."""
        task = torch._C._current_graph_task_id()
        if task not in self.running:
            self.running[task] = Gathered(self.shape, like)
            torch.autograd.Variable._execution_engine.queue_callback(lambda: self._end(task))
        return self.running[task]

    def _end(self, task: int) -> None:
        del self.running[task]


class Begin(torch.autograd.Function):
    """Gives the folded queries their gradient, when all sources have added to it."""

    @staticmethod
    def forward(ctx: Any, folded: Tensor, passes: Passes) -> Tensor:
        ctx.passes = passes
        return folded.new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, token: Tensor):
        gathered = ctx.passes.now()
        return None if gathered is None else gathered.query_grad, None


class Source(torch.autograd.Function):
    """Registers v_i. Its token orders the backward pass: it comes back when all readers of v_i are through."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, token: Tensor, reader: Sources, summary: bool) -> Tensor:
        with torch.autocast(v.device.type, enabled=False):
            slot, rms, folded, ctx.rows, ctx.column = reader.store(v, summary)
        # .data: later sources enter the same buffer, which does not change this one
        ctx.save_for_backward(slot.data, rms, *([] if folded is None else [folded]))
        ctx.form, ctx.passes, ctx.like = reader.form, reader.passes, (v.shape, v.dtype)
        return token.new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, token: Tensor):
        gathered = ctx.passes.now()
        if gathered is None:  # no reader of any source took part
            return None, token, None, None
        v, rms, *folded = ctx.saved_tensors
        with torch.autocast(v.device.type, enabled=False):
            dv = _gather(ctx, gathered, v, rms, *folded)
        return dv, token, None, None


def _gather(ctx: Any, gathered: Gathered, v: Tensor, rms: Tensor, folded: Tensor | None = None) -> Tensor | None:
    """dv of a source and, on the way, its part of the queries' gradient."""
    rows, form, v = ctx.rows, ctx.form, v.to(rms.dtype)
    dh = gathered.read(rows)
    alpha = torch.stack([gathered.rows[row][0][:, ctx.column] for row in rows], dim=1)  # (M, readers)
    w = alpha
    if form.scale != "convex":
        counts = torch.tensor([form.counts[row] for row in rows], dtype=alpha.dtype)
        w = alpha * counts.to(alpha.device, non_blocking=True)
    if folded is not None:
        delta = torch.stack([gathered.rows[row][1] for row in rows], dim=1)
        ds = w * (dots(dh, v) - delta)
        u = _through_queries(gathered, folded, ds * rms[:, None], v, rows, form)
    else:
        assert gathered.queries is not None
        ds = torch.stack([gathered.rows[row][1][:, ctx.column] for row in rows], dim=1)
        u = mix((ds * rms[:, None])[:, None], gathered.queries[:, rows.start : rows.stop])[:, 0]
    if not ctx.needs_input_grad[0]:
        return None
    dv = mix((w - 1 if form.scale == "stream" else w)[:, None], dh)[:, 0]
    along = dots(v[:, None], u) * (rms.square() / v.shape[-1])[:, None]  # (M, 1)
    shape, dtype = ctx.like
    return dv.add_(u).addcmul_(v, along, value=-1).to(dtype).view(shape)


def _through_queries(gathered: Gathered, folded: Tensor, ds: Tensor, v: Tensor, rows: range, form: Form) -> Tensor:
    """u = sum_l ds_l q_l, (M, d), for ds with RMS^-1; adds sum ds_l v to the queries' gradient.

    folded: rows of (R, d) or (B, R, d).
    """
    if folded.ndim == 3:
        ds, v = ds.unflatten(0, (len(folded), -1)), v.unflatten(0, (len(folded), -1))
    if form.learns:
        if gathered.query_grad is None:
            routers, width = gathered.dh.shape[1:]
            gathered.query_grad = folded.new_zeros(*folded.shape[:-2], routers, width)
        gathered.query_grad[..., rows.start : rows.stop, :] += ds.transpose(-1, -2) @ v
    return (ds @ folded).view(-1, folded.shape[-1])


class Route(torch.autograd.Function):
    """h_l and alpha (M, n); its backward leaves dh_l to the sources. `query` is for dynamic routers only."""

    @staticmethod
    def forward(
        ctx: Any,
        token: Tensor,
        stream: Tensor | None,
        query: Tensor | None,
        gain: Tensor,
        reader: Sources,
        row: int,
    ) -> tuple[Tensor, Tensor]:
        x = None if stream is None else stream.reshape(-1, stream.shape[-1]).to(reader.wide).contiguous()
        seen = []
        with torch.autocast(token.device.type, enabled=False):
            if query is None:
                h, alpha, mean = reader.merged(row, x)
            else:
                folded = query.reshape(-1, query.shape[-1]) * (gain * gain.shape[-1] ** -0.5)
                (h, alpha), mean = reader.mixed(row, x, folded), None
                seen = [query, gain, folded, *reader.seen()]
        h = h.to(reader.dtype if stream is None else stream.dtype).view(reader.shape)
        ctx.form, ctx.passes, ctx.row, ctx.mean_saved = reader.form, reader.passes, row, mean is not None
        ctx.save_for_backward(alpha, h if mean is None else mean, *seen)
        ctx.mark_non_differentiable(alpha)
        return h, alpha

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh: Tensor, _: Any):
        alpha, state, *seen = ctx.saved_tensors
        flat, c = dh.reshape(-1, dh.shape[-1]), 1 if ctx.form.scale == "convex" else ctx.form.counts[ctx.row]
        d_query = d_gain = folded = None
        with torch.autocast(dh.device.type, enabled=False):
            if seen:
                query, gain, folded, rms, *parts = seen
                rest, d_folded = _through_logits(flat.to(alpha.dtype), c, alpha, rms, parts)
                root = gain.shape[-1] ** -0.5
                d_query = (d_folded * (gain * root)).view(query.shape)
                d_gain = (d_folded * query.reshape(folded.shape)).sum(dim=0) * root
            else:
                mean_times = 1 if ctx.mean_saved else c
                rest = dots(state.view(flat.shape)[:, None], flat.to(alpha.dtype))[:, 0] / mean_times  # delta
            ctx.passes.begin(flat).take(ctx.row, flat, alpha, rest, folded)
        return flat.new_zeros(()), dh if ctx.form.scale == "stream" else None, d_query, d_gain, None, None


def _through_logits(dh: Tensor, c: int, alpha: Tensor, rms: Tensor, parts: list[Tensor]) -> tuple[Tensor, Tensor]:
    """ds (M, n) and the gradient (M, d) of a dynamic query folded with its gain; `parts` are the sources (M, n', d)."""
    g = torch.cat([dots(part, dh) for part in parts], dim=1)
    ds = c * alpha * (g - (alpha * g).sum(dim=1, keepdim=True))
    by_part = (ds * rms)[:, None].split([part.shape[1] for part in parts], dim=2)
    mixed = [mix(weights, part) for weights, part in zip(by_part, parts, strict=True)]
    return ds, torch.cat(mixed, dim=1).sum(dim=1)
