"""compare.json and the small files of the runs: results to JSON, and a file, also an earlier one, read back."""

import json
import math
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from ..measure.results import Curve, Provenance, Recorded, SeedCurves, SeedDifference
from ..metrics.intervals import Interval
from ..metrics.record import jsonable
from ..metrics.wavelet import Distance
from ..samples.cost import SamplingCost
from ..samples.facts import NetworkFacts
from ..samples.images import UnfitError
from .endpoint import Power
from .few_steps import FewSteps
from .results import (
    AdjustedDifference,
    AgainstTeacher,
    ArmComparison,
    NetworkRow,
    PairedDifference,
    RunRecord,
    StepsResult,
    StudyResult,
)

T = TypeVar("T")
ORIGIN = ("git", "contract_hash", "versions")  # what the small file of a run keeps of the provenance
WRONG = (OSError, ValueError, KeyError, TypeError, AttributeError)  # what reading a file raises that is no compare.json

MAY_BE_UNDEFINED = ("training_step_seconds", "lsd", "lsd_signed", "hf_kurtosis_ratio", "diversity_ratio")


def text_of(result: StudyResult | StepsResult | RunRecord) -> str:
    """The text of its JSON file."""
    return json.dumps(jsonable(result), indent=1, allow_nan=False)


def run_records(result: StudyResult | StepsResult) -> dict[str, RunRecord]:
    """By file name, one record for each network: its arm, numbers, and where they come from."""
    if isinstance(result, StudyResult):
        return _run_records(result, result.provenance, "")
    named = {title: "_".join(title.replace(",", "").split()) + "_" for title in result.steps}
    return {
        name: record
        for title, one in result.steps.items()
        for name, record in _run_records(one, result.provenance, named[title]).items()
    }


def _run_records(result: StudyResult, provenance: Provenance | Recorded, steps: str) -> dict[str, RunRecord]:
    known = jsonable(provenance)
    origin = Recorded({name: known[name] for name in ORIGIN if name in known})
    return {
        f"{arm}_{steps}seed{row.seed}.json": RunRecord(
            schema_version=result.schema_version,
            label=result.label,
            images=result.images,
            arm=arm,
            row=row,
            provenance=origin,
        )
        for arm, rows in result.runs.items()
        for row in rows
    }


def read_study(path: str | Path) -> StudyResult:
    """A whole compare.json of equal steps. UnfitError naming the file where it is none."""
    studies = read_studies(path)
    if len(studies) > 1:
        raise UnfitError(f"{path} compares {', '.join(studies)}; read_studies gives each of them")
    return next(iter(studies.values()))


def read_studies(path: str | Path) -> dict[str, StudyResult]:
    """The comparisons of a compare.json by what tells their steps apart, "" for one alone. UnfitError naming the file
    where it is none.
    """
    try:
        return {title: _study(one) for title, one in by_steps(json.loads(Path(path).read_text())).items()}
    except WRONG as error:
        raise not_a_study(path, error) from error


def by_steps(record: dict[str, Any]) -> dict[str, Any]:
    """The comparisons in the object of a compare.json."""
    return dict(record["steps"]) if "steps" in record else {"": record}


def not_a_study(path: str | Path, error: Exception) -> UnfitError:
    return UnfitError(f"{path}: no compare.json of eval.compare ({type(error).__name__}: {error})")


def _study(record: dict[str, Any]) -> StudyResult:
    few_steps = record.get("few_steps")
    parts = {
        "few_steps": few_steps and FewSteps(**{**few_steps, "rungs": tuple(few_steps["rungs"])}),
        "primary": _comparison(record["primary"]),
        "controls": {name: _comparison(one) for name, one in record["controls"].items()},
        "secondaries": {name: _paired(AdjustedDifference, one) for name, one in record["secondaries"].items()},
        "costs": {name: _paired(PairedDifference, one) for name, one in record["costs"].items()},
        "runs": {arm: [_row(one) for one in rows] for arm, rows in record["runs"].items()},
        "reference": Recorded(record["reference"]),
        "provenance": Recorded(record["provenance"]),
    }
    return StudyResult(**{**record, **parts})


def _comparison(record: dict[str, Any]) -> ArmComparison:
    parts = {
        "per_seed": seed_differences(record),
        "difference_db": interval(record["difference_db"]),
        "intervals": {method: interval(one) for method, one in record["intervals"].items()},
        "power": Power(**record["power"]),
        "curve": seed_curves(record["curve"]),
    }
    return ArmComparison(**{**record, **parts})


def _paired(kind: type[T], record: dict[str, Any]) -> T:
    difference = record["difference"]
    return kind(**{**record, "difference": None if difference is None else interval(difference)})


def _row(record: dict[str, Any]) -> NetworkRow:
    distance = {name: value for name, value in record["fd_wavelet"].items() if name != "excess"}
    numbers = {
        **record,
        **{name: number(record[name]) for name in MAY_BE_UNDEFINED},
        "flat_noise_db": number(record["flat_noise_db"]) if "flat_noise_db" in record else None,
        "latency_ms_range": tuple(record["latency_ms_range"]),
        "fd_wavelet": Distance(**distance),
        "gain_db": {band: number(value) for band, value in record["gain_db"].items()},
    }
    return NetworkRow(
        network=_taken(NetworkFacts, numbers),
        cost=_taken(SamplingCost, numbers),
        against=_taken(AgainstTeacher, numbers),
        **numbers,
    )


def _taken(kind: type[T], numbers: dict[str, Any]) -> T:
    """A class of plain values, whose keys are taken out of `numbers`."""
    return kind(**{one.name: numbers.pop(one.name) for one in fields(kind)})  # type: ignore[arg-type]


def seed_differences(record: dict[str, Any]) -> list[SeedDifference]:
    """Both arms of a comparison, seed by seed."""
    arms = (str(record["baseline"]), "dar")
    return [
        SeedDifference(int(one["seed"]), gains(one, arms), interval(one["difference_db"])) for one in record["per_seed"]
    ]


def gains(record: dict[str, Any], arms: tuple[str, ...]) -> dict[str, float]:
    return {arm: float(record["gain_db"][arm]) for arm in arms}


def seed_curves(record: dict[str, Any]) -> SeedCurves:
    """ValueError where a curve has not one value for each frequency."""
    frequencies = [float(f) for f in record["frequencies"]]

    def ends(values: list[float | None], unbounded: float) -> list[float]:
        if len(values) != len(frequencies):
            raise ValueError(f"a curve of {len(values)} values over {len(frequencies)} frequencies")
        return [number(value, unbounded) for value in values]

    arms = [name for name in record if name != "frequencies"]
    curves = {
        name: Curve(
            value=ends(record[name]["value"], math.nan),
            low=ends(record[name]["low"], -math.inf),
            high=ends(record[name]["high"], math.inf),
        )
        for name in arms
    }
    return SeedCurves(frequencies, curves)


def interval(record: dict[str, Any]) -> Interval:
    """An end that is null is unbounded."""
    return Interval(float(record["value"]), number(record["low"], -math.inf), number(record["high"], math.inf))


def number(value: float | None, undefined: float = math.nan) -> float:
    return undefined if value is None else float(value)
