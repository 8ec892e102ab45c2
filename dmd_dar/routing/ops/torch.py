"""The router in plain PyTorch, fast everywhere: each source's norm and logits once, grouped reads, gathered gradients.

Legend: M = B T tokens, d width, C summaries, S outputs of a chunk, R routers of the bank, n sources of one router,
G routers of a group. s logits, p = exp(s - max s), Z = sum p, alpha = p / Z; all in promote_types(dtype, float32).

Forward. A source's RMS, and for static and timestep queries its logits for all later routers, are computed once, when
it is produced. The routers of a group read the sources that they share in one pass and merge with the newer ones by
log-sum-exp. For `stream`, sum (p_i - 1) v_i and sum v_i are kept apart: equal logits then add exactly nothing.

Backward. A router only hands on dh_l; when all readers of a source are through, one pass over their dh_l gives
dv_i = sum_l w_{l,i} dh_l + r_i (u - k_i (k_i . u) / d), u = sum_l ds_{l,i} q_l, with k_i = r_i v_i, r_i = 1 / RMS(v_i),
q_l with gain and 1 / sqrt(d) folded in, ds_{l,i} = c alpha_{l,i} dh_l . (v_i - sum_j alpha_{l,j} v_j),
c = 1 (convex) or n (count, stream) and w = c alpha, less 1 in `stream`.
"""

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dmd_dar.routing.layout import Scale
from dmd_dar.routing.ops.naive import EPS

if TYPE_CHECKING:
    from dmd_dar.routing.router import RouterBank

DENSE_GROUP = 8  # routers that share a read where every output is a summary
BLOCK_BYTES = 2**23  # half-precision sources are widened this much at a time


def mix(w: Tensor, v: Tensor) -> Tensor:
    """sum_i w_ki v_i: w (M, k, n), v (M, n, d) of any float dtype -> (M, k, d) in w's dtype."""
    if v.dtype == w.dtype:
        return torch.bmm(w, v)
    mixed = w.new_empty(len(w), w.shape[1], v.shape[2])
    rows = max(1, BLOCK_BYTES // (w.element_size() * v[0].numel() + 1))
    for start in range(0, len(w), rows):
        block = slice(start, start + rows)
        torch.bmm(w[block], v[block].to(w.dtype), out=mixed[block])
    return mixed


def dots(v: Tensor, x: Tensor) -> Tensor:
    """v_i . x of every token: v (M, n, d), x (M, d) -> (M, n) in x's dtype."""
    return mix(x[:, None], v.transpose(1, 2))[:, 0]


class Pass:
    """What one backward pass gathers, shared by the nodes of one forward; emptied when the pass ends."""

    def __init__(self, tokens: int, routers: int, width: int):
        self.shape = (tokens, routers, width)
        self.dh: Tensor | None = None  # (M, R, d)
        self.asked: Tensor | None = None  # (M, R, d), the folded queries; dynamic only
        self.query_grad: Tensor | None = None  # like the bank's folded queries
        self.rows: dict[int, tuple[Tensor, Tensor]] = {}  # row -> alpha (M, n) and delta (M,), dynamic: ds (M, n)

    def take(self, row: int, dh: Tensor, alpha: Tensor, rest: Tensor) -> None:
        if self.dh is None:
            self.dh = dh.new_empty(self.shape)
            torch.autograd.Variable._execution_engine.queue_callback(self.end)
        self.dh[:, row] = dh
        self.rows[row] = (alpha, rest)

    def ask(self, row: int, folded: Tensor) -> None:
        if self.asked is None:
            self.asked = folded.new_zeros(self.shape)
        self.asked[:, row] = folded

    def read(self, rows: range) -> Tensor:
        """dh of the routers `rows`, (M, readers, d); zero where this pass did not reach one."""
        assert self.dh is not None
        for row in rows:
            if row not in self.rows:
                self.dh[:, row] = 0
                alpha, rest = next(iter(self.rows.values()))
                blank = alpha.new_zeros(1, 1).expand(len(alpha), self.shape[1] + 1)
                self.rows[row] = (blank, blank if rest.ndim == 2 else blank[:, 0])
        return self.dh[:, rows.start : rows.stop]

    def end(self) -> None:
        self.dh = self.asked = self.query_grad = None
        self.rows.clear()


class _Begin(torch.autograd.Function):
    """Gives the folded queries their gradient, when all sources have added to it."""

    @staticmethod
    def forward(ctx: Any, folded: Tensor, shared: Pass) -> Tensor:
        ctx.shared = shared
        return folded.new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, token: Tensor):
        return ctx.shared.query_grad, None


