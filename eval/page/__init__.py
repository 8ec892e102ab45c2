"""A report as HTML, CSV and figures."""

from dmd_dar import moved

moved.keep_names(__name__, f"{__name__}.html")  # that this package was before
