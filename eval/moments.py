"""Mean and covariance of features, gathered batch by batch and process by process in float64; npz references.

The merge is that of Chan, Golub & LeVeque (1979): any split and any order give the same numbers up to rounding.
Legend: N rows, D features.
"""

import io
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from dmd_dar.atomic import write_atomic
from eval.images import UnfitError

SYMMETRY = 1e-6  # of a reference's covariance, relative to its largest entry


@dataclass(frozen=True)
class Gaussian:
    """Mean (D,) and covariance (D, D) in float64. `count`: images it was fitted to, where that is known."""

    mean: Tensor
    covariance: Tensor
    count: int | None = None


@dataclass(frozen=True)
class Moments:
    """Rows seen so far: their number, mean (D,) and scatter (D, D), the sum of outer products of deviations."""

    count: int
    mean: Tensor
    scatter: Tensor

    @staticmethod
    def of(features: Tensor, name: str = "features") -> "Moments":
        """Of one batch (N, D). UnfitError naming the batch when a number is not finite."""
        features = finite(features, name)
        mean = features.mean(0)
        centred = features - mean
        return Moments(len(features), mean, centred.T @ centred)

    def merge(self, other: "Moments") -> "Moments":
        """Those of both sets of rows together."""
        count = self.count + other.count
        step = other.mean - self.mean
        mean = self.mean + step * (other.count / count)
        scatter = self.scatter + other.scatter + torch.outer(step, step) * (self.count * other.count / count)
        return Moments(count, mean, scatter)

    def gaussian(self) -> Gaussian:
        """With the unbiased covariance. UnfitError for fewer than 2 rows."""
        if self.count < 2:
            raise UnfitError(f"a covariance of {self.count} image; give at least 2")
        return Gaussian(self.mean, self.scatter / (self.count - 1), self.count)


def finite(features: Tensor, name: str) -> Tensor:
    """(N >= 1, D) as float64. UnfitError naming the batch otherwise."""
    if features.ndim != 2 or not len(features):
        raise UnfitError(f"{name}: expected features (N >= 1, D), got {tuple(features.shape)}")
    bad = (~torch.isfinite(features)).sum().item()
    if bad:
        raise UnfitError(f"{name}: {bad} of {features.numel()} features are not finite")
    return features.double().cpu()


def merged(parts: Iterable[Moments]) -> Moments:
    """Of all batches or processes. UnfitError when there are none."""
    parts = list(parts)
    if not parts:
        raise UnfitError("no batches; nothing to take the moments of")
    return reduce(Moments.merge, parts)


def save_reference(path: str | Path, gaussian: Gaussian) -> None:
    """An npz with mu (D,) and sigma (D, D), as other FID tools read it, and count where it is known."""
    fields = {"mu": gaussian.mean.numpy(), "sigma": gaussian.covariance.numpy()}
    if gaussian.count is not None:
        fields["count"] = np.int64(gaussian.count)
    buffer = io.BytesIO()
    np.savez(buffer, **fields)
    write_atomic(path, buffer.getvalue())


def load_reference(path: str | Path) -> Gaussian:
    """The Gaussian of an npz with mu (D,) and sigma (D, D).

    UnfitError naming the file where it is pickled, lacks a field, or a field has another shape, is not finite or,
    for sigma, is not symmetric.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            fields = {name: archive[name] for name in archive.files if name in ("mu", "sigma", "count")}
            held = ", ".join(archive.files)
    except (ValueError, OSError, EOFError, BadZipFile, TypeError, NotImplementedError, zlib.error) as error:
        raise UnfitError(f"{path}: no npz of plain arrays ({error}); pickles are refused") from error
    missing = [name for name in ("mu", "sigma") if name not in fields]
    if missing:
        raise UnfitError(f"{path}: no field {' and '.join(missing)}, only {held}; a reference holds mu and sigma")
    return _checked(path, fields)


def _checked(path: str | Path, fields: dict[str, np.ndarray]) -> Gaussian:
    mean, covariance = fields["mu"], fields["sigma"]
    size = mean.size
    if mean.ndim != 1 or covariance.shape != (size, size) or not size:
        raise UnfitError(f"{path}: mu {mean.shape} and sigma {covariance.shape}; expected (D,) and (D, D)")
    for name, field in (("mu", mean), ("sigma", covariance)):
        if field.dtype.kind not in "fiu" or not np.isfinite(field).all():
            raise UnfitError(f"{path}: {name} ({field.dtype}) holds numbers that are not real and finite")
    if np.abs(covariance - covariance.T).max() > SYMMETRY * np.abs(covariance).max():
        raise UnfitError(f"{path}: sigma is not symmetric, so no covariance")
    count = int(fields["count"]) if "count" in fields else None
    return Gaussian(torch.from_numpy(mean).double(), torch.from_numpy(covariance).double(), count)