class _Source(torch.autograd.Function):
    """Registers v_i. Its token orders the backward pass: it comes back when all readers of v_i are through."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, token: Tensor, reader: "TorchReader", summary: bool) -> Tensor:
        with torch.autocast(v.device.type, enabled=False):
            slot, rms, folded, ctx.rows, ctx.column = reader.store(v, summary)
        # .data: later sources enter the same buffer, which does not change this one
        ctx.save_for_backward(slot.data, rms, *([] if folded is None else [folded]))
        ctx.form, ctx.shared, ctx.like = reader.form, reader.shared, (v.shape, v.dtype)
        return token.new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, token: Tensor):
        if ctx.shared.dh is None:  # no reader of any source took part
            return None, token, None, None
        v, rms, *folded = ctx.saved_tensors
        shared, rows, form = ctx.shared, ctx.rows, ctx.form
        dh, key = shared.read(rows), v * rms[:, None]
        alpha = torch.stack([shared.rows[row][0][:, ctx.column] for row in rows], dim=1)  # (M, readers)
        w = alpha if form.scale == "convex" else alpha * alpha.new_tensor([form.counts[row] for row in rows])
        if folded:
            delta = torch.stack([shared.rows[row][1] for row in rows], dim=1)
            ds = w * (dots(dh, v.to(w.dtype)) - delta)
            u = _through_queries(shared, folded[0], ds, key, rows, form)
        else:
            ds = torch.stack([shared.rows[row][1][:, ctx.column] for row in rows], dim=1)
            u = mix(ds[:, None], shared.asked[:, rows.start : rows.stop])[:, 0]
        if not ctx.needs_input_grad[0]:
            return None, token, None, None
        dv = mix((w - 1 if form.scale == "stream" else w)[:, None], dh)[:, 0]
        u -= key * ((key * u).sum(dim=-1, keepdim=True) / v.shape[-1])
        shape, dtype = ctx.like
        return dv.addcmul_(u, rms[:, None]).to(dtype).view(shape), token, None, None


def _through_queries(shared: Pass, folded: Tensor, ds: Tensor, key: Tensor, rows: range, form: "Form") -> Tensor:
    """u = sum_l ds_l q_l, (M, d); adds sum ds_l k to the queries' gradient. folded: rows of (R, d) or (B, R, d)."""
    if folded.ndim == 3:
        ds, key = ds.unflatten(0, (len(folded), -1)), key.unflatten(0, (len(folded), -1))
    if form.learns:
        if shared.query_grad is None:
            shared.query_grad = folded.new_zeros(*folded.shape[:-2], shared.shape[1], folded.shape[-1])
        shared.query_grad[..., rows.start : rows.stop, :] += ds.transpose(-1, -2) @ key
    return (ds @ folded).view(-1, folded.shape[-1])


