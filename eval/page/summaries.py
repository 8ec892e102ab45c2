"""What a report's page says in words and tables beside its figures: verdicts, structure, all numbers, cost."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..measure.results import Comparison, Reference, Report, SetRow
from ..metrics.colour import Placed
from ..metrics.intervals import Interval
from ..samples.cost import SamplingCost
from .cells import NOTHING, Cell, Table, fact, finite, interval_cell, minus, number, short, span, the
from .columns import COLUMNS, HF_GAIN, STRUCTURE, Column, colour_word, compared, reference_name, verdict_word
from .csv import Number, numbers
from .plain import sentence


@dataclass(frozen=True)
class Answer:
    """The verdict on one set in a line, with its reason."""

    name: str
    sentence: str  # for a newcomer
    word: str
    reason: str
    colour: str  # the verdict on colour, a dash where a file of before has none
    colour_reason: str


@dataclass(frozen=True)
class Folded:
    """A table under a heading that opens it."""

    summary: str
    table: Table


def answers(report: Report) -> list[Answer]:
    """One for each student or folder; for each set where there is none of them."""
    pairs = compared(report, "teacher")
    chosen = [pair for pair in pairs if pair[0].role in ("student", "images")]
    return [_answer(report, row, against) for row, against in chosen or pairs]


def _answer(report: Report, row: SetRow, against: Comparison) -> Answer:
    why = f"Colour: {minus(against.colour.verdict.reason)}." if against.colour else ""
    plain, word = sentence(row, against, the(report.teacher)), verdict_word(report, "teacher", against)
    return Answer(row.name, plain, word, _reason(row, against), colour_word(against), why)


def _reason(row: SetRow, against: Comparison) -> str:
    """The gain, unless the verdict's reason tells it, and the reason."""
    note, gain = _note(against, row.images), against.gain_db["HF"]
    interval = span(gain.low, gain.high, 2, True)
    start = "" if note.startswith("HF gain") else f"HF gain {number(gain.value, 2, True)} dB ({interval}); "
    return start + minus(note)


def _note(against: Comparison, images: int) -> str:
    note = against.verdict.reason
    if (against.images_for_quarter_db or 0) > images:
        note += f"; about {against.images_for_quarter_db} images would bring the gain's interval to ±0.25 dB"
    if (gap := against.class_share_gap or 0.0) > 0.02:
        note += f"; class shares differ by up to {100 * gap:.0f} %"
    return note + "."


def summary(report: Report, reference: Reference, columns: Sequence[Column] = COLUMNS) -> Table:
    """Each set against that reference."""
    rows = [
        [
            Cell(row.name, row.facts.routing.label if row.facts.routing else ""),
            Cell(verdict_word(report, reference, against), kind="verdict"),
            Cell(colour_word(against), kind="colour"),
            *(column.cell(row, against) for column in columns),
        ]
        for row, against in compared(report, reference)
    ]
    heads = ["set", "verdict", "colour", *(column.heading for column in columns)]
    name = reference_name(report, reference)
    note = f"Each set against {the(name)}; small print: 95 % intervals and parts."
    return Table.of(f"against {name}", heads, rows, note=note, kind="verdicts")


def findings(report: Report) -> list[str]:
    """The first sentence of a comparison over seeds, all of one over several steps, then those that the report's
    command adds.
    """
    told = report.forest.conclusion if report.forest else ""
    first, stop, _ = told.partition(". ")
    if report.forest and any(one.steps for one in report.forest.comparisons):
        first, stop = told, ""
    sentences = [first + stop.strip()] if first else []
    if report.discretisation is not None:
        sentences.append(report.discretisation.sentence)
    return [minus(sentence) for sentence in (*sentences, *report.conclusions)]


def structure(report: Report) -> Table:
    """Whether what has the right energy is detail."""
    rows = [
        [row.name, *(column.cell(row, against) for column in STRUCTURE)] for row, against in compared(report, "teacher")
    ]
    note = (
        "Shaped noise can have the right spectrum; it has no edges, its scales do not agree, and it fills flat areas."
    )
    return Table.of("structure", ["set", *(column.heading for column in STRUCTURE)], rows, note=note)


