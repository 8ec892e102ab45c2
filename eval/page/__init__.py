"""A report as HTML, CSV and figures."""

from dmd_dar import moved


def __getattr__(name: str) -> object:
    """Names of the module that this package was before."""
    return moved.attribute(__name__, f"{__name__}.html", name)
