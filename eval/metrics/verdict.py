"""One word for what happened to fine detail, from three intervals against a reference."""

from dataclasses import dataclass
from typing import Literal

from .intervals import Interval

Word = Literal["preserved", "reduced", "inflated", "energy only", "inconclusive"]
Side = Literal["inside", "below", "above", "straddles"]

GAIN_MARGIN_DB = 0.5
KURTOSIS_RANGE = (0.8, 1.25)
FLAT_NOISE_DB = 0.5


@dataclass(frozen=True)
class Verdict:
    word: Word
    reason: str


def side(interval: Interval, low: float, high: float) -> Side:
    """Where the whole confidence interval lies with respect to [low, high]; an undefined interval straddles."""
    if not interval.defined:
        return "straddles"
    if low <= interval.low and interval.high <= high:
        return "inside"
    if interval.high < low:
        return "below"
    return "above" if interval.low > high else "straddles"


def verdict_of(gain_hf: Interval, kurtosis_ratio: Interval, flat_noise: Interval) -> Verdict:
    """preserved | reduced | inflated | energy only | inconclusive.

    gain_hf and flat_noise in dB. The gain decides first; where it is within the margin, structure has to be right
    too: the kurtosis ratio in [0.8, 1.25] and smooth regions not noisier by 0.5 dB, each with its whole interval.
    """
    gain = side(gain_hf, -GAIN_MARGIN_DB, GAIN_MARGIN_DB)
    if gain == "below":
        return Verdict("reduced", f"HF gain {show(gain_hf)} is below -{GAIN_MARGIN_DB} dB")
    if gain == "above":
        return Verdict("inflated", f"HF gain {show(gain_hf)} is above +{GAIN_MARGIN_DB} dB")
    if gain == "straddles":
        return Verdict("inconclusive", f"HF gain {show(gain_hf)} straddles a margin of {GAIN_MARGIN_DB} dB")
    return _structure(kurtosis_ratio, flat_noise)


def _structure(kurtosis_ratio: Interval, flat_noise: Interval) -> Verdict:
    """The verdict once the gain is right."""
    kurtosis, noise = side(kurtosis_ratio, *KURTOSIS_RANGE), side(flat_noise, float("-inf"), FLAT_NOISE_DB)
    if kurtosis in ("below", "above"):
        return Verdict("energy only", f"kurtosis ratio {show(kurtosis_ratio, '', '')} is {kurtosis} {_range()}")
    if noise == "above":
        return Verdict("energy only", f"smooth regions are noisier by {show(flat_noise)}")
    if kurtosis == "straddles":
        return Verdict("inconclusive", f"kurtosis ratio {show(kurtosis_ratio, '', '')} straddles an end of {_range()}")
    if noise == "straddles":
        return Verdict("inconclusive", f"noise in smooth regions {show(flat_noise)} straddles +{FLAT_NOISE_DB} dB")
    return Verdict("preserved", "energy, kurtosis and smooth regions are within their margins")


def _range() -> str:
    return f"{KURTOSIS_RANGE[0]} to {KURTOSIS_RANGE[1]}"


def show(interval: Interval, unit: str = " dB", sign: str = "+") -> str:
    """A number with its interval, for a reason."""
    if not interval.defined:
        return "(undefined)"
    return f"{interval.value:{sign}.2f}{unit} [{interval.low:{sign}.2f}, {interval.high:{sign}.2f}]"
