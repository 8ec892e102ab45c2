"""The router in plain PyTorch, fast everywhere: each source's norm and logits once, grouped reads, gathered gradients.

Legend: M = B T tokens, d width, C summaries, S outputs of a chunk, R routers of the bank, n sources of one router,
G routers of a group. s logits, p = exp(s - max s), Z = sum p, alpha = p / Z; all in promote_types(dtype, float32).

A source's norm, and for static and timestep queries its logits for all later routers, are computed once, when it is
produced. Where every output is a summary, the routers of a group read the sources that they share in one pass and merge
with the newer ones by log-sum-exp; for `stream`, sum (p_i - 1) v_i and sum v_i are then kept apart. Routers of chunks
read few sources, each by itself. Either way equal logits add exactly nothing. gather.py has the backward pass.
"""

import copy
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dmd_dar.routing.ops.gather import Begin, Form, Passes, Route, Source, Stored, add_mix, dots, mix
from dmd_dar.routing.ops.naive import EPS
from dmd_dar.routing.router import RouterBank

DENSE_GROUP = 8  # routers that share a read where every output is a summary


@dataclass(frozen=True)
class GroupSums:
    """What the routers `rows` have in common: the first `base` summaries, summed by each router's own weights."""

    rows: range
    base: int
    top: Tensor  # max s, (M, G)
    p: Tensor  # (M, G, base)
    z: Tensor  # (M, G)
    sums: Tensor  # (M, G, d) sum p_i v_i; `stream`: (M, G + 1, d) sum (p_i - 1) v_i, and last sum v_i