class _Route(torch.autograd.Function):
    """h_l; its backward leaves dh_l to the sources."""

    @staticmethod
    def forward(
        ctx: Any,
        token: Tensor,
        stream: Tensor | None,
        query: Tensor | None,
        gain: Tensor,
        reader: "TorchReader",
        row: int,
    ) -> tuple[Tensor, Tensor]:
        x = None if stream is None else stream.reshape(-1, stream.shape[-1]).to(reader.wide)
        with torch.autocast(token.device.type, enabled=False):
            if query is None:
                h, alpha, mean = reader.merged(row, x)
            else:
                asked = query.reshape(-1, query.shape[-1]) * (gain * gain.shape[-1] ** -0.5)
                h, alpha, mean = reader.asked(row, x, asked)
        h = h.to(reader.dtype if stream is None else stream.dtype).view(reader.shape)
        ctx.form, ctx.shared, ctx.row = reader.form, reader.shared, row
        seen = [] if query is None else [query, gain, asked, *reader.seen()]
        ctx.save_for_backward(alpha, h if mean is None else mean, *seen)
        ctx.mean_saved = mean is not None
        ctx.mark_non_differentiable(alpha)
        return h, alpha

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh: Tensor, _: Any):
        alpha, state, *seen = ctx.saved_tensors
        form, shared, row = ctx.form, ctx.shared, ctx.row
        flat, c = dh.reshape(-1, dh.shape[-1]), 1 if form.scale == "convex" else form.counts[row]
        d_query = d_gain = None
        if seen:
            query, gain, asked, rms, *parts = seen
            g = torch.cat([dots(part, flat.to(alpha.dtype)) for part in parts], dim=1)
            rest = c * alpha * (g - (alpha * g).sum(dim=1, keepdim=True))  # ds (M, n)
            by_part = (rest * rms)[:, None].split([part.shape[1] for part in parts], dim=2)
            mixed = [mix(ds, part) for ds, part in zip(by_part, parts, strict=True)]
            d_asked = torch.cat(mixed, dim=1).sum(dim=1)  # (M, d)
            root = gain.shape[-1] ** -0.5
            d_query = (d_asked * (gain * root)).view(query.shape)
            d_gain = (d_asked * query.reshape(d_asked.shape)).sum(dim=0) * root
        else:
            rest = (flat * state.view(flat.shape).to(alpha.dtype)).sum(dim=-1) / (1 if ctx.mean_saved else c)  # delta
        shared.take(row, flat, alpha, rest)
        if seen:
            shared.ask(row, asked)
        return flat.new_zeros(()), dh if form.scale == "stream" else None, d_query, d_gain, None, None


@dataclass(frozen=True)
class Form:
    """What the backward pass needs to know of a bank."""

    scale: Scale
    counts: tuple[int, ...]  # n of every row
    learns: bool  # whether the queries want a gradient


@dataclass(frozen=True)
class Known:
    """What is kept of a source beside itself: RMS^-1 (M,) and, unless dynamic, its logits (M, readers)."""

    rms: Tensor
    logits: Tensor
    readers: range

    def logits_of(self, rows: range) -> Tensor:
        return self.logits[:, rows.start - self.readers.start : rows.stop - self.readers.start]


@dataclass(frozen=True)
class Shared:
    """What the routers `rows` have in common: the first `base` summaries, summed by each router's own weights."""

    rows: range
    base: int
    top: Tensor  # max s, (M, G)
    p: Tensor  # (M, G, base)
    z: Tensor  # (M, G)
    sums: Tensor  # (M, G, d) sum p_i v_i; `stream`: (M, G + 1, d) sum (p_i - 1) v_i, and last sum v_i


