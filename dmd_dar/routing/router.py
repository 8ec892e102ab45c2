"""The bank of routers of one network: their queries and key gains."""

import torch
from torch import Tensor, nn

from dmd_dar.routing.layout import RoutingConfig, chunk_length, reads


class RouterBank(nn.Module):
    """Stacked parameters of the routers of one token stream, arXiv:2605.20708 Eq. 5-6.

    `routers` are the l that exist, 2 .. L + 1 unless told otherwise; row r of every parameter is router
    routers[0] + r. `gain` (R, d) starts at one; all that enters the query starts at zero: `query` (R, d) for static
    and timestep, `gate` (R, d) on the shared t embedding for timestep, `w_q` (R, d, d) for dynamic. With
    `final: reuse_last` the head's router uses the row of router L.
    """

    def __init__(self, config: RoutingConfig, num_sublayers: int, width: int, routers: range | None = None):
        super().__init__()
        if config.query == "residual":
            raise ValueError("a residual network has no routers: build the bank only for static, timestep or dynamic")
        self.config, self.num_sublayers = config.resolved(num_sublayers), num_sublayers
        self.chunk_size = chunk_length(num_sublayers, config.chunk_size)
        self.layout = reads(num_sublayers, self.chunk_size)
        self.routers = range(2, num_sublayers + 2) if routers is None else routers
        shares = config.final == "reuse_last" and self.routers[-1] == num_sublayers + 1 and len(self.routers) > 1
        self.rows = rows = len(self.routers) - shares
        self.backend: str | None = None  # one of ops.BACKENDS; None: ops.chosen
        self.gain = nn.Parameter(torch.ones(rows, width))
        if config.query == "dynamic":
            self.w_q = nn.Parameter(torch.zeros(rows, width, width))
        else:
            self.query = nn.Parameter(torch.zeros(rows, width))
        if config.query == "timestep":
            self.gate = nn.Parameter(torch.zeros(rows, width))

    def row(self, router: int) -> int:
        return min(router - self.routers[0], self.rows - 1)

    def forward(self, device: torch.device | None = None) -> dict[str, Tensor]:
        """The parameters by name for one forward pass, on `device` if given.

        A pass gets them by this call and in no other way: what keeps them elsewhere between calls, an offloader, puts
        its hooks on calls. Where this one has such hooks it gives copies, which the caller can use after they have
        taken the parameters back.
        """
        hooked = "forward" in vars(self) or self._forward_hooks or self._forward_pre_hooks
        here = {name: parameter.to(device=device) for name, parameter in self.named_parameters()}
        return {name: x.clone() for name, x in here.items()} if hooked else here

    def queries(self, held: dict[str, Tensor], t_embedding: Tensor | None) -> Tensor:
        """q_l of every row, Eq. 6: (rows, d) static, (rows, B, 1, d) timestep; held: what `forward` gave.

        t_embedding (B, d); ValueError where `timestep` routers are not given it.
        """
        if self.config.query == "static":
            return held["query"]
        if t_embedding is None:
            raise ValueError("timestep routers need t_embedding (B, d): give it to the History")
        return (held["query"][:, None] + held["gate"][:, None] * t_embedding)[:, :, None]

    @staticmethod
    def dynamic_query(w_q: Tensor, previous: Tensor) -> Tensor:
        """q_l (B, T, d) of a `dynamic` router, Eq. 6, from its row of w_q (d, d) and v_{l-1} (B, T, d)."""
        dtype = torch.promote_types(previous.dtype, torch.float32)
        with torch.autocast(previous.device.type, enabled=False):
            return nn.functional.linear(previous.to(dtype), w_q.to(dtype))

    def folded_queries(self, held: dict[str, Tensor], t_embedding: Tensor | None, dtype: torch.dtype) -> Tensor:
        """gain * q_l of all routers, (R, d) static, (B, R, d) timestep: s_i = folded . v_i / sqrt(|v_i|^2 + d eps).

        A row per router, also where routers share one. `dynamic` has no query before its v_{l-1}.
        """
        query, gain = self.queries(held, t_embedding).to(dtype), held["gain"]
        if self.config.query == "timestep":
            query = query.squeeze(2).transpose(0, 1)
        folded = query * gain.to(dtype)
        if len(self.routers) == self.rows:
            return folded
        return torch.cat([folded, folded[..., -1:, :]], dim=-2)

    @property
    def at_start(self) -> bool:
        """Whether all queries are zero, so that the sources weigh the same."""
        return not any(parameter.any() for name, parameter in self().items() if name != "gain")

    @torch.no_grad()
    def reset(self) -> None:
        """Back to the start: zero queries, unit gains; the network then adds plainly, as it did before routing."""
        for name, parameter in self.named_parameters():
            parameter.fill_(1.0 if name == "gain" else 0.0)
