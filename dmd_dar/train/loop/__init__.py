"""Steps: phases, optimiser, averages, the job around them."""

from dmd_dar import moved


def __getattr__(name: str) -> object:
    """Names of the module that this package was before."""
    return moved.attribute(__name__, f"{__name__}.loop", name)
