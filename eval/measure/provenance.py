"""Where the numbers of a report come from: code, inputs, machine, and the contract of how images become numbers."""

import hashlib
import json
import os
import platform
import shlex
import subprocess
from pathlib import Path
from typing import Any

import torch

from dmd_dar import colour as colours
from dmd_dar import spectrum
from dmd_dar.data.images import to_pixels

from ..metrics import (
    classifier,
    colour,
    features,
    frechet,
    intervals,
    neighbours,
    power_map,
    sliced,
    structure,
    verdict,
)
from ..metrics.record import jsonable
from . import one_set, suite
from .machine import Machine, versions
from .results import CodeState, Contract, Origin, Provenance

ROOT = Path(__file__).parents[2]  # of the checkout; installed, this folder is the package's
COMMIT = "DMD_DAR_COMMIT"  # names the commit of code that was copied without its history
PACKAGES = ("torch", "numpy", "scipy", "PyWavelets", "pillow", "matplotlib")


def git_state(root: Path | None = None) -> str | None:
    """Commit of the checkout at `root` (None: this code's), with -dirty where the tree differs; None where it is none.

    An installed copy has none, although its environment may lie in another repository.
    """
    root = root or ROOT
    if not (root / ".git").exists():
        return None
    try:
        command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
        return subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def code_now() -> CodeState:
    """The state of this code: where DMD_DAR_COMMIT is set, it names the commit."""
    named = os.environ.get(COMMIT)
    state = None if named else git_state()
    if state is None:
        return CodeState(named or "unknown", None)
    return CodeState(state.removesuffix("-dirty"), state.endswith("-dirty"))


def contract() -> Contract:
    """The constants that the code uses; the rounding is what `to_pixels` does to a ramp beyond its range."""
    ramp = torch.linspace(-1.1, 1.1, 1024).reshape(1, 1, 32, 32)
    return Contract(
        {
            "pixels": "decoded in float32, clamped, quantised once by rounding; stored as PNG or npy; never resized",
            "quantised_ramp": hashlib.sha256(bytes(to_pixels(ramp).flatten().tolist())).hexdigest()[:16],
            "luma": spectrum.LUMA,
            "chroma_factors": (spectrum.CB_FACTOR, spectrum.CR_FACTOR),
            "window": "periodic Hann, weighted mean removed, first bin dropped",
            "bands": spectrum.BAND_EDGES,
            "fits_below": spectrum.HIGHEST_FIT,
            "power_floor": spectrum.POWER_FLOOR,
            "quantisation_power": spectrum.QUANTISATION_POWER,
            "wavelet": (structure.WAVELET, structure.LEVELS),
            "least_kurtosis": structure.LEAST_KURTOSIS,
            "components": (features.PCA_COMPONENTS, features.PCA_SIDE),
            "least_spread": frechet.LEAST_SPREAD,
            "flat_patches": (structure.PATCH, structure.FLAT_SHARE),
            "grid_lines": (spectrum.PERIODS, spectrum.OFFSETS, spectrum.LEAST_PERIODS),
            "grid_peak_db": power_map.PEAK_DB,
            "sliced": (sliced.PATCH, sliced.PATCHES, sliced.DIRECTIONS, sliced.SMALLEST, sliced.BINOMIAL),
            "sliced_images": one_set.SLICED_IMAGES,
            "diversity_images": one_set.DIVERSITY_IMAGES,
            "classifier": (classifier.SIDE, classifier.WIDTHS, classifier.STEPS, classifier.LEAST_SHARE),
            "kid": (suite.KID_SUBSET_OFFLINE, suite.KID_SUBSET, neighbours.KID_SUBSETS),
            "neighbours": neighbours.NEIGHBOURS,
            "margins": (verdict.GAIN_MARGIN_DB, verdict.KURTOSIS_RANGE, verdict.FLAT_NOISE_DB),
            "colour": (colours.BLOCK, colours.CONTRAST_FLOOR, colours.SATURATION_FLOOR, colours.SPECKLE_FLOOR),
            "colour_margins": (
                *(colour.DRIFT_Y, colour.DRIFT_CHROMA, colour.SPECKLE_DB),
                *(colour.CONTRAST_RANGE, colour.SATURATION_RANGE),
            ),
            "intervals": (intervals.LEVEL, intervals.RESAMPLES, intervals.LEAST_IN_STRATUM),
        }
    )


def contract_hash() -> str:
    return hashlib.sha256(json.dumps(jsonable(contract()), sort_keys=True).encode()).hexdigest()[:16]


def command_line(module: str, differences: list[tuple[str, Any, Any]]) -> str:
    """The command that gives a configuration again; `differences` are its (key, default, value)."""
    words = [
        (name, f"[{','.join(value)}]" if isinstance(value, list | tuple) else value) for name, _, value in differences
    ]
    return shlex.join(["python", "-m", module, *(f"{name}={value}" for name, value in words if value != "[]")])


def provenance(device: torch.device, seconds: float, origin: Origin) -> Provenance:
    """Code, contract, versions, device and wall time of numbers that `origin` says more of."""
    machine = Machine.of(device)
    return Provenance(
        origin,
        git=code_now(),
        contract_hash=contract_hash(),
        contract=contract(),
        versions={"python": platform.python_version(), **versions(PACKAGES)},
        device=f"{device}, {machine.device}, {machine.cores} CPU cores, {machine.threads} threads",
        seconds=round(seconds, 1),
    )
