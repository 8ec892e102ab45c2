"""Does DAR keep more detail? python -m eval.compare arms.residual=[RUN,..] arms.dar=[RUN,..] out=DIR

Students trained from several seeds, sampled on the same noise and classes, against their teacher. The endpoint is
fixed: D = |gain_HF(residual)| - |gain_HF(DAR)| in dB, above 0 in favour of DAR. Runs of other steps are a comparison of
their own. Writes compare.json, and a small file for each run.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from dmd_dar import config, moved
from dmd_dar.atomic import make_folder, write_atomic
from dmd_dar.keys import key
from dmd_dar.messages import LOGGER
from dmd_dar.methods.solvers import Solver

from .measure.provenance import command_line, provenance
from .measure.results import Origin
from .metrics.intervals import LARGEST_EXACT
from .samples.parallel import Processes
from .samples.sampling import Bench
from .study.differences import conclude, conclude_over_steps
from .study.few_steps import FewSteps, titles
from .study.pairing import ArmsConfig, RunsByArm, read_groups
from .study.prompts import IMAGES, LEAST, encoded_for
from .study.records import run_records, text_of
from .study.results import StepsResult, StudyResult
from .study.runs import GuidedTeacher, Run, reference_guidance, require_teacher
from .study.sampled import Yardstick, sample_and_measure
from .study.wording import seed_table


@dataclass(frozen=True)
class CompareConfig(Solver):
    """python -m eval.compare"""

    arms: ArmsConfig = key(factory=ArmsConfig)
    reference: Literal["teacher"] = key("teacher", "what the gains are against")
    guidance_scale: float | None = key(
        None,
        "of the teacher that is the reference; needed where the guidance of runs differs; null: the runs' own",
        least=0,
    )
    out: str = key("out/compare", "folder for compare.json and runs/, one small file for each run")
    n: int = key(IMAGES, "images of each network", least=LEAST)
    seeds: int = key(0, "images of each prompt or class, in the place of n; 0: n images, the prompts in turn", least=0)
    prompts: str = key(
        "",
        "what all networks are sampled at: a file of prompts in words, as dmd_dar.encode reads it, or a folder of"
        " encoded ones; empty: those that the runs were trained on",
        path=True,
    )
    text_encoder: str = key("", "pipeline that encodes the file; empty: the one that the first run's card names")
    seed: int = key(0, "of the evaluation noise, the resampling and the simulations", least=0)
    batch_size: int = key(64, "images at a time; changes no image beyond rounding", least=1)
    cache: str = key("out/cache", "folder in which images are kept and found again")
    cpu: bool = key(False, "compute on the CPU although a GPU is there")

    def __post_init__(self) -> None:
        for name in ("residual", "dar"):
            runs = len(getattr(self.arms, name))
            if runs < 2:
                raise ValueError(
                    f"arms.{name} names {runs} runs: name 2 to {LARGEST_EXACT}, one for each training seed"
                )


@dataclass(frozen=True)
class CompareOrigin(Origin):
    """Command and configurations of a comparison."""

    configs: dict[str, dict[str, Any]]  # of each run by its folder, as that holds it


def origin_of(cfg: CompareConfig, runs: Sequence[Run]) -> CompareOrigin:
    nothing = CompareConfig(arms=ArmsConfig(residual=("", ""), dar=("", "")))
    return CompareOrigin(
        command_line("eval.compare", config.differences(nothing, cfg)),
        configs={str(run.folder): run.raw for run in runs},
    )


def compare(cfg: CompareConfig) -> None:
    """Sample, measure, compare; write compare.json and print tables and conclusion.

    Runs of several steps are compared steps by steps. Of several processes, each samples its share; the first one does
    the rest.
    """
    began = time.monotonic()
    processes = Processes.of(cfg.cpu)
    device = processes.device(cfg.cpu)
    groups = read_groups(cfg.arms, lambda run: encoded_for(run.folder, run.origin, cfg, processes))
    runs = [run for group in groups.values() for arm in group.values() for run in arm]
    guidance_scale = reference_guidance(runs, cfg.guidance_scale)
    make_folder(cfg.out)
    teacher = GuidedTeacher.of(runs[0], device, guidance_scale)
    require_teacher(runs, teacher.loaded)
    bench = teacher.bench(cfg, device, processes, runs[0])
    if processes.main:
        LOGGER.info(f"sampling {bench.count} images of the teacher and of {len(runs)} runs")
    reference = teacher.sample_set(bench, cfg.ode)
    result = concluded(cfg, groups, Yardstick.of(reference, bench), bench)
    if result is not None:
        origin = provenance(device, time.monotonic() - began, origin_of(cfg, runs))
        publish(replace(result, reference=reference.facts, provenance=origin), Path(cfg.out))


def concluded(
    cfg: CompareConfig, groups: dict[FewSteps, RunsByArm], yardstick: Yardstick, bench: Bench
) -> StudyResult | StepsResult | None:
    """The comparison of runs of equal steps, or all of several; None in all processes but the first."""
    results = {}
    for few, title in titles(groups).items():
        study = sample_and_measure(groups[few], yardstick, bench)
        if study is not None:
            result = conclude(study, bench.count, cfg.seed)
            results[title] = replace(result, few_steps=few) if title else result
    if len(results) > 1:
        return conclude_over_steps(results)
    return next(iter(results.values()), None)


def publish(result: StudyResult | StepsResult, out: Path) -> None:
    """Write compare.json and the small file of each run, print the table and the conclusion."""
    write_atomic(out / "compare.json", text_of(result))
    folder = make_folder(out / "runs")
    for name, record in run_records(result).items():
        write_atomic(folder / name, text_of(record))
    if isinstance(result, StepsResult):
        for title, one in result.steps.items():
            print(f"{title.upper()}\n{seed_table(one)}\n\n{one.conclusion}\n")
    else:
        print(f"{seed_table(result)}\n")
    print(f"{result.conclusion}\nwritten: {out / 'compare.json'}")


def main(argv: Sequence[str] | None = None) -> None:
    config.run_job(CompareConfig, compare, argv, description=__doc__ or "")


moved.keep_names(__name__)


if __name__ == "__main__":
    main()
