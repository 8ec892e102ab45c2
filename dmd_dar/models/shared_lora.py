"""One frozen base for three networks: the teacher is the base itself, the others add low-rank updates of their own.

The networks are separate modules over the same tensors, so none has to be switched to: not in a forward, not in a
backward pass that computes a forward again.
"""

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dmd_dar.draws import Draws, sample_range
from dmd_dar.errors import UserError
from dmd_dar.keys import key
from dmd_dar.models.diffusers_denoiser import DiffusersDenoiser, Shape
from dmd_dar.models.frozen import release
from dmd_dar.models.prompts import Prompts
from dmd_dar.models.rungs import Rung
from dmd_dar.models.sit import SiT, SiTConfig
from dmd_dar.routing.layout import RoutingConfig

Plain = SiT | DiffusersDenoiser
Weights = Literal["full", "shared_lora"]  # what student and fake score have of their own: all, or adapters


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank updates of frozen linear layers, where weights is shared_lora."""

    rank: int = key(16, "r of every update", least=1)
    alpha: float = key(16.0, "an update is scaled by alpha / rank", above=0)
    targets: tuple[str, ...] = key((), "how the names of the updated linear layers end, such as attn.qkv; empty: all")


class Lora(nn.Module):
    """The update of one linear layer: alpha / r B A x (arXiv:2106.09685 Eq. 3), A (r, in) random, B (out, r) zero.

    A and B are float32 or wider, whatever the layer is stored in. A is keyed by `seed` and `name`.
    """

    def __init__(
        self,
        linear: nn.Linear,
        config: LoraConfig,
        device: torch.device | None = None,
        seed: int = 0,
        name: str = "",
    ):
        super().__init__()
        weight, rank = linear.weight, config.rank
        device = device or weight.device
        dtype = torch.promote_types(weight.dtype, torch.float32)
        self.scale = config.alpha / rank
        self.A = nn.Parameter(torch.empty(rank, linear.in_features, dtype=dtype, device=device))
        self.B = nn.Parameter(torch.zeros(linear.out_features, rank, dtype=dtype, device=device))
        if device.type != "meta":
            self.A.data.copy_(start_of_a(rank, linear.in_features, seed, name))
        self.handle = linear.register_forward_hook(self.add)

    def add(self, linear: nn.Module, args: tuple, output: Tensor) -> Tensor:
        """Forward hook of the layer. A bound method, so that a deep copy's hook is the copy's own."""
        x, dtype = args[0], self.A.dtype
        if x.dtype == output.dtype == dtype or torch.is_autocast_enabled(output.device.type):
            inner = F.linear(x, self.A).flatten(0, -2)  # (M, r), M all but the last dimension
            return torch.addmm(output.flatten(0, -2), inner, self.B.t(), alpha=self.scale).view_as(output)
        update = F.linear(F.linear(x.to(dtype), self.A), self.B)
        return output + (self.scale * update).to(output.dtype)

    def merged(self, linear: nn.Linear) -> Tensor:
        """The layer's weight with the update, in float32 or wider, where the weight lies."""
        weight, update = linear.weight.detach(), self.scale * self.B.detach() @ self.A.detach()
        return weight.to(update.dtype) + update.to(weight.device)

    def merge(self, linear: nn.Linear) -> None:
        """Add the update to the layer's own weight, and go."""
        linear.weight = nn.Parameter(self.merged(linear), requires_grad=False)
        self.handle.remove()
        del linear.lora


def start_of_a(rank: int, width: int, seed: int, name: str) -> Tensor:
    """(rank, width) float64, uniform within 1 / sqrt(width) of 0, which is He's law for a slope of sqrt(5) as in
    Microsoft's LoRA; the same on every device, whatever was drawn before."""
    uniform = Draws(seed, "lora", 0, sample_range(0, rank)).uniform(name, width)
    return (2 * uniform - 1) / math.sqrt(width)


