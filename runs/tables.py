"""Tables of README.md and of pages of docs, from docs/results: python runs/tables.py rewrites them in place."""

import json
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dmd_dar import config, flow
from dmd_dar.atomic import write_atomic
from dmd_dar.eval.study.records import read_study
from dmd_dar.eval.study.wording import seed_table
from dmd_dar.train.disk.readme import has_converged, verdict_on_detail

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
RESULTS = ROOT / "docs" / "results"
PILOT = ROOT / "docs" / "pilot.md"
RECIPES = ROOT / "docs" / "recipes.md"
ROWS = ROOT / "runs" / "ablations"
TEACHERS = ROOT / "docs" / "teachers.md"
FAMILIES = RESULTS / "families.json"  # what tests/stages.py recorded
TEACHER = ROOT / "teachers" / "photos32" / "quality.json"
REPORTS = {"demo": "Demo (`make demo`)", "long": "5:1 recipe (`runs/photos32_long.sh`)"}
NOTHING = "–"
HEADINGS = (
    "network",
    "calls",
    "verdict",
    "HF gain, dB",
    "HF gain of a class, dB",
    "kurtosis ratio",
    "flat noise, dB",
    "`fd_wavelet` above null",
    "share of undistilled",
    "least class diversity",
    "ms per image",
)


def interval(value: dict[str, float]) -> str:
    return f"{value['value']:+.2f} [{value['low']:+.2f}, {value['high']:+.2f}]"


def verdict(against: dict[str, Any], converged: bool) -> str:
    """On detail and, where there is one, on colour. converged: whether the teacher's samples are those of its ODE."""
    colour = against.get("colour")
    return verdict_on_detail(against, converged) + (f"; {colour['verdict']['word']}" if colour else "")


def row(one: dict[str, Any], shares: dict[str, float], converged: bool) -> str:
    """One network against the teacher."""
    against, share = one["against"]["teacher"], shares.get(one["name"])
    by_class = against["hf_gain_by_class"].values()
    cells = [
        one["name"],
        str(one["facts"]["evaluations"]),
        verdict(against, converged),
        interval(against["gain_db"]["HF"]),
        f"{min(by_class):+.1f} to {max(by_class):+.1f}",
        f"{against['hf_kurtosis_ratio']['value']:.2f}",
        f"{against['flat_noise_db']['value']:+.1f}",
        f"{against['fd_wavelet']['excess']:.2f}",
        "" if share is None else f"{share:.2f}",
        f"{against['diversity_ratio']['pixels']['least']:.2f}",
        f"{one['facts']['latency_ms_per_image']:.1f}",
    ]
    return "| " + " | ".join(cells) + " |"


def report_table(title: str, result: dict[str, Any]) -> str:
    shares, converged = {check["name"]: check["fd_excess_share"] for check in result["checks"]}, has_converged(result)
    rows = [row(one, shares, converged) for one in result["sets"] if one["role"] in ("undistilled", "student")]
    updates = max(one["facts"].get("updates", 0) for one in result["sets"])
    images = result["sets"][0]["images"]
    head = ["| " + " | ".join(HEADINGS) + " |", "|" + "---|" * len(HEADINGS)]
    caption = (
        f"**{title}**: {updates} student updates, one seed, {images} images against the teacher's,"
        " 95 % intervals over images."
    )
    return "\n".join([caption, "", *head, *rows, "", *(f"- {line}" for line in result["conclusions"])]) + "\n"


def teacher_table(judged: dict[str, Any]) -> str:
    rows = [
        ("teacher", "gain_db"),
        ("held-out tiles (null)", "gain_db_held_out"),
        ("training tiles again (null)", "gain_db_null"),
    ]
    bands = list(judged["gain_db"])
    lines = ["| against training tiles, dB | " + " | ".join(bands) + " |", "|" + "---|" * (len(bands) + 1)]
    lines += [f"| {title} | " + " | ".join(f"{judged[name][b]:+.2f}" for b in bands) + " |" for title, name in rows]
    title = f"**Teacher** (`runs/photos32_teacher.sh`): {judged['n']} samples at {judged['evaluations']} evaluations."
    by_class = ", ".join(f"{name} {gain:+.2f}" for name, gain in judged["hf_gain_by_class"].items())
    distances = ", ".join(
        f"{name} {mean_distance(classes):.1f}" for name, classes in judged["nearest_training_crop"].items()
    )
    kurtosis = judged["hf_kurtosis_ratio"]
    notes = [
        f"- HF gain by class, dB: {by_class}; median {judged['hf_gain_class_median']:+.2f}.",
        f"- Structure: kurtosis ratio {kurtosis['value']:.2f} [{kurtosis['low']:.2f}, {kurtosis['high']:.2f}];"
        f" `fd_wavelet` above its null {judged['fd_wavelet']['excess']:.2f}, of held-out tiles"
        f" {judged['fd_wavelet_held_out']['excess']:.2f}.",
        "- Distance to the nearest training crop (levels of 255, median of each class, mean over classes; a network"
        f" that copies would read what fresh crops of the training tiles do): {distances}.",
    ]
    return "\n".join([title, "", *lines, "", *notes]) + "\n"


