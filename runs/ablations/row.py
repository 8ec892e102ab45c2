"""One row of docs/recipes.md: python runs/ablations/row.py row=rungs_bands [arm=dar] [seed=1]

Distils by runs/ablations/ROW.yaml, measures the student against its teacher, and keeps what the table shows in
docs/results/ablations/ROW_ARM_seedSEED.json; then `python runs/tables.py` writes the table.
"""

import json
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dmd_dar import config
from dmd_dar.atomic import make_folder, write_atomic
from dmd_dar.eval.measure.provenance import code_now
from dmd_dar.eval.metrics.record import jsonable
from dmd_dar.keys import key

ROOT = Path(__file__).parents[2]
ROWS = Path(__file__).parent
KEPT = ROOT / "docs" / "results" / "ablations"
Arm = Literal["residual", "dar", "static"]
QUERIES: dict[Arm, str] = {"residual": "residual", "dar": "timestep", "static": "static"}


@dataclass(frozen=True)
class RowConfig:
    """python runs/ablations/row.py"""

    row: str = key("base", "a file of runs/ablations without .yaml")
    arm: Arm = key("residual", "the student's additions")
    seed: int = key(0, "of the training", least=0)
    n: int = key(512, "images that are measured", least=64)

    def __post_init__(self) -> None:
        if not (ROWS / f"{self.row}.yaml").is_file():
            rows = ", ".join(sorted(path.stem for path in ROWS.glob("*.yaml")))
            raise ValueError(f"row = {self.row} is none; there are {rows}")

    @property
    def folder(self) -> Path:
        return Path("out") / "ablations" / self.row / f"{self.arm}_seed{self.seed}"


def commands(cfg: RowConfig) -> list[list[str]]:
    """Training and measuring, as one would type them in the root of the repository."""
    distill = ["python", "distill.py", f"config=runs/ablations/{cfg.row}.yaml", f"out_dir={cfg.folder}"]
    distill += [f"seed={cfg.seed}", f"student.routing.query={QUERIES[cfg.arm]}"]
    report = ["python", "-m", "eval.report", f"runs=[{cfg.folder}]", f"out={cfg.folder}/report", f"n={cfg.n}"]
    return [distill, [*report, "metrics=[offline]"]]


def extract(report: dict[str, Any]) -> dict[str, Any]:
    """What the table shows of the only student of a report."""
    (student,) = (one for one in report["sets"] if one["role"] == "student")
    (check,) = report["checks"]
    against = student["against"]["teacher"]
    accuracy = {
        one["name"]: one["against"]["real"]["modes"]["agreement"]
        for one in report["sets"]
        if one["role"] in ("teacher", "student")
    }
    names = ("verdict", "colour", "hf_kurtosis_ratio", "flat_noise_db")
    return {
        **{name: against[name] for name in names},
        "gain_db": {band: against["gain_db"][band] for band in ("B1", "B2", "B3", "B4", "HF")},
        "hf_gain_by_class": against["hf_gain_by_class"],
        "chroma_hf_db": {plane: gains["HF"] for plane, gains in against["chroma"].items()},
        "fd_wavelet_excess": against["fd_wavelet"]["excess"],
        "fd_share": check["fd_excess_share"],
        "grid_db": max(line["height"]["value"] or 0.0 for line in against["grid_lines"]),
        "least_diversity": against["diversity_ratio"]["pixels"]["least"],
        "accuracy_ratio": accuracy[student["name"]] / accuracy["teacher"],
        "images": student["images"],
        "evaluations": student["facts"]["evaluations"],
        "updates": student["facts"]["updates"],
        "routing": student["facts"].get("routing"),
        "converged": report["discretisation"]["converged"],
    }


def measure(cfg: RowConfig) -> None:
    """Run the commands, keep the numbers."""
    began, lines = code_now(), commands(cfg)
    for words in lines:
        subprocess.run([sys.executable, *words[1:]], cwd=ROOT, check=True)
    report = json.loads((ROOT / cfg.folder / "report" / "report.json").read_text())
    provenance = {
        "git": jsonable(began),
        "commands": [shlex.join(words) for words in lines],
        "device": report["provenance"]["device"],
        "versions": report["provenance"]["versions"],
    }
    kept = make_folder(KEPT) / f"{cfg.row}_{cfg.arm}_seed{cfg.seed}.json"
    row = {"row": cfg.row, "arm": cfg.arm, "seed": cfg.seed, **extract(report), "provenance": provenance}
    write_atomic(kept, json.dumps(row, indent=1) + "\n")
    print(kept)


if __name__ == "__main__":
    config.run_job(RowConfig, measure, description=__doc__ or "")
