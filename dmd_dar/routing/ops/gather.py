"""The autograd side of the torch backend: routers hand on dh_l, sources gather their gradient from it.

A router's backward only leaves its dh_l; when all readers of a source are through, one pass over their dh_l gives

    dv_i = sum_l w_{l,i} dh_l + u - v_i (v_i . u) r_i^2,    u = r_i sum_l ds_{l,i} q_l,
    (v_i . u) r_i^2 = r_i^2 sum_l ds_{l,i} s_{l,i} where the logits s = r v . q are known,

as FlashAttention's dK and dV: r_i = (|v_i|^2 + d eps)^-1/2, that is 1 / (sqrt(d) RMS(v_i)), q_l with its gain,
ds_{l,i} = c alpha_{l,i} (dh_l . v_i - delta_l), delta_l = dh_l . sum_j alpha_{l,j} v_j, c = 1 (convex) or n (count,
stream), w = c alpha, less 1 in `stream`. In half precision delta_l carries one rounding of h_l.
Legend as in torch.py: M = B T tokens, d width, R routers, n sources of one router.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dmd_dar.routing.layout import Scale

BLOCK_BYTES = 2**23  # half-precision sources are widened this much at a time
SMALL = 400  # products of fewer terms are slow as batched matrix products on a CPU


def exact(device: torch.device) -> AbstractContextManager[object]:
    """Without autocast, where it is on: to enter it costs as much as a small operation."""
    cast = torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if cast else nullcontext()


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
    numbers: Tensor  # the same, (R,)
    learns: bool  # whether the queries want a gradient


class Sources(Protocol):
    """The sources of one forward pass, as `Source` and `Route` find them; TorchReader is one."""

    form: Form
    passes: "Passes"
    shape: torch.Size  # of v_0
    dtype: torch.dtype  # the sources'
    wide: torch.dtype  # in which they are computed with

    def store(self, v: Tensor, summary: bool) -> "Stored":
        """Keeps v."""
        ...

    def merged(self, row: int, x: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """h (M, d) of a router whose logits are known, alpha (n, M), and sum alpha_i v_i where h does not tell it."""
        ...

    def mixed(self, x: Tensor | None, folded: Tensor) -> tuple[Tensor, Tensor]:
        """h (M, d) and alpha (n, M) of a router whose query comes with the token: folded (M, d)."""
        ...

    def seen(self) -> list[Tensor]:
        """r (M, n) and the sources of the next router, (M, chunks, d) and (M, outputs, d)."""
        ...


@dataclass(frozen=True)
class Stored:
    """A source as it is kept. `folded` and `logits` are None where queries come with the token."""

    slot: Tensor  # (M, d)
    r: Tensor  # (M,)
    rows: range  # of the routers that read it
    column: int  # its place among a router's sources
    folded: Tensor | None = None  # its readers' queries, (readers, d) or (B, readers, d)
    logits: Tensor | None = None  # (readers, M)


class Gathered:
    """What one backward pass has left on its way through one forward's routers."""

    def __init__(self, shape: tuple[int, int, int], like: Tensor):
        self.dh = like.new_empty(shape)  # (M, R, d)
        self.queries: Tensor | None = None  # (M, R, d) the folded queries; dynamic only
        self.query_grad: Tensor | None = None  # like the bank's folded queries
        self.rows: dict[int, tuple[Tensor, Tensor]] = {}  # row -> alpha (n, M) and delta (M,), dynamic: ds (n, M)

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
                blank = alpha.new_zeros(1, 1).expand(self.dh.shape[1] + 1, alpha.shape[1])
                self.rows[row] = (blank, blank if rest.ndim == 2 else blank[0])
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
        with exact(v.device):
            kept = reader.store(v, summary)
        ctx.rows, ctx.column = kept.rows, kept.column
        # .data: later sources enter the same buffers, which does not change this one
        known = [] if kept.folded is None or kept.logits is None else [kept.folded, kept.logits.data]
        ctx.save_for_backward(kept.slot.data, kept.r, *known)
        ctx.form, ctx.passes, ctx.like = reader.form, reader.passes, (v.shape, v.dtype)
        return token.new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, token: Tensor):
        gathered = ctx.passes.now()
        if gathered is None:  # no reader of any source took part
            return None, token, None, None
        v, r, *known = ctx.saved_tensors
        with exact(v.device):
            dv = _gather(ctx, gathered, v, r, *known)
        return dv, token, None, None


