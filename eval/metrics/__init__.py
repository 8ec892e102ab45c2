"""Metrics of images and features, each a definition of its own; intervals and the verdict."""