class LoraDenoiser(nn.Module):
    """A view of a frozen network: its tensors, with adapters, and routers where it has them, that are the view's own.

    Same surface as the network. `parameters()`, `state_dict()` and a deep copy hold what is its own; the frozen
    tensors are shared with the copy. `device` is the one it computes on; None: that of the weights, which may be
    stored elsewhere. `role` says whose adapters they are: their start is keyed by it and `seed`.
    """

    def __init__(
        self, network: Plain, config: LoraConfig, device: torch.device | None = None, seed: int = 0, role: str = ""
    ):
        super().__init__()
        self.network = network
        layers = [(name, layer) for name, layer in network.named_modules() if isinstance(layer, nn.Linear)]
        chosen = [(name, layer) for name, layer in layers if not config.targets or name.endswith(config.targets)]
        if not chosen:
            names = sorted({name.rpartition(".")[2] for name, _ in layers})
            raise UserError(f"lora.targets = {list(config.targets)}: no linear layer's name ends so, but with {names}")
        network.requires_grad_(False)
        for name, layer in chosen:
            layer.lora = Lora(layer, config, device, seed, f"{role}.{name}")
        for _, parameter in self.named_parameters():
            parameter.requires_grad_(True)

    @property
    def config(self) -> SiTConfig | Shape:
        return self.network.config

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.network.shape

    @property
    def num_conditions(self) -> int:
        return self.network.num_conditions

    @property
    def prompts(self) -> Prompts | None:
        return self.network.prompts

    @property
    def routing(self) -> RoutingConfig:
        return self.network.routing

    def block_readers(self) -> list[nn.Module]:
        return self.network.block_readers()

    def forward(self, x: Tensor, t: Tensor, cond: Tensor, rung: Rung | None = None) -> Tensor:
        return self.network(x, t, cond, rung)

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """Adapters, routers and the vectors of rungs."""
        routers = {id(parameter) for parameter in self.network.router_parameters()}
        for name, parameter in super().named_parameters(prefix, recurse, remove_duplicate):
            if ".lora." in name or ".rungs." in name or id(parameter) in routers:
                yield name, parameter

    def router_parameters(self) -> list[nn.Parameter]:
        return self.network.router_parameters()

    def rung_parameters(self) -> list[nn.Parameter]:
        return self.network.rung_parameters()

    def backbone_parameters(self) -> list[nn.Parameter]:
        """The adapters."""
        return [parameter for name, parameter in self.named_parameters() if ".lora." in name]

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        own = {name for name, _ in self.named_parameters()}
        return {name: value for name, value in super().state_dict(*args, **kwargs).items() if name in own}

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Raises RuntimeError where the names are not those of what this view owns."""
        own = {name for name, _ in self.named_parameters()}
        if strict and own != state_dict.keys():
            raise RuntimeError(f"other adapters, routers or rungs: {sorted(own ^ state_dict.keys())[:4]}")
        return super().load_state_dict(state_dict, strict=False, assign=assign)

    def checkpoint_activations(self) -> None:
        self.network.checkpoint_activations()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        own = {id(parameter) for parameter in self.parameters()}
        _share(self.network, own, memo)
        twin = self.__class__.__new__(self.__class__)
        memo[id(self)] = twin
        vars(twin).update(copy.deepcopy(vars(self), memo))
        return twin


def merged(network: Plain | LoraDenoiser) -> Plain:
    """A plain network of the same function, up to rounding, frozen and in float32; a plain one is returned itself.

    On the CPU where its weights are offloaded.
    """
    if not isinstance(network, LoraDenoiser):
        return network
    twin = copy.deepcopy(network.network)
    release(twin)
    for layer in [layer for layer in twin.modules() if isinstance(getattr(layer, "lora", None), Lora)]:
        layer.lora.merge(layer)  # type: ignore[operator,union-attr]
    if len({parameter.device for parameter in twin.parameters()}) > 1:
        twin.cpu()
    return twin.float().requires_grad_(False)


def parameter_count(network: Plain) -> int:
    """Numbers that its weights are, without adapters."""
    return sum(parameter.numel() for name, parameter in network.named_parameters() if ".lora." not in name)


def shared_copy(network: Plain) -> Plain:
    """The network's modules once more over the same tensors; its routers, which every network owns, are copied."""
    memo: dict[int, Any] = {}
    _share(network, {id(parameter) for parameter in network.router_parameters()}, memo)
    return copy.deepcopy(network, memo)


def _share(network: nn.Module, own: set[int], memo: dict[int, Any]) -> None:
    """Make a deep copy with `memo` share every tensor that is not among `own`."""
    for tensor in (*network.parameters(), *network.buffers()):
        if id(tensor) not in own:
            memo[id(tensor)] = tensor
