"""The sources of one forward pass, and the states that routers build from them."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor

from dmd_dar.routing import ops
from dmd_dar.routing.router import RouterBank

Observer = Callable[[int, Tensor], None]  # (router l, alpha (n, B, T)): sees the weights, changes nothing


class History:
    """`append` each sublayer's output, `state` gives the next sublayer's input (arXiv:2605.20708 Eq. 5-7).

    v_0 (B, T, d); t_embedding (B, d), for `timestep` queries only. Sources are kept in the dtype that the network
    computes in: autocast's where it is on, else v_0's. A `joinable` history keeps its sources for `joined`.
    """

    def __init__(
        self,
        bank: RouterBank,
        v_0: Tensor,
        t_embedding: Tensor | None = None,
        observe: Observer | None = None,
        joinable: bool = False,
    ):
        self.bank, self.observe = bank, observe
        autocast = torch.is_autocast_enabled(v_0.device.type)
        self.dtype = torch.get_autocast_dtype(v_0.device.type) if autocast else v_0.dtype
        self.reader = ops.reader(bank, v_0, t_embedding, self.dtype)
        self.stream, self.previous, self.partial, self.count = v_0, v_0, None, 0
        self.kept: list[tuple[str, Tensor]] | None = [] if joinable else None
        self._take("summary", v_0)

    def append(self, v: Tensor, stream: Tensor | None = None) -> None:
        """Take v_l (B, T, d), the output of sublayer l as it would be added to the stream.

        `stream`: x_{l+1} where the network keeps it itself; otherwise v_l is added here.
        """
        config = self.bank.config
        if self.count == self.bank.num_sublayers:
            raise ValueError(f"the bank has routers for {self.count} sublayers and got the output of one more")
        self.count, self.previous = self.count + 1, v
        if config.scale == "stream":
            self.stream = self.stream + v if stream is None else stream
        summed = config.summary == "sum" and self.bank.chunk_size > 1
        if summed:
            wide = torch.promote_types(v.dtype, torch.float32)
            self.partial = v.to(wide) if self.partial is None else self.partial + v
        if self.count % self.bank.chunk_size or self.count == self.bank.num_sublayers:
            self._take("output", v)
            return
        self._take("summary", v if self.partial is None else self.partial)
        self.partial = None

    def _take(self, kind: str, v: Tensor) -> None:
        if self.kept is not None:
            self.kept = [pair for pair in self.kept if kind == "output" or pair[0] == "summary"] + [(kind, v)]
        (self.reader.summary if kind == "summary" else self.reader.output)(v.to(self.dtype))

    def state(self) -> Tensor:
        """h_{l+1} after v_l, (B, T, d); v_0 itself before the first sublayer."""
        if self.count == 0:
            return self.stream
        router = self.count + 1
        stream = self.stream if self.bank.config.scale == "stream" else None
        h, alpha = self.reader.route(router, self.previous, stream, self.observe is not None)
        if self.observe is not None and alpha is not None:
            self.observe(router, alpha.detach())
        return h

    def snapshot(self) -> "History":
        """The state of the pass as it is now, for computing a part of it again; not for other outputs from here on.

        Buffers are shared: what follows a snapshot must be what follows the history itself.
        """
        twin = copy.copy(self)
        twin.observe = None  # what is computed again was seen before
        twin.kept = None if self.kept is None else list(self.kept)
        twin.reader = self.reader.snapshot()
        if self.bank.config.query != "dynamic":
            twin.previous = self.stream  # nothing reads it: v_l need not stay alive
        return twin

    @classmethod
    def joined(cls, a: "History", b: "History", bank: RouterBank, t_embedding: Tensor | None = None) -> "History":
        """The history of two token streams concatenated, a's tokens first; both joinable and equally far.

        `bank` holds the routers from here on; its layout counts on from the sublayers before.
        Raises ValueError where the streams differ in what they have taken.
        """
        if a.kept is None or b.kept is None or a.count != b.count or len(a.kept) != len(b.kept):
            raise ValueError(f"histories to join must be joinable and equally far: {a.count} and {b.count} sublayers")

        def both(x: Tensor, y: Tensor) -> Tensor:
            return torch.cat([x, y.to(x.dtype)], dim=1)

        ((_, x), (_, y)), *later = zip(a.kept, b.kept, strict=True)
        joint = cls(bank, both(x, y), t_embedding, a.observe)
        for (kind, x), (_, y) in later:
            joint._take(kind, both(x, y))
        joint.stream, joint.previous = both(a.stream, b.stream), both(a.previous, b.previous)
        joint.partial = None if a.partial is None or b.partial is None else both(a.partial, b.partial)
        joint.count = a.count
        return joint
