"""Random numbers as a function of where they are used: (seed, phase, optimiser step, global sample index, name).

A counter-based generator (Philox4x32-10, Salmon et al. 2011) turns that tuple into bits, so no draw depends on rank,
micro-batch, batch size or on what was drawn before it. There is no state to save, and sample i is the same anywhere.
"""

import hashlib
import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
TOGETHER = 2**22  # most numbers made in one pass (32 MiB): where there are more, launches hide behind the work


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Philox4x32-10: four int64 tensors holding 32-bit words -> four tensors of 32 random bits, elementwise.

    Both halves of a round are one tensor: a launch costs more than the numbers of a small batch.
    """
    device, dims = counter[0].device, (2, *[1] * counter[0].ndim)
    rounds = [[(k + i * weyl) & _WORD for k, weyl in zip(key, _WEYL, strict=True)] for i in range(_ROUNDS)]
    # non_blocking: a GPU is given the numbers in passing, nobody waits for it
    constants = torch.tensor([_MULTIPLIERS, *rounds]).to(device, non_blocking=True).reshape(-1, *dims)
    even, odd = torch.stack(counter[0::2]), torch.stack(counter[1::2])
    for round_key in constants[1:]:
        product = even * constants[0]  # int64 multiplication wraps, which leaves all 64 bits in place
        even = (product >> 32).bitwise_and_(_WORD).flip(0).bitwise_xor_(odd).bitwise_xor_(round_key)
        odd = product.bitwise_and_(_WORD).flip(0)
    return even[0], odd[0], even[1], odd[1]


def _words(*parts: object) -> tuple[int, int]:
    digest = hashlib.sha256("\x1f".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")


class Habits:
    """What the steps of one phase draw, so that a step makes the bits of all its draws in one pass of the generator.

    Steps that draw the same shared integers, such as the rung, draw the same names: each is foreseen to draw what the
    last of its kind drew. A wrong guess costs time and changes no number.
    """

    def __init__(self) -> None:
        self.of_kind: dict[tuple[str, *tuple[int, ...]], dict[str, int]] = {}  # name -> blocks, by (phase, *integers)


@dataclass(frozen=True)
class Draws:
    """All randomness of one optimiser step for the samples held here.

    seed: the run's; phase: "student", "fake_score", "pretrain", "pairs", "sample", ...; step: optimiser step of that
    phase (0 where there is none); samples: (B,) int64 global sample indices, on the device the draws are wanted on.
    """

    seed: int
    phase: str
    step: int
    samples: Tensor
    habits: Habits | None = field(default=None, repr=False, compare=False)
    part: int = field(default=0, compare=False)  # which micro-batch of the step; no draw depends on it
    _shared: list[int] = field(default_factory=list, init=False, repr=False, compare=False)
    _drawn: dict[str, int] = field(default_factory=dict, init=False, repr=False, compare=False)
    _ready: dict[tuple[str, int], Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def _bits(self, name: str, numel: int) -> Tensor:
        """(B, 4 ceil(numel / 4)) int64 holding 32 random bits each."""
        blocks = math.ceil(numel / 4)
        if self.habits is None:
            return self._made([(name, blocks)])[0]
        foreseen = self._foreseen() if not self._drawn else {}
        self._drawn[name] = blocks
        if (name, blocks) not in self._ready:
            wanted = [(name, blocks), *((other, size) for other, size in foreseen.items() if other != name)]
            self._ready.update(zip(wanted, self._made(wanted), strict=True))
        return self._ready.pop((name, blocks))

    def _foreseen(self) -> dict[str, int]:
        """What the last step of this kind drew; from here on the record is this step's."""
        assert self.habits is not None
        kind = self.phase, *self._shared
        before = self.habits.of_kind.get(kind, {})
        self.habits.of_kind[kind] = self._drawn
        return before if sum(before.values()) * 4 * len(self.samples) <= TOGETHER else {}

    def _made(self, wanted: list[tuple[str, int]]) -> list[Tensor]:
        """The bits of several draws, each a (name, blocks of 4 words)."""
        device, sizes = self.samples.device, [blocks for _, blocks in wanted]
        ranges = [torch.arange(blocks, device=device) for blocks in sizes]
        streams = [torch.full_like(block, _words(name)[0]) for block, (name, _) in zip(ranges, wanted, strict=True)]
        block, stream = (torch.cat(x).expand(len(self.samples), -1) for x in (ranges, streams))
        low = (self.samples & _WORD)[:, None].expand_as(block)
        high = (self.samples >> 32)[:, None].expand_as(block)
        words = torch.stack(philox((block, stream, low, high), _words(self.seed, self.phase, self.step)), dim=-1)
        return [part.flatten(1) for part in words.split(sizes, dim=1)]

    def uniform(self, name: str, *shape: int) -> Tensor:
        """(B, *shape) float64 in the open interval (0, 1)."""
        numel = math.prod(shape)
        return ((self._bits(name, numel)[:, :numel].double() + 0.5) * 2.0**-32).reshape(-1, *shape)

    def normal(self, name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """(B, *shape) standard normal, computed in float64 (Box-Muller), cast once to `dtype`."""
        numel = math.prod(shape)
        half = math.ceil(numel / 2)
        u = self.uniform(name, 2, half)
        radius, angle = (-2.0 * u[:, 0].log()).sqrt(), 2.0 * math.pi * u[:, 1]
        pair = torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)
        return pair[:, :numel].reshape(-1, *shape).to(dtype)

    def integers(self, name: str, high: int | Tensor, *shape: int) -> Tensor:
        """(B, *shape) int64 uniform in [0, high); `high` may be a tensor that broadcasts against (B, *shape)."""
        return (self.uniform(name, *shape) * high).long()

    def shared_integer(self, name: str, high: int) -> int:
        """One integer in [0, high) for the whole global batch: keyed without the sample index."""
        word = _words(self.seed, self.phase, self.step, "shared", name)[0]
        self._shared.append(word * high >> 32)
        return self._shared[-1]


def sample_range(start: int, stop: int, device: torch.device | str = "cpu") -> Tensor:
    """(stop - start,) global sample indices."""
    return torch.arange(start, stop, dtype=torch.int64, device=device)
