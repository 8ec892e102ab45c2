"""SIGTERM and SIGINT: a clean end where there is something to finish, else an end at once."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)
EXIT_CODE = 143  # of a command that a signal stopped; the same command continues


@contextlib.contextmanager
def _handled(act: Callable[[], None]) -> Iterator[None]:
    """The first of the signals calls `act`; a second one ends the process at once, whatever it is doing.

    Not in a process that a launcher started: it may get the same signal twice, from whoever sent it and from the
    launcher, and it is the launcher that a second one ends.
    """

    def handle(number: int, frame: Any) -> None:
        for each in SIGNALS:
            signal.signal(each, signal.SIG_IGN if os.environ.get("WORLD_SIZE") else signal.SIG_DFL)
        act()

    if threading.current_thread() is not threading.main_thread():  # signals are the main thread's
        yield
        return
    previous = {number: signal.signal(number, handle) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _leave() -> None:
    os.write(2, b"stopped\n")
    raise SystemExit(EXIT_CODE)


def leaving() -> contextlib.AbstractContextManager[None]:
    """While nothing is under way that could be finished: a signal ends the command with exit code 143 and one line."""
    return _handled(_leave)


class StopRequest:
    """`asked` is set by SIGTERM or SIGINT from entry to exit; who works finishes the unit at hand, saves, and ends."""

    asked = False

    def __enter__(self) -> "StopRequest":
        self._handling = _handled(self._ask)
        self._handling.__enter__()
        return self

    def _ask(self) -> None:
        self.asked = True

    def __exit__(self, *exception: object) -> None:
        self._handling.__exit__(None, None, None)
