"""Gains seed by seed: several runs of each arm in one report, or the compare.json that eval.compare wrote."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from ..metrics.intervals import LARGEST_EXACT
from ..metrics.spectrum import HF, spectrum_of
from ..samples.images import UnfitError
from ..samples.sets import ImageSet
from .endpoint import Arms, endpoint, pilot_label

Pair = tuple[int, ImageSet, ImageSet]  # training seed, residual and DAR student


def from_runs(pairs: list[Pair], teacher: ImageSet, seed: int) -> dict[str, Any]:
    """D = mean over seeds of |HF gain residual| - |HF gain DAR| of students that were trained in pairs, in dB.

    UnfitError for more pairs than the exact test takes.
    """
    if len(pairs) > LARGEST_EXACT:
        raise UnfitError(
            f"{len(pairs)} training seeds: an exact test takes {LARGEST_EXACT} at the most; give fewer runs"
        )
    pairs = sorted(pairs, key=lambda pair: pair[0])
    baseline, routed = (np.stack([_high(pair[side]) for pair in pairs]) for side in (1, 2))
    found = endpoint(Arms(baseline, routed, _high(teacher), teacher.labels.cpu().numpy()), seed)
    seeds = [pair[0] for pair in pairs]
    primary = {
        "baseline": "residual",
        "seeds": seeds,
        "per_seed": [
            {"seed": s, "gain_db": {"residual": gains[0], "dar": gains[1]}, "difference_db": vars(difference)}
            for s, gains, difference in zip(seeds, found.gains.T.tolist(), found.per_seed, strict=True)
        ],
        "gain_db": dict(zip(("residual", "dar"), found.gains.mean(1).tolist(), strict=True)),
        "difference_db": vars(found.difference),
        "method": found.method,
        "pilot": found.pilot,
        "p": found.p,
    }
    return {
        "source": "the runs of this report",
        "label": pilot_label(found.pilot),
        "conclusion": "",
        "comparisons": [primary],
    }


def _high(one: ImageSet) -> np.ndarray:
    """Energy of the high band of each image, (N,)."""
    return spectrum_of(one.batches()).energies[:, HF]


def from_file(path: str | Path) -> dict[str, Any]:
    """The endpoint and the controls of a compare.json. UnfitError naming the file where it is none."""
    try:
        whole = json.loads(Path(path).read_text())
        comparisons = [_comparison(one) for one in (whole["primary"], *whole["controls"].values())]
        told = {"label": str(whole["label"]), "conclusion": str(whole["conclusion"])}
        told["curve"] = _curve(whole["primary"]["curve"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UnfitError(f"{path}: no compare.json of eval.compare ({type(error).__name__}: {error})") from error
    return {"source": str(path), **told, "comparisons": comparisons}


def _comparison(one: dict[str, Any]) -> dict[str, Any]:
    """What of it is shown, in its types."""
    baseline = str(one["baseline"])
    each = [{"seed": int(seed["seed"]), **_gains(seed, baseline)} for seed in one["per_seed"]]
    told = {"baseline": baseline, "method": str(one["method"]), "pilot": bool(one["pilot"]), "p": float(one["p"])}
    return {**told, "seeds": [seed["seed"] for seed in each], "per_seed": each, **_gains(one, baseline)}


def _curve(one: dict[str, Any]) -> dict[str, Any]:
    """Gain of both arms and their difference over frequency, each with its band; an end that is None is unbounded."""
    frequencies = [float(f) for f in one["frequencies"]]

    def column(values: list[float | None]) -> list[float | None]:
        found = [None if value is None else float(value) for value in values]
        if len(found) != len(frequencies):
            raise ValueError(f"a curve of {len(found)} values over {len(frequencies)} frequencies")
        return found

    arms = [name for name in one if name != "frequencies"]
    return {
        "frequencies": frequencies,
        **{name: {end: column(one[name][end]) for end in ("value", "low", "high")} for name in arms},
    }


def _gains(one: dict[str, Any], baseline: str) -> dict[str, Any]:
    """An end of the interval that is None is unbounded."""
    ends = {end: one["difference_db"][end] for end in ("low", "high")}
    difference = {end: None if value is None else float(value) for end, value in ends.items()}
    return {
        "gain_db": {arm: float(one["gain_db"][arm]) for arm in (baseline, "dar")},
        "difference_db": {"value": float(one["difference_db"]["value"]), **difference},
    }
