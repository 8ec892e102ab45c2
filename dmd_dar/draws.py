"""Random numbers as a function of where they are used: (seed, phase, optimiser step, global sample index, name).

A counter-based generator (Philox4x32-10, Salmon et al. 2011) turns that tuple into bits, so no draw depends on rank,
micro-batch, batch size or on what was drawn before it. There is no state to save, and sample i is the same anywhere.
"""

import hashlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def _multiply_wide(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32-bit words of a * b; int64 multiplication wraps, which leaves all 64 bits in place."""
    product = b * a
    return (product >> 32) & _WORD, product & _WORD


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Philox4x32-10: four int64 tensors holding 32-bit words -> four tensors of 32 random bits, elementwise."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        high0, low0 = _multiply_wide(_MULTIPLIERS[0], c0)
        high1, low1 = _multiply_wide(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return c0, c1, c2, c3


def _words(*parts: object) -> tuple[int, int]:
    digest = hashlib.sha256("\x1f".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")


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

    def _bits(self, name: str, numel: int) -> Tensor:
        """(B, 4 ceil(numel / 4)) int64 holding 32 random bits each."""
        blocks = math.ceil(numel / 4)
        device = self.samples.device
        block = torch.arange(blocks, device=device).expand(len(self.samples), -1)
        low = (self.samples & _WORD)[:, None].expand_as(block)
        high = (self.samples >> 32)[:, None].expand_as(block)
        stream = torch.full_like(block, _words(name)[0])
        key = _words(self.seed, self.phase, self.step)
        return torch.stack(philox((block, stream, low, high), key), dim=-1).flatten(1)

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
        return word * high >> 32


def sample_range(start: int, stop: int, device: torch.device | str = "cpu") -> Tensor:
    """(stop - start,) global sample indices."""
    return torch.arange(start, stop, dtype=torch.int64, device=device)
