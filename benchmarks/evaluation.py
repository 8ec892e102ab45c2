"""How long does an offline evaluation take? python -m benchmarks.evaluation

Three models, a teacher, two sets of real crops; every metric that needs no weights, then the report on disk. The
models' images are crops of the photographs, spoiled in different degrees: measuring does not depend on what they show.
With runs=[RUN,..] also the whole command `python -m eval.report` of these runs: sampling, latencies and start included,
then once more with the images that the first call kept. The result is benchmarks/results/evaluation.json.
"""

import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.record import save, spread
from dmd_dar import config
from dmd_dar.data.photos import NAMES, Photos
from dmd_dar.draws import Draws, sample_range
from dmd_dar.keys import key
from eval.measure.pair import Compared, measure
from eval.measure.results import Report
from eval.measure.suite import Ledger, Sources, Suite, prepare
from eval.metrics import spoil
from eval.page.html import write_report
from eval.samples.cost import seconds
from eval.samples.sets import ImageSet

AIM_S = 60


@dataclass(frozen=True)
class EvaluationBenchmark:
    """python -m benchmarks.evaluation"""

    n: int = key(512, "images of each set", least=64)
    size: int = key(32, "side of an image: 32 or 64", unit="pixels", least=32, most=64)
    models: int = key(3, "students", least=1)
    rounds: int = key(3, "repetitions of everything", least=1)
    runs: tuple[str, ...] = key((), "run folders whose report is timed as a command", path=True)


def image_sets(
    cfg: EvaluationBenchmark,
) -> tuple[ImageSet, ImageSet, list[ImageSet], tuple[torch.Tensor, torch.Tensor]]:
    """Teacher, real crops, the null with the students, and the crops that PCA and classifier are fitted to."""
    data, samples = Photos(cfg.size), sample_range(0, cfg.n)
    labels = samples % data.num_classes
    crops = {name: data.crops(labels, Draws(0, name, 0, samples)) for name in ("teacher", "real", "null", "fit")}
    unit = crops["teacher"].double() / 255
    students = [
        ImageSet(f"model {i}", spoil.eight_bit(spoil.blurred(unit, 0.2 * i)), labels, "student", True)
        for i in range(1, cfg.models + 1)
    ]
    teacher = ImageSet("teacher", crops["teacher"], labels, "teacher", True)
    real = ImageSet("real", crops["real"], labels, "real", False)
    return teacher, real, [ImageSet("null", crops["null"], labels, "null", False), *students], (crops["fit"], labels)


def evaluation(cfg: EvaluationBenchmark, folder: Path) -> dict[str, float]:
    """Seconds of the parts of one evaluation, in order."""
    teacher, real, sets, fit = image_sets(cfg)
    ledger, made = Ledger(), {}

    def fitted() -> None:
        made["suite"] = prepare(("offline",), fit, 0, ledger, Sources(), "{}")

    def measured() -> None:
        suite: Suite = made["suite"]
        names = dict(enumerate(NAMES))
        compared = Compared(sets, teacher, real, set(Photos.colour_labels), names)
        made["report"] = Report(**vars(measure(compared, 0, suite, ledger)), title="benchmark")

    def written() -> None:
        write_report(made["report"], [real, teacher, *sets], folder)

    parts: dict[str, Callable[[], Any]] = {"fits": fitted, "metrics": measured, "report": written}
    times = {name: seconds(part) for name, part in parts.items()}
    if ledger.skipped:
        raise RuntimeError(f"not the whole evaluation: {ledger.skipped}")
    return times


def command(cfg: EvaluationBenchmark, folder: Path) -> dict[str, float]:
    """Seconds of eval.report in a process of its own that finds no images of an earlier one, and of a second one."""
    words = [f"runs=[{','.join(cfg.runs)}]", f"n={cfg.n}", "metrics=[offline]", f"out={folder / 'report'}"]

    with tempfile.TemporaryDirectory(dir=folder) as cache:

        def call() -> None:
            subprocess.run([sys.executable, "-m", "eval.report", *words, f"cache={cache}"], check=True)

        return {name: seconds(call) for name in ("new", "again")}


def run(cfg: EvaluationBenchmark) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rounds = [evaluation(cfg, folder) for _ in range(cfg.rounds)]
        whole = [command(cfg, folder) for _ in range(cfg.rounds if cfg.runs else 0)]
    totals = [sum(one.values()) for one in rounds]
    result = {
        "images": cfg.n,
        "size": cfg.size,
        "models": cfg.models,
        "sets": cfg.models + 3,
        "aim_s": AIM_S,
        "seconds": spread(totals),
        "parts_s": {name: spread([one[name] for one in rounds]) for name in rounds[0]},
        "command_s": {name: spread([one[name] for one in whole]) for name in whole[0]} if whole else None,
        "runs": len(cfg.runs),
    }
    print(
        f"{statistics.median(totals):.1f} s",
        {name: round(part["median"], 1) for name, part in result["parts_s"].items()},
    )
    print(save("evaluation", torch.device("cpu"), result))


if __name__ == "__main__":
    config.run_job(EvaluationBenchmark, run, description=__doc__ or "")
