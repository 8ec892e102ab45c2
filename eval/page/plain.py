"""One plain sentence or two for each student, made from its verdicts: for who knows none of the page's words."""

from ..measure.results import Comparison, SetRow
from ..metrics.colour import OK, ColourComparison, ColourWord, judged, neutral
from ..metrics.power_map import GridLine
from ..metrics.verdict import FLAT_NOISE_DB, KURTOSIS_RANGE, side
from .cells import minus, number

TOO_WIDE = "more images are needed to tell"


def sentence(row: SetRow, against: Comparison, reference: str) -> str:
    """What a newcomer should know of a set against `reference`, as `cells.the` names it."""
    network = row.facts.network
    calls = f"At {network.evaluations} call{'s' * (network.evaluations != 1)}, " if network else ""
    told = f"{calls}{row.name} {_detail(against, reference)}."
    if against.colour is not None:
        told += f" {_colour(against.colour, against.grid_lines)}."
    return minus(told)


def _detail(against: Comparison, reference: str) -> str:
    """What becomes of fine detail. Blurred edges stand out less, too, so that with lost detail they show no noise."""
    gain, word, rough, doubt = against.gain_db["HF"], against.verdict.word, _roughness(against), _noise(against)
    amount = f"({number(gain.value, 1, True)} dB)"
    if word == "reduced":
        lost = f"has lost fine detail against {reference} {amount}: its pictures are softer"
        return lost + (f", and part of what is left is noise: {rough}" if rough else "")
    if word == "inflated":
        added = f"part of it is noise: {doubt}" if doubt else "its pictures are over-sharpened"
        return f"has more fine detail than {reference} {amount}: {added}"
    if word == "inconclusive" and against.verdict.reason.startswith("HF gain"):
        between = f"{number(gain.low, 1, True)} and {number(gain.high, 1, True)} dB"
        unknown = f"may have kept its fine detail or not (between {between} against {reference}): {TOO_WIDE}"
        return unknown + (f"; part of it is noise: {doubt}" if doubt else "")
    as_much = f"has as much fine detail as {reference} {amount}"
    if word == "inconclusive":
        return f"{as_much}; whether part of it is noise, {TOO_WIDE}"
    return (
        f"{as_much}, with its edges and its smooth areas" if word == "preserved" else f"{as_much}, but {_wrong(doubt)}"
    )


def _wrong(doubt: str) -> str:
    """Of detail whose energy alone is right."""
    return f"part of it is noise: {doubt}" if doubt else "single spots stand out more than they should"


def _noise(against: Comparison) -> str:
    """What shows that detail is noise, where an interval shows it; else empty."""
    signs = [_roughness(against)]
    if side(against.hf_kurtosis_ratio, *KURTOSIS_RANGE) == "below":
        signs.insert(0, f"edges stand out less ({number(against.hf_kurtosis_ratio.value)} of the reference's)")
    return " and ".join(filter(None, signs))


def _roughness(against: Comparison) -> str:
    if side(against.flat_noise_db, float("-inf"), FLAT_NOISE_DB) != "above":
        return ""
    return f"smooth areas are rougher ({number(against.flat_noise_db.value, 1, True)} dB)"


def _colour(colour: ColourComparison, lines: list[GridLine]) -> str:
    if not colour.verdict.faults:
        return "Its colours are right" if colour.verdict.word == OK else f"Whether its colours are right, {TOO_WIDE}"
    told = {
        "over-saturated": lambda: f"they are too strong ({_farthest(colour, 'over-saturated')})",
        "washed out": lambda: f"they are too pale ({_farthest(colour, 'washed out')})",
        "colour drift": lambda: f"they have drifted ({_farthest(colour, 'colour drift')})",
        "colour speckle": lambda: f"they are speckled ({_farthest(colour, 'colour speckle')})",
        "grid": lambda: f"a grid of pixels shows ({_grid(lines)})",
    }
    return "Its colours are off: " + "; ".join(told[word]() for word in colour.verdict.faults)


def _farthest(colour: ColourComparison, fault: ColourWord) -> str:
    """Of the measures that have this fault, the one that is farthest off in units of its margin."""
    found = {name: one.value for name, one in colour.measures.items() if judged(name, one).fault == fault}
    name = max(found, key=lambda name: _margins_off(name, colour))
    measure, _, group = name.partition(".")
    of = {"grey": " on grey classes", "colour": " on coloured classes"}.get(group, "")
    if measure.endswith("ratio"):
        return f"{measure.removesuffix('_ratio')} {number(found[name])} of the reference's{of}"
    if measure == "speckle_db":
        return f"{number(found[name], 1, True)} dB of fine noise of colour{of}"
    what = {"drift_y": "brightness", "drift_cb": "blue", "drift_cr": "red"}[measure]
    return f"{what} by {number(found[name], 0, True)} of 255 levels"


def _margins_off(name: str, colour: ColourComparison) -> float:
    """How far from no difference a measure at fault is, in units of the margin that it is beyond."""
    one, none = judged(name, colour.measures[name]), neutral(name)
    return (one.interval.value - none) / ((one.high if one.place == "above" else one.low) - none)


def _grid(lines: list[GridLine]) -> str:
    highest = max((line for line in lines if line.word == "peak"), key=lambda line: line.height.value)
    return f"every {highest.period} px, {number(highest.height.value, 1, True)} dB"
