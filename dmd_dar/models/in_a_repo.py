"""Travels beside a part of a student that only dmd_dar can load: the part's class is the one that the package has."""

from dmd_dar import __getattr__ as __getattr__
