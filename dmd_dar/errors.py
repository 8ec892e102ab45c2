"""Errors that are the user's to mend: a command prints them as one line and exits with code 2."""

import errno


class UserError(Exception):
    """Its message names the value, the key or file, and the remedy."""


class MissingWeightsError(UserError, FileNotFoundError):
    """Weights that this machine does not hold; the message names the file and where it is looked for."""


class DivergedError(UserError, FloatingPointError):
    """A number that is not finite; the message names the network and the step."""


class DamagedFileError(UserError, ValueError):
    """A file that cannot be what it should be; the message names it."""


def users_line(error: Exception) -> str | None:
    """What to tell the user of an error that is theirs to mend, a full disk among them; None for any other."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{error}: free some space and run again; what was saved is whole"
    return None
