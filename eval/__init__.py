"""Measurement of samples: metrics with intervals, reports, comparisons over training seeds."""

from dmd_dar import extras, moved

moved.install()
extras.require("the evaluation", "jinja2", "matplotlib", "pywt", "scipy")
