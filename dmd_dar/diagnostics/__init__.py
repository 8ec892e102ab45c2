"""What a network does inside: magnitudes, gradients, source mixing over t, and figures of them."""

from dmd_dar import extras

extras.require("dmd_dar.diagnostics", "matplotlib")
