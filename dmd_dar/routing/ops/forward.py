"""The router in plain PyTorch for passes without gradients, such as sampling: no autograd, and few operations.

Legend: M = B T tokens, d width, R routers, n sources of one router, slots the most that any router reads. All
arithmetic is in promote_types(dtype, float32). What a router reads is the first n slots: the summaries, then the
outputs of the chunk that is being built, which the next summary replaces. Its logits for the slots behind stay at -inf.
"""

import copy
import math
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from dmd_dar.routing.ops.gather import SMALL, add_mix
from dmd_dar.routing.ops.naive import EPS
from dmd_dar.routing.router import RouterBank

FEW = 256  # tokens below which a CPU spends more on starting an operation than on its numbers


def equal_weights(counts: tuple[int, ...], slots: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """For each router the weights (slots,) of equal logits: 1 / n for its n sources, 0 behind them."""
    table = [[1 / n] * n + [0.0] * (slots - n) for n in counts]
    return torch.tensor(table, dtype=dtype, device=device).unbind()


class ForwardReader:
    """The sources of one forward pass that nothing is differentiated through; `static` and `timestep` queries.

    A source's logits for all later routers are computed once, when it is produced.
    """

    def __init__(self, bank: RouterBank, v_0: Tensor, t_embedding: Tensor | None, dtype: torch.dtype):
        self.bank, self.shape, self.dtype = bank, v_0.shape, dtype
        self.wide = torch.promote_types(dtype, torch.float32)
        self.first, self.counts = bank.routers[0], tuple(bank.layout[router].count for router in bank.routers)
        (batch, length, width), slots = v_0.shape, max(self.counts)
        tokens, routers = batch * length, len(self.counts)
        folded = bank.folded_queries(bank(v_0.device), t_embedding, self.wide).expand(batch, -1, -1)
        self.queries = folded.transpose(1, 2).contiguous()  # (B, d, R)
        self.floor = torch.full((), EPS * width, dtype=self.wide, device=v_0.device)
        self.few = tokens < FEW and dtype == self.wide
        self.least = min(-(-SMALL // width), slots) if self.few else 0
        sources = v_0.new_empty(slots, tokens, width, dtype=dtype)
        sources[: self.least] = 0  # they may be read, with weight 0, before there is a source
        self.sources, self.source_of = sources.transpose(0, 1), sources.view(slots, *self.shape).unbind()
        logits = v_0.new_full((routers, slots, tokens), -math.inf, dtype=self.wide)
        self.logits = logits.unbind()  # of a router, (slots, M)
        self.logits_of = logits.view(routers, slots, batch, length).permute(1, 2, 3, 0).unbind()  # of a slot, (B, T, R)
        self.equal = equal_weights(self.counts, slots, self.wide, v_0.device) if bank.config.scale == "stream" else None
        self.summaries = self.outputs = 0
        self.cast = torch.is_autocast_enabled(v_0.device.type)

    def summary(self, v: Tensor) -> None:
        """c_n of the chunk that ends here; the chunk's outputs are read no more."""
        self._store(v, self.summaries, self.summaries * self.bank.chunk_size, len(self.counts))
        self.summaries, self.outputs = self.summaries + 1, 0

    def output(self, v: Tensor) -> None:
        """An output of the chunk that is being built: routers up to its end read it, in the last one the head's too."""
        end, size = self.summaries * self.bank.chunk_size, self.bank.chunk_size
        stop = end + 1 - self.first if end < self.bank.num_sublayers else len(self.counts)
        self._store(v, self.summaries + self.outputs, end - size + self.outputs + 1, stop)
        self.outputs += 1

    def _store(self, v: Tensor, slot: int, done: int, stop: int) -> None:
        """Keep v (B, T, d), and its logits for the routers behind sublayer `done` whose rows are below `stop`."""
        first, readers = max(done + 1 - self.first, 0), min(stop, len(self.counts))
        readers -= first
        if slot == len(self.source_of) or readers <= 0:
            return  # nothing reads it
        self.source_of[slot].copy_(v)
        wide = v.to(self.wide)
        size = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        scale = torch.addcmul(self.floor, size, size).rsqrt_()  # RMSNorm's 1 / (sqrt(d) RMS)
        with self._exact():
            products = torch.bmm(wide, self.queries.narrow(2, first, readers))  # (B, T, readers)
        torch.mul(products, scale, out=self.logits_of[slot].narrow(2, first, readers))

    def _exact(self) -> AbstractContextManager[object]:
        """Without autocast, where it is on."""
        return torch.autocast(self.sources.device.type, enabled=False) if self.cast else nullcontext()

    def route(
        self, router: int, previous: Tensor, stream: Tensor | None, observed: bool
    ) -> tuple[Tensor, Tensor | None]:
        """h_l, and alpha (n, B, T) if observed. RuntimeError with gradients: this pass has kept nothing for them."""
        if torch.is_grad_enabled():
            raise RuntimeError(
                "routing that began under torch.no_grad cannot go on with gradients: begin the forward with gradients"
                " enabled, or choose the backend naive"
            )
        row, width = router - self.first, self.shape[-1]
        alpha = self.logits[row].softmax(dim=0)  # (slots, M)
        x = alpha.new_zeros(()).expand(self.shape) if stream is None else stream.to(self.wide)
        with self._exact():
            h = self._mixed(row, alpha, x.reshape(-1, 1, width))
        h = h.to(self.dtype if stream is None else stream.dtype).view(self.shape)
        return h, alpha[: self.counts[row]].unflatten(1, self.shape[:2]) if observed else None

    def _mixed(self, row: int, alpha: Tensor, x: Tensor) -> Tensor:
        """x + sum_i w_i v_i, (M, 1, d), for alpha (slots, M)."""
        n = self.counts[row]
        c, slots = 1 if self.bank.config.scale == "convex" else n, max(n, self.least)
        w = alpha.new_empty(alpha.shape[::-1])  # of w / c, (M, slots)
        if self.equal is None:
            w.copy_(alpha.T)
        else:  # softmax gives equal logits the 1 / n that is taken off, to the bit
            torch.sub(alpha.T, self.equal[row], out=w)
        w, v = w.narrow(1, 0, slots)[:, None], self.sources.narrow(1, 0, slots)  # (M, 1, slots), (M, slots, d)
        if self.few or (w.dtype == v.dtype and n * v.shape[2] >= SMALL):
            return torch.baddbmm(x, w, v, alpha=c)
        w *= c
        return add_mix(torch.addcmul(x, w[:, :, :1], v[:, :1].to(w.dtype)), w[:, :, 1:], v[:, 1:])

    def snapshot(self) -> "ForwardReader":
        return copy.copy(self)
