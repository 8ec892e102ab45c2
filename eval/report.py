"""Did the detail survive? python -m eval.report runs=[RUN_A,RUN_B,...] out=DIR"""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from dmd_dar import config, moved
from dmd_dar.atomic import make_folder
from dmd_dar.errors import UserError
from dmd_dar.keys import key
from dmd_dar.messages import LOGGER
from dmd_dar.methods.solvers import Solver

from .measure.latent import latent_spectra, read_latents
from .measure.ledger import Ledger
from .measure.one_set import Reading, mean_plane, read_one
from .measure.pair import Compared, fitting, measure
from .measure.provenance import command_line, provenance
from .measure.results import Forest, Origin, Report, Skipped
from .measure.suite import Metric, Sources, Suite, prepare
from .page.columns import terminal_table
from .page.html import write_report
from .samples.parallel import Processes, Rows
from .study import forest
from .study.checks import conclusions, student_checks
from .study.convergence import discretisation
from .study.inputs import Inputs, read_inputs
from .study.prompts import IMAGES, LEAST
from .study.twins import forest_of, pairs_by_steps

__all__ = ["ReportConfig", "main", "report"]

TEACHER = "teacher"
GENERAL = ("auto", "offline")  # words for `metrics` that stand alone


@dataclass(frozen=True)
class ReportConfig(Solver):
    """python -m eval.report"""

    runs: tuple[str, ...] = key((), "run folders of distill.py; they share teacher and data", path=True)
    images: tuple[str, ...] = key((), "further sets: folders of PNG or npy files, named after the folder", path=True)
    reference: str = key(TEACHER, "what the verdict compares with: the runs' teacher, or without runs a folder")
    real: str = key("", "folder of real images; empty: of runs, crops of their own data where these fit", path=True)
    guidance_scale: float | None = key(
        None, "of the reference; needed where the guidance of runs differs; null: the runs' own", least=0
    )
    compare: str = key("", "compare.json of eval.compare, whose seeds are drawn", path=True)
    metrics: tuple[Metric, ...] = key(
        ("auto",), "which metrics with weights: auto takes those whose weights are there, offline none, or name them"
    )
    statistics: str = key("", "npz with mu and sigma of other images' FID features", path=True)
    inception: str = key("", "file of FID's Inception; empty looks where eval.weights does", path=True)
    clip: str = key("", "local-dir:FOLDER or hf-hub:OWNER/NAME; empty takes the default of eval.weights")
    prompt: str = key(
        "", "text of the CLIP score, {} being class or prompt; empty: 'a photo of {}' of classes, prompts as they are"
    )
    prompts: str = key(
        "",
        "what all networks are sampled at: a file of prompts in words, as dmd_dar.encode reads it, or a folder of"
        " encoded ones; empty: those that the runs were trained on",
        path=True,
    )
    text_encoder: str = key("", "pipeline that encodes the file; empty: the one that the first run's card names")
    allow_download: bool = key(False, "fetch weights that are missing")
    strict: bool = key(False, "exit with code 2 where a metric that was asked for is skipped; --strict does the same")
    out: str = key("out/report", "folder for report.html, report.json, report.csv and the figures")
    n: int = key(IMAGES, "images of each set that is sampled", least=LEAST)
    seeds: int = key(0, "images of each prompt or class, in the place of n; 0: n images, the prompts in turn", least=0)
    seed: int = key(0, "of the evaluation noise, the real crops and the bootstrap", least=0)
    batch_size: int = key(64, "images at a time; changes no image beyond rounding", least=1)
    cache: str = key("out/cache", "folder in which the teacher's images are kept and found again")
    title: str = key("Did the detail survive?", "heading of the page")
    cpu: bool = key(False, "compute on the CPU although a GPU is there")

    def __post_init__(self) -> None:
        if not self.runs and not self.images:
            raise ValueError("runs is empty: name at least one run folder, runs=[out/demo/residual,out/demo/dar]")
        if self.runs and self.reference != TEACHER:
            raise ValueError("reference is for folders without runs, which bring their teacher; leave it out")
        if not self.runs and self.reference == TEACHER:
            raise ValueError("reference is the teacher of runs, but there are none: name a folder, reference=FOLDER")
        if self.prompts and not self.runs:
            raise ValueError("prompts are what networks of runs are sampled at: leave it out of a report of folders")
        if len(self.metrics) > 1 and any(word in self.metrics for word in GENERAL):
            raise ValueError("metrics holds auto or offline beside others: give one of these words alone, or names")


@dataclass(frozen=True)
class Readings:
    """What was read of every set, by name: of its images, and of its latents where it has some."""

    images: dict[str, Reading]
    latents: dict[str, Rows]


def report(cfg: ReportConfig) -> None:
    """Sample or read every set, measure, write the report, print its table. UserError for a skip where strict.

    Of several processes, each samples its share and reads its share of every set; the first one does the rest.
    """
    began = time.monotonic()
    processes, ledger = Processes.of(cfg.cpu), Ledger()
    device = processes.device(cfg.cpu)
    make_folder(cfg.out)
    inputs = read_inputs(cfg, device, ledger, processes)
    if processes.main:
        print_left_out(inputs)
    asked: tuple[Metric, ...] = ("clip",) if any(one.prompted for one in inputs.everything) else ()
    sources = Sources(cfg.inception or None, cfg.clip or None, cfg.allow_download, device, cfg.statistics, asked)
    suite = prepare(cfg.metrics, inputs.fit, cfg.seed, ledger, sources, cfg.prompt)
    inputs, readings = read_sets(inputs, suite, ledger, processes)
    if processes.main:
        inputs = inputs.with_costs()
        whole = measured(cfg, inputs, readings, suite, ledger)
        origin = provenance(device, time.monotonic() - began, origin_of(cfg, inputs))
        publish(cfg, replace(whole, provenance=origin), inputs, readings)