class TorchReader:
    """The sources of one forward pass, in buffers (M, slots, d)."""

    def __init__(self, bank: "RouterBank", v_0: Tensor, t_embedding: Tensor | None, dtype: torch.dtype):
        self.bank, self.shape, self.dtype = bank, v_0.shape, dtype
        self.wide = torch.promote_types(dtype, torch.float32)
        tokens, width = v_0[..., 0].numel(), v_0.shape[-1]
        self.size, self.last = bank.chunk_size, bank.routers[-1]
        self.shared = Pass(tokens, len(bank.routers), width)
        self.group: Shared | None = None
        self.sums = v_0.new_empty(tokens, -(-bank.num_sublayers // self.size), width, dtype=dtype)
        self.outs = self.sums[:, :0]
        self.sum_known: list[Known] = []  # of the summaries; of the chunk's outputs:
        self.out_known: list[Known] = []
        self.token, self.folded, learns = v_0.new_zeros(()), None, False
        if bank.config.query != "dynamic":
            folded = bank.folded_queries(t_embedding, self.wide)
            self.folded, learns = folded.detach(), folded.requires_grad
            self.token = _Begin.apply(folded, self.shared)
        counts = tuple(bank.layout[router].count for router in bank.routers)
        self.form = Form(bank.config.scale, counts, learns)

    def summary(self, v: Tensor) -> None:
        """c_n of the chunk that ends here; the chunk's outputs are read no more."""
        self.outs, self.out_known = self.sums[:, :0], []
        self._register(v, True)

    def output(self, v: Tensor) -> None:
        self._register(v, False)

    def _register(self, v: Tensor, summary: bool) -> None:
        if len(self._readers(summary)):
            self.token = _Source.apply(v, self.token, self, summary)

    def _chunk_end(self) -> int:
        """The last sublayer of the chunk that is being built."""
        return min(len(self.sum_known) * self.size, self.bank.num_sublayers)

    def _readers(self, summary: bool) -> range:
        """Rows of the routers that read the next source of a kind."""
        first, last = self.bank.routers[0], self.last
        taken = len(self.sum_known)
        after = taken * self.size if summary else (taken - 1) * self.size + len(self.out_known) + 1
        if not summary and self._chunk_end() < self.bank.num_sublayers:
            last = min(last, self._chunk_end())
        return range(max(after + 1, first) - first, last + 1 - first)

    def store(self, v: Tensor, summary: bool) -> tuple[Tensor, Tensor, Tensor | None, range, int]:
        """Keeps v: its slot (M, d), RMS^-1 (M,), the folded queries of its readers, their rows, its column in alpha."""
        rows, known = self._readers(summary), self.sum_known if summary else self.out_known
        column = len(self.sum_known) + (0 if summary else len(self.out_known))
        if not summary and not known:
            self.outs = v.new_empty(len(self.sums), len(rows), v.shape[-1])
        slot = (self.sums if summary else self.outs)[:, len(known)]
        slot.copy_(v.reshape(slot.shape))
        wide = v.to(self.wide)
        rms = (torch.linalg.vector_norm(wide, dim=-1).square() / v.shape[-1] + EPS).rsqrt()  # (B, T)
        folded, logits = None, wide[..., :0]
        if self.folded is not None:
            folded = self.folded[..., rows.start : rows.stop, :]
            logits = (wide @ folded.transpose(-1, -2)) * rms[..., None]
        known.append(Known(rms.flatten(), logits.flatten(0, 1), rows))
        return slot, rms.flatten(), folded, rows, column

    def route(
        self, router: int, previous: Tensor, stream: Tensor | None, observed: bool
    ) -> tuple[Tensor, Tensor | None]:
        """h_l, and alpha (n, B, T) if observed."""
        query, row = None, router - self.bank.routers[0]
        if self.folded is None:
            query = self.bank.query_of(router, None, previous)
        h, alpha = _Route.apply(self.token, stream, query, self.bank.gain[self.bank.row(router)], self, row)
        return h, alpha.T.unflatten(1, self.shape[:2]) if observed else None

    def snapshot(self) -> "TorchReader":
        twin = copy.copy(self)
        twin.sum_known, twin.out_known, twin.group = list(self.sum_known), list(self.out_known), None
        return twin

    def _group_of(self, row: int) -> range:
        """Rows from `row` to the end of its group: its chunk; DENSE_GROUP routers where chunks are single sublayers."""
        if self.size == 1:
            return range(row, min(row - row % DENSE_GROUP + DENSE_GROUP, len(self.bank.routers)))
        end = self._chunk_end()
        return range(
            row, (self.last if end == self.bank.num_sublayers else min(end, self.last)) + 1 - self.bank.routers[0]
        )

    def _share(self, row: int) -> Shared:
        rows, base = self._group_of(row), len(self.sum_known)
        shared = [one.logits_of(rows) for one in self.sum_known]
        s = torch.stack(shared, dim=2)  # (M, G, base)
        top = s.amax(dim=2)
        p = (s - top[..., None]).exp()
        w = torch.cat([p - 1, torch.ones_like(p[:, :1])], dim=1) if self.form.scale == "stream" else p
        return Shared(rows, base, top, p, p.sum(dim=2), mix(w, self.sums[:, :base]))

    def merged(self, row: int, x: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """h (M, d) of a router whose logits are known, alpha (M, n), and sum alpha_i v_i where h does not tell it."""
        if self.group is None or row not in self.group.rows:
            self.group = self._share(row)
        group, n = self.group, self.form.counts[row]
        one = row - group.rows.start
        p, z, r, fresh = group.p[:, one], group.z[:, one], torch.ones_like(group.z[:, one]), None
        newer = self.sum_known[group.base :] + self.out_known
        if newer:
            s = torch.cat([one.logits_of(range(row, row + 1)) for one in newer], dim=1)
            top = torch.maximum(group.top[:, one], s.amax(dim=1))
            r, fresh = (group.top[:, one] - top).exp(), (s - top[:, None]).exp()
            p, z = torch.cat([p * r[:, None], fresh], dim=1), z * r + fresh.sum(dim=1)
        alpha, shared = p / z[:, None], group.sums[:, one]
        if self.form.scale != "stream":
            c = n if self.form.scale == "count" else 1
            h = shared * (c * r / z)[:, None]
            return self._add_newer(h, c * alpha[:, group.base :], group.base), alpha, None
        assert x is not None
        total = group.sums[:, -1]
        h = torch.addcmul(x, shared, (n * r / z)[:, None]).addcmul_(total, ((n * r - z) / z)[:, None])
        mean = None
        if self.bank.config.summary == "last" and self.size > 1:  # then x is not the sum of the sources
            mean = self._add_newer((shared + total) * (r / z)[:, None], alpha[:, group.base :], group.base)
        if fresh is not None:
            self._add_newer(h, (n * fresh - z[:, None]) / z[:, None], group.base)
        return h, alpha, mean

    def _add_newer(self, h: Tensor, w: Tensor, base: int) -> Tensor:
        """h += sum_i w_i v_i over the summaries after the first `base` and the chunk's outputs, in place."""
        summaries = len(self.sum_known) - base
        for part, weights in (
            (self.sums[:, base : base + summaries], w[:, :summaries]),
            (self.outs[:, : len(self.out_known)], w[:, summaries:]),
        ):
            if part.shape[1]:
                h += mix(weights[:, None], part)[:, 0]
        return h

    def seen(self) -> list[Tensor]:
        """RMS^-1 (M, n) and the sources of the next router, (M, chunks, d) and (M, outputs, d)."""
        rms = torch.stack([one.rms for one in self.sum_known + self.out_known], dim=1)
        return [rms, self.sums[:, : len(self.sum_known)].data, self.outs[:, : len(self.out_known)].data]

    def asked(self, row: int, x: Tensor | None, asked: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """`merged` for queries that come with the token: asked (M, d), gain and 1 / sqrt(d) folded in."""
        rms, *parts = self.seen()
        n = rms.shape[1]
        s = torch.cat([dots(part, asked) for part in parts], dim=1) * rms
        p = (s - s.amax(dim=1, keepdim=True)).exp()
        z = p.sum(dim=1, keepdim=True)
        scale = self.form.scale
        w = (n * p - z) / z if scale == "stream" else (n if scale == "count" else 1) * p / z
        h = torch.zeros_like(asked) if x is None else x.clone()
        return self._add_newer(h, w, 0), p / z, asked[:, :0]
