"""Rules by which a run ends itself: what its health may not read in several records in a row (`log.stop_when`)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from dmd_dar.train.watch.advice import COLLAPSED, GRIDDED, LOUD, PASSED, SATURATED

StopWord = Literal[
    "over_saturated", "washed_out", "colour_drift", "colour_speckle", "grid", "inflated", "collapsed", "past_best"
]
ABOVE_BEST = "score_above_best"  # dB
BEYOND = "saturation_above_teacher"  # share of values beyond [-1, 1]

# By rule, the range of each signal, all against the teacher's own. A few dozen samples tell less than a report: margins
# of colour are about twice the verdict's.
RULES: dict[StopWord, dict[str, tuple[float, float]]] = {
    "over_saturated": {
        "saturation_ratio": (-math.inf, 1.2),
        "contrast_ratio": (-math.inf, 1.3),
        BEYOND: (-math.inf, SATURATED),
    },
    "washed_out": {"saturation_ratio": (0.8, math.inf), "contrast_ratio": (0.7, math.inf)},
    "colour_drift": {"drift_y": (-16.0, 16.0), "drift_cb": (-6.0, 6.0), "drift_cr": (-6.0, 6.0)},
    "colour_speckle": {"speckle_db": (-math.inf, 4.0)},
    "grid": {"grid_peak": (-math.inf, GRIDDED)},
    "inflated": {"hf_gain": (-math.inf, LOUD)},
    "collapsed": {"diversity": (COLLAPSED, math.inf)},
    "past_best": {ABOVE_BEST: (-math.inf, PASSED)},
}


def broken(rule: StopWord, measured: dict[str, float]) -> str:
    """The signal outside its range, with its value and the end that it passed; empty where none is known to be."""
    for name, (low, high) in RULES[rule].items():
        value = measured.get(name, math.nan)
        if value < low:
            return f"{name} {value:.3g} below {low:g}"
        if value > high:
            return f"{name} {value:.3g} above {high:g}"
    return ""


@dataclass
class Stopping:
    """Counts the records in a row in which each of the rules is broken. `stopped` says why it ended the run."""

    rules: Sequence[StopWord] = ()
    patience: int = 2
    after: int = 0  # steps, before which nothing is counted
    counts: dict[str, int] = field(default_factory=dict)
    stopped: str = ""
    by: list[Any] = field(default_factory=list)  # the rule that did, with patience and `after`

    def on(self, step: int, measured: dict[str, float], best: tuple[float, int] | None) -> str:
        """Count the health record of a step. Returns why the run has to end now, empty where it goes on.

        best: the least score so far, in dB, and its step; None before the first.
        """
        if step < self.after:
            return ""
        known = dict(measured)
        if best is not None and "score" in measured:
            known[ABOVE_BEST] = measured["score"] - best[0]
        if "saturation" in measured:
            known[BEYOND] = measured["saturation"] - measured["teacher_saturation"]
        for rule in self.rules:
            fault = broken(rule, known)
            self.counts[rule] = self.counts.get(rule, 0) + 1 if fault else 0
            if self.counts[rule] >= self.patience and not self.stopped:
                records = "record" if self.patience == 1 else "records in a row"
                self.stopped = f"log.stop_when: {rule}, {fault}, in {self.patience} health {records}"
                self.by = [rule, self.patience, self.after]
        return self.stopped

    def state(self) -> dict[str, Any]:
        """For the checkpoint: a continued run ends where an uninterrupted one does."""
        return {"counts": dict(self.counts), "stopped": self.stopped, "by": list(self.by)}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint: a run that had ended stays so while the rule that ended it, its patience and
        `after` are the same; else it goes on and counts that rule anew.
        """
        self.counts, self.stopped, self.by = dict(state["counts"]), state["stopped"], list(state["by"])
        if self.stopped and (self.by[0] not in self.rules or self.by[1:] != [self.patience, self.after]):
            self.counts.pop(self.by[0], None)
            self.stopped, self.by = "", []
