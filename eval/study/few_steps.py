"""With which few steps a student was distilled, and what tells these from the steps of others."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class FewSteps:
    """The rungs and the teacher's guidance that a student was distilled with, at which its undistilled twins are
    sampled too, and by which sampler, Euler or re-noised. None: either.
    """

    rungs: tuple[float, ...]
    guidance_scale: float
    sampler: str | None = None


def titles(several: Iterable[FewSteps]) -> dict[FewSteps, str]:
    """What tells each from the others, "2 steps" for example, in the order of calls; empty where there is one alone.

    Of equal numbers of steps the rungs are named; guidance and sampler where they differ.
    """
    distinct = sorted(set(several), key=lambda one: (len(one.rungs), one.rungs, one.guidance_scale, one.sampler or ""))
    lists = Counter(len(rungs) for rungs in {one.rungs for one in distinct})
    guidances, samplers = {one.guidance_scale for one in distinct}, {one.sampler for one in distinct if one.sampler}

    def title(one: FewSteps) -> str:
        words = {
            steps(one.rungs, in_full=lists[len(one.rungs)] > 1): lists.total() > 1,
            f"guidance {plain(one.guidance_scale)}": len(guidances) > 1,
            one.sampler or "": one.sampler is not None and len(samplers) > 1,
        }
        return ", ".join(word for word, needed in words.items() if needed)

    return {one: title(one) for one in distinct}


def steps(rungs: tuple[float, ...], in_full: bool) -> str:
    """Their number, and where they lie."""
    count = f"{len(rungs)} step{'s' if len(rungs) > 1 else ''}"
    return f"{count} at {', '.join(map(plain, rungs))}" if in_full else count


def plain(value: float) -> str:
    """A number without the digits that say nothing; two that differ are told apart."""
    short = f"{value:g}"
    return short if float(short) == value else repr(value)
