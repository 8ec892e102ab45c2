"""The router in plain PyTorch, fast everywhere: each source's norm and logits once, grouped reads, gathered gradients.

Legend: M = B T tokens, d width, C summaries, S outputs of a chunk, R routers of the bank, n sources of one router,
G routers of a group. s logits, p = exp(s - max s), Z = sum p, alpha = p / Z; all in promote_types(dtype, float32).

A source's RMS, and for static and timestep queries its logits for all later routers, are computed once, when it is
produced. The routers of a group read the sources that they share in one pass and merge with the newer ones by
log-sum-exp. For `stream`, sum (p_i - 1) v_i and sum v_i are kept apart: equal logits then add exactly nothing.
gather.py has the backward pass.
"""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from dmd_dar.routing.ops.gather import Begin, Form, Passes, Route, Source, add_mix, dots, mix
from dmd_dar.routing.ops.naive import EPS
from dmd_dar.routing.router import RouterBank

DENSE_GROUP = 8  # routers that share a read where every output is a summary


@dataclass(frozen=True)
class Known:
    """What is kept of a source beside itself: RMS^-1 (M,) and, unless dynamic, its logits (M, readers)."""

    rms: Tensor
    logits: Tensor
    readers: range

    def logits_of(self, rows: range) -> Tensor:
        return self.logits[:, rows.start - self.readers.start : rows.stop - self.readers.start]


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
        self.sum_known: list[Known] = []  # of the summaries; of the chunk's outputs:
        self.out_known: list[Known] = []
        self.tracks = torch.is_grad_enabled()
        held = bank(v_0.device)
        self.gains = held["gain"].unbind()
        self.token, self.folded, learns = v_0.new_zeros(()), None, False
        if bank.config.query != "dynamic":
            folded = bank.folded_queries(held, t_embedding, self.wide)
            self.folded, learns = folded.detach(), folded.requires_grad
            self.token = Begin.apply(folded, self.passes)
        else:
            self.w_q = held["w_q"].unbind()  # one gradient of the parameter's size, not one for each router
        counts = tuple(bank.layout[router].count for router in bank.routers)
        self.form = Form(bank.config.scale, counts, learns)

    def summary(self, v: Tensor) -> None:
        """c_n of the chunk that ends here; the chunk's outputs are read no more."""
        self.outs, self.out_known = self.sums[:, :0], []
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

    def _share(self, row: int) -> GroupSums:
        rows, base = self._group_of(row), len(self.sum_known)
        s = torch.stack([one.logits_of(rows) for one in self.sum_known], dim=2)  # (M, G, base)
        top = s.amax(dim=2)
        p = (s - top[..., None]).exp()
        w = torch.cat([p - 1, torch.ones_like(p[:, :1])], dim=1) if self.form.scale == "stream" else p
        return GroupSums(rows, base, top, p, p.sum(dim=2), mix(w, self.sums[:, :base]))

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
            add_mix(h[:, None], weights[:, None], part)
        return h

    def seen(self) -> list[Tensor]:
        """RMS^-1 (M, n) and the sources of the next router, (M, chunks, d) and (M, outputs, d)."""
        rms = torch.stack([one.rms for one in self.sum_known + self.out_known], dim=1)
        return [rms, self.sums[:, : len(self.sum_known)].data, self.outs[:, : len(self.out_known)].data]

    def mixed(self, row: int, x: Tensor | None, folded: Tensor) -> tuple[Tensor, Tensor]:
        """h (M, d) and alpha (M, n) of a router whose query comes with the token: folded (M, d)."""
        rms, *parts = self.seen()
        n = rms.shape[1]
        s = torch.cat([dots(part, folded) for part in parts], dim=1) * rms
        p = (s - s.amax(dim=1, keepdim=True)).exp()
        z = p.sum(dim=1, keepdim=True)
        scale = self.form.scale
        w = (n * p - z) / z if scale == "stream" else (n if scale == "count" else 1) * p / z
        h = torch.zeros_like(folded) if x is None else x.clone()
        return self._add_newer(h, w, 0), p / z
