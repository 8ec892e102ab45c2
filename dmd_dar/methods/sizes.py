"""The sizes that a run computes at."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from dmd_dar.draws import Draws


@dataclass
class Sizes:
    """Shapes (C, H, W), of which each step draws one for its whole batch, keyed as all that it draws."""

    shapes: tuple[tuple[int, ...], ...]
    forced: int | None = field(default=None, init=False)

    def index(self, draws: Draws) -> int:
        """Which one it is."""
        if self.forced is not None:
            return self.forced
        return draws.shared_integer("size", len(self.shapes)) if len(self.shapes) > 1 else 0

    def shape(self, draws: Draws) -> tuple[int, ...]:
        return self.shapes[self.index(draws)]

    @property
    def largest(self) -> tuple[int, ...]:
        """The shape of the most numbers."""
        return max(self.shapes, key=math.prod)

    @contextmanager
    def at_largest(self) -> Iterator[None]:
        """Within it every step computes at the largest."""
        self.forced = self.shapes.index(self.largest)
        try:
            yield
        finally:
            self.forced = None
