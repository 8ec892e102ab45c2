"""Is it *adaptive* routing that helps? A trained student with its routers frozen over t, or reset.

Two controls answer two questions. This one takes a finished DAR student and freezes it: does this network use the
dependence on t? It is exact and needs no training, but the other weights have learned beside moving routers, so a loss
shows reliance and not merit. Whether adaptivity *helps* is asked by an arm trained alike with
`student.routing.query=static`, the same routers with one query for all t.
"""

import copy
from dataclasses import replace

import torch

from dmd_dar.models.sit import SiT
from dmd_dar.models.teachers import Denoiser


def unfreezable(network: Denoiser) -> str:
    """Why `frozen_at_mean` cannot be made of a student; empty where it can."""
    if not isinstance(network, SiT):
        return f"it is made of SiT students only, and these are {type(network).__name__}"
    query = network.routing.query
    return "" if query == "timestep" else f"routing.query {query}: only timestep routers have a mean over t"


def with_routers_reset(network: Denoiser) -> Denoiser:
    """A copy that adds plainly, all other weights as they are: what it makes otherwise, its routers do."""
    plain = copy.deepcopy(network)
    if isinstance(plain, SiT) and plain.routing.scale == "stream":
        plain.dar = None  # that form at equal weights is the residual network bit for bit, which is sooner computed
    else:
        plain.dar.reset()  # type: ignore[union-attr]
    return plain


@torch.no_grad()
def frozen_at_mean(network: SiT, times: tuple[float, ...]) -> SiT:
    """A `static` network whose query is each router's mean over `times`, w_l + gate_l * mean_t e(t).

    arXiv:2605.20708 Eq. 5-6: logits are linear in the query, so this is the mean of each token's logits over t for the
    same sources. The weights still follow the sources, as any static router's do; what is gone is the query's own t.
    Fixing alpha itself would remove that too, and would not be a network of this family.

    `times` are the network's own at which it is called: `network_time` of a few-step student's rungs.
    ValueError where the query is not `timestep`: static routers are frozen already, and a dynamic router's query
    depends on t only through its input, which has no mean outside of a data set.
    """
    if reason := unfreezable(network):
        raise ValueError(f"{reason}; train a control with student.routing.query=static")
    weights = network.state_dict()
    t = torch.tensor(times, dtype=torch.float32, device=network.pos_embed.device)
    weights["dar.query"] = weights["dar.query"] + weights.pop("dar.gate") * network.t_embedder(t).mean(0)
    frozen = SiT(replace(network.config, routing=replace(network.config.routing, query="static")))
    frozen.load_state_dict(weights)
    return frozen.to(network.pos_embed.device, network.pos_embed.dtype).eval().requires_grad_(False)
