"""What is known of one family of diffusers transformers and of the pipelines around it.

B samples, C channels, H x W latent cells, T text tokens, D width of an embedding.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from dmd_dar.guidance import Form
from dmd_dar.models.sizes import Limits

THOUSAND = 1000  # timesteps of the chains of flow matching, by which diffusers' pipelines divide


@dataclass(frozen=True)
class FixedInputs:
    """What a transformer takes at every call and its files leave open."""

    input_size: int = 0  # latent cells on a side, of a family whose config names no size; 0 for all others
    embedded_guidance: float = 0.0  # of a network with guidance_embeds


Rows = dict[str, Tensor]  # labels (B,); or embedding (B, T, D) and, as the family has it, mask (B, T) or pooled (B, P)
# (transformer, x (B, C, H, W), timesteps (B,) of the chain, rows, fixed) -> (B, C or 2 C, H, W), in the chain's sign
Ask = Callable[[Any, Tensor, Tensor, Rows, FixedInputs], Tensor]
# (pipeline, prompts, tokens, how many of the last are what guidance leads away from) -> rows without "labels"
Encode = Callable[[Any, list[str], int, int], Rows]


def _nothing(pipeline: Any) -> tuple[str, ...]:
    return ()


@dataclass(frozen=True)
class Prompting:
    """How one class of pipelines reads prompts."""

    tokens: int  # the most that it reads where nothing else is asked for
    parts: tuple[str, ...]  # classes of transformers that its tokenizers and text encoders may be of
    encode: Encode
    template: Callable[[Any], tuple[str, ...]] = _nothing  # what diffusers' code puts around a prompt; for the digest
    before: int = 0  # tokens of other encoders that stand before those
    negative: str = ""  # the prompt that guidance leads away from, where none is named
    asks_transformer: bool = False  # zeros stand for a text encoder that is left out, as wide as the transformer says


def _any_number(config: Any) -> int:
    return 0


def _accepted(config: Any) -> str:
    return ""


@dataclass(frozen=True)
class Unguided:
    """How a pipeline is called that its guidance is off: the argument and its value."""

    argument: str
    value: float
    embedded: bool = False  # the value is a strength that the network reads, and was trained at


@dataclass(frozen=True)
class Latents:
    """The form in which a pipeline keeps its latents between steps."""

    of_cells: Callable[[Tensor], Tensor]  # (B, C, H, W) -> the pipeline's
    to_cells: Callable[[Tensor, tuple[int, int]], Tensor]  # (the pipeline's, (H, W)) -> (B, C, H, W)


CELLS = Latents(lambda x: x, lambda y, size: y)


@dataclass(frozen=True)
class Family:
    """One class of transformers: how it is asked, what its latents are, how its pipelines encode and guide.

    Where its blocks, norms and head are, `routing.consumers.SUBLAYERS` says under the same name.
    """

    transformer: str  # class of diffusers
    ask: Ask
    width: str = ""  # config key of D; empty for one that reads labels
    beside: str = ""  # the tensor beside the embedding: mask, pooled or none
    side: int = 0  # latent cells on a side of its pipeline's images; 0: its config's sample_size
    patch: int = 0  # latent cells on a side of a token; 0: its config's patch_size
    square: bool = False  # whether it knows square images alone
    most: Callable[[Any], int] = _any_number  # (config) -> latent cells on a side at most; 0 where there is no bound
    packed: bool = False  # whether its config's in_channels are those of a token, not of a cell
    time_scale: float = float(THOUSAND)  # of its flow, where a transformer's folder alone leaves the chain open
    time_embedder: str = "timestep_embedder"  # the last part of its modules' names
    guidance: Form = "plain"  # of its pipelines
    off: tuple[str, float] = ("guidance_scale", 1.0)  # the argument of their call, and where it leaves guidance out
    latents: Latents = CELLS  # of its pipelines
    embedded: float = 0.0  # the strength that its pipeline gives a network with guidance_embeds
    refused: Callable[[Any], str] = _accepted  # (config) -> why such a one is no teacher; empty where it is one
    pipelines: dict[str, Prompting] = field(default_factory=dict)  # by class

    def unguided(self, config: Any, fixed: FixedInputs) -> Unguided:
        """How its pipelines are called for a student that was trained with the `fixed` inputs."""
        if config.get("guidance_embeds"):
            return Unguided("guidance_scale", fixed.embedded_guidance, embedded=True)
        return Unguided(*self.off)

    def channels(self, config: Any) -> int:
        """C of the latents."""
        return config["in_channels"] // self.cells(config) ** 2 if self.packed else config["in_channels"]

    def cells(self, config: Any) -> int:
        """Latent cells on a side of a token: what H and W must be multiples of."""
        return self.patch or config["patch_size"]

    def limits(self, config: Any) -> Limits:
        """The sizes that it takes."""
        return Limits(self.cells(config), self.square, self.most(config))

    def latent_shape(self, config: Any, fixed: FixedInputs) -> tuple[int, int]:
        """(C, S) of its square latents."""
        return self.channels(config), fixed.input_size or self.side or config["sample_size"]


def as_tokens(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H W, C)."""
    return x.flatten(2).mT


def as_cells(y: Tensor, size: tuple[int, int]) -> Tensor:
    """The inverse of `as_tokens`: (B, H W, C) -> (B, C, H, W)."""
    return y.mT.reshape(len(y), -1, *size)


def packed(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H/2 W/2, 4 C): a token for 2 x 2 cells, channel first."""
    b, c, h, w = x.shape
    return x.reshape(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, -1, 4 * c)


def unpacked(y: Tensor, rows: int, columns: int) -> Tensor:
    """The inverse of `packed`: (B, rows columns, 4 C) -> (B, C, 2 rows, 2 columns)."""
    b, _, c = y.shape
    y = y.reshape(b, rows, columns, c // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return y.reshape(b, c // 4, 2 * rows, 2 * columns)


PACKED = Latents(packed, lambda y, size: unpacked(y, size[0] // 2, size[1] // 2))
TOKENS = Latents(as_tokens, as_cells)
