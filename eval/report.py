"""Did the detail survive? python -m eval.report runs=[RUN_A,RUN_B,...] out=DIR"""

import dataclasses
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dmd_dar import config
from dmd_dar.atomic import make_folder
from dmd_dar.data.config import DataConfig
from dmd_dar.data.sources import Source
from dmd_dar.distillation.config import DistillConfig
from dmd_dar.errors import UserError
from dmd_dar.keys import key
from dmd_dar.messages import LOGGER

from .measure.latent import latent_spectra, read_latents
from .measure.one_set import Reading, mean_plane, read_one
from .measure.pair import Compared, fitting, jsonable, measure
from .measure.provenance import command_line, provenance
from .measure.results import Forest
from .measure.suite import Ledger, Metric, Sources, Suite, prepare
from .page.columns import terminal_table
from .page.html import write_report
from .samples.parallel import Processes, Rows
from .samples.real import named_real, open_fitting, read_real
from .samples.sampling import Bench, with_costs
from .samples.sets import ImageSet, read_set
from .study import forest
from .study import runs as arms
from .study.pairing import ROUTING, RunsByArm, book_keeping, different_networks, same_data
from .study.students import student_set

__all__ = ["ReportConfig", "main", "report"]

TEACHER = "teacher"
CROPS = "real crops that are not compared"
OWN = "samples of the teacher that are not compared"
GENERAL = ("auto", "offline")  # words for `metrics` that stand alone


@dataclass(frozen=True)
class ReportConfig:
    """python -m eval.report"""

    runs: tuple[str, ...] = key((), "run folders of distill.py; they share teacher, rungs and guidance", path=True)
    images: tuple[str, ...] = key((), "further sets: folders of PNG or npy files, named after the folder", path=True)
    reference: str = key(TEACHER, "what the verdict compares with: the runs' teacher, or without runs a folder")
    real: str = key("", "folder of real images; empty: of runs, crops of their own data where these fit", path=True)
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
    allow_download: bool = key(False, "fetch weights that are missing")
    strict: bool = key(False, "exit with code 2 where a metric that was asked for is skipped; --strict does the same")
    out: str = key("out/report", "folder for report.html, report.json, report.csv and the figures")
    n: int = key(1024, "images of each set that is sampled", least=64)
    seed: int = key(0, "of the evaluation noise, the real crops and the bootstrap", least=0)
    solver_steps: int = key(15, "Heun steps of the teacher, two evaluations each", unit="steps", least=1)
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
        if len(self.metrics) > 1 and any(word in self.metrics for word in GENERAL):
            raise ValueError("metrics holds auto or offline beside others: give one of these words alone, or names")


@dataclass(frozen=True)
class Inputs:
    """What a report compares. `fit`: images and labels that features are fitted to; `fitted_to` says which."""

    reference: ImageSet
    real: ImageSet | None
    sets: list[ImageSet]
    read: list[arms.Arm]
    fit: tuple[Tensor, Tensor | None]
    fitted_to: str
    colour_labels: set[int] | None
    class_names: dict[int, str]
    data_hash: str | None = None
    prompts: dict[int, str] | None = None  # of the runs, by number, as far as their texts are known; None for labels
    bench: Bench | None = None  # None without networks

    @property
    def everything(self) -> list[ImageSet]:
        return [one for one in (self.real, self.reference, *self.sets) if one is not None]


