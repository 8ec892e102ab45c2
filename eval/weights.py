"""Which pretrained weights of metrics are on this machine, and what each unlocks: python -m eval.weights"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from dmd_dar import config, moved
from dmd_dar.errors import DamagedFileError
from dmd_dar.keys import key

from .metrics.record import jsonable
from .metrics.weight_files import VARIABLE, Weights, cache_folder, every_file, find, missing_message, own_folder, verify

COLUMNS = ("file", "state", "size", "unlocks")


@dataclass(frozen=True)
class WeightsConfig:
    """python -m eval.weights"""

    json: bool = key(False, "print JSON instead of a table")


@dataclass(frozen=True)
class WeightsRow:
    """A file of weights and how it stands on this machine. `problem`: what to do about one that cannot be used."""

    file: str
    state: Literal["verified", "present", "damaged", "missing"]
    path: str | None
    owner: str
    megabytes: int
    sha256: str | None
    unlocks: str
    instead: str
    looked_in: list[str]
    problem: str | None


def describe(weights: Weights) -> WeightsRow:
    """The file, its state here, and what it unlocks."""
    path, state, problem = find(weights), "missing", missing_message(weights)
    if path is not None:
        try:
            state, problem = ("verified" if verify(path, weights).verified else "present"), ""
        except DamagedFileError as error:
            state, problem = "damaged", str(error)
    return WeightsRow(
        file=weights.file,
        state=state,
        path=None if path is None else str(path),
        owner=weights.owner,
        megabytes=weights.megabytes,
        sha256=weights.sha256 or None,
        unlocks=weights.unlocks,
        instead=weights.instead,
        looked_in=[str(folder) for folder in (own_folder(), cache_folder(weights)) if folder],
        problem=problem or None,
    )


def table(rows: Sequence[WeightsRow]) -> str:
    """The rows in aligned columns, then the folders that were looked in and what to do about a missing file."""
    cells = [COLUMNS] + [(row.file, row.state, f"{row.megabytes} MB", row.unlocks) for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(COLUMNS) - 1)]
    lines = ["  ".join([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[-1]]) for row in cells]
    own = own_folder()
    folders = list(dict.fromkeys(folder for row in rows for folder in row.looked_in if folder != str(own)))
    lines += ["", f"looked in: ${VARIABLE} ({own or 'not set'}), then {', '.join(folders)}"]
    for row in rows:
        if row.state == "missing":
            lines.append(f"{row.file}: from {row.owner}; without it: {row.instead}")
        elif row.problem:
            lines.append(row.problem)
    return "\n".join(lines)


def show(cfg: WeightsConfig) -> None:
    """Print every file that a metric can use, as a table or as JSON."""
    rows = [describe(weights) for weights in every_file()]
    print(json.dumps({"variable": VARIABLE, "weights": jsonable(rows)}, indent=1) if cfg.json else table(rows))


def main(argv: Sequence[str] | None = None) -> None:
    config.run_job(WeightsConfig, show, argv, description=__doc__ or "")


moved.keep_names(__name__)


if __name__ == "__main__":
    main()