def colours(report: Report) -> Table | None:
    """Each measure of colour against the teacher, with interval and null; None where a file of before has none."""
    rows = [(row, against.colour) for row, against in compared(report, "teacher") if against.colour]
    if not rows:
        return None
    names = list(dict.fromkeys(name for _, one in rows for name in one.measures))
    cells = [
        [
            row.name,
            Cell(one.verdict.word, kind="colour"),
            *(_placed_cell(name, one.measures.get(name)) for name in names),
        ]
        for row, one in rows
    ]
    note = (
        "Means of Y, Cb and Cr in levels of 255; contrast and saturation as ratios to the reference's; speckle in dB:"
        " fine noise of colour. Small print: 95 % intervals, and how far other images of the reference's own source"
        " would be off at these sizes (null)."
    )
    return Table.of("colour", ["set", "verdict", *map(_measure_title, names)], cells, note=note)


def agreement(report: Report) -> Table | None:
    """The CLIP score of each set that has texts, and its difference from the teacher's; None without CLIP."""
    rows = [(row, row.clip) for row in report.sets if row.clip is not None]
    if not rows:
        return None
    cells = []
    for row, clip in rows:
        against = row.against.teacher and row.against.teacher.clip_difference
        interval = Interval(clip.value, clip.low, clip.high)
        apart = interval_cell(against) if against else NOTHING
        cells.append(
            [row.name, interval_cell(interval, signed=False), apart, str(clip.facts.get("images", row.images))]
        )
    first = rows[0][1]
    network, digest = (str(first.facts.get(name, NOTHING)) for name in ("architecture", "sha256"))
    note = (
        f"100 times the mean cosine of each image and its text, {first.prompt!r}, by CLIP {network} with the weights"
        f" {digest[:12]} ({first.facts.get('model')}). The difference is at the same noise and text. Small print: 95 %"
        " intervals, over prompts where there are prompts."
    )
    heads = ["set", "CLIP score", f"less that of {the(report.teacher)}", "n"]
    return Table.of("agreement with the words", heads, cells, note=note)


def _measure_title(name: str) -> str:
    measure, _, group = name.partition(".")
    title = {"drift_y": "Y", "drift_cb": "Cb", "drift_cr": "Cr", "speckle_db": "speckle, dB"}.get(measure)
    return (title or measure.replace("_", " ")) + (f", {group} classes" if group else "")


def _placed_cell(name: str, one: Placed | None) -> Cell:
    if one is None:
        return Cell(NOTHING)
    cell = interval_cell(one, 2, "ratio" not in name)
    return Cell(cell.text, f"{cell.small}; null {number(one.null)}")


def resolutions(report: Report) -> list[str]:
    """What the verdict's margin is worth at this number of images, from the second set of real ones."""
    notes = []
    for row, against in compared(report, "real"):
        gain = against.gain_db["HF"]
        if row.role == "null" and finite(gain.low) is not None:
            notes.append(
                f"{row.name} is the null of an unpaired comparison: at {row.images} images its HF gain is known"
                f" to ±{gain.half_width:.2f} dB; about {against.images_for_quarter_db} images bring"
                " that to ±0.25 dB."
            )
    return notes


def every_number(report: Report) -> list[Folded]:
    """All that is in the CSV: against the teacher, against real images, and of each set by itself."""
    titles = {"teacher": report.teacher, "real": report.real, "": None}
    every, tables = numbers(report), []
    for key, name in titles.items():
        chosen = [one for one in every if one.against == key]
        if chosen:
            title = f"Every number against {the(name)}" if name else "Every number of a set by itself"
            metrics = len({one.metric for one in chosen})
            tables.append(Folded(f"{title} ({metrics} metrics)", _every(chosen, title)))
    return tables


