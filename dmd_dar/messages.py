"""The logger `dmd_dar`: what the package says while it works.

Its modules log and never print. A command shows the bare messages on stderr, from `show` on; a program that uses the
package as a library decides for itself, by `logging`, which of them it wants and where.
"""

import logging
import sys

LOGGER = logging.getLogger("dmd_dar")


class Screen(logging.Handler):
    """Writes each message, and nothing else, to what sys.stderr is at that moment."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            print(self.format(record), file=sys.stderr, flush=True)
        except Exception:
            self.handleError(record)


def show() -> None:
    """Show messages of level INFO and above from now on, each once, however often this is called."""
    if any(isinstance(handler, Screen) for handler in LOGGER.handlers):
        return
    LOGGER.addHandler(Screen())
    LOGGER.setLevel(logging.INFO)
    LOGGER.propagate = False  # libraries may have given the root logger a screen of its own
