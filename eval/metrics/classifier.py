"""A small classifier trained on labelled real images in seconds: which modes a set holds, and fd_classifier.

Legend: N images, n of a batch, C classes, D features.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..samples.images import UnfitError
from .features import Extractor
from .record import FLAT

WIDTHS = (16, 32, 32)  # the last one is D
SIDE = 64  # larger images are averaged down to it first
STEPS = 300
BATCH = 64
PEAK_RATE = 1e-2
HELD_OUT = 0.2
CHUNK = 256
NULL_SPLITS = 32
LEAST_SHARE = 0.05  # of the typical spread over a reference: some units hardly fire there, or never


@dataclass(frozen=True)
class Classifier:
    """`network` maps uint8 images to C logits; `classes` are the labels in their order.

    accuracy: on the fifth of the images that it was not trained on.
    """

    network: nn.Sequential
    classes: tuple[int, ...]
    accuracy: float
    facts: dict[str, Any]

    def predict(self, images: Tensor) -> np.ndarray:
        """Labels (N,) of uint8 images (N, 3, H, W)."""
        with torch.no_grad():
            logits = torch.cat([self.network(_prepared(part)) for part in images.split(CHUNK)])
        return np.array(self.classes)[logits.argmax(1).numpy()]

    def extractor(self) -> Extractor:
        """fd_classifier: the D features before the logits, in units of the reference's spread."""
        body = self.network[:-1]
        return Extractor(
            "fd_classifier",
            lambda x: body(_prepared(x)),
            standardised=True,
            least_share=LEAST_SHARE,
            facts=self.facts,
        )


@dataclass(frozen=True, kw_only=True)
class Modes:
    """Which classes a set holds beside those that its reference holds, as a classifier sees them.

    total_variation: half the sum of the absolute differences of shares; its null is that of random halves of the
    reference, rescaled to these sizes by sqrt(1/N + 1/M). least_share_ratio: the rarest class against its share in
    the reference, 0 for a mode that is dropped. agreement: share of images taken for their own label, None without any.
    """

    images: int
    shares: dict[int, float]
    reference_shares: dict[int, float]
    total_variation: float
    null: float
    least_share_ratio: float
    agreement: float | None
    comparable_to_published: bool
    facts: dict[str, Any] = field(metadata=FLAT)  # of the classifier: trained_on, train_seed, classes, accuracy


def _prepared(images: Tensor) -> Tensor:
    x = images.float() / 127.5 - 1
    height, width = (min(side, SIDE) for side in x.shape[2:])
    return F.adaptive_avg_pool2d(x, (height, width)) if max(x.shape[2:]) > SIDE else x


def _network(classes: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for channels, width in zip((3, *WIDTHS[:-1]), WIDTHS, strict=True):
        layers += [nn.Conv2d(channels, width, 3, stride=2, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(WIDTHS[-1], classes))


def fit_classifier(images: Tensor, labels: Tensor, seed: int = 0, steps: int = STEPS) -> Classifier:
    """From real uint8 images (N, 3, H, W) and labels (N,); `seed` determines split, weights and batches.

    UnfitError for fewer than two classes, or a class with fewer than 5 images.
    """
    classes, targets, counts = labels.unique(return_inverse=True, return_counts=True)
    if len(classes) < 2 or counts.min() < 5:
        sizes = dict(zip(classes.tolist(), counts.tolist(), strict=True))
        raise UnfitError(f"classifier: images by class {sizes}; give at least two classes with 5 images each")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(images), generator=generator)
    held, used = order.split([int(HELD_OUT * len(images)), len(images) - int(HELD_OUT * len(images))])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = _network(len(classes))
    _train(network, _prepared(images[used]), targets[used], generator, steps)
    network.eval().requires_grad_(False)
    names = tuple(classes.tolist())
    facts = {"trained_on": len(used), "train_seed": seed, "classes": len(names)}
    untested = Classifier(network, names, float("nan"), facts)
    accuracy = float((untested.predict(images[held]) == labels[held].numpy()).mean())
    return Classifier(network, names, accuracy, {**facts, "accuracy": accuracy})


def _train(network: nn.Module, x: Tensor, targets: Tensor, generator: torch.Generator, steps: int) -> None:
    optimiser = torch.optim.AdamW(network.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, PEAK_RATE, total_steps=steps)
    for _ in range(steps):
        batch = torch.randint(len(x), (BATCH,), generator=generator)
        optimiser.zero_grad()
        F.cross_entropy(network(x[batch]), targets[batch]).backward()
        optimiser.step()
        schedule.step()


def shares(predicted: np.ndarray, classes: tuple[int, ...]) -> np.ndarray:
    """Share of each class, (C,)."""
    return np.array([(predicted == label).mean() for label in classes])


def modes(
    classifier: Classifier, images: Tensor, reference: Tensor, labels: Tensor | None = None, seed: int = 0
) -> Modes:
    """Of uint8 images (N, 3, H, W) beside those of a reference; labels (N,); `seed` draws the halves of the null."""
    ours, theirs = classifier.predict(images), classifier.predict(reference)
    mine, real = shares(ours, classifier.classes), shares(theirs, classifier.classes)
    ratios = mine[real > 0] / real[real > 0]
    return Modes(
        images=len(images),
        shares=dict(zip(classifier.classes, mine.tolist(), strict=True)),
        reference_shares=dict(zip(classifier.classes, real.tolist(), strict=True)),
        total_variation=float(np.abs(mine - real).sum() / 2),
        null=_null(theirs, classifier.classes, len(ours), np.random.default_rng(seed)),
        least_share_ratio=float(ratios.min()),
        agreement=None if labels is None else float((ours == labels.numpy()).mean()),
        comparable_to_published=False,
        facts=classifier.facts,
    )


def _null(predicted: np.ndarray, classes: tuple[int, ...], size: int, rng: np.random.Generator) -> float:
    half = len(predicted) // 2
    if not half:
        raise UnfitError("modes: a reference of one image has no null; give more")
    values = []
    for _ in range(NULL_SPLITS):
        order = rng.permutation(len(predicted))
        ours, theirs = (shares(predicted[rows], classes) for rows in (order[:half], order[half : 2 * half]))
        values.append(np.abs(ours - theirs).sum() / 2)
    return float(np.mean(values) * np.sqrt((1 / size + 1 / len(predicted)) * half / 2))