def sampled(cfg: ReportConfig, device: torch.device, ledger: Ledger, processes: Processes) -> Inputs:
    """Every network of the runs on the same noise, and images of their data where these fit the teacher's."""
    read = arms.read_arms(cfg.runs)
    teacher = arms.Teacher.of(read[0], device)
    arms.require_teacher(read, teacher.weights)
    bench = Bench.of(cfg, teacher.network, device, teacher.codec, processes)
    given = named_real(cfg.real, bench) if cfg.real else None
    data = None if given else data_of(read[0].cfg, bench, teacher, ledger)
    if processes.main:
        LOGGER.info(f"sampling {cfg.n} images of the teacher and of {len(read)} students")
    real = None if data is None else read_real(data, bench)
    reference = teacher.sample_set(bench, cfg.solver_steps)
    sets = [*(real.beside if real else []), *teacher.undistilled_sets(bench)]
    made = {}
    for arm in read:
        call = partial(student_set, arm, bench, reference)
        made[arm.name] = ledger.attempt("every metric", arm.name, call)
    read = [arm for arm in read if made[arm.name] is not None]
    sets += [made[arm.name] for arm in read]
    prompts = prompts_of(teacher, reference)
    reference, *sets = (as_prompted(one, prompts) for one in (reference, *sets))
    names = dict(enumerate(real.label_names if real else teacher.label_names)) or prompts or {}
    common = {"prompts": prompts, "bench": bench}
    if real is None:
        fit = teacher.sample_set(replace(bench, seed=bench.seed + 1), cfg.solver_steps)
        shown = given and as_prompted(given, prompts)
        return Inputs(reference, shown, sets, read, (fit.first(cfg.n), fit.labels), OWN, None, names, **common)
    shown, colour = as_prompted(real.reference, prompts), real.colour_labels
    return Inputs(reference, shown, sets, read, real.fit, CROPS, colour, names, real.hash, **common)


def as_prompted(one: ImageSet, prompts: dict[int, str] | None) -> ImageSet:
    """The set, whose labels are numbers of the runs' prompts unless it names them itself."""
    return one if prompts is None or one.names else replace(one, names=prompts, prompted=True)


def data_of(cfg: DistillConfig, bench: Bench, teacher: arms.Teacher, ledger: Ledger) -> Source | None:
    """The run's data where they can stand beside the samples; nobody asked for those that it names by default."""
    asked = cfg.needs_data or cfg.data.name != DataConfig().name
    return ledger.attempt("against real images", "", lambda: open_fitting(cfg.data, bench, teacher.loaded), asked)


def prompts_of(teacher: arms.Teacher, reference: ImageSet) -> dict[int, str] | None:
    """The texts of the prompts that occur, as far as they are known; None for a teacher of labels."""
    if teacher.prompts is None or reference.labels is None:
        return None
    texts = teacher.prompts.texts()
    return {label: texts[label] for label in reference.labels.unique().tolist()} if texts else {}


def opened(cfg: ReportConfig) -> Inputs:
    """The folders of a report without runs."""
    reference = read_set(cfg.reference, "teacher")
    real = _real_beside(reference, cfg) if cfg.real else None
    source = real or reference
    return Inputs(reference, real, [], [], (source.first(cfg.n), None), f"{source.name} itself", None, {})


def _real_beside(reference: ImageSet, cfg: ReportConfig) -> ImageSet:
    """The real images, under a name of their own, since sets go by it; a folder that is both is opened once."""
    same = Path(cfg.real).resolve() == Path(cfg.reference).resolve()
    real = replace(reference, role="real") if same else read_set(cfg.real, "real")
    return replace(real, name=f"{real.name} (real)") if real.name == reference.name else real


def better_baseline(sets: list[ImageSet], result: dict[str, Any]) -> str:
    """The undistilled sampler nearer to the teacher by fd_wavelet: the one that students have to beat."""
    rows = {row["name"]: row for row in result["sets"]}
    names = [one.name for one in sets if one.role == "undistilled"]
    return min(names, key=lambda name: rows[name]["against"]["teacher"]["fd_wavelet"]["value"])


