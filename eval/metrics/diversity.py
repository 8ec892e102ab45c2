"""Diversity within classes: the mean distance of a class's images, as a ratio to a reference's.

Legend: N images, D features.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class DiversityRatio:
    """Diversity within classes as a ratio to a reference's, with the least and the median of the classes."""

    by_class: dict[int, float]
    least: float
    median: float


def class_diversity(features: Tensor, labels: Tensor) -> dict[int, float]:
    """Mean distance |x_i - x_j| over the pairs of each class, features (N, D); not for classes of one image."""
    spread = {}
    for label in labels.unique().tolist():
        members = features[labels == label].double()
        if len(members) > 1:
            spread[int(label)] = torch.nn.functional.pdist(members).mean().item()
    return spread


def diversity_ratio(ours: dict[int, float], teachers: dict[int, float]) -> dict[int, float]:
    """Diversity of each class as a ratio to the teacher's; classes in which the teacher is constant are left out."""
    return {label: ours[label] / teachers[label] for label in ours if teachers.get(label, 0.0) > 0}


def diversity_ratios(ours: dict[int, float], teachers: dict[int, float]) -> DiversityRatio:
    """`diversity_ratio` by class, the least and the median of the classes; these are NaN where there is none."""
    by_class = diversity_ratio(ours, teachers)
    values = list(by_class.values())
    median = float(np.median(values)) if values else math.nan
    return DiversityRatio(by_class, min(values, default=math.nan), median)
