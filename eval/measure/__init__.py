"""One set measured, a pair compared, the null of each distance, what could not be measured."""

from dmd_dar import moved


def __getattr__(name: str) -> object:
    """Names of the module that this package was before."""
    return moved.attribute(__name__, f"{__name__}.pair", name)
