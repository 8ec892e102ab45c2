"""A history held as lists of tensors, for backends that read whole sources at every router."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor

from dmd_dar.routing.ops import naive
from dmd_dar.routing.router import RouterBank


class ListedReader:
    """Sources in lists; `route_of` (the signature of naive.route) builds each state from them."""

    def __init__(
        self,
        bank: RouterBank,
        device: torch.device,
        t_embedding: Tensor | None,
        route_of: Callable[..., Tensor],
    ):
        self.bank, self.t_embedding, self.route_of = bank, t_embedding, route_of
        self.summaries: list[Tensor] = []
        self.outputs: list[Tensor] = []
        self._take_parameters(device)

    def _take_parameters(self, device: torch.device) -> None:
        """Rows of all routers at once: taken one by one, each would cost a gradient of the whole parameter's size."""
        held, self.tracks = self.bank(device), torch.is_grad_enabled()
        self.dynamic = self.bank.config.query == "dynamic"
        self.gains = held["gain"].unbind()
        self.queries = (held["w_q"] if self.dynamic else self.bank.queries(held, self.t_embedding)).unbind()

    def summary(self, v: Tensor) -> None:
        """c_n of the chunk that ends here; its outputs are read no more."""
        self.summaries.append(v)
        self.outputs = []

    def output(self, v: Tensor) -> None:
        self.outputs.append(v)

    def route(
        self, router: int, previous: Tensor, stream: Tensor | None, observed: bool
    ) -> tuple[Tensor, Tensor | None]:
        """h_l, and alpha (n, B, T) if observed."""
        if torch.is_grad_enabled() and not self.tracks:  # the pass began without gradients
            self._take_parameters(previous.device)
        bank, row, sources = self.bank, self.bank.row(router), self.summaries + self.outputs
        query, gain = self.queries[row], self.gains[row]
        if self.dynamic:
            query = bank.dynamic_query(query, previous)
        with torch.no_grad():
            alpha = naive.weights(sources, query, gain) if observed else None
        return self.route_of(sources, query, gain, scale=bank.config.scale, stream=stream), alpha

    def snapshot(self) -> "ListedReader":
        twin = copy.copy(self)
        twin.summaries, twin.outputs = list(self.summaries), list(self.outputs)
        return twin
