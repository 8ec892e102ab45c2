"""A report on disk: report.html, which needs nothing else, report.json, report.csv and the figures as PNG."""

import base64
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from torch import Tensor

from dmd_dar.atomic import make_folder, write_atomic

from ..measure.pair import jsonable
from ..metrics.power_map import mean_log_map
from ..samples.sets import ImageSet
from . import facts, sections, style, summaries
from .cells import the
from .csv import as_csv
from .figures import charts
from .grids import Row, grids

JOINT = re.compile(r"(?<=_)|(?<=\.)(?=[A-Za-z])")  # where a long name may break


def write_report(
    result: dict,
    sets: Sequence[ImageSet],
    out_dir: str | Path,
    title: str,
    provenance: dict[str, Any],
    planes: dict[str, Tensor] | None = None,
) -> None:
    """Writes report.html, report.json, report.csv and one PNG per figure into `out_dir`, each atomically.

    sets: those to show in the grids, in this order. provenance: JSON-able facts about the run, printed last. planes:
    `one_set.mean_plane` of each set by name, where it is known.
    """
    out_dir = make_folder(out_dir)
    whole = {**result, "title": title, "provenance": jsonable(provenance)}
    measured = {row["name"] for row in result["sets"]}
    sets = [one for one in sets if one.name in measured]
    drawn, rows = grids(whole, sets)
    if planes is None:
        planes = {one.name: mean_log_map(one.batches()) for one in sets}
    drawn |= charts(whole, {one.name: planes[one.name] for one in sets})
    for name, png in drawn.items():
        write_atomic(out_dir / f"{name}.png", png)
    write_atomic(out_dir / "report.json", json.dumps(whole, indent=1, allow_nan=False))
    write_atomic(out_dir / "report.csv", as_csv(whole))
    write_atomic(out_dir / "report.html", page(whole, drawn, rows))


def page(result: dict, drawn: dict[str, bytes], rows: list[Row]) -> str:
    """The whole HTML document; every text that comes from outside is escaped."""
    return (
        templates()
        .get_template("page.html")
        .render(
            title=result["title"],
            reference=the(result["teacher"]),
            answers=summaries.answers(result),
            summary=summaries.summary(result, "teacher"),
            findings=summaries.findings(result),
            charts=sections.chart_sections(result, drawn),
            structure=summaries.structure(result),
            grids=sections.grid_sections(result, drawn, rows),
            against_real=summaries.summary(result, "real") if result["real"] else None,
            resolutions=summaries.resolutions(result),
            classes=summaries.classes(result),
            modes=summaries.modes(result),
            every_number=summaries.every_number(result),
            cost=summaries.cost(result),
            not_measured=facts.not_measured(result),
            set_facts=facts.set_facts(result),
            origin=facts.origin(result),
            whole_origin=facts.whole_origin(result),
            style=style,
        )
    )


def templates() -> Environment:
    """The page's templates; they escape whatever they are given, and a name that they do not know is an error."""
    folder = Path(__file__).parent / "templates"
    found = Environment(loader=FileSystemLoader(folder), autoescape=True, undefined=StrictUndefined)
    found.filters |= {"breakable": breakable, "base64": lambda png: base64.b64encode(png).decode("ascii")}
    return found


def breakable(text: str) -> Markup:
    """Escaped, with a place to break after each joint of a long name."""
    return Markup("<wbr>").join(JOINT.split(text))
