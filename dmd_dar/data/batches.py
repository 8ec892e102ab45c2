"""Full batches of samples that lie in shards, whatever the two sizes are."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

Make = Callable[[int, int], dict[str, Tensor]]  # (first, stop) -> tensors (stop - first, ...) of these samples
MOST = 8  # shards that are begun together for the sake of full batches, where a batch does not hold more by itself


@dataclass
class Batches:
    """Samples by make(first, stop), `size` at a time.

    Batches run on from shard to shard within a group of them and begin anew with the next group. So the batch that a
    sample is made in, and with it the rounding, depends on the two sizes alone, not on who makes it or what is there.
    """

    make: Make
    size: int
    last: tuple[int, dict[str, Tensor]] = field(default=(-1, {}), init=False)  # the batch begun last: its first sample

    def group(self, shard_size: int) -> int:
        """How many shards are begun together: those that full batches fill, or as many as lie in one batch."""
        filled, inside = math.lcm(self.size, shard_size) // shard_size, self.size // shard_size
        return filled if filled <= max(MOST, inside) else max(1, inside)

    def holds(self, first: int, stop: int) -> bool:
        """Whether samples first .. stop - 1 are all of the batch begun last."""
        start, made = self.last
        return start >= 0 and start <= first and stop <= start + len(next(iter(made.values())))

    def samples(self, first: int, stop: int, group: tuple[int, int]) -> dict[str, Tensor]:
        """Samples first .. stop - 1, on the CPU; `group` is the first sample of their group and the one after its last.

        A batch that reaches into the next shard is kept for it.
        """
        begin, end = group
        parts = []
        for start in range(first - (first - begin) % self.size, stop, self.size):
            if self.last[0] != start:
                made = self.make(start, min(start + self.size, end))
                self.last = start, {name: rows.cpu() for name, rows in made.items()}
            parts.append({name: rows[max(first - start, 0) : stop - start] for name, rows in self.last[1].items()})
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