def distillation_checks(result: dict[str, Any], baseline: str) -> list[dict[str, Any]]:
    """For every student: fd_wavelet above its null, HF gain, least class diversity, beside the baseline's.

    fd_excess_share is None where the baseline is no further above the null than the null is above 0.
    """
    rows = {row["name"]: row for row in result["sets"]}

    def against(name: str) -> dict[str, Any]:
        return rows[name]["against"]["teacher"]

    start = against(baseline)
    far, least = (start["fd_wavelet"][name] for name in ("excess", "null"))
    checks = []
    for name, row in rows.items():
        if row["role"] == "student":
            ours = against(name)
            checks.append(
                {
                    "name": name,
                    "baseline": baseline,
                    "fd_excess": ours["fd_wavelet"]["excess"],
                    "fd_excess_share": None if far <= least else ours["fd_wavelet"]["excess"] / far,
                    "hf_gain_db": ours["gain_db"]["HF"]["value"],
                    "hf_gain_db_baseline": start["gain_db"]["HF"]["value"],
                    "least_class_diversity": ours["diversity_ratio"]["pixels"]["least"],
                    "routing": row["facts"].get("routing"),
                    "latency_ms_per_image": row["facts"]["latency_ms_per_image"],
                    "peak_memory_mb": row["facts"]["peak_memory_mb"],
                }
            )
    return checks


def routing_comparisons(checks: list[dict[str, Any]], read: list[arms.Arm]) -> list[str]:
    """One sentence for each routed arm and its residual twin, the arm that differs from it in routing alone."""
    by_name = {check["name"]: check for check in checks}
    sentences = []
    for arm in read:
        if arm.cfg.student.routing.query == "residual":
            continue
        plain = [other for other in read if other.cfg.student.routing.query == "residual"]
        twins = [other for other in plain if not unequal(arm.cfg, other.cfg)]
        if twins:
            sentences.append(compare_pair(by_name[arm.name], by_name[twins[0].name]))
        elif plain:
            keys = ", ".join(unequal(arm.cfg, plain[0].cfg))
            sentences.append(f"{arm.name} and {plain[0].name} differ in {keys} too: not a comparison of routing.")
    return sentences


def unequal(ours: DistillConfig, theirs: DistillConfig) -> list[str]:
    """Keys beyond routing and book-keeping in which two runs differ."""
    names = [name for name, _, _ in config.differences(ours, theirs)]
    return [name for name in names if not name.startswith(ROUTING) and not book_keeping(name)]


def compare_pair(routed: dict[str, Any], plain: dict[str, Any]) -> str:
    """HF gain, fd_wavelet above its null and cost of a routed arm against its residual twin, as plain words."""

    def word(ours: float, theirs: float, digits: int) -> str:
        ours, theirs = round(ours, digits), round(theirs, digits)
        return "equal" if ours == theirs else "better" if ours < theirs else "worse"

    gain = word(abs(routed["hf_gain_db"]), abs(plain["hf_gain_db"]), 2)
    distance = word(routed["fd_excess"], plain["fd_excess"], 2)
    return (
        f"{routed['name']} against {plain['name']}: HF gain {gain} ({routed['hf_gain_db']:+.2f} dB, there"
        f" {plain['hf_gain_db']:+.2f}); fd_wavelet above its null {distance} ({routed['fd_excess']:.2f}, there"
        f" {plain['fd_excess']:.2f}); {cost_words(routed, plain)}. One pair of training runs: no test of significance."
    )


def cost_words(routed: dict[str, Any], plain: dict[str, Any]) -> str:
    time, memory = (routed[name] / plain[name] for name in ("latency_ms_per_image", "peak_memory_mb"))
    return f"{time:.2f} times its time and {memory:.2f} times its peak memory"


def seed_pairs(read: list[arms.Arm], sets: list[ImageSet]) -> list[forest.Pair]:
    """Routed students with the residual ones that differ from them in routing alone, of the form with most seeds."""
    by_name = {one.name: one for one in sets}
    forms: dict[str, list[forest.Pair]] = {}
    for arm in read:
        routing = arm.cfg.student.routing
        twins = [other for other in read if other.cfg.student.routing.query == "residual"]
        twins = [other for other in twins if not unequal(arm.cfg, other.cfg)]
        if routing.query != "residual" and twins:
            pair = forest.Pair(arm.cfg.seed, by_name[twins[0].name], by_name[arm.name])
            forms.setdefault(repr(routing), []).append(pair)
    return max(forms.values(), key=len, default=[])


