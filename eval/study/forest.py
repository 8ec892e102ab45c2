"""Gains seed by seed: several runs of each arm in one report, or the compare.json that eval.compare wrote."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..measure.results import Forest, ForestComparison, SeedDifference
from ..metrics.intervals import LARGEST_EXACT, holm
from ..metrics.spectrum import HF, spectrum_of
from ..samples.images import UnfitError
from ..samples.sets import ImageSet
from .endpoint import Arms, endpoint, pilot_label
from .records import WRONG, by_steps, gains, interval, not_a_study, seed_curves, seed_differences


@dataclass(frozen=True)
class Pair:
    """The images of two students that were trained from one seed."""

    seed: int
    residual: ImageSet
    dar: ImageSet


def from_runs(pairs: list[Pair], teacher: ImageSet, seed: int, steps: str = "") -> Forest:
    """D = mean over seeds of |HF gain residual| - |HF gain DAR| of students that were trained in pairs, in dB.

    seed: of the resampling and the simulations. steps: what tells these pairs from others. UnfitError for more pairs
    than the exact test takes.
    """
    if len(pairs) > LARGEST_EXACT:
        raise UnfitError(
            f"{len(pairs)} training seeds: an exact test takes {LARGEST_EXACT} at the most; give fewer runs"
        )
    pairs = sorted(pairs, key=lambda pair: pair.seed)
    baseline = np.stack([_high(pair.residual) for pair in pairs])
    routed = np.stack([_high(pair.dar) for pair in pairs])
    arms = ("residual", "dar")
    result = endpoint(Arms(baseline, routed, _high(teacher), teacher.classes), seed)  # type: ignore[arg-type]
    per_seed = [
        SeedDifference(pair.seed, dict(zip(arms, of_arms, strict=True)), difference)
        for pair, of_arms, difference in zip(pairs, result.gains.T.tolist(), result.per_seed, strict=True)
    ]
    primary = ForestComparison(
        baseline="residual",
        steps=steps or None,
        method=result.method,
        pilot=result.pilot,
        p=result.p,
        seeds=[pair.seed for pair in pairs],
        per_seed=per_seed,
        gain_db=dict(zip(arms, result.gains.mean(1).tolist(), strict=True)),
        difference_db=result.difference,
    )
    label = pilot_label(result.pilot)
    return Forest(source="the runs of this report", label=label, conclusion="", comparisons=[primary])


def joined(forests: Sequence[Forest]) -> Forest:
    """One forest of `from_runs` of several steps, one of which makes it a pilot; their tests are a family."""
    label = next((one.label for one in forests if one.label), "")
    lines = [line for one in forests for line in one.comparisons]
    if len(lines) > 1:
        adjusted = holm({line.steps or "": line.p for line in lines})
        lines = [replace(line, p_holm=adjusted[line.steps or ""]) for line in lines]
    return replace(forests[0], label=label, comparisons=lines)


def _high(one: ImageSet) -> np.ndarray:
    """Energy of the high band of each image, (N,)."""
    return spectrum_of(one.batches()).energies[:, HF]


def from_file(path: str | Path) -> Forest:
    """The endpoint and the controls of a compare.json, of each steps. UnfitError naming the file where it is none."""
    try:
        whole = json.loads(Path(path).read_text())
        studies = by_steps(whole)
        return Forest(
            source=str(path),
            label=str(whole["label"]),
            conclusion=str(whole["conclusion"]),
            curve=seed_curves(whole["primary"]["curve"]) if list(studies) == [""] else None,
            comparisons=[
                _comparison(one, title)
                for title, study in studies.items()
                for one in (study["primary"], *study["controls"].values())
            ],
        )
    except WRONG as error:
        raise not_a_study(path, error) from error


def _comparison(record: dict[str, Any], steps: str) -> ForestComparison:
    """What of it is shown, in its types."""
    baseline, per_seed, after = str(record["baseline"]), seed_differences(record), record.get("p_holm")
    return ForestComparison(
        baseline=baseline,
        steps=steps or None,
        method=str(record["method"]),
        pilot=bool(record["pilot"]),
        p=float(record["p"]),
        p_holm=None if after is None else float(after),
        seeds=[one.seed for one in per_seed],
        per_seed=per_seed,
        gain_db=gains(record, (baseline, "dar")),
        difference_db=interval(record["difference_db"]),
    )
