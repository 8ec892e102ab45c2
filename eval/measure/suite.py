"""Distances between sets over features, what each set holds, and the metrics that need weights: whatever can be had.

A metric that cannot be measured is recorded with its reason, and the others go on.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from ..metrics import dino, features, inception, perceptual
from ..metrics.classifier import Classifier, Modes, fit_classifier, modes
from ..metrics.features import Extractor, FeatureDistance, Features, compare_features, scaled
from ..metrics.moments import Gaussian, load_reference
from ..metrics.neighbours import (
    HalvesNull,
    Neighbours,
    compare_neighbours,
    halved,
    kid,
    neighbours_of,
    precision_recall,
)
from ..metrics.perceptual import LpipsDiversity, LpipsPaired
from ..metrics.weight_files import ALEXNET, INCEPTION, Weights, clip_weights, dinov2_weights, find, missing_message
from ..samples.images import UnfitError
from ..samples.parallel import Processes, one_thread
from ..samples.sets import ImageSet, Role
from .ledger import Ledger

Metric = Literal["auto", "offline", "fid", "patch_fid", "fd_dinov2", "clip", "lpips"]
WEIGHT_BOUND: tuple[Metric, ...] = ("fid", "patch_fid", "fd_dinov2", "clip", "lpips")
KID_SUBSET_OFFLINE = 256  # images; of no use for comparisons with published values, so the quicker choice
KID_SUBSET = 1000
MOST_CLASSIFIED = 10_000  # images of a set whose modes are counted
MOST_PERCEPTUAL = 1000  # images of a set that CLIP and LPIPS read
REAL: tuple[Role, ...] = ("real", "null")


@dataclass(frozen=True)
class Sources:
    """Where weights come from: paths of the user's own, or the places that `weight_files` looks in.

    statistics: an npz with mu and sigma of FID's features of other images. asked: metrics that are asked for by the
    kind of the sets, though `auto` names none.
    """

    inception: str | None = None
    clip: str | None = None  # local-dir:FOLDER or hf-hub:OWNER/NAME
    allow_download: bool = False
    device: torch.device | str = "cpu"
    statistics: str = ""
    asked: tuple[Metric, ...] = ()


@dataclass(frozen=True)
class Suite:
    """What reads the images, fitted or loaded once for a report."""

    extractors: tuple[Extractor, ...] = field(default_factory=lambda: (features.wavelet(),))
    classifier: Classifier | None = None
    clip: perceptual.Clip | None = None
    lpips: perceptual.Lpips | None = None
    prompt: str = ""  # of CLIP, {} being the name of the class or the prompt; empty: see measure.clip
    statistics: Gaussian | None = None  # of FID's features of other images

    @property
    def small(self) -> bool:
        """Whether nothing in it is a large network."""
        return not (self.clip or self.lpips or any(one.comparable_to_published for one in self.extractors))


def wanted(metrics: Iterable[Metric], sources: Sources, ledger: Ledger) -> list[Metric]:
    """The metrics with weights to measure: those that are named, or for `auto` those whose weights are there."""
    if "auto" not in metrics:
        return [name for name in WEIGHT_BOUND if name in metrics]
    files: dict[Metric, Weights] = {
        "fid": INCEPTION,
        "patch_fid": INCEPTION,
        "fd_dinov2": dinov2_weights(),
        "clip": clip_weights(),
        "lpips": ALEXNET,
    }
    own = {"fid": sources.inception, "patch_fid": sources.inception, "clip": sources.clip}
    available: list[Metric] = [name for name, weights in files.items() if own.get(name) or find(weights)]
    for name in files:
        if name not in available:
            ledger.add(name, "", missing_message(files[name]), requested=name in sources.asked)
    return available


def prepare(
    metrics: tuple[Metric, ...],
    fit: tuple[Tensor, Tensor | None],
    seed: int,
    ledger: Ledger,
    sources: Sources,
    prompt: str = "",
) -> Suite:
    """Everything that can be fitted or loaded. `fit`: uint8 images (N, 3, H, W), best none of those that are compared,
    and their labels (N,) or None. `prompt`: see `Suite`."""
    images, labels = fit
    names, requested = wanted(metrics, sources, ledger), "auto" not in metrics
    with one_thread():
        pca, classifier = _fitted(images, labels, seed, ledger)
    path, download, device = sources.inception or None, sources.allow_download, sources.device
    loaders: dict[str, Callable[[], Any]] = {
        "fid": lambda: inception.fid(path, download, device),
        "patch_fid": lambda: inception.patch_fid(path, download, device),
        "fd_dinov2": lambda: dino.dinov2(None, download, device),
        "clip": lambda: perceptual.load_clip(
            **({"source": sources.clip} if sources.clip else {}), allow_download=download, device=device
        ),
        "lpips": lambda: perceptual.load_lpips(allow_download=download, device=device),
    }
    loaded = {name: ledger.attempt(name, "", loaders[name], requested) for name in names}
    networks = [loaded.get(name) for name in ("fid", "patch_fid", "fd_dinov2")]
    offline = [features.wavelet(), pca, classifier and classifier.extractor()]
    statistics = sources.statistics
    gaussian = ledger.attempt("fid", statistics, lambda: load_reference(statistics)) if statistics else None
    if gaussian is not None and loaded.get("fid") is None:
        ledger.add("fid", statistics, "FID itself was not measured; ask for it, metrics=[fid]")
    return Suite(
        tuple(one for one in (*offline, *networks) if one is not None),
        classifier,
        loaded.get("clip"),
        loaded.get("lpips"),
        prompt,
        gaussian,
    )


def _fitted(
    images: Tensor, labels: Tensor | None, seed: int, ledger: Ledger
) -> tuple[Extractor | None, Classifier | None]:
    pca = ledger.attempt("fd_pca", "", lambda: features.fit_pca(images, seed=seed))
    if labels is None:
        ledger.add("fd_classifier", "", "no labelled images to train the classifier on", requested=False)
        return pca, None
    return pca, ledger.attempt("fd_classifier", "", lambda: fit_classifier(images, labels, seed))


def features_of(one: ImageSet, suite: Suite, ledger: Ledger, processes: Processes | None = None) -> dict[str, Features]:
    """By extractor, those that can be had; shared out among the processes."""
    features_by_name, processes = {}, processes or Processes()
    for extractor in suite.extractors:

        def read(extractor: Extractor = extractor) -> Features:
            def share(rank: int, world: int) -> dict[str, Tensor]:
                return {"values": features.extract(one.stream, extractor, rank=rank, world=world).values}

            values = processes.joined(one.count, share)["values"]
            return Features(one.name, values, extractor, features.upsampled(one.stream, extractor))

        values = ledger.attempt(extractor.name, one.name, read)
        if values is not None:
            features_by_name[extractor.name] = values
    return features_by_name


def neighbours(ours: Features, theirs: Features, seed: int, ledger: Ledger) -> Neighbours | None:
    """KID, precision and recall without their null; KID alone between sets of unequal size."""
    subset = KID_SUBSET if ours.extractor.comparable_to_published else KID_SUBSET_OFFLINE
    if len(ours.values) == len(theirs.values):
        call = partial(compare_neighbours, ours, theirs, seed, subset)
        return ledger.attempt("KID, precision and recall", ours.name, call)
    both, names = (scaled(ours, theirs), scaled(theirs, theirs)), (ours.name, theirs.name)
    ledger.attempt("precision and recall", ours.name, lambda: precision_recall(*both, names=names))
    size = min(subset, *(len(rows) // 2 for rows in both))
    distance = ledger.attempt("KID", ours.name, lambda: kid(*both, seed=seed, subset_size=size, names=names))
    return None if distance is None else neighbours_of(ours, distance, None)


def neighbours_null(reference: Features, seed: int, ledger: Ledger) -> HalvesNull | None:
    """KID, precision and recall of a reference against itself."""
    subset = KID_SUBSET if reference.extractor.comparable_to_published else KID_SUBSET_OFFLINE
    return ledger.attempt("the null of KID", reference.name, lambda: halved(reference, seed, subset))


def diversity_result(one: ImageSet, suite: Suite, seed: int, ledger: Ledger) -> LpipsDiversity | None:
    """LPIPS diversity of a set; None where the suite has no LPIPS."""
    lpips = suite.lpips
    if lpips is None:
        return None
    # of prompts there may be one image each, and of real images no classes: then there is nothing to measure
    requested = not (one.prompted or one.role in REAL)
    return ledger.attempt("lpips", one.name, lambda: _diversity(one, lpips, seed), requested)


def _diversity(one: ImageSet, lpips: perceptual.Lpips, seed: int) -> LpipsDiversity:
    images = one.first(MOST_PERCEPTUAL)
    labels = classes_for(one, "LPIPS diversity")[: len(images)]
    return perceptual.lpips_diversity(lpips, images, labels, seed)


def classes_for(one: ImageSet, what: str) -> Tensor:
    """Its labels (N,). UnfitError naming what needs them where they are not known."""
    if one.labels is None:
        raise UnfitError(f"{what} of {one.name}: its classes are not known; put a samples.json beside the images")
    return one.labels


def mean_lpips(one: ImageSet, other: ImageSet, suite: Suite, ledger: Ledger) -> LpipsPaired | None:
    """Mean LPIPS between images of equal noise and class."""

    lpips = suite.lpips
    if lpips is None:
        return None

    def call() -> LpipsPaired:
        return perceptual.lpips_paired(lpips, one.first(MOST_PERCEPTUAL), other.first(MOST_PERCEPTUAL))

    return ledger.attempt("lpips", one.name, call)


def modes_of(one: ImageSet, other: ImageSet, suite: Suite, seed: int, ledger: Ledger) -> Modes | None:
    """The classes that a set holds beside those of another, as the classifier sees them."""
    classifier = suite.classifier
    if classifier is None:
        return None
    ours, theirs = (x.first(MOST_CLASSIFIED) for x in (one, other))
    labels = None if one.labels is None else one.labels[: len(ours)].cpu()
    return ledger.attempt("modes", one.name, lambda: modes(classifier, ours, theirs, labels, seed))


def against_statistics(
    ours: Features | None, suite: Suite, ledger: Ledger, second: Features | None = None
) -> FeatureDistance | None:
    """FID against the npz; its null is what `second`, a set of real images, reads there."""
    if ours is None or suite.statistics is None:
        return None
    known = suite.statistics
    return ledger.attempt("fid against the npz", ours.name, lambda: compare_features(ours, known, second=second))