def _gather(ctx: Any, gathered: Gathered, v: Tensor, r: Tensor, *known: Tensor) -> Tensor | None:
    """dv of a source and, on the way, its part of the queries' gradient. known: its readers' queries and logits."""
    rows, form, v = ctx.rows, ctx.form, v.to(r.dtype)
    dh = gathered.read(rows)
    w = torch.stack([gathered.rows[row][0][ctx.column] for row in rows], dim=1)  # (M, readers)
    if form.scale != "convex":
        w *= form.numbers[rows.start : rows.stop]
    if known:
        folded, logits = known
        delta = torch.stack([gathered.rows[row][1] for row in rows], dim=1)
        ds = (dots(dh, v) - delta).mul_(w).mul_(r[:, None])  # r_i ds
        along = (ds * logits.T).sum(dim=1) * r
        if form.learns:
            _add_query_grad(gathered, ds, v, rows, folded)
    else:
        assert gathered.queries is not None
        ds = torch.stack([gathered.rows[row][1][ctx.column] for row in rows], dim=1).mul_(r[:, None])
        folded = u = mix(ds[:, None], gathered.queries[:, rows.start : rows.stop])[:, 0]
        along = dots(v[:, None], u)[:, 0] * r.square()
    if not ctx.needs_input_grad[0]:
        return None
    dv = mix((w.sub_(1) if form.scale == "stream" else w)[:, None], dh)[:, 0]
    dv = _add_queries(dv, ds, folded) if known else dv.add_(folded)
    shape, dtype = ctx.like
    return dv.addcmul_(v, along[:, None], value=-1).to(dtype).view(shape)


def _add_queries(dv: Tensor, ds: Tensor, folded: Tensor) -> Tensor:
    """dv (M, d) += sum_l ds_l q_l, in place; folded (readers, d) or (B, readers, d)."""
    if folded.ndim == 2:
        return dv.addmm_(ds, folded)
    batch = len(folded)
    dv.view(batch, -1, dv.shape[-1]).baddbmm_(ds.view(batch, -1, ds.shape[-1]), folded)
    return dv


def _add_query_grad(gathered: Gathered, ds: Tensor, v: Tensor, rows: range, folded: Tensor) -> None:
    """Adds sum ds_l v over the tokens to the gradient of the queries of `rows`."""
    if folded.ndim == 3:
        ds, v = ds.unflatten(0, (len(folded), -1)), v.unflatten(0, (len(folded), -1))
    if gathered.query_grad is None:
        routers, width = gathered.dh.shape[1:]
        gathered.query_grad = folded.new_zeros(*folded.shape[:-2], routers, width)
    gathered.query_grad.narrow(-2, rows.start, len(rows)).add_(ds.transpose(-1, -2) @ v)


class Route(torch.autograd.Function):
    """h_l and alpha (n, M); its backward leaves dh_l to the sources. `query` is for dynamic routers only."""

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
        with exact(token.device):
            if query is None:
                h, alpha, mean = reader.merged(row, x)
            else:
                folded = query.reshape(-1, query.shape[-1]) * gain
                (h, alpha), mean = reader.mixed(x, folded), None
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
        with exact(dh.device):
            if seen:
                query, gain, folded, r, *parts = seen
                rest, d_folded = _through_logits(flat.to(alpha.dtype), c, alpha, r, parts)
                d_query = (d_folded * gain).view(query.shape)
                d_gain = (d_folded * query.reshape(folded.shape)).sum(dim=0)
            else:
                mean_times = 1 if ctx.mean_saved else c
                rest = dots(state.view(flat.shape)[:, None], flat.to(alpha.dtype))[:, 0] / mean_times  # delta
            ctx.passes.begin(flat).take(ctx.row, flat, alpha, rest, folded)
        return flat.new_zeros(()), dh if ctx.form.scale == "stream" else None, d_query, d_gain, None, None


def _through_logits(dh: Tensor, c: int, alpha: Tensor, r: Tensor, parts: list[Tensor]) -> tuple[Tensor, Tensor]:
    """ds (n, M) and the gradient (M, d) of a dynamic query folded with its gain; `parts` are the sources (M, n', d)."""
    g, alpha = torch.cat([dots(part, dh) for part in parts], dim=1), alpha.T
    ds = c * alpha * (g - (alpha * g).sum(dim=1, keepdim=True))
    by_part = (ds * r)[:, None].split([part.shape[1] for part in parts], dim=2)
    mixed = [mix(weights, part) for weights, part in zip(by_part, parts, strict=True)]
    return ds.T, torch.cat(mixed, dim=1).sum(dim=1)
