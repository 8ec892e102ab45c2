"""Counts how often files of weights are opened, to hash, to load or for their heads."""

import contextlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from dmd_dar.models import saved


@contextlib.contextmanager
def weights_opened() -> Iterator[Counter]:
    """Within it: (path of a file of a SiT's weights, what opens it) -> times."""
    found: Counter = Counter()
    real = Path.read_bytes

    def read_bytes(path: Path) -> bytes:
        found[str(path), "hash"] += path.name == saved.SIT_WEIGHTS
        return real(path)

    def counted(name: str, kind: str):
        call = getattr(saved, name)

        def opening(path, *given, **named):
            found[str(path), kind] += 1
            return call(path, *given, **named)

        return opening

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Path, "read_bytes", read_bytes)
        patched.setattr(saved, "load_file", counted("load_file", "load"))
        yield found


def of(found: Counter, student: Path) -> dict[str, int]:
    """What opened the weights of one folder, and how often."""
    return {kind: times for (path, kind), times in found.items() if times and Path(path).is_relative_to(student)}
