"""Errors that are the user's to mend: a command prints them as one line and exits with code 2."""


class UserError(Exception):
    """Its message names the value, the key or file, and the remedy."""


class MissingWeightsError(UserError, FileNotFoundError):
    """Weights that this machine does not hold; the message names the file and where it is looked for."""


class DivergedError(UserError, FloatingPointError):
    """A number that is not finite; the message names the network and the step."""


class DamagedFileError(UserError, ValueError):
    """A file that cannot be what it should be; the message names it."""