def print_left_out(inputs: Inputs) -> None:
    """Name the files in folders of images that are no images."""
    for one in inputs.everything:
        if left_out := one.facts.left_out:
            LOGGER.info(f"{one.name}: {one.count} images; other files, left out: {left_out}")


def read_sets(inputs: Inputs, suite: Suite, ledger: Ledger, processes: Processes) -> tuple[Inputs, Readings]:
    """The sets that can be compared, and what is read of each; the others stand in `ledger`."""
    chosen = fitting(inputs.sets, inputs.reference, inputs.real, ledger)
    images = {one.name: read_one(one, suite, ledger, processes) for one in chosen}
    inputs = replace(inputs, sets=[one for one in chosen if any(one is other for other in inputs.sets)])
    return inputs, Readings(images, read_latents(inputs.everything, processes))


def measured(cfg: ReportConfig, inputs: Inputs, readings: Readings, suite: Suite, ledger: Ledger) -> Report:
    """The report without its provenance: comparisons, latents, seeds, and what they say of each student."""
    reference, real = inputs.reference, inputs.real
    compared = Compared(inputs.sets, reference, real, inputs.colour_labels, inputs.class_names)
    comparisons = measure(compared, cfg.seed, suite, ledger, readings.images)
    latent = latent_spectra(inputs.everything, reference, real, cfg.seed, ledger, readings.latents)
    seeds = seed_by_seed(cfg, inputs, ledger)
    error = None if inputs.twice is None else discretisation(reference, inputs.twice, cfg.seed)
    checks = student_checks(comparisons.sets)
    return replace(
        Report(**vars(comparisons)),
        skipped=list(ledger.skipped),
        latent=latent,
        forest=seeds,
        discretisation=error,
        fitted_to=inputs.fitted_to,
        checks=checks,
        conclusions=conclusions(checks, inputs.runs),
        title=cfg.title,
    )


def seed_by_seed(cfg: ReportConfig, inputs: Inputs, ledger: Ledger) -> Forest | None:
    """What the forest plot shows: the compare.json that is named, or runs that were trained in pairs from several
    seeds; None without either.
    """
    if cfg.compare:
        return ledger.attempt("seed by seed", cfg.compare, lambda: forest.from_file(cfg.compare))
    pairs = pairs_by_steps(inputs.runs, inputs.sets)
    if not pairs:
        return None
    return ledger.attempt("seed by seed", "", lambda: forest_of(pairs, inputs.runs, inputs.reference, cfg.seed))


@dataclass(frozen=True)
class ReportOrigin(Origin):
    """Command, weights, seeds and configurations of a report."""

    checkpoints: dict[str, str]  # hash of the weights of each set that a network made
    seeds: dict[str, int]
    data_hash: str | None
    runs: dict[str, dict[str, Any]]  # configuration of each run, as its folder holds it
    report: ReportConfig


def origin_of(cfg: ReportConfig, inputs: Inputs) -> ReportOrigin:
    sets = [inputs.reference, *inputs.sets]
    return ReportOrigin(
        command_line("eval.report", config.differences(ReportConfig(runs=("",)), cfg)),
        checkpoints={one.name: one.facts.network.network for one in sets if one.facts.network is not None},
        seeds={"evaluation": cfg.seed, **{f"training of {run.name}": run.cfg.seed for run in inputs.runs}},
        data_hash=inputs.data_hash,
        runs={run.name: run.raw for run in inputs.runs},
        report=cfg,
    )


def publish(cfg: ReportConfig, whole: Report, inputs: Inputs, readings: Readings) -> None:
    """Write the files, print table, conclusions and skips. UserError for a skip where strict."""
    out = make_folder(cfg.out)
    sets = [one for one in inputs.everything if one.name in readings.images]
    write_report(whole, sets, out, {one.name: mean_plane(one, readings.images[one.name].rows) for one in sets})
    print(terminal_table(whole))
    print(*whole.conclusions, sep="\n")
    if whole.discretisation is not None:
        print(whole.discretisation.sentence)
    print_skipped(whole.skipped)
    print(f"report: {out / 'report.html'}")
    missed = [one for one in whole.skipped if one.requested]
    if cfg.strict and missed:
        raise UserError(
            f"{len(missed)} metrics that were asked for were skipped, first {missed[0].metric}: {missed[0].reason};"
            f" the others are in {out / 'report.json'}"
        )


def print_skipped(skipped: Sequence[Skipped]) -> None:
    for one in skipped:
        of = f" of {one.name}" if one.name else ""
        LOGGER.info(f"not measured: {one.metric}{of}: {one.reason}")


def main(argv: Sequence[str] | None = None) -> None:
    """`config.run_job`, with --strict for strict=true."""
    words = ["strict=true" if word == "--strict" else word for word in (sys.argv[1:] if argv is None else argv)]
    config.run_job(ReportConfig, report, words, description=__doc__ or "")


moved.keep_names(__name__)


if __name__ == "__main__":
    main()
