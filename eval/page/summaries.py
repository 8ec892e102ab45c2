"""What a report's page says in words and tables beside its figures: verdicts, structure, all numbers, cost."""

from collections.abc import Sequence
from dataclasses import dataclass

from .cells import NOTHING, Cell, Table, fact, minus, number, short, span, the
from .columns import COLUMNS, HF_GAIN, STRUCTURE, Column, compared
from .csv import Number, numbers


@dataclass(frozen=True)
class Answer:
    """The verdict on one set in a line, with its reason."""

    name: str
    word: str
    reason: str


@dataclass(frozen=True)
class Folded:
    """A table under a heading that opens it."""

    summary: str
    table: Table


def answers(result: dict) -> list[Answer]:
    """One for each student or folder; for each set where there is none of them."""
    pairs = compared(result, "teacher")
    chosen = [pair for pair in pairs if pair[0]["role"] in ("student", "images")]
    return [Answer(row["name"], against["verdict"]["word"], _reason(row, against)) for row, against in chosen or pairs]


def _reason(row: dict, against: dict) -> str:
    """The gain, unless the verdict's reason tells it, and the reason."""
    note, gain = _note(against, row["images"]), against["gain_db"]["HF"]
    interval = span(gain["low"], gain["high"], 2, True)
    start = "" if note.startswith("HF gain") else f"HF gain {number(gain['value'], 2, True)} dB ({interval}); "
    return start + minus(note)


def _note(against: dict, images: int) -> str:
    note = against["verdict"]["reason"]
    if (against["images_for_quarter_db"] or 0) > images:
        note += f"; about {against['images_for_quarter_db']} images would bring the gain's interval to ±0.25 dB"
    if (against["class_share_gap"] or 0) > 0.02:
        note += f"; class shares differ by up to {100 * against['class_share_gap']:.0f} %"
    return note + "."


def summary(result: dict, key: str, columns: Sequence[Column] = COLUMNS) -> Table:
    """Each set against the one that `key` names, "teacher" or "real"."""
    rows = [
        [
            Cell(row["name"], row["facts"].get("label") or ""),
            Cell(against["verdict"]["word"], kind="verdict"),
            *(column.cell(row, against) for column in columns),
        ]
        for row, against in compared(result, key)
    ]
    heads = ["set", "verdict", *(column.heading for column in columns)]
    note = f"Each set against {the(result[key])}; small print: 95 % intervals and parts."
    return Table.of(f"against {result[key]}", heads, rows, note=note, kind="verdicts")


def findings(result: dict) -> list[str]:
    """The first sentence of a comparison over seeds, then those that the report's command adds."""
    first, stop, _ = (result.get("forest") or {"conclusion": ""})["conclusion"].partition(". ")
    sentences = [first + stop.strip()] if first else []
    return [minus(sentence) for sentence in sentences + result.get("conclusions", [])]


def structure(result: dict) -> Table:
    """Whether what has the right energy is detail."""
    rows = [
        [row["name"], *(column.cell(row, against) for column in STRUCTURE)]
        for row, against in compared(result, "teacher")
    ]
    note = (
        "Shaped noise can have the right spectrum; it has no edges, its scales do not agree, and it fills flat areas."
    )
    return Table.of("structure", ["set", *(column.heading for column in STRUCTURE)], rows, note=note)


def resolutions(result: dict) -> list[str]:
    """What the verdict's margin is worth at this number of images, from the second set of real ones."""
    notes = []
    for row, against in compared(result, "real"):
        gain = against["gain_db"]["HF"]
        if row["role"] == "null" and gain["low"] is not None:
            notes.append(
                f"{row['name']} is the null of an unpaired comparison: at {row['images']} images its HF gain is known"
                f" to ±{(gain['high'] - gain['low']) / 2:.2f} dB; about {against['images_for_quarter_db']} images bring"
                " that to ±0.25 dB."
            )
    return notes


def every_number(result: dict) -> list[Folded]:
    """All that is in the CSV: against the teacher, against real images, and of each set by itself."""
    titles = {"teacher": result["teacher"], "real": result["real"], "": None}
    every, tables = numbers(result), []
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


def _class_names(result: dict, labels: Sequence[str]) -> list[str]:
    return [result["class_names"].get(label, f"class {label}") for label in labels]


def classes(result: dict) -> Table | None:
    """HF gain against the teacher of each class, and its median; None where classes are not known."""
    rows = [pair for pair in compared(result, "teacher") if pair[1]["hf_gain_by_class"]]
    if not rows:
        return None
    labels = sorted({label for _, against in rows for label in against["hf_gain_by_class"]}, key=int)
    cells = []
    for row, against in rows:
        gains = [number(against["hf_gain_by_class"].get(label), signed=True) for label in labels]
        cells.append([row["name"], *gains, number(against["hf_gain_class_median"], signed=True)])
    return Table.of("HF gain of each class", ["set", *_class_names(result, labels), "median"], cells)


def modes(result: dict) -> Table | None:
    """The share of each class that a small classifier sees in each set; None where there is no classifier."""
    rows = [(row, against["modes"]) for row, against in compared(result, "teacher") if against["modes"]]
    if not rows:
        return None
    first = rows[0][1]
    labels = list(first["shares"])
    cells = [
        [
            row["name"],
            *(number(100 * seen["shares"][label], 1) for label in labels),
            Cell(number(seen["total_variation"], 3), f"null {number(seen['null'], 3)}"),
            number(None if seen["agreement"] is None else 100 * seen["agreement"], 1),
        ]
        for row, seen in rows
    ]
    note = (
        f"By a small classifier trained on {first['trained_on']} images"
        f" ({result.get('fitted_to') or 'not among those compared'}), right for {100 * first['accuracy']:.1f} % of"
        f" those it was not trained on. Total variation is against {the(result['teacher'])}."
    )
    heads = ["set", *_class_names(result, labels), "total variation", "taken for their own class, %"]
    return Table.of("classes that are there", heads, cells, note=note)


def cost(result: dict) -> Table | None:
    """Time and memory of every network beside what it keeps; None without networks."""
    rows = [row for row in result["sets"] if "latency_ms_per_image" in row["facts"]]
    if not rows:
        return None
    base = next((row for row in rows if row["role"] == "teacher"), rows[0])
    facts, rounds = base["facts"], max(row["facts"].get("latency_runs", 0) for row in rows) or NOTHING
    note = (
        f"Median over up to {rounds} rounds in which the networks take turns, {facts.get('cost_batch', NOTHING)} images"
        " at a time; small print: least and most. Peak memory is of one such batch above the weights:"
        f" {facts.get('peak_memory_method', NOTHING)}."
    )
    heads = [
        "set",
        "calls",
        "ms per image",
        f"of the time of {the(base['name'])}",
        "peak memory, MB",
        "parameters",
        "HF gain, dB",
    ]
    return Table.of("cost of sampling", heads, [_cost_cells(row, base) for row in rows], note=note)


def _cost_cells(row: dict, base: dict) -> list[Cell | str]:
    facts, against = row["facts"], row["against"]["teacher"]
    milliseconds = facts["latency_ms_per_image"]
    return [
        row["name"],
        fact(facts.get("evaluations")),
        Cell(fact(milliseconds), span(*facts.get("latency_ms_range", (None, None)))),
        number(milliseconds / base["facts"]["latency_ms_per_image"], 3),
        number(facts.get("peak_memory_mb"), 1),
        f"{facts['parameters']:,}" if "parameters" in facts else NOTHING,
        HF_GAIN.cell(row, against) if against else NOTHING,
    ]
