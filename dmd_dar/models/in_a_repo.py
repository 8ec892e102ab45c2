"""Travels beside a part of a student that only dmd_dar can load: the part's class is the one that the package has."""

import importlib

__getattr__ = importlib.import_module("dmd_dar").__getattr__
