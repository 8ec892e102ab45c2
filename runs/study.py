"""The study of docs/study.md: python runs/study.py stage=search|train|compare [jobs=2]

Every run takes one thread; what is done is kept, and a stage that was stopped goes on where it was.
"""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dmd_dar import config
from dmd_dar.atomic import make_folder, write_atomic
from dmd_dar.eval.metrics.intervals import holm
from dmd_dar.eval.study.records import read_study
from dmd_dar.keys import key
from dmd_dar.messages import LOGGER
from dmd_dar.models.saved import holds_network

ROOT = Path(__file__).parents[1]
KEPT = ROOT / "docs" / "results" / "study"
OUT = Path("out/study")
ARMS = ("residual", "dar", "static")
SEEDS = tuple(range(11, 19))
SEARCHED_ON = 101
BACKBONE, ROUTERS = (1.5e-4, 3e-4, 6e-4), (5e-4, 8e-3)
ROUTERS_FIRST = 2e-3
HALF, WHOLE = 200, 400
ON_THE_WAY = (25, 50, 110, 300)


@dataclass(frozen=True)
class StudyConfig:
    """python runs/study.py"""

    stage: Literal["search", "train", "compare"] = key("search", "what to do")
    jobs: int = key(2, "runs at a time, of one thread each", least=1)


@dataclass(frozen=True)
class Setting:
    """Rates of one run of the search."""

    arm: str
    lr: float
    routers: float

    @property
    def folder(self) -> Path:
        return OUT / "search" / f"{self.arm}_{self.lr:g}_{self.routers:g}"

    @property
    def command(self) -> list[str]:
        keys = [f"student.lr={self.lr}", f"student.routing.lr={self.routers}", "checkpoint.students=[]"]
        return distill(self.arm, SEARCHED_ON, self.folder) + keys


def distill(arm: str, seed: int, folder: Path) -> list[str]:
    return ["distill.py", f"config=configs/photos32/study_{arm}.yaml", f"seed={seed}", f"out_dir={folder}"]


def run_all(commands: list[list[str]], jobs: int) -> None:
    """Python commands, so many at a time. Raises CalledProcessError of the first that failed once all have ended."""
    with ThreadPoolExecutor(jobs) as pool:
        running = [pool.submit(subprocess.run, [sys.executable, *one], cwd=ROOT, check=True) for one in commands]
    for one in running:
        one.result()


def measured(settings: list[Setting]) -> dict[Setting, float]:
    """`fd_wavelet` above its null of each run's student."""
    folder = OUT / "search" / f"report_{len(settings)}"
    runs = ",".join(str(one.folder) for one in settings)
    report = ["-m", "eval.report", f"runs=[{runs}]", f"out={folder}", "n=512", "metrics=[offline]"]
    run_all([report], 1)
    sets = json.loads((ROOT / folder / "report.json").read_text())["sets"]
    students = {one["name"]: one["against"]["teacher"] for one in sets if one["role"] == "student"}
    return {one: students[one.folder.name]["fd_wavelet"]["excess"] for one in settings}


def more(best: Setting) -> list[Setting]:
    """The two further settings of an arm, around its best."""
    if best.arm == "residual":
        return [Setting(best.arm, round(best.lr * factor, 8), best.routers) for factor in (2 / 3, 3 / 2)]
    return [Setting(best.arm, best.lr, rate) for rate in ROUTERS]


def search(cfg: StudyConfig) -> None:
    """Five settings for each arm; what was measured goes to search.json, and the best of each is told."""
    settings = [Setting(arm, lr, ROUTERS_FIRST) for lr in BACKBONE for arm in ARMS]
    run_all([one.command for one in settings], cfg.jobs)
    found = measured(settings)
    settings += [one for arm in ARMS for one in more(best_of(found, arm))]
    run_all([one.command for one in settings[len(found) :]], cfg.jobs)
    found = measured(settings)
    rows: list[dict[str, Any]] = [{**vars(one), "fd_wavelet_excess": value} for one, value in found.items()]
    write_atomic(make_folder(KEPT) / "search.json", json.dumps(rows, indent=1) + "\n")
    for arm in ARMS:
        best = best_of(found, arm)
        LOGGER.info(f"{arm}: student.lr={best.lr:g} student.routing.lr={best.routers:g}")


def best_of(found: dict[Setting, float], arm: str) -> Setting:
    return min((one for one in found if one.arm == arm), key=found.__getitem__)


def place(arm: str, seed: int, updates: int = WHOLE) -> Path:
    """The folder of a student."""
    run = OUT / f"{arm}_seed{seed}"
    return run if updates == WHOLE else run / f"student_step_{updates:08d}"


def train(cfg: StudyConfig) -> None:
    run_all([distill(arm, seed, place(arm, seed)) for seed in SEEDS for arm in ARMS], cfg.jobs)


def complete() -> list[int]:
    """The seeds of which every arm's run is finished. The others are told, and left out of all arms."""
    found = [seed for seed in SEEDS if all(holds_network(ROOT / place(arm, seed) / "student") for arm in ARMS)]
    if left_out := sorted({*SEEDS} - {*found}):
        LOGGER.warning(f"seeds {left_out} are left out of every arm: a run of theirs is not finished")
    return found


def compare(cfg: StudyConfig) -> None:
    """The comparison at every number of updates, into docs/results/study/N.json; p after Holm over the two endpoints
    into endpoints.json.
    """
    seeds = complete()
    for updates in sorted((*ON_THE_WAY, HALF, WHOLE)):
        out = OUT / f"compare_{updates}"
        names = zip(("residual", "dar", "frozen"), ARMS, strict=True)
        arms = [f"arms.{name}=[{','.join(str(place(arm, seed, updates)) for seed in seeds)}]" for name, arm in names]
        rates = "arms.may_differ=[student.lr,student.routing.lr]"
        run_all([["-m", "eval.compare", *arms, rates, f"out={out}", "n=1024"]], 1)
        write_atomic(make_folder(KEPT) / f"{updates}.json", (ROOT / out / "compare.json").read_text())
    found = {str(updates): read_study(KEPT / f"{updates}.json").primary.p for updates in (HALF, WHOLE)}
    write_atomic(KEPT / "endpoints.json", json.dumps({"p": found, "p_holm": holm(found)}, indent=1) + "\n")


STAGES = {"search": search, "train": train, "compare": compare}


if __name__ == "__main__":
    config.run_job(StudyConfig, lambda cfg: STAGES[cfg.stage](cfg), description=__doc__ or "")