def _every(chosen: list[Number], label: str) -> Table:
    """Metrics down, sets across."""
    names = list(dict.fromkeys(one.name for one in chosen))
    metrics = list(dict.fromkeys(one.metric for one in chosen))
    known = {(one.metric, one.name): one for one in chosen}
    counts = {one.name: one.images for one in chosen}
    heads = ["metric", *(Cell(name, f"n {counts[name]}") for name in names)]
    rows = [[Cell(metric, kind="code"), *(_number_cell(known.get((metric, n))) for n in names)] for metric in metrics]
    return Table.of(label, heads, rows)


def _number_cell(one: Number | None) -> Cell:
    if one is None or one.value is None:
        return Cell(NOTHING)
    return Cell(short(one.value), span(one.low, one.high, 3) if one.null is None else f"null {short(one.null)}")


def _class_names(report: Report, labels: Iterable[int]) -> list[str]:
    return [report.class_names.get(label, f"class {label}") for label in labels]


def classes(report: Report) -> Table | None:
    """HF gain against the teacher of each class, and its median; None where classes are not known."""
    rows = [pair for pair in compared(report, "teacher") if pair[1].hf_gain_by_class]
    if not rows:
        return None
    labels = sorted({label for _, against in rows for label in against.hf_gain_by_class})
    cells = []
    for row, against in rows:
        gains = [number(against.hf_gain_by_class.get(label), signed=True) for label in labels]
        cells.append([row.name, *gains, number(against.hf_gain_class_median, signed=True)])
    return Table.of("HF gain of each class", ["set", *_class_names(report, labels), "median"], cells)


def modes(report: Report) -> Table | None:
    """The share of each class that a small classifier sees in each set; None where there is no classifier."""
    rows = [(row, against.modes) for row, against in compared(report, "teacher") if against.modes]
    if not rows:
        return None
    first = rows[0][1]
    labels = list(first.shares)
    cells = [
        [
            row.name,
            *(number(100 * seen.shares[label], 1) for label in labels),
            Cell(number(seen.total_variation, 3), f"null {number(seen.null, 3)}"),
            number(None if seen.agreement is None else 100 * seen.agreement, 1),
        ]
        for row, seen in rows
    ]
    note = (
        f"By a small classifier trained on {first.facts['trained_on']} images"
        f" ({report.fitted_to or 'not among those compared'}), right for {100 * first.facts['accuracy']:.1f} % of"
        f" those it was not trained on. Total variation is against {the(report.teacher)}."
    )
    heads = ["set", *_class_names(report, labels), "total variation", "taken for their own class, %"]
    return Table.of("classes that are there", heads, cells, note=note)


def cost(report: Report) -> Table | None:
    """Time and memory of every network beside what it keeps; None without networks."""
    costs = {row.name: row.facts.cost for row in report.sets if row.facts.cost is not None}
    if not costs:
        return None
    base = next((row.name for row in report.sets if row.role == "teacher" and row.name in costs), next(iter(costs)))
    note = (
        f"Median over up to {max(one.latency_runs for one in costs.values())} rounds in which the networks take turns,"
        f" {costs[base].cost_batch} images at a time; small print: least and most. Peak memory is of one such batch"
        f" above the weights: {costs[base].peak_memory_method}."
    )
    heads = [
        "set",
        "calls",
        "ms per image",
        f"of the time of {the(base)}",
        "peak memory, MB",
        "parameters",
        "HF gain, dB",
    ]
    cells = [_cost_cells(row, costs[row.name], costs[base]) for row in report.sets if row.name in costs]
    return Table.of("cost of sampling", heads, cells, note=note)


def _cost_cells(row: SetRow, cost: SamplingCost, base: SamplingCost) -> list[Cell | str]:
    network, against = row.facts.network, row.against.teacher
    return [
        row.name,
        NOTHING if network is None else str(network.evaluations),
        Cell(fact(cost.latency_ms_per_image), span(*cost.latency_ms_range)),
        number(cost.latency_ms_per_image / base.latency_ms_per_image, 3),
        number(cost.peak_memory_mb, 1),
        NOTHING if network is None else f"{network.parameters:,}",
        HF_GAIN.cell(row, against) if against else NOTHING,
    ]