def seed_by_seed(cfg: ReportConfig, inputs: Inputs, ledger: Ledger) -> Forest | None:
    """What the forest plot shows: the given compare.json, or runs that were trained in pairs from several seeds."""
    if cfg.compare:
        return ledger.attempt("seed by seed", cfg.compare, lambda: forest.from_file(cfg.compare))
    pairs = seed_pairs(inputs.read, inputs.sets)
    if len({pair.seed for pair in pairs}) < max(2, len(pairs)):
        return None

    def drawn() -> Forest:
        names = {"residual": {pair.residual.name for pair in pairs}, "dar": {pair.dar.name for pair in pairs}}
        groups: RunsByArm = {role: [arm for arm in inputs.read if arm.name in held] for role, held in names.items()}
        for role, runs in groups.items():
            different_networks(role, runs)
        same_data(groups)
        return forest.from_runs(pairs, inputs.reference, cfg.seed)

    return ledger.attempt("seed by seed", "", drawn)


def check_sentence(check: dict[str, Any]) -> str:
    """What a student's checks say, in words."""
    share, baseline = check["fd_excess_share"], check["baseline"]
    apart = f"{check['fd_excess']:.2f}, where '{baseline}' is near its null already"
    if share is not None:
        apart = f"{share:.2f} of that of '{baseline}'"
    spread = "class diversity is not known, since no class has two images"
    if check["least_class_diversity"] is not None:
        spread = f"least diversity of a class {check['least_class_diversity']:.2f} of the teacher's"
    text = (
        f"{check['name']}: fd_wavelet above its null is {apart};"
        f" HF gain {check['hf_gain_db']:+.2f} dB (there {check['hf_gain_db_baseline']:+.2f}); {spread}"
    )
    if routing := check["routing"]:
        text += (
            f"; routers: mean |n alpha - 1| {routing['deviation']:.3f},"
            f" range of n alpha over t {routing['change_over_t']:.3f},"
            f" HF gain shifts by {routing['hf_gain_shift_db']:+.2f} dB when they are reset"
            f" ({'used' if routing['used'] else 'router unused'})"
        )
    return text + "."


def origin(cfg: ReportConfig, inputs: Inputs) -> dict[str, Any]:
    """Command, weights, seeds and configurations: what this command knows of where its numbers come from."""
    sets = [inputs.reference, *inputs.sets]
    return {
        "command": command_line("eval.report", config.differences(ReportConfig(runs=("",)), cfg)),
        "checkpoints": {one.name: one.facts.network.network for one in sets if one.facts.network is not None},
        "seeds": {"evaluation": cfg.seed, **{f"training of {arm.name}": arm.cfg.seed for arm in inputs.read}},
        "data_hash": inputs.data_hash,
        "runs": {arm.name: arm.raw for arm in inputs.read},
        "report": dataclasses.asdict(cfg),
    }


def conclude(result: dict[str, Any], inputs: Inputs) -> None:
    """Add `checks` of the students against the undistilled teacher, and `conclusions` in words."""
    result["checks"], result["conclusions"] = [], []
    if inputs.read:
        result["checks"] = distillation_checks(result, better_baseline(inputs.sets, result))
        result["conclusions"] = [check_sentence(check) for check in result["checks"]]
        result["conclusions"] += routing_comparisons(result["checks"], inputs.read)