def mean_distance(classes: dict[str, dict[str, float]]) -> float:
    return sum(distance["median"] for distance in classes.values()) / len(classes)


def routers_table(result: dict[str, Any]) -> str:
    """The students of runs/pilot_routers.sh: how far their routers went, and what became of the images."""
    checks = {check["name"]: check for check in result["checks"]}
    lines = [
        "| student | mean abs(n alpha - 1) | range of n alpha over t | HF gain, dB | the same, routers reset | kurtosis"
        " ratio | `fd_wavelet` above null |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in result["sets"]:
        if one["role"] == "student":
            against, routing = one["against"]["teacher"], checks[one["name"]].get("routing")
            gain, moved = against["gain_db"]["HF"]["value"], ["", "", f"{against['gain_db']['HF']['value']:+.2f}", ""]
            if routing is not None:
                moved = [f"{routing['deviation']:.3f}", f"{routing['change_over_t']:.3f}", f"{gain:+.2f}"]
                moved.append(f"{gain + routing['hf_gain_shift_db']:+.2f}")
            rest = [f"{against['hf_kurtosis_ratio']['value']:.2f}", f"{against['fd_wavelet']['excess']:.2f}"]
            lines.append("| " + " | ".join([one["name"], *moved, *rest]) + " |")
    return "\n".join(lines) + "\n"


def rungs_table() -> str:
    """HF gains of the pilot's runs with and without rungs told apart."""
    lines = ["| HF gain, dB, seed by seed | residual | DAR | D |", "|---|---|---|---|"]
    for title, name in (("rungs told apart", "pilot"), ("rungs pooled", "pilot_pooled")):
        result = json.loads((RESULTS / name / "compare.json").read_text())
        arms = (result["runs"][arm] for arm in ("residual", "dar"))
        gains = [", ".join(f"{run['gain_db']['HF']:+.2f}" for run in runs) for runs in arms]
        lines.append("| " + " | ".join([title, *gains, interval(result["primary"]["difference_db"])]) + " |")
    return "\n".join(lines) + "\n"


def pilot_words() -> str:
    """The terminal's table of the pilot and its conclusion, as eval.compare prints them."""
    result = read_study(RESULTS / "pilot" / "compare.json")
    words = textwrap.fill(result.conclusion, 120, break_long_words=False, break_on_hyphens=False)
    return f"```\n{seed_table(result)}\n```\n\n{words}\n"


def readme_tables() -> str:
    """All tables; a report that has not been measured says so."""
    parts = [teacher_table(json.loads(TEACHER.read_text()))]
    for name, title in REPORTS.items():
        path = RESULTS / name / "report.json"
        measured = path.is_file()
        parts.append(report_table(title, json.loads(path.read_text())) if measured else f"**{title}**: not measured.\n")
    return "\n".join(parts)


def recipes_table() -> str:
    """A line for each row and arm of runs/ablations that was measured; in the order of their names, after `base`."""
    measured: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for path in sorted((RESULTS / "ablations").glob("*.json")):
        one = json.loads(path.read_text())
        measured.setdefault((one["row"], one["arm"]), []).append(one)
    order = sorted(measured, key=lambda place: (place[0] != "base", place))
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "verdict": lambda one: verdict(one, one.get("converged", True)),
        "HF gain, dB": lambda one: decimal(one["gain_db"]["HF"]["value"], "+.2f"),
        "kurtosis ratio": lambda one: decimal(one["hf_kurtosis_ratio"]["value"], ".2f"),
        "flat noise, dB": lambda one: decimal(one["flat_noise_db"]["value"], "+.1f"),
        "grid line, dB": lambda one: decimal(one["grid_db"], "+.1f"),
        "chroma HF, dB": lambda one: ", ".join(decimal(p["value"], "+.1f") for p in one["chroma_hf_db"].values()),
        "`fd_wavelet` above null": lambda one: decimal(one["fd_wavelet_excess"], ".2f"),
        "share of undistilled": lambda one: decimal(one["fd_share"], ".2f"),
        "least class diversity": lambda one: decimal(one["least_diversity"], ".2f"),
        "accuracy of the teacher's": lambda one: decimal(one["accuracy_ratio"], ".2f"),
    }
    heads = ["row", "arm", "calls", "updates", "images", "seed", *columns]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for row, arm in order:
        for one in measured[row, arm]:
            facts = [f"`{row}`", arm, *(str(one[name]) for name in ("evaluations", "updates", "images", "seed"))]
            lines.append("| " + " | ".join([*facts, *(of(one) for of in columns.values())]) + " |")
    meanings = [f"- `{row}`: {meaning_of(row)}" for row in dict.fromkeys(row for row, _ in order)]
    return "\n".join([*lines, "", *meanings]) + "\n"


