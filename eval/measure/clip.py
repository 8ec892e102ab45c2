"""CLIP scores: each set's agreement with its own prompts or classes, and how far it is from another set's.

Legend: N images.
"""

from dataclasses import dataclass

import numpy as np

from ..metrics import perceptual
from ..metrics.intervals import Interval, Sample, bootstrap_interval
from ..metrics.spectrum import labelled
from ..samples.images import UnfitError
from ..samples.sets import ImageSet
from .ledger import Ledger
from .one_set import by_prompt
from .results import ClipResult
from .suite import MOST_PERCEPTUAL, REAL, Suite, classes_for

OF_CLASS, ITSELF = "a photo of {}", "{}"  # what CLIP reads of a class, and of a prompt, unless the user says otherwise


@dataclass(frozen=True)
class Scored:
    """The score of each of the first N images of a set. `paired`: as the set is."""

    score: perceptual.ClipScore
    sample: Sample
    prompt: str  # {} being the class or the prompt
    paired: bool

    def result(self, seed: int) -> ClipResult:
        """With its interval over images or prompts; seed: of the bootstrap."""
        values = self.score.per_image
        error = float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else None
        interval = bootstrap_interval(lambda x: x.mean(1), self.sample, rng=np.random.default_rng(seed))
        return ClipResult(
            value=self.score.value,
            low=interval.low,
            high=interval.high,
            standard_error=error,
            prompt=self.prompt,
            facts=self.score.facts,
            comparable_to_published=self.score.facts.get("model") == perceptual.HUB + perceptual.CLIP_REPO,
        )


def scored(one: ImageSet, suite: Suite, class_names: dict[int, str], ledger: Ledger) -> Scored | None:
    """The set's images against its prompts; None where the suite has no CLIP, or the set no texts.

    The latter stands in `ledger`; of real images, which nobody made from words, it was not asked for.
    """
    if suite.clip is None:
        return None
    return ledger.attempt("clip", one.name, lambda: _scored(one, suite, class_names), one.role not in REAL)


def clip_difference(ours: Scored | None, theirs: Scored | None, seed: int) -> Interval | None:
    """Mean score less the other set's at the same noise and prompts, with its interval; None of sets that share none.

    seed: of the bootstrap.
    """
    if ours is None or theirs is None or not (ours.paired and theirs.paired) or ours.prompt != theirs.prompt:
        return None
    rng = np.random.default_rng(seed)
    return bootstrap_interval(lambda a, b: a.mean(1) - b.mean(1), ours.sample, theirs.sample, paired=True, rng=rng)


def _scored(one: ImageSet, suite: Suite, class_names: dict[int, str]) -> Scored:
    images = one.first(MOST_PERCEPTUAL)
    template = suite.prompt or (ITSELF if one.prompted else OF_CLASS)
    prompts = _prompts(one, template, one.names if one.prompted else one.names or class_names)[: len(images)]
    score = perceptual.clip_score(suite.clip, images, prompts)  # type: ignore[arg-type]
    values = score.per_image
    sample = labelled(values, None if one.classes is None else one.classes[: len(values)])
    return Scored(score, by_prompt(sample, one), template, one.paired)


def _prompts(one: ImageSet, template: str, names: dict[int, str]) -> list[str]:
    """What CLIP reads beside each image. UnfitError where that takes a name and a class or prompt has none."""
    labels = classes_for(one, "CLIP score").tolist()
    unnamed = sorted(set(labels) - names.keys()) if ITSELF in template else []
    if unnamed:
        what = f"the text of prompt {unnamed[0]} is" if one.prompted else f"the name of class {unnamed[0]} is"
        remedy = "encode its prompts again" if one.prompted else "name classes in its samples.json or its teacher"
        raise UnfitError(f"CLIP score of {one.name}: {what} not known; {remedy}, or set prompt to a text without {{}}")
    return [template.replace(ITSELF, names.get(label, "")) for label in labels]
