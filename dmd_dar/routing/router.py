"""The bank of routers of one network: their queries and key gains, and the history that they read."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from dmd_dar.routing import ops
from dmd_dar.routing.layout import RoutingConfig, reads

Observer = Callable[[int, Tensor], None]  # (router l, alpha (n, B, T)): sees the weights, changes nothing


class RouterBank(nn.Module):
    """Stacked parameters of all routers, arXiv:2605.20708 Eq. 5-6.

    Row r belongs to router l = r + 2. `gain` (R, d) starts at one; all that enters the query starts at zero:
    `query` (R, d) for static and timestep, `gate` (R, d) on the shared t embedding for timestep, `w_q` (R, d, d) for
    dynamic. With `final: reuse_last` the head's router uses the row of router L.
    """

    def __init__(self, config: RoutingConfig, num_sublayers: int, width: int):
        super().__init__()
        if config.query == "residual":
            raise ValueError("a residual network has no routers: build the bank only for static, timestep or dynamic")
        self.config, self.num_sublayers = config, num_sublayers
        self.layout = reads(num_sublayers, config.chunk_size)
        rows = num_sublayers - (config.final == "reuse_last")
        self.gain = nn.Parameter(torch.ones(rows, width))
        if config.query == "dynamic":
            self.w_q = nn.Parameter(torch.zeros(rows, width, width))
        else:
            self.query = nn.Parameter(torch.zeros(rows, width))
        if config.query == "timestep":
            self.gate = nn.Parameter(torch.zeros(rows, width))

    def row(self, router: int) -> int:
        return min(router - 2, self.gain.shape[0] - 1)

    def query_of(self, router: int, t_embedding: Tensor, previous: Tensor) -> Tensor:
        """q_l, Eq. 6: (d,) static, (B, 1, d) timestep, (B, T, d) dynamic. t_embedding (B, d); previous v_{l-1}."""
        row = self.row(router)
        if self.config.query == "dynamic":
            dtype = torch.promote_types(previous.dtype, torch.float32)
            with torch.autocast(previous.device.type, enabled=False):
                return nn.functional.linear(previous.to(dtype), self.w_q[row].to(dtype))
        if self.config.query == "static":
            return self.query[row]
        return (self.query[row] + self.gate[row] * t_embedding)[:, None]

    @property
    def at_start(self) -> bool:
        """Whether all queries are zero, so that the sources weigh the same."""
        return not any(parameter.any() for name, parameter in self.named_parameters() if name != "gain")

    @torch.no_grad()
    def reset(self) -> None:
        """Back to the start: zero queries, unit gains; the network then computes what it did before routing."""
        for name, parameter in self.named_parameters():
            parameter.fill_(1.0 if name == "gain" else 0.0)


class History:
    """The sources of one forward pass. `append` each sublayer's output, `state` gives the next sublayer's input."""

    def __init__(self, bank: RouterBank, v_0: Tensor, t_embedding: Tensor, observe: Observer | None = None):
        self.bank, self.t_embedding, self.observe = bank, t_embedding, observe
        self.summaries, self.outputs = [v_0], []  # c_0 .. ; v_1 .. of the chunk being built
        self.stream, self.previous, self.count = v_0, v_0, 0

    def append(self, v: Tensor) -> None:
        """Take v_l, (B, T, d), the output of sublayer l as it would be added to the stream."""
        config = self.bank.config
        if len(self.outputs) == config.chunk_size:
            self.outputs = []
        self.outputs.append(v)
        self.stream, self.previous, self.count = self.stream + v, v, self.count + 1
        if len(self.outputs) == config.chunk_size and self.count < self.bank.num_sublayers:
            self.summaries.append(self._sum_of_chunk() if config.summary == "sum" else v)

    def _sum_of_chunk(self) -> Tensor:
        dtype = torch.promote_types(self.previous.dtype, torch.float32)
        return torch.stack([v.to(dtype) for v in self.outputs]).sum(dim=0)

    def state(self) -> Tensor:
        """h_{l+1} after v_l, (B, T, d); v_0 itself before the first sublayer."""
        if self.count == 0:
            return self.stream
        bank, router = self.bank, self.count + 1
        read = bank.layout[router]
        sources = self.summaries[: read.chunks] + self.outputs[: read.count - read.chunks]
        query = bank.query_of(router, self.t_embedding, self.previous)
        gain = bank.gain[bank.row(router)]
        if self.observe is not None:
            self.observe(router, ops.weights(sources, query, gain))
        return ops.route(sources, query, gain, scale=bank.config.scale, stream=self.stream)
