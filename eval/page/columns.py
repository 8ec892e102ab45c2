"""The columns of a report's summaries, for its page and for a terminal."""

from collections.abc import Callable
from dataclasses import dataclass

from dmd_dar.train.disk.readme import UNCONVERGED

from ..measure.results import Comparison, Reference, Report, SetRow
from ..metrics.features import FeatureDistance
from ..metrics.intervals import Interval
from .cells import NOTHING, Cell, fact, number, span

REFERENCES: tuple[Reference, ...] = ("teacher", "real")


@dataclass(frozen=True)
class Column:
    """A column of a summary: a heading, the number and, for the page, a smaller line under it."""

    heading: str
    number: Callable[[SetRow, Comparison], str]
    detail: Callable[[SetRow, Comparison], str] = lambda row, against: ""

    def cell(self, row: SetRow, against: Comparison) -> Cell:
        return Cell(self.number(row, against), self.detail(row, against))


def _interval_column(heading: str, of: Callable[[Comparison], Interval], signed: bool, digits: int = 2) -> Column:
    return Column(
        heading,
        lambda row, against: number(of(against).value, digits, signed),
        lambda row, against: span(of(against).low, of(against).high, digits, signed),
    )


def _distance_column(metric: str, heading: str) -> Column:
    """A distance over features above its null; a dash where it was not measured."""

    def excess(row: SetRow, against: Comparison) -> str:
        return number(against.distances[metric].excess) if metric in against.distances else NOTHING

    def parts(row: SetRow, against: Comparison) -> str:
        return _with_null(against.distances[metric]) if metric in against.distances else ""

    return Column(heading, excess, parts)


def _with_null(distance: FeatureDistance) -> str:
    return f"{number(distance.value)}, null {number(distance.null)}"


HF_GAIN = _interval_column("HF gain, dB", lambda against: against.gain_db["HF"], True)
KURTOSIS = _interval_column("kurtosis ratio", lambda against: against.hf_kurtosis_ratio, False)
FLAT_NOISE = _interval_column("flat noise, dB", lambda against: against.flat_noise_db, True)
LATENCY = Column("ms per image", lambda row, against: fact(row.facts.cost and row.facts.cost.latency_ms_per_image))
IMAGES = Column("n", lambda row, against: str(row.images))
COLUMNS = (
    HF_GAIN,
    KURTOSIS,
    FLAT_NOISE,
    _distance_column("fd_wavelet", "fd_wavelet over null"),
    _distance_column("fd_classifier", "fd_classifier over null"),
    Column(
        "LSD, dB",
        lambda row, against: number(against.lsd),
        lambda row, against: f"null {number(against.lsd_null)}",
    ),
    Column(
        "diversity",
        lambda row, against: number(against.diversity_ratio["pixels"].least),
        lambda row, against: f"median {number(against.diversity_ratio['pixels'].median)}",
    ),
    LATENCY,
    IMAGES,
)
CLIP = Column("CLIP score", lambda row, against: NOTHING if row.clip is None else number(row.clip.value))
STRUCTURE = (
    KURTOSIS,
    _interval_column("gradient kurtosis ratio", lambda against: against.gradient_kurtosis_ratio, False),
    _interval_column("parent-child difference", lambda against: against.parent_child_difference, True, 3),
    FLAT_NOISE,
    Column(
        "finest kurtosis ratios",
        lambda row, against: number(against.wavelet_kurtosis_ratio[0][2]),
        lambda row, against: " / ".join(number(value) for value in against.wavelet_kurtosis_ratio[0][:2]),
    ),
    Column(
        "sliced Wasserstein, finest level",
        lambda row, against: number(against.sliced_wasserstein[0].value, 3),
        lambda row, against: f"null {number(against.sliced_wasserstein[0].null, 3)}",
    ),
    _distance_column("fd_wavelet", "fd_wavelet over null"),
    IMAGES,
)


def terminal_table(report: Report) -> str:
    """The verdicts against the teacher, then against real images, as text in aligned columns."""
    tables, columns = [], (*COLUMNS, *((CLIP,) if any(row.clip for row in report.sets) else ()))
    for reference in REFERENCES:
        heads = (f"against {reference_name(report, reference)}", "verdict", "colour")
        lines = [[*heads, *(column.heading for column in columns)]]
        for row, against in compared(report, reference):
            cells = [column.number(row, against).replace("−", "-") for column in columns]
            lines.append([row.name, verdict_word(report, reference, against), colour_word(against), *cells])
        widths = [max(len(line[place]) for line in lines) for place in range(len(lines[0]))]
        tables.append("\n".join(_aligned(line, widths) for line in lines if len(lines) > 1))
    return "\n\n".join(filter(None, tables))


def verdict_word(report: Report, reference: Reference, against: Comparison) -> str:
    """The verdict, and whether it compares with a teacher whose samples are not yet those of its ODE."""
    error = report.discretisation
    unsure = reference == "teacher" and error is not None and not error.converged
    return against.verdict.word + (UNCONVERGED if unsure else "")


def colour_word(against: Comparison) -> str:
    """The verdict on colour; a dash where a file of before has none."""
    return against.colour.verdict.word if against.colour else NOTHING


def _aligned(cells: list[str], widths: list[int]) -> str:
    left = [cell.ljust(width) for cell, width in zip(cells[:3], widths[:3], strict=True)]
    right = [cell.rjust(width) for cell, width in zip(cells[3:], widths[3:], strict=True)]
    return "  ".join(left + right).rstrip()


def reference_name(report: Report, reference: Reference) -> str:
    """Of the set that others are compared with; empty where there are no real images."""
    return report.teacher if reference == "teacher" else report.real or ""


def compared(report: Report, reference: Reference) -> list[tuple[SetRow, Comparison]]:
    """Rows with what they are against that reference; without those that are not compared with it."""
    return [(row, against) for row in report.sets if (against := row.against.of(reference)) is not None]


def charted(report: Report) -> list[tuple[SetRow, Comparison]]:
    """The rows that the charts show against the teacher: all but the nulls."""
    return [(row, against) for row, against in compared(report, "teacher") if row.role != "null"]
