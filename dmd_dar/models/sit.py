"""SiT (arXiv:2401.08740) with an explicit source history, so that its residual additions can be routed (DAR).

B batch, T tokens, d width, p patch, C channels. Parameter names are those of the public DiT and SiT checkpoints.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Unpack

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from dmd_dar.keys import key
from dmd_dar.models.rungs import Rung, Rungs
from dmd_dar.models.sizes import Limits
from dmd_dar.routing.history import History, Observer
from dmd_dar.routing.layout import FormOptions, Query, RoutingConfig, routing_form
from dmd_dar.routing.router import RouterBank

PRESETS = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}  # d, depth, heads
FREQUENCIES = 256


@dataclass(frozen=True)
class SiTConfig:
    """The shape of a SiT; `routing` decides what its residual additions become."""

    input_size: int = key(32, "side of the input", unit="pixels or latent cells", least=1)
    in_channels: int = key(3, "channels of the input", least=1)
    patch: int = key(4, "side of a patch", unit="pixels or latent cells", least=1)
    width: int = key(128, "token width d; divisible by heads and by 4", least=4)
    depth: int = key(6, "number of blocks; twice as many sublayers", unit="blocks", least=1)
    heads: int = key(4, "attention heads", least=1)
    mlp_ratio: float = key(4.0, "MLP width over d", above=0)
    num_classes: int = key(1, "class labels 0 .. num_classes - 1; the next index is the unconditional one", least=1)
    learn_sigma: bool = key(False, "output 2 C channels, of which the first C are the velocity")
    routing: RoutingConfig = key(factory=RoutingConfig)

    def __post_init__(self) -> None:
        if self.input_size % self.patch:
            raise ValueError(f"input_size must be a multiple of patch, got {self.input_size} and {self.patch}")
        if self.width % self.heads or self.width % 4:
            raise ValueError(f"width must be divisible by heads and by 4, got {self.width} and {self.heads} heads")
        chunk_size = self.routing.resolved(2 * self.depth).chunk_size
        if self.routing.query != "residual" and int(chunk_size) > 2 * self.depth:
            raise ValueError(f"routing.chunk_size {chunk_size} exceeds the {2 * self.depth} sublayers")


def sin_cos_positions(width: int, rows: int, columns: int = 0, device: torch.device | str | None = None) -> Tensor:
    """Fixed 2-D sine-cosine position table of rows x columns tokens, (1, rows columns, width): half the channels for
    columns, half for rows. `columns` 0 is as many as rows.
    """
    columns = columns or rows
    omega = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64, device=device) / (width / 4))
    places = torch.arange(max(rows, columns), dtype=torch.float64, device=device)
    angles = places[:, None] * omega  # (longer side, width / 4)
    line = torch.cat([angles.sin(), angles.cos()], dim=1)  # (longer side, width / 2)
    along, down = line[None, :columns].expand(rows, -1, -1), line[:rows, None].expand(-1, columns, -1)
    return torch.cat([along, down], dim=-1).reshape(1, rows * columns, width).float()


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """adaLN: x (B, T, d), shift and scale (B, d)."""
    return x * (1 + scale[:, None]) + shift[:, None]


class PatchEmbed(nn.Module):
    """(B, C, H, W) -> (B, T, d)."""

    def __init__(self, patch: int, channels: int, width: int):
        super().__init__()
        self.proj = nn.Conv2d(channels, width, kernel_size=patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2).contiguous()  # all that is added to it takes its layout


class TimestepEmbedder(nn.Module):
    """t (B,) -> (B, d): 256 sines and cosines with periods from 2 pi to 20,000 pi, then an MLP."""

    def __init__(self, width: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        half = FREQUENCIES // 2
        rate = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
        angles = t.float()[:, None] * rate
        first: Any = self.mlp[0]
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=1).to(first.weight.dtype))


class LabelEmbedder(nn.Module):
    """Class labels, with one more row for "no label"."""

    def __init__(self, num_classes: int, width: int):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, width)

    def forward(self, labels: Tensor) -> Tensor:
        return self.embedding_table(labels)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each (B, heads, T, d / heads)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    """Two sublayers behind adaLN-Zero. Each returns what would be added to the stream, its gate included."""

    def __init__(self, config: SiTConfig):
        super().__init__()
        d = config.width
        self.norm1, self.norm2 = (nn.LayerNorm(d, elementwise_affine=False, eps=1e-6) for _ in range(2))
        self.attn, self.mlp = Attention(d, config.heads), Mlp(d, int(d * config.mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(d, 6 * d))

    def modulation(self, c: Tensor) -> tuple[Tensor, ...]:
        """c (B, d) -> shift, scale, gate of the attention, then of the MLP, each (B, d)."""
        return self.adaLN_modulation(c).chunk(6, dim=1)

    def attention_output(self, h: Tensor, shift: Tensor, scale: Tensor, gate: Tensor) -> Tensor:
        return gate[:, None] * self.attn(modulate(self.norm1(h), shift, scale))

    def mlp_output(self, h: Tensor, shift: Tensor, scale: Tensor, gate: Tensor) -> Tensor:
        return gate[:, None] * self.mlp(modulate(self.norm2(h), shift, scale))


class FinalLayer(nn.Module):
    def __init__(self, width: int, patch: int, channels: int):
        super().__init__()
        self.norm_final = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(width, patch * patch * channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, h: Tensor, c: Tensor) -> Tensor:
        return self.linear(modulate(self.norm_final(h), *self.adaLN_modulation(c).chunk(2, dim=1)))


class SiT(nn.Module):
    """The raw network: (x (B, C, H, W), t (B,), labels (B,)) -> (B, C or 2 C, H, W). Its meaning is denoiser.py's."""

    def __init__(self, config: SiTConfig):
        super().__init__()
        self.config = config = replace(config, routing=config.routing.resolved(2 * config.depth))
        d, side = config.width, config.input_size // config.patch
        self.out_channels = config.in_channels * (2 if config.learn_sigma else 1)
        self.x_embedder = PatchEmbed(config.patch, config.in_channels, d)
        self.t_embedder, self.y_embedder = TimestepEmbedder(d), LabelEmbedder(config.num_classes, d)
        self.pos_embed = nn.Parameter(sin_cos_positions(d, side), requires_grad=False)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.final_layer = FinalLayer(d, config.patch, self.out_channels)
        routed = config.routing.query != "residual"
        self.dar = RouterBank(config.routing, 2 * config.depth, d) if routed else None
        self.rungs: Rungs | None = None
        self.checkpointing = False
        self._initialise()

    def _initialise(self) -> None:
        """The DiT start (arXiv:2212.09748): Xavier weights, zero biases, zero gates (adaLN-Zero) and a zero head."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))
        nn.init.zeros_(self.x_embedder.proj.get_parameter("bias"))
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp.get_parameter("0.weight"), std=0.02)
        nn.init.normal_(self.t_embedder.mlp.get_parameter("2.weight"), std=0.02)
        zeroed = [block.get_submodule("adaLN_modulation.1") for block in self.blocks]
        zeroed += [self.final_layer.adaLN_modulation[1], self.final_layer.linear]
        for linear in zeroed:
            nn.init.zeros_(linear.get_parameter("weight"))
            nn.init.zeros_(linear.get_parameter("bias"))

    def forward(
        self, x: Tensor, t: Tensor, labels: Tensor, rung: Rung | None = None, observe: Observer | None = None
    ) -> Tensor:
        rows, columns = (side // self.config.patch for side in x.shape[-2:])
        v_0 = self.x_embedder(x) + self._positions(rows, columns)  # (B, T, d)
        t_embedding = self.t_embedder(t)
        if self.rungs is not None:
            t_embedding = self.rungs.tables[0](t_embedding, rung)
        c = t_embedding + self.y_embedder(labels)
        if self.dar is None:
            h = self._residual(v_0, c)
        else:
            h = self._routed(History(self.dar, v_0, t_embedding, observe), c)
        return self._unpatchify(self.final_layer(h, c), rows, columns)

    def _positions(self, rows: int, columns: int) -> Tensor:
        """The table of its own size, or that of another one, made anew each time."""
        own = self.config.input_size // self.config.patch
        if (rows, columns) == (own, own):
            return self.pos_embed
        return sin_cos_positions(self.config.width, rows, columns, self.pos_embed.device).to(self.pos_embed.dtype)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, S, S) of its input where no other size is asked for."""
        return self.config.in_channels, self.config.input_size, self.config.input_size

    @property
    def limits(self) -> Limits:
        """The sizes that it takes."""
        return Limits(self.config.patch)

    @property
    def num_conditions(self) -> int:
        """Labels; the next index is the unconditional one."""
        return self.config.num_classes

    @property
    def prompts(self) -> None:
        """Its conditions are labels."""
        return None

    @property
    def routing(self) -> RoutingConfig:
        return self.config.routing

    def block_readers(self) -> list[nn.Module]:
        """For each block what reads its output: the next block's first norm, or the head's."""
        return [*(block.norm1 for block in list(self.blocks)[1:]), self.final_layer.norm_final]  # type: ignore[list-item,union-attr]

    def tell_rungs_apart(self, count: int, device: torch.device | None = None) -> None:
        """From now on a call must name one of `count` rungs, which at first makes no difference; see `Rungs`."""
        self.rungs = Rungs([self.t_embedder], count, device)

    def checkpoint_activations(self) -> None:
        """From now on, keep the residual stream and the sources for the backward pass, and compute the rest again."""
        self.checkpointing = True

    def _residual(self, h: Tensor, c: Tensor) -> Tensor:
        block: Any
        for block in self.blocks:
            h = self._run(partial(self._block, block), h, c)
        return h

    def _block(self, block: Block, h: Tensor, c: Tensor) -> Tensor:
        m = block.modulation(c)
        h = h + block.attention_output(h, *m[:3])
        return h + block.mlp_output(h, *m[3:])

    def _routed(self, history: History, c: Tensor) -> Tensor:
        count, length = history.bank.num_sublayers, max(history.bank.chunk_size, 2)
        for first in range(0, count, length):  # chunk by chunk: of a whole chunk, only its summary is read later
            found = replayed(history) if self.checkpointing else lambda: history
            self._run(partial(self._sublayers, found, range(first, min(first + length, count))), c)
        return history.state()

    def _sublayers(self, found: Callable[[], History], indices: range, c: Tensor) -> None:
        """Sublayers counted from 0: even ones are attentions."""
        history, m = found(), ()
        for index in indices:
            block = self.blocks[index // 2]
            assert isinstance(block, Block)
            if index % 2 == 0 or index == indices.start:
                m = block.modulation(c)
            if index % 2 == 0:
                history.append(block.attention_output(history.state(), *m[:3]))
            else:
                history.append(block.mlp_output(history.state(), *m[3:]))

    def _run(self, part: Callable[..., Any], *inputs: Tensor) -> Any:
        """A part of the network; where activations are not kept, the backward pass runs it again."""
        if not (self.checkpointing and torch.is_grad_enabled()):
            return part(*inputs)
        return checkpoint(part, *inputs, use_reentrant=False, preserve_rng_state=False)

    def _unpatchify(self, tokens: Tensor, rows: int = 0, columns: int = 0) -> Tensor:
        """(B, T, p p C) -> (B, C, H, W), of rows x columns tokens; 0: as many as the network's own side has."""
        p = self.config.patch
        side = self.config.input_size // p
        return (
            tokens.unflatten(1, (rows or side, columns or side))
            .unflatten(-1, (p, p, -1))
            .permute(0, 5, 1, 3, 2, 4)
            .flatten(4)
            .flatten(2, 3)
        )

    def router_parameters(self) -> list[nn.Parameter]:
        """The parameters that DAR adds; empty for a residual network."""
        return [] if self.dar is None else list(self.dar.parameters())

    def rung_parameters(self) -> list[nn.Parameter]:
        """The vectors of rungs; empty for a network that is not told the rung."""
        return [] if self.rungs is None else list(self.rungs.parameters())

    def backbone_parameters(self) -> list[nn.Parameter]:
        """All trainable parameters that are neither routers nor vectors of rungs."""
        named = self.named_parameters()
        return [p for name, p in named if p.requires_grad and not name.startswith(("dar.", "rungs."))]

    def shards(self) -> list[nn.Module]:
        """What is gathered by itself when weights are sharded: the modules that a forward calls, a third of a block."""
        return [part for block in self.blocks for part in (block.attn, block.mlp, block.adaLN_modulation)]  # type: ignore[union-attr]


def replayed(history: History) -> Callable[[], History]:
    """Gives the history itself at the first call, and at every later one a copy of it as it is now."""
    first, start = [history], history.snapshot()
    return lambda: first.pop() if first else start.snapshot()


def build_sit(
    preset: str,
    *,
    routing: Query | RoutingConfig = "residual",
    num_classes: int = 1000,
    input_size: int = 32,
    in_channels: int = 4,
    learn_sigma: bool = True,
    **options: Unpack[FormOptions],
) -> SiT:
    """A SiT by its public name: "S", "B", "L" or "XL", a slash, and patch 2, 4 or 8, for example "XL/2".

    `routing` is the whole form, or its query with the `options` chunk_size, summary, scale and final. `input_size` is
    the side of the latents. Raises ValueError for another name. For free sizes build `SiT(SiTConfig(...))`.
    """
    size, _, patch = preset.partition("/")
    if size not in PRESETS or patch not in ("2", "4", "8"):
        raise ValueError(f"unknown preset {preset!r}: write one of S, B, L, XL, then /2, /4 or /8, such as 'XL/2'")
    width, depth, heads = PRESETS[size]
    return SiT(
        SiTConfig(
            input_size=input_size,
            in_channels=in_channels,
            patch=int(patch),
            width=width,
            depth=depth,
            heads=heads,
            num_classes=num_classes,
            learn_sigma=learn_sigma,
            routing=routing_form(routing, **options),
        )
    )


def with_routing(
    model: SiT, routing: RoutingConfig, allow_change: bool = False, copied: Callable[[SiT], SiT] = copy.deepcopy
) -> SiT:
    """A copy of `model` under `routing`: its own routers where it has that routing already, else zero-query ones.

    `copied` makes the copy. Raises ValueError, unless `allow_change`, where that would change the function: the form
    does (keeps_function), or `model` has trained routers of another form, which would be dropped.
    """
    own, routing = model.config.routing, routing.resolved(2 * model.config.depth)
    if routing == own:
        return copied(model)
    if not allow_change and model.dar is not None and not (own.keeps_function and model.dar.at_start):
        raise ValueError(f"routing {routing} would drop the network's trained routers: keep its own form, {own}")
    if not allow_change and not routing.keeps_function:
        raise ValueError(
            f"routing.scale {routing.scale} with summary {routing.summary} does not keep the network's function:"
            " use scale stream, or count with summary sum, or set routing.allow_change=true"
        )
    config = replace(model.config, routing=routing)  # raises where chunks exceed the network
    routed = copied(model)
    routed.config, routed.dar = config, None
    if routing.query != "residual":
        bank = RouterBank(routing, 2 * config.depth, config.width)
        routed.dar = bank.to(model.pos_embed.device, model.pos_embed.dtype)
    return routed