def report(cfg: ReportConfig) -> None:
    """Sample or read every set, measure, write the report, print its table. UserError for a skip where strict.

    Of several processes, each samples its share and reads its share of every set; the first one does the rest.
    """
    began = time.monotonic()
    processes, ledger = Processes.of(cfg.cpu), Ledger()
    device = processes.device(cfg.cpu)
    make_folder(cfg.out)
    inputs = sampled(cfg, device, ledger, processes) if cfg.runs else opened(cfg)
    for folder in cfg.images:
        one = ledger.attempt("every metric", folder, lambda folder=folder: read_set(folder))
        inputs.sets.extend([as_prompted(one, inputs.prompts)] if one is not None else [])
    if processes.main:
        print_left_out(inputs)
    sources = Sources(cfg.inception or None, cfg.clip or None, cfg.allow_download, device, cfg.statistics)
    suite = prepare(cfg.metrics, inputs.fit, cfg.seed, ledger, sources, cfg.prompt)
    chosen = fitting(inputs.sets, inputs.reference, inputs.real, ledger)
    read = {one.name: read_one(one, suite, ledger, processes) for one in chosen}
    inputs = replace(inputs, sets=[one for one in chosen if any(one is other for other in inputs.sets)])
    cells = read_latents(inputs.everything, processes)
    if processes.main:
        publish(cfg, with_network_costs(inputs), suite, read, cells, ledger, device, began)


def print_left_out(inputs: Inputs) -> None:
    for one in inputs.everything:
        if left_out := one.facts.left_out:
            LOGGER.info(f"{one.name}: {one.count} images; other files, left out: {left_out}")


def with_network_costs(inputs: Inputs) -> Inputs:
    if inputs.bench is None:
        return inputs
    reference, *sets = with_costs([inputs.reference, *inputs.sets], inputs.bench)
    return replace(inputs, reference=reference, sets=sets)


def publish(
    cfg: ReportConfig,
    inputs: Inputs,
    suite: Suite,
    read: dict[str, Reading],
    cells: dict[str, Rows],
    ledger: Ledger,
    device: torch.device,
    began: float,
) -> None:
    """What remains once all images, and latents as `cells`, are read."""
    fixed = (inputs.reference, inputs.real)
    compared = Compared(inputs.sets, *fixed, inputs.colour_labels, inputs.class_names)
    result = jsonable(measure(compared, cfg.seed, suite, ledger, read))
    result["latent"] = jsonable(latent_spectra(inputs.everything, *fixed, cfg.seed, ledger, cells))
    result["forest"] = jsonable(seed_by_seed(cfg, inputs, ledger))
    result["skipped"] = jsonable(ledger.skipped)
    result["fitted_to"] = inputs.fitted_to
    conclude(result, inputs)
    facts = provenance(device, time.monotonic() - began, **origin(cfg, inputs))
    out = make_folder(cfg.out)
    planes = {one.name: mean_plane(one, read[one.name].rows) for one in inputs.everything if one.name in read}
    write_report(result, inputs.everything, out, cfg.title, facts, planes)
    print(terminal_table(result))
    print(*result["conclusions"], sep="\n")
    print_skipped(ledger)
    print(f"report: {Path(cfg.out) / 'report.html'}")
    missed = [one for one in ledger.skipped if one.requested]
    if cfg.strict and missed:
        raise UserError(
            f"{len(missed)} metrics that were asked for were skipped, first {missed[0].metric}: {missed[0].reason};"
            f" the others are in {out / 'report.json'}"
        )


def print_skipped(ledger: Ledger) -> None:
    for one in ledger.skipped:
        of = f" of {one.name}" if one.name else ""
        LOGGER.info(f"not measured: {one.metric}{of}: {one.reason}")


def main(argv: Sequence[str] | None = None) -> None:
    """`config.run_job`, with --strict for strict=true."""
    words = ["strict=true" if word == "--strict" else word for word in (sys.argv[1:] if argv is None else argv)]
    config.run_job(ReportConfig, report, words, description=__doc__ or "")


if __name__ == "__main__":
    main()
