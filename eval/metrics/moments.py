"""Mean and covariance of features, gathered batch by batch and process by process in float64; npz references.

The merge is that of Chan, Golub & LeVeque (1979): any split and any order give the same numbers up to rounding.
Legend: N rows, D features.
"""

import io
import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dmd_dar.atomic import write_atomic

from ..samples.images import UnfitError

SYMMETRY = 1e-6  # of a reference's covariance, relative to its largest entry
DEFINITE = 1e-3  # of its Frobenius norm: as far below 0 may rounding to half precision leave an eigenvalue
FEWEST = 2  # images that a covariance is of


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
    fields: dict[str, Any] = {"mu": gaussian.mean.numpy(), "sigma": gaussian.covariance.numpy()}
    if gaussian.count is not None:
        fields["count"] = np.int64(gaussian.count)
    buffer = io.BytesIO()
    np.savez(buffer, **fields)
    write_atomic(path, buffer.getvalue())


def load_reference(path: str | Path) -> Gaussian:
    """The Gaussian of an npz with mu (D,) and sigma (D, D).

    UnfitError naming the file where it is pickled, lacks a field, a field has another shape or is not finite, sigma is
    not symmetric or has negative eigenvalues, or count is no number of images.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            fields = {name: archive[name] for name in archive.files if name in ("mu", "sigma", "count")}
            held = ", ".join(archive.files)
    except Exception as error:  # numpy and zipfile raise all kinds on damaged files
        raise UnfitError(f"{path}: no npz of plain arrays ({error}); pickles are refused") from error
    missing = [name for name in ("mu", "sigma") if name not in fields]
    if missing:
        raise UnfitError(f"{path}: no field {' and '.join(missing)}, only {held}; a reference holds mu and sigma")
    return _checked(path, fields)


def _checked(path: str | Path, fields: dict[str, np.ndarray]) -> Gaussian:
    mean, covariance = (_finite_field(path, name, fields[name]) for name in ("mu", "sigma"))
    size = mean.size
    if mean.ndim != 1 or covariance.shape != (size, size) or not size:
        raise UnfitError(f"{path}: mu {mean.shape} and sigma {covariance.shape}; expected (D,) and (D, D)")
    largest = np.abs(covariance).max()
    if np.abs(covariance - covariance.T).max() > SYMMETRY * largest:
        raise UnfitError(f"{path}: sigma is not symmetric, so no covariance")
    sigma = torch.from_numpy(covariance)
    room = DEFINITE * sigma.norm() * torch.eye(size, dtype=sigma.dtype)
    if largest and torch.linalg.cholesky_ex(sigma + room).info.item():
        values = torch.linalg.eigvalsh(sigma)
        ends = f"{values[0].item():.4g} to {values[-1].item():.4g}"
        raise UnfitError(f"{path}: sigma has eigenvalues from {ends}, so it is no covariance; make the file anew")
    return Gaussian(torch.from_numpy(mean), sigma, _count(path, fields["count"]) if "count" in fields else None)


def _finite_field(path: str | Path, name: str, field: np.ndarray) -> np.ndarray:
    """In float64, of whatever byte order and length it was saved in."""
    values = field.astype(np.float64) if field.dtype.kind in "fiu" else None
    if values is None or not np.isfinite(values).all():
        raise UnfitError(f"{path}: {name} ({field.dtype.str}) holds numbers that are not real and finite; save float64")
    return values


def _count(path: str | Path, field: np.ndarray) -> int:
    value = float(field.item()) if field.size == 1 and field.dtype.kind in "fiu" else math.nan
    if not (math.isfinite(value) and value == int(value) >= FEWEST):
        shown = str(field.item()) if field.size == 1 else f"of shape {field.shape}"
        raise UnfitError(
            f"{path}: count {shown}; it is the number of images, {FEWEST} at least: mend it or leave it out"
        )
    return int(value)
