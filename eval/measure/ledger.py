"""What could not be measured, with the reason: a metric that fails is recorded, and the others go on."""

from collections.abc import Callable
from typing import TypeVar

from dmd_dar.errors import UserError

from .results import Skipped

T = TypeVar("T")


class Ledger:
    """What was skipped, in the order in which it was met."""

    def __init__(self) -> None:
        self.skipped: list[Skipped] = []

    def attempt(self, metric: str, name: str, call: Callable[[], T], requested: bool = True) -> T | None:
        """The result, or None and an entry with the error that names the remedy."""
        try:
            return call()
        except UserError as error:
            self.add(metric, name, str(error), requested)
            return None

    def take(self, other: "Ledger") -> None:
        """Add the other's entries that are not here yet."""
        self.skipped += [entry for entry in other.skipped if entry not in self.skipped]

    def add(self, metric: str, name: str, reason: str, requested: bool = True) -> None:
        """Record a metric of the set `name` that was not measured, once, with the reason on one line."""
        entry = Skipped(metric, name, " ".join(reason.split()), requested)
        if entry not in self.skipped:
            self.skipped.append(entry)
