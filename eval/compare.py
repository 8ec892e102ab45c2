"""Does DAR keep more detail? python -m eval.compare arms.residual=[RUN,..] arms.dar=[RUN,..] out=DIR

Students trained from several seeds, sampled on the same noise and classes, against their teacher. The endpoint is
fixed: D = |gain_HF(residual)| - |gain_HF(DAR)| in dB, above 0 in favour of DAR. Writes compare.json, and a small file
for each run.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from dmd_dar import config
from dmd_dar.atomic import make_folder, write_atomic
from dmd_dar.keys import key
from dmd_dar.messages import LOGGER
from dmd_dar.methods.solvers import Solver

from .measure.provenance import command_line, provenance
from .measure.results import Origin
from .metrics.intervals import LARGEST_EXACT
from .samples.parallel import Processes
from .samples.sampling import Bench
from .study.differences import conclude
from .study.pairing import ArmsConfig, RunsByArm, read_groups
from .study.records import run_records, text_of
from .study.results import StudyResult
from .study.runs import GuidedTeacher, require_teacher
from .study.sampled import sample_and_measure
from .study.wording import seed_table


@dataclass(frozen=True)
class CompareConfig(Solver):
    """python -m eval.compare"""

    arms: ArmsConfig = key(factory=ArmsConfig)
    reference: Literal["teacher"] = key("teacher", "what the gains are against")
    out: str = key("out/compare", "folder for compare.json and runs/, one small file for each run")
    n: int = key(1024, "images of each network", least=64)
    seed: int = key(0, "of the evaluation noise, the resampling and the simulations", least=0)
    batch_size: int = key(64, "images at a time; changes no image beyond rounding", least=1)
    cache: str = key("out/cache", "folder in which images are kept and found again")
    cpu: bool = key(False, "compute on the CPU although a GPU is there")

    def __post_init__(self) -> None:
        for name in ("residual", "dar"):
            runs = len(getattr(self.arms, name))
            if not 2 <= runs <= LARGEST_EXACT:
                raise ValueError(
                    f"arms.{name} names {runs} runs: name 2 to {LARGEST_EXACT}, one for each training seed"
                )


@dataclass(frozen=True)
class CompareOrigin(Origin):
    """Command and configurations of a comparison."""

    configs: dict[str, dict[str, Any]]  # of each run by its folder, as that holds it


def origin_of(cfg: CompareConfig, groups: RunsByArm) -> CompareOrigin:
    nothing = CompareConfig(arms=ArmsConfig(residual=("", ""), dar=("", "")))
    return CompareOrigin(
        command_line("eval.compare", config.differences(nothing, cfg)),
        configs={str(run.folder): run.raw for runs in groups.values() for run in runs},
    )


def compare(cfg: CompareConfig) -> None:
    """Sample, measure, compare; write compare.json and print tables and conclusion.

    Of several processes, each samples its share; the first one does the rest.
    """
    began = time.monotonic()
    processes = Processes.of(cfg.cpu)
    device = processes.device(cfg.cpu)
    groups = read_groups(cfg.arms)
    make_folder(cfg.out)
    teacher = GuidedTeacher.of(groups["residual"][0], device)
    require_teacher([run for runs in groups.values() for run in runs], teacher.weights)
    bench = Bench.of(cfg, teacher.network, device, teacher.codec, processes)
    if processes.main:
        LOGGER.info(f"sampling {cfg.n} images of the teacher and of {sum(map(len, groups.values()))} runs")
    reference = teacher.sample_set(bench, cfg.ode)
    study = sample_and_measure(groups, reference, bench)
    if study is not None:
        result = conclude(study, cfg.n, cfg.seed)
        origin = provenance(device, time.monotonic() - began, origin_of(cfg, groups))
        publish(replace(result, reference=reference.facts, provenance=origin), Path(cfg.out))


def publish(result: StudyResult, out: Path) -> None:
    """Write compare.json and the small file of each run, print the table and the conclusion."""
    write_atomic(out / "compare.json", text_of(result))
    folder = make_folder(out / "runs")
    for name, record in run_records(result).items():
        write_atomic(folder / name, text_of(record))
    print(seed_table(result))
    print(f"\n{result.conclusion}\nwritten: {out / 'compare.json'}")


def main(argv: Sequence[str] | None = None) -> None:
    config.run_job(CompareConfig, compare, argv, description=__doc__ or "")


if __name__ == "__main__":
    main()