def bands_table() -> str:
    """At which t the teacher's luma of the demo meets the noise, by band: (1 - t) a = t, a its amplitude in [-1, 1]."""
    result = json.loads((RESULTS / "demo" / "report.json").read_text())
    teacher = next(one for one in result["sets"] if one["role"] == "teacher")
    names, edges = result["bands"]["names"], result["bands"]["edges"]
    lines = ["| band | cycles per pixel | t where it meets the noise |", "|---|---|---|"]
    for name, low, high in zip(names, edges, edges[1:], strict=False):
        inside = [p for f, p in zip(teacher["frequencies"], teacher["power"], strict=True) if low <= f <= high]
        if len(inside) > 1:
            times = sorted(flow.meeting_time(4 * p) for p in inside)  # images in [0, 1] have half the amplitude
            lines.append(f"| {name} | {low:g} to {high:g} | {times[-1]:.2f} to {times[0]:.2f} |")
    return "\n".join(lines) + "\n"


def families_table(recorded: dict[str, Any]) -> str:
    """What the tests took each family through, with a note for what is refused, was skipped or failed."""
    notes: dict[str, int] = {}
    stages, lines = recorded["stages"], []
    for family, tests in recorded["families"].items():
        cells = [stage_cell(tests[stage], notes) for stage in stages]
        lines.append("| " + " | ".join([f"`{family}`", *cells]) + " |")
    head = ["| family | " + " | ".join(stages) + " |", "|" + "---|" * (len(stages) + 1)]
    meanings = [f"- {stage}: {meaning}" for stage, meaning in stages.items()]
    told = [f"- [{place}] {note}" for note, place in notes.items()]
    return "\n".join([*head, *lines, "", *told, *([""] if told else []), *meanings]) + "\n"


def stage_cell(tests: list[dict[str, str]], notes: dict[str, int]) -> str:
    """A failure goes before what passed, that before a refusal, and what was skipped comes last."""
    refusals = [one for one in tests if one.get("refused") and one["outcome"] == "passed"]
    passed = [one for one in tests if one["outcome"] == "passed" and not one.get("refused")]
    if failed := [one["test"] for one in tests if one["outcome"] == "failed"]:
        word, note = "**failed**", failed[0]
    elif passed:
        return "yes"
    elif refusals:
        word, note = "no", refusals[0]["refused"]
    elif tests:
        word, note = "skipped", tests[0].get("reason", "")
    else:
        return "not tested"
    return f"{word} [{notes.setdefault(note, len(notes) + 1)}]"


def decimal(value: float | None, form: str) -> str:
    return NOTHING if value is None else format(value, form)


def meaning_of(row: str) -> str:
    """What the row's file says of itself in its first line."""
    return (ROWS / f"{row}.yaml").read_text().partition("\n")[0].removeprefix("# ")


def with_table(text: str, name: str, table: str) -> str:
    """`text` with what stands between the markers of that name replaced. Raises ValueError where one is missing."""
    before, start, rest = text.partition(f"<!-- {name} -->\n")
    _, end, after = rest.partition(f"<!-- /{name} -->")
    if not (start and end):
        raise ValueError(f"the page needs the markers <!-- {name} --> and <!-- /{name} -->")
    return f"{before}{start}\n{table}\n{end}{after}"


def pages() -> dict[Path, str]:
    """What README.md, docs/pilot.md, docs/recipes.md and docs/teachers.md should hold."""
    routers = routers_table(json.loads((RESULTS / "pilot_routers" / "report.json").read_text()))
    pilot = PILOT.read_text()
    for name, text in (("conclusion", pilot_words()), ("rungs", rungs_table()), ("routers", routers)):
        pilot = with_table(pilot, name, text)
    recipes = with_table(with_table(RECIPES.read_text(), "rows", recipes_table()), "bands", bands_table())
    teachers = with_table(TEACHERS.read_text(), "stages", families_table(json.loads(FAMILIES.read_text())))
    return {
        README: with_table(README.read_text(), "tables", readme_tables()),
        PILOT: pilot,
        RECIPES: recipes,
        TEACHERS: teachers,
    }


@dataclass(frozen=True)
class TableConfig:
    """python runs/tables.py"""


def write(_: TableConfig) -> None:
    for path, text in pages().items():
        write_atomic(path, text)


if __name__ == "__main__":
    config.run_job(TableConfig, write, description=__doc__ or "")
