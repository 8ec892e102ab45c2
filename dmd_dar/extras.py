"""Packages that an installation may lack: which extra brings each, and one clear error where one is needed."""

import importlib
import importlib.util
import sys
from types import ModuleType

from dmd_dar import messages
from dmd_dar.errors import UserError
from dmd_dar.messages import LOGGER

# By the name that is imported. pyproject.toml lists the same packages under the names that are installed.
EXTRA_OF = {
    "jinja2": "evaluation",
    "lpips": "evaluation",
    "markupsafe": "evaluation",
    "matplotlib": "evaluation",
    "open_clip": "evaluation",
    "pyarrow": "parquet",
    "pywt": "evaluation",
    "scipy": "evaluation",
    "tensorboard": "tensorboard",
    "timm": "evaluation",
    "wandb": "wandb",
}


class MissingPackageError(UserError, ImportError):
    """Optional packages that are not installed; the message names them and the extra that brings them."""


def remedy(module: str) -> str:
    """What a user types to get an optional package, for example pip install 'dmd-dar[evaluation]'."""
    return f"pip install 'dmd-dar[{EXTRA_OF[module]}]'"


def needed(module: str) -> ModuleType:
    """An optional package, imported. Raises MissingPackageError."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingPackageError(f"{module} is not installed: {remedy(module)}") from error


def require(room: str, *modules: str) -> None:
    """Called by a package whose modules import optional packages at their top, before any of them does.

    Raises MissingPackageError; where `python -m` is about to start a command of that package, the error is shown and
    the exit code is 2, as for any other error of a command.
    """
    lacking = [module for module in modules if importlib.util.find_spec(module) is None]
    if not lacking:
        return
    verb = "is" if len(lacking) == 1 else "are"
    message = f"{room} needs {', '.join(lacking)}, which {verb} not installed: {remedy(lacking[0])}"
    if sys.argv[:1] == ["-m"]:  # as long as Python looks for the module that it is to run
        messages.show()
        LOGGER.error(f"error: {message}")
        raise SystemExit(2)
    raise MissingPackageError(message)
