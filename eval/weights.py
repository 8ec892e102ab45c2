"""Which pretrained weights of metrics are on this machine, and what each unlocks: python -m eval.weights"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dmd_dar import config
from dmd_dar.errors import DamagedFileError
from dmd_dar.keys import key

from .metrics.weight_files import VARIABLE, Weights, cache_folder, every_file, find, missing_message, own_folder, verify

COLUMNS = ("file", "state", "size", "unlocks")


@dataclass(frozen=True)
class WeightsConfig:
    """python -m eval.weights"""

    json: bool = key(False, "print JSON instead of a table")


def describe(weights: Weights) -> dict[str, Any]:
    """One row: the file, its state here ("verified", "present", "damaged" or "missing"), what it unlocks."""
    path, state, problem = find(weights), "missing", missing_message(weights)
    if path is not None:
        try:
            state, problem = ("verified" if verify(path, weights).verified else "present"), ""
        except DamagedFileError as error:
            state, problem = "damaged", str(error)
    return {
        "file": weights.file,
        "state": state,
        "path": None if path is None else str(path),
        "owner": weights.owner,
        "megabytes": weights.megabytes,
        "sha256": weights.sha256 or None,
        "unlocks": weights.unlocks,
        "instead": weights.instead,
        "looked_in": [str(folder) for folder in (own_folder(), cache_folder(weights)) if folder],
        "problem": problem or None,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in aligned columns, then the folders that were looked in and what to do about a missing file."""
    cells = [COLUMNS] + [(r["file"], r["state"], f"{r['megabytes']} MB", r["unlocks"]) for r in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(COLUMNS) - 1)]
    lines = ["  ".join([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[-1]]) for row in cells]
    own = own_folder()
    folders = list(dict.fromkeys(folder for row in rows for folder in row["looked_in"] if folder != str(own)))
    lines += ["", f"looked in: ${VARIABLE} ({own or 'not set'}), then {', '.join(folders)}"]
    for row in rows:
        if row["state"] == "missing":
            lines.append(f"{row['file']}: from {row['owner']}; without it: {row['instead']}")
        elif row["problem"]:
            lines.append(row["problem"])
    return "\n".join(lines)


def show(cfg: WeightsConfig) -> None:
    rows = [describe(weights) for weights in every_file()]
    text = json.dumps({"variable": VARIABLE, "weights": rows}, indent=1) if cfg.json else table(rows)
    print(text)


def main(argv: Sequence[str] | None = None) -> None:
    config.run_job(WeightsConfig, show, argv, description=__doc__ or "")


if __name__ == "__main__":
    main()
