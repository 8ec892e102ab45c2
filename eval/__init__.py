"""Measurement of samples: metrics with intervals, reports, comparisons over training seeds."""

from dmd_dar import moved

moved.install()