class TorchReader:
    """The sources of one forward pass, in buffers (M, slots, d)."""

    def __init__(self, bank: RouterBank, v_0: Tensor, t_embedding: Tensor | None, dtype: torch.dtype):
        self.bank, self.shape, self.dtype = bank, v_0.shape, dtype
        self.wide = torch.promote_types(dtype, torch.float32)
        tokens, width = v_0[..., 0].numel(), v_0.shape[-1]
        self.size, self.last = bank.chunk_size, bank.routers[-1]
        self.passes = Passes(tokens, len(bank.routers), width)
        self.group: GroupSums | None = None
        self.sums = v_0.new_empty(tokens, -(-bank.num_sublayers // self.size), width, dtype=dtype)
        self.outs = self.sums[:, :0]
        self.sum_r: list[Tensor] = []  # (|v|^2 + d eps)^-1/2 of the summaries, (M,); of the chunk's outputs:
        self.out_r: list[Tensor] = []
        self.floor = torch.full((), EPS * width, dtype=self.wide, device=v_0.device)
        self.tracks = torch.is_grad_enabled()
        held = bank(v_0.device)
        self.gains = held["gain"].unbind()
        counts = tuple(bank.layout[router].count for router in bank.routers)
        self.token, self.folded, learns = v_0.new_zeros(()), None, False
        if bank.config.query != "dynamic":
            folded = bank.folded_queries(held, t_embedding, self.wide)
            self.folded, learns = folded.detach(), folded.requires_grad
            self.token = Begin.apply(folded, self.passes)
            self._begin_logits(max(counts))
        else:
            self.w_q = held["w_q"].unbind()  # one gradient of the parameter's size, not one for each router
        numbers = torch.tensor(counts, dtype=self.wide, device=v_0.device)
        self.form = Form(bank.config.scale, counts, numbers, learns)

    def _begin_logits(self, slots: int) -> None:
        """(R, slots, M), the summaries first and then the chunk's outputs; -inf where a router reads nothing."""
        batch, length, routers, folded = *self.shape[:2], len(self.bank.routers), self.folded
        assert folded is not None
        self.columns = folded.expand(batch, -1, -1).transpose(1, 2).contiguous()  # (B, d, R)
        self.logits = folded.new_full((routers, slots, batch * length), -math.inf)
        self.logits_of = self.logits.view(routers, slots, batch, length).permute(1, 2, 3, 0).unbind()  # (B, T, R) each

    def summary(self, v: Tensor) -> None:
        """c_n of the chunk that ends here; the chunk's outputs are read no more."""
        self.outs, self.out_r = self.sums[:, :0], []
        self._register(v, True)

    def output(self, v: Tensor) -> None:
        self._register(v, False)

    def _register(self, v: Tensor, summary: bool) -> None:
        if not len(self._readers(summary)):
            return
        if self.tracks and not torch.is_grad_enabled():  # a part without gradients: its outputs are constants
            with torch.enable_grad():
                self.token = Source.apply(v.detach(), self.token, self, summary)
        else:
            self.token = Source.apply(v, self.token, self, summary)

    def _chunk_end(self) -> int:
        """The last sublayer of the chunk that is being built."""
        return min(len(self.sum_r) * self.size, self.bank.num_sublayers)

    def _readers(self, summary: bool) -> range:
        """Rows of the routers that read the next source of a kind."""
        first, last = self.bank.routers[0], self.last
        taken = len(self.sum_r)
        after = taken * self.size if summary else (taken - 1) * self.size + len(self.out_r) + 1
        if not summary and self._chunk_end() < self.bank.num_sublayers:
            last = min(last, self._chunk_end())
        return range(max(after + 1, first) - first, last + 1 - first)

    def store(self, v: Tensor, summary: bool) -> Stored:
        """Keeps v, and its logits for its readers."""
        rows, known = self._readers(summary), self.sum_r if summary else self.out_r
        column = len(self.sum_r) + (0 if summary else len(self.out_r))
        if not summary and not known:
            self.outs = v.new_empty(len(self.sums), len(rows), v.shape[-1])
        slot = (self.sums if summary else self.outs)[:, len(known)]
        slot.copy_(v.reshape(slot.shape))
        wide = v.to(self.wide)
        size = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        r = torch.addcmul(self.floor, size, size).rsqrt_()  # (B, T, 1)
        known.append(r.view(-1))
        if self.folded is None:
            return Stored(slot, known[-1], rows, column)
        products = torch.bmm(wide, self.columns.narrow(2, rows.start, len(rows)))
        torch.mul(products, r, out=self.logits_of[column].narrow(2, rows.start, len(rows)))
        of_readers = slice(rows.start, rows.stop)
        return Stored(slot, known[-1], rows, column, self.folded[..., of_readers, :], self.logits[of_readers, column])

    def route(
        self, router: int, previous: Tensor, stream: Tensor | None, observed: bool
    ) -> tuple[Tensor, Tensor | None]:
        """h_l, and alpha (n, B, T) if observed.

        RuntimeError for gradients in a pass that began without them: it has kept nothing for them.
        """
        if torch.is_grad_enabled() and not self.tracks:
            raise RuntimeError(
                "routing that began under torch.no_grad cannot go on with gradients: begin the forward with gradients"
                " enabled, or choose the backend naive"
            )
        query, row = None, router - self.bank.routers[0]
        if self.folded is None:
            query = self.bank.dynamic_query(self.w_q[self.bank.row(router)], previous)
        h, alpha = Route.apply(self.token, stream, query, self.gains[self.bank.row(router)], self, row)
        return h, alpha.unflatten(1, self.shape[:2]) if observed else None

    def snapshot(self) -> "TorchReader":
        twin = copy.copy(self)
        twin.sum_r, twin.out_r, twin.group = list(self.sum_r), list(self.out_r), None
        return twin

    def _group_of(self, row: int) -> range:
        """Rows from `row` to the end of its group."""
        return range(row, min(row - row % DENSE_GROUP + DENSE_GROUP, len(self.bank.routers)))

    def _share(self, row: int) -> GroupSums:
        rows, base = self._group_of(row), len(self.sum_r)
        s = self.logits[rows.start : rows.stop, :base].permute(2, 0, 1).contiguous()  # (M, G, base)
        top = s.amax(dim=2)
        p = (s - top[..., None]).exp()
        w = torch.cat([p - 1, torch.ones_like(p[:, :1])], dim=1) if self.form.scale == "stream" else p
        return GroupSums(rows, base, top, p, p.sum(dim=2), mix(w, self.sums[:, :base]))

    def merged(self, row: int, x: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """h (M, d) of a router whose logits are known, alpha (n, M), and sum alpha_i v_i where h does not tell it."""
        if self.size == 1:
            h, alpha = self._grouped(row, x)
            return h, alpha.T, None
        alpha, mean = self.logits[row].softmax(dim=0)[: self.form.counts[row]], None
        if x is not None and self.bank.config.summary == "last":  # then x is not the sum of the sources
            mean = self._add_newer(torch.zeros_like(x), alpha.T, 0)
        return self._summed(alpha.T, x), alpha, mean

    def _summed(self, alpha: Tensor, x: Tensor | None) -> Tensor:
        """h (M, d) for alpha (M, n) over all sources."""
        n, w = alpha.shape[1], alpha.new_empty(alpha.shape)
        if x is None:
            torch.mul(alpha, n if self.form.scale == "count" else 1, out=w)
            return self._add_newer(alpha.new_zeros(len(alpha), self.shape[-1]), w, 0)
        torch.sub(alpha, 1 / n, out=w)  # softmax gives equal logits this 1 / n, to the bit
        return self._add_newer(x.clone(), w.mul_(n), 0)

    def _grouped(self, row: int, x: Tensor | None) -> tuple[Tensor, Tensor]:
        """h (M, d) and alpha (M, n) of a router whose group reads its older sources together."""
        if self.group is None or row not in self.group.rows:
            self.group = self._share(row)
        group, n = self.group, self.form.counts[row]
        one = row - group.rows.start
        p, z, r, fresh = group.p[:, one], group.z[:, one], torch.ones_like(group.z[:, one]), None
        if n > group.base:
            s = self.logits[row, group.base : n].T
            top = torch.maximum(group.top[:, one], s.amax(dim=1))
            r, fresh = (group.top[:, one] - top).exp(), (s - top[:, None]).exp()
            p, z = torch.cat([p * r[:, None], fresh], dim=1), z * r + fresh.sum(dim=1)
        alpha, shared = p / z[:, None], group.sums[:, one]
        if x is None:
            c = n if self.form.scale == "count" else 1
            return self._add_newer(shared * (c * r / z)[:, None], c * alpha[:, group.base :], group.base), alpha
        total = group.sums[:, -1]
        h = torch.addcmul(x, shared, (n * r / z)[:, None]).addcmul_(total, ((n * r - z) / z)[:, None])
        if fresh is not None:
            self._add_newer(h, (n * fresh - z[:, None]) / z[:, None], group.base)
        return h, alpha

    def _add_newer(self, h: Tensor, w: Tensor, base: int) -> Tensor:
        """h += sum_i w_i v_i over the summaries after the first `base` and the chunk's outputs, in place."""
        summaries = len(self.sum_r) - base
        for part, weights in (
            (self.sums[:, base : base + summaries], w[:, :summaries]),
            (self.outs[:, : len(self.out_r)], w[:, summaries:]),
        ):
            add_mix(h[:, None], weights[:, None], part)
        return h

    def seen(self) -> list[Tensor]:
        """r (M, n) and the sources of the next router, (M, chunks, d) and (M, outputs, d)."""
        r = torch.stack(self.sum_r + self.out_r, dim=1)
        return [r, self.sums[:, : len(self.sum_r)].data, self.outs[:, : len(self.out_r)].data]

    def mixed(self, x: Tensor | None, folded: Tensor) -> tuple[Tensor, Tensor]:
        """h (M, d) and alpha (n, M) of a router whose query comes with the token: folded (M, d)."""
        r, *parts = self.seen()
        alpha = (torch.cat([dots(part, folded) for part in parts], dim=1) * r).softmax(dim=1)
        return self._summed(alpha, x), alpha.T
