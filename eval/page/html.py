"""A report on disk: report.html, which needs nothing else, report.json, report.csv and the figures as PNG."""

import base64
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from torch import Tensor

from dmd_dar.atomic import make_folder, write_atomic

from ..measure.results import Report, jsonable
from ..metrics.power_map import mean_log_map
from ..samples.sets import ImageSet
from . import facts, sections, style, summaries, terms
from .cells import the
from .csv import as_csv
from .figures import charts
from .grids import Row, grids, one_of_each, opening_rows

JOINT = re.compile(r"(?<=_)|(?<=\.)(?=[A-Za-z])")  # where a long name may break


def write_report(
    report: Report, sets: Sequence[ImageSet], out_dir: str | Path, planes: Mapping[str, Tensor] | None = None
) -> None:
    """Writes report.html, report.json, report.csv and one PNG per figure into `out_dir`, each atomically.

    sets: those to show in the grids, in this order. planes: `one_set.mean_plane` of each set by name, where it is
    known.
    """
    out_dir = make_folder(out_dir)
    measured = {row.name for row in report.sets}
    sets = [one for one in sets if one.name in measured]
    drawn, rows = grids(report, sets)
    if planes is None:
        planes = {one.name: mean_log_map(one.batches()) for one in sets}
    drawn |= charts(report, {one.name: planes[one.name] for one in sets})
    for name, png in drawn.items():
        write_atomic(out_dir / f"{name}.png", png)
    write_atomic(out_dir / "report.json", json.dumps(jsonable(report), indent=1, allow_nan=False))
    write_atomic(out_dir / "report.csv", as_csv(report))
    write_atomic(out_dir / "report.html", page(report, drawn, rows))


def page(report: Report, drawn: Mapping[str, bytes], rows: list[Row]) -> str:
    """The whole HTML document; every text that comes from outside is escaped."""
    return (
        templates()
        .get_template("page.html")
        .render(
            title=report.title,
            reference=the(report.teacher),
            opening=sections.opening(report, drawn["opening"], opening_rows(one_of_each(rows))),
            answers=summaries.answers(report),
            summary=(summary := summaries.summary(report, "teacher")),
            terms=terms.terms_of([heading.text for heading in summary.headings]),
            findings=summaries.findings(report),
            charts=sections.chart_sections(report, drawn),
            structure=summaries.structure(report),
            colours=summaries.colours(report),
            agreement=summaries.agreement(report),
            grids=sections.grid_sections(report, drawn, rows),
            against_real=summaries.summary(report, "real") if report.real else None,
            resolutions=summaries.resolutions(report),
            classes=summaries.classes(report),
            modes=summaries.modes(report),
            every_number=summaries.every_number(report),
            cost=summaries.cost(report),
            not_measured=facts.not_measured(report),
            set_facts=facts.set_facts(report),
            origin=facts.origin(report),
            whole_origin=facts.whole_origin(report),
            style=style,
        )
    )


def templates() -> Environment:
    """The page's templates; they escape whatever they are given, and a name that they do not know is an error."""
    folder = Path(__file__).parent / "templates"
    environment = Environment(loader=FileSystemLoader(folder), autoescape=True, undefined=StrictUndefined)
    environment.filters |= {
        "breakable": breakable,
        "explained": terms.explained,
        "base64": lambda png: base64.b64encode(png).decode("ascii"),
    }
    return environment


def breakable(text: str) -> Markup:
    """Escaped, with a place to break after each joint of a long name."""
    return Markup("<wbr>").join(JOINT.split(text))
