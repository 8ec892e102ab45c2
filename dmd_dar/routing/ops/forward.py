"""The router in plain PyTorch for passes without gradients, such as sampling: no autograd, and few operations.

Legend: M = B T tokens, d width, n sources of one router, slots the most that any router reads. All arithmetic is in
promote_types(dtype, float32). What a router reads is the first n slots: the summaries, then the outputs of the chunk
that is being built, which the next summary replaces.
"""

import copy
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from dmd_dar.routing.ops.gather import add_mix
from dmd_dar.routing.ops.naive import EPS
from dmd_dar.routing.router import RouterBank


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
        self.sources = v_0.new_empty(tokens, slots, width, dtype=dtype)
        self.logits = v_0.new_empty(tokens, slots, len(self.counts), dtype=self.wide)
        self.summaries = self.outputs = self.taken = 0
        self.cast = torch.is_autocast_enabled(v_0.device.type)

    def summary(self, v: Tensor) -> None:
        """c_n of the chunk that ends here; the chunk's outputs are read no more."""
        self._store(v, self.summaries, len(self.counts))
        self.summaries, self.outputs = self.summaries + 1, 0

    def output(self, v: Tensor) -> None:
        """An output of the chunk that is being built: routers up to the one behind its end may read it."""
        self._store(v, self.summaries + self.outputs, self.summaries * self.bank.chunk_size + 2 - self.first)
        self.outputs += 1

    def _store(self, v: Tensor, slot: int, stop: int) -> None:
        """Keep v (B, T, d), and its logits for the routers still to come whose rows are below `stop`."""
        rows = slice(max(self.taken + 1 - self.first, 0), min(stop, len(self.counts)))  # the next is router taken + 1
        self.taken += 1
        if slot == self.sources.shape[1] or rows.start >= rows.stop:
            return  # nothing reads it
        self.sources[:, slot].view(v.shape).copy_(v)
        wide = v.to(self.wide)
        size = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        scale = torch.addcmul(self.floor, size, size).rsqrt_()  # RMSNorm's 1 / (sqrt(d) RMS)
        with self._exact():
            products = wide @ self.queries[..., rows]  # (B, T, readers)
        torch.mul(products, scale, out=self.logits[:, slot, rows].view(products.shape))

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
        n, scale = self.counts[row], self.bank.config.scale
        s = self.logits[:, :n, row]
        p = (s - s.amax(dim=1, keepdim=True)).exp_()  # (M, n)
        z = p.sum(dim=1, keepdim=True)
        alpha = p / z if observed else None
        if scale == "stream":
            assert stream is not None
            w, h = p.mul_(n).sub_(z).div_(z), stream.reshape(-1, 1, self.shape[-1]).to(self.wide, copy=True)
        else:
            w = p.div_(z if scale == "convex" else z / n)
            h = w.new_zeros(len(w), 1, self.shape[-1])
        with self._exact():
            h = add_mix(h, w[:, None], self.sources[:, :n])
        dtype = self.dtype if stream is None else stream.dtype
        return h.to(dtype).view(self.shape), None if alpha is None else alpha.T.unflatten(1, self.shape[:2])

    def snapshot(self) -> "ForwardReader":
        return copy.copy(self)
