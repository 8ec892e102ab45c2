"""The router in plain PyTorch for passes without gradients, such as sampling: no autograd, and few operations.

Legend: M = B T tokens, d width, n sources of one router, slots the most that any router reads. All arithmetic is in
promote_types(dtype, float32). What a router reads is the first n slots: the summaries, then the outputs of the chunk
that is being built, which the next summary replaces.
"""

import copy
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from dmd_dar.routing.ops.gather import SMALL, add_mix
from dmd_dar.routing.ops.naive import EPS
from dmd_dar.routing.router import RouterBank

FEW = 256  # tokens below which a CPU spends more on starting an operation than on its numbers


class ForwardReader:
    """The sources of one forward pass that nothing is differentiated through; `static` and `timestep` queries.

    A source's logits for all later routers are computed once, when it is produced.
    """

    def __init__(self, bank: RouterBank, v_0: Tensor, t_embedding: Tensor | None, dtype: torch.dtype):
        self.bank, self.shape, self.dtype = bank, v_0.shape, dtype
        self.wide = torch.promote_types(dtype, torch.float32)
        self.first, self.counts = bank.routers[0], [bank.layout[router].count for router in bank.routers]
        tokens, width, slots = v_0[..., 0].numel(), v_0.shape[-1], max(self.counts)
        folded = bank.folded_queries(bank(v_0.device), t_embedding, self.wide)
        self.queries = folded.transpose(-1, -2) * width**0.5  # (d, R) or (B, d, R); keys are v / |v| sqrt(d)
        self.floor = torch.full((), EPS * width, dtype=self.wide, device=v_0.device)
        self.sources = v_0.new_empty(slots, tokens, width, dtype=dtype)
        self.logits = v_0.new_empty(slots, *self.shape[:2], len(self.counts), dtype=self.wide)
        self.source_of, self.logits_of = self.sources.view(slots, *self.shape).unbind(), self.logits.unbind()
        self.few = tokens < FEW and dtype == self.wide
        self.least = min(-(-SMALL // width), slots) if self.few else 0
        self.sources[: self.least] = 0  # they may be read, with weight 0, before there is a source
        self.summaries = self.outputs = 0
        self.cast = torch.is_autocast_enabled(v_0.device.type)

    def summary(self, v: Tensor) -> None:
        """c_n of the chunk that ends here; the chunk's outputs are read no more."""
        self._store(v, self.summaries, self.summaries * self.bank.chunk_size, len(self.counts))
        self.summaries, self.outputs = self.summaries + 1, 0

    def output(self, v: Tensor) -> None:
        """An output of the chunk that is being built: routers up to the one behind its end may read it."""
        done = (self.summaries - 1) * self.bank.chunk_size + self.outputs + 1
        self._store(v, self.summaries + self.outputs, done, self.summaries * self.bank.chunk_size + 2 - self.first)
        self.outputs += 1

    def _store(self, v: Tensor, slot: int, done: int, stop: int) -> None:
        """Keep v (B, T, d), and its logits for the routers behind sublayer `done` whose rows are below `stop`."""
        rows = slice(max(done + 1 - self.first, 0), min(stop, len(self.counts)))
        if slot == len(self.sources) or rows.start >= rows.stop:
            return  # nothing reads it
        self.source_of[slot].copy_(v)
        wide = v.to(self.wide)
        size = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        scale = torch.addcmul(self.floor, size, size).rsqrt_()  # RMSNorm's 1 / (sqrt(d) RMS)
        with self._exact():
            products = wide @ self.queries[..., rows]  # (B, T, readers)
        torch.mul(products, scale, out=self.logits_of[slot][..., rows])

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
        row = router - self.first
        alpha = self.logits[: self.counts[row], ..., row].softmax(dim=0)  # (n, B, T)
        x = alpha.new_zeros(()).expand(self.shape) if stream is None else stream.to(self.wide)
        with self._exact():
            h = self._mixed(alpha.flatten(1).T, x.reshape(-1, 1, self.shape[-1]))
        dtype = self.dtype if stream is None else stream.dtype
        return h.to(dtype).view(self.shape), alpha if observed else None

    def _mixed(self, alpha: Tensor, x: Tensor) -> Tensor:
        """x + sum_i w_i v_i, (M, 1, d), for alpha (M, n)."""
        (tokens, n), scale = alpha.shape, self.bank.config.scale
        slots, c = max(n, self.least), 1 if scale == "convex" else n
        padded = alpha.new_zeros(tokens, slots) if slots > n else alpha.new_empty(tokens, n)
        # softmax gives equal logits the 1 / n that is taken off, to the bit
        torch.sub(alpha, 1 / n if scale == "stream" else 0, out=padded[:, :n])
        w, v = padded[:, None], self.sources[:slots].transpose(0, 1)  # (M, 1, slots) of w / c, (M, slots, d)
        if self.few or (w.dtype == v.dtype and n * v.shape[2] >= SMALL):
            return torch.baddbmm(x, w, v, alpha=c)
        w *= c
        return add_mix(torch.addcmul(x, w[:, :, :1], v[:, :1].to(w.dtype)), w[:, :, 1:], v[:, 1:])

    def snapshot(self) -> "ForwardReader":
        return copy.copy(self)
