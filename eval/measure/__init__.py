"""One set measured, a pair compared, the null of each distance, what could not be measured."""

from dmd_dar import moved

moved.keep_names(__name__, f"{__name__}.pair")  # that this package was before
