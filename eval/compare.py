"""Does DAR keep more detail? python -m eval.compare arms.residual=[RUN,..] arms.dar=[RUN,..] out=DIR

Students trained from several seeds, sampled on the same noise and classes, against their teacher. The endpoint is
fixed: D = |gain_HF(residual)| - |gain_HF(DAR)| in dB, above 0 in favour of DAR. Writes compare.json, and a small file
for each run.
"""

import dataclasses
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from dmd_dar import config
from dmd_dar.atomic import make_folder, write_atomic
from dmd_dar.keys import key
from dmd_dar.methods.generate import Generator, few_step_generator
from dmd_dar.models import teachers
from dmd_dar.models.denoiser import network_time, velocity_of
from dmd_dar.models.teachers import Denoiser

from .measure.one_set import class_spread
from .measure.pair import jsonable
from .measure.provenance import command_line, provenance
from .metrics import frechet, structure
from .metrics.intervals import LARGEST_EXACT, holm, max_t_band, sign_flip_p, student_t
from .metrics.spectrum import BAND_NAMES, HF, Spectrum, as_floats, gain_curve, hf_gain_db, pooled_gains, spectrum_of
from .samples.facts import NetworkFacts
from .samples.parallel import Processes
from .samples.sampling import LATENCY_BATCH, Bench, costs_of
from .samples.sets import ImageSet
from .study.controls import frozen_at_mean, unfreezable, with_routers_reset
from .study.endpoint import LEAST_COVERAGE, Arms, differences, endpoint, image_spread, pilot_label
from .study.pairing import ArmsConfig, Groups, Role, read_groups
from .study.runs import Arm, Teacher, require_teacher
from .study.wording import conclusion, table

SCHEMA_VERSION = 2
ORIGIN = ("git", "contract_hash", "versions")  # what the small file of a run keeps of the provenance
AT_MEAN = "frozen_at_mean"  # the DAR students themselves, their routers held at the mean over the rungs
# What is tested beside the endpoint: how far a run is from the teacher in another way, 0 being best.
SECONDARIES = {
    "lsd": ("log-spectral distance, dB", lambda row: row["lsd"]),
    "fd_wavelet": ("fd_wavelet above its null", lambda row: row["fd_wavelet"]["excess"]),
    "hf_kurtosis_ratio": ("|log kurtosis ratio|", lambda row: _log_distance(row["hf_kurtosis_ratio"])),
    "diversity_ratio": ("|log least class diversity|", lambda row: _log_distance(row["diversity_ratio"])),
}
# What DAR is paid for with: told beside the tests, and no part of their family.
COSTS = {
    "latency_ms": ("ms per image", lambda row: row["latency_ms_per_image"]),
    "peak_memory_mb": (f"peak MB of {LATENCY_BATCH} images", lambda row: row["peak_memory_mb"]),
    "gflops": ("GFLOPs per image", lambda row: row["gflops_per_image"]),
    "training_step_seconds": ("s per training step", lambda row: row["training_step_seconds"]),
    "parameters": ("parameters", lambda row: row["parameters"]),
}


def _log_distance(ratio: float) -> float:
    """How far a ratio is from 1, either way; infinite where it is not positive."""
    return abs(math.log(ratio)) if ratio > 0 else math.inf


@dataclass(frozen=True)
class CompareConfig:
    """python -m eval.compare"""

    arms: ArmsConfig = key(factory=ArmsConfig)
    reference: Literal["teacher"] = key("teacher", "what the gains are against")
    out: str = key("out/compare", "folder for compare.json and runs/, one small file for each run")
    n: int = key(1024, "images of each network", least=64)
    seed: int = key(0, "of the evaluation noise, the resampling and the simulations", least=0)
    solver_steps: int = key(15, "Heun steps of the teacher, two evaluations each", unit="steps", least=1)
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
class Measured:
    """What the comparisons need of one set of N images."""

    labels: np.ndarray  # (N,)
    luma: Spectrum
    kurtosis: float  # median over images
    features: Tensor  # (N, 20)
    diversity: dict[int, float]  # of each class, in pixels

    @property
    def hf(self) -> np.ndarray:
        """(N,) energy of the high band."""
        return self.luma.energies[:, HF]

    @staticmethod
    def of(one: ImageSet) -> "Measured":
        """Of images whose classes are known, by the definitions of a report."""
        kurtosis, features = [], []
        for batch in one.batches():
            unit = as_floats(batch)
            kurtosis.append(structure.hf_kurtosis(unit))
            features.append(frechet.wavelet_features(unit))
        return Measured(
            labels=one.classes,  # type: ignore[arg-type]
            luma=spectrum_of(one.batches()),
            kurtosis=float(np.median(np.concatenate(kurtosis))),
            features=torch.cat(features),
            diversity=class_spread(one),
        )


def measure_run(ours: Measured, teacher: Measured, null: float, name: str) -> dict[str, Any]:
    """The numbers of one run against the teacher."""
    gains = pooled_gains(ours.luma.energies, teacher.luma.energies)  # NaN for B0 of 32-px images, which has no mode
    _, distance, signed = gain_curve(ours.luma, teacher.luma)
    fd = frechet.fd_wavelet(ours.features, teacher.features, null, (name, "teacher"))
    kurtosis = structure.tail_ratio(*(np.array(one.kurtosis) for one in (ours, teacher)))
    return {
        "gain_db": dict(zip(BAND_NAMES, gains.tolist(), strict=True)),
        "lsd": distance,
        "lsd_signed": signed,
        "fd_wavelet": {**dataclasses.asdict(fd), "excess": fd.excess},
        "hf_kurtosis_ratio": float(kurtosis),
        "diversity_ratio": frechet.diversity_ratios(ours.diversity, teacher.diversity)["least"],
    }


@dataclass(frozen=True)
class Study:
    """All that is measured: rows of numbers and the images' energies, by arm, in the order of the seeds."""

    teacher: Measured
    rows: dict[str, list[dict[str, Any]]]
    sets: dict[str, list[Measured]]
    absent: dict[str, str] = field(default_factory=dict)  # controls that could not be made, and why

    def arms(self, baseline: str, select: Any) -> Arms:
        """`select` takes what is compared, (N, ...), from a Measured."""
        baselines, routed = (np.stack([select(one) for one in self.sets[arm]]) for arm in (baseline, "dar"))
        return Arms(baselines, routed, select(self.teacher), self.teacher.labels)


@dataclass(frozen=True)
class Student:
    """One network to sample: a run's own, or a variant of it; `identity` names its images in the cache."""

    run: Arm
    network: Denoiser
    saved: teachers.Teacher
    identity: dict[str, Any]

    @property
    def generator(self) -> Generator:
        velocity = velocity_of(self.network, self.saved.prediction)
        return few_step_generator(velocity, self.saved.rungs, self.saved.sampler)


def students(runs: dict[Role, Arm], device: torch.device) -> dict[str, Student]:
    """The networks of one training seed by arm, and DAR, where it can be, once more with its routers frozen over t."""
    found = {}
    for role, run in runs.items():
        saved = run.student(device)
        network, identity = saved.network, {"student": saved.digest, "rungs": saved.rungs, "sampler": saved.sampler}
        found[role] = Student(run, network, saved, identity)
        if role == "dar" and not unfreezable(network):
            times = tuple(network_time(saved.prediction, torch.tensor(saved.rungs, dtype=torch.float64)).tolist())
            found[AT_MEAN] = Student(run, frozen_at_mean(network, times), saved, {**identity, "routers": AT_MEAN})
    return found


def sample_and_measure(groups: Groups, reference: ImageSet, bench: Bench) -> Study:
    """Every run of every arm, seed by seed."""
    teacher = Measured.of(reference)
    null = frechet.fd_null(teacher.features, bench.count, np.random.default_rng(bench.seed))
    rows: dict[str, list[dict[str, Any]]] = {}
    sets: dict[str, list[Measured]] = {}
    absent: dict[str, str] = {}
    for index in range(len(groups["residual"])):
        found = students({role: runs[index] for role, runs in groups.items()}, bench.device)
        if AT_MEAN not in found:
            absent[AT_MEAN] = unfreezable(found["dar"].network)
        generators = {name: one.generator for name, one in found.items()}
        costs: dict[str, dict[str, Any]] = dict.fromkeys(found, {})
        if bench.processes.main:
            costs |= {name: dataclasses.asdict(cost) for name, cost in costs_of(generators, bench).items()}
        for name, one in found.items():
            if bench.processes.main:
                print(f"{name}: {one.run.folder}", file=sys.stderr)
            made = bench.cached(one.identity, one.generator, name)
            sets.setdefault(name, []).append(Measured.of(made.as_set(name, "student", True)))
            row = {"folder": str(one.run.folder), "seed": one.run.cfg.seed, "updates": one.run.cfg.steps}
            row |= dataclasses.asdict(NetworkFacts.of(one.network, len(one.saved.rungs), one.identity["student"]))
            row |= costs[name]
            row["training_step_seconds"] = one.run.step_seconds()
            row |= measure_run(sets[name][-1], teacher, null, str(one.run.folder))
            if name == "dar":
                row["reset_shift_db"] = reset_shift_db(one, sets[name][-1], bench)
            rows.setdefault(name, []).append(row)
    return Study(teacher, rows, sets, absent)


def reset_shift_db(student: Student, ours: Measured, bench: Bench) -> float:
    """By how much the HF gain moves when the routers are reset: near 0, they are not used."""
    plain = with_routers_reset(student.network)
    reset = dataclasses.replace(student, network=plain, identity={**student.identity, "routers": "reset"})
    made = bench.cached(reset.identity, reset.generator, "routers reset")
    return hf_gain_db(spectrum_of(made.as_set("routers reset", "student", True).batches()), ours.luma)


def compare_arms(study: Study, baseline: str, seed: int) -> dict[str, Any]:
    """The endpoint of the DAR arm against `baseline`, with its gain curves; JSON-able."""
    high = study.arms(baseline, lambda one: one.hf)
    result = endpoint(high, seed)
    seeds = [row["seed"] for row in study.rows["dar"]]
    return {
        "baseline": baseline,
        "seeds": seeds,
        "pilot": result.pilot,
        "per_seed": [
            {"seed": s, "gain_db": {baseline: g[0], "dar": g[1]}, "difference_db": d}
            for s, g, d in zip(seeds, result.gains.T.tolist(), result.per_seed, strict=True)
        ],
        "gain_db": dict(zip((baseline, "dar"), result.gains.mean(1).tolist(), strict=True)),
        "absolute_gain_db": dict(zip((baseline, "dar"), np.abs(result.gains).mean(1).tolist(), strict=True)),
        "difference_db": result.difference,
        "method": result.method,
        "reason": result.reason,
        "intervals": result.intervals,
        "coverage": result.coverage,
        "least_coverage": LEAST_COVERAGE,
        "p": result.p,
        "least_p": 2 / 2 ** len(seeds),
        "variance_db2": result.variance,
        "power": result.power,
        "curve": curves(study, baseline, seed),
    }


def curves(study: Study, baseline: str, seed: int) -> dict[str, Any]:
    """Gain over frequency of both arms, and |gain baseline| - |gain DAR|, with simultaneous 95 % bands over seeds."""
    arms = study.arms(baseline, lambda one: one.luma.per_image.numpy())
    gains, spread, images = arms.gains, image_spread(arms), len(arms.labels)
    shared, _ = spread.of_difference(gains)
    kinds = {
        baseline: (gains[0], np.maximum(spread.shared[0, 0], 0.0)),
        "dar": (gains[1], np.maximum(spread.shared[1, 1], 0.0)),
        "difference": (differences(gains), shared),
    }
    result: dict[str, Any] = {"frequencies": study.teacher.luma.frequencies.tolist()}
    for name, (values, variance) in kinds.items():
        band = max_t_band(values, np.random.default_rng([seed, 2]), variance / images)
        result[name] = dict(zip(("value", "low", "high"), (part.tolist() for part in band), strict=True))
    return result


def residual_minus_dar(study: Study, quantities: dict[str, tuple[str, Any]]) -> dict[str, dict[str, Any]]:
    """Each quantity of the runs in both arms and its paired difference, above 0 in favour of DAR; see `paired`."""
    return {
        name: {
            "title": title,
            **paired(*(np.array([of(row) for row in study.rows[arm]]) for arm in ("residual", "dar"))),
        }
        for name, (title, of) in quantities.items()
    }


def adjust(family: dict[str, dict[str, Any]]) -> None:
    """Give every test of a family its p-value after Holm, `p_holm`; None where it was skipped."""
    adjusted = holm({name: one["p"] for name, one in family.items() if one["p"] is not None})
    for name, one in family.items():
        one["p_holm"] = adjusted.get(name)


def paired(ours: np.ndarray, theirs: np.ndarray) -> dict[str, Any]:
    """Means of two arms (K,), the mean paired difference with its Student-t interval, and the exact p-value."""
    if not (np.isfinite(ours).all() and np.isfinite(theirs).all()):
        return {"residual": None, "dar": None, "difference": None, "p": None, "skipped": "undefined for a run"}
    each = ours - theirs
    low, high = student_t(each)
    difference = {"value": float(each.mean()), "low": float(low), "high": float(high)}
    means = {"residual": float(ours.mean()), "dar": float(theirs.mean())}
    return {**means, "difference": difference, "per_seed": each.tolist(), "p": sign_flip_p(each)}


def origin(cfg: CompareConfig, groups: Groups) -> dict[str, Any]:
    """Command and configurations: what this command knows of where its numbers come from."""
    nothing = CompareConfig(ArmsConfig(residual=("", ""), dar=("", "")))
    return {
        "command": command_line("eval.compare", config.differences(nothing, cfg)),
        "configs": {str(run.folder): run.raw for runs in groups.values() for run in runs},
    }


def run_records(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """By file name, one small record for each run of compare.json's data: its arm, numbers, and where it comes from."""
    common = {name: result[name] for name in ("schema_version", "label", "images")}
    origin = {name: result["provenance"][name] for name in ORIGIN if name in result["provenance"]}
    return {
        f"{arm}_seed{row['seed']}.json": {**common, "arm": arm, **row, "provenance": origin}
        for arm, rows in result["runs"].items()
        for row in rows
    }


def conclude(study: Study, cfg: CompareConfig) -> dict[str, Any]:
    """All comparisons of what was measured, and the conclusion in words; JSON-able."""
    primary = compare_arms(study, "residual", cfg.seed)
    controls = {name: compare_arms(study, name, cfg.seed) for name in study.rows if name not in ("residual", "dar")}
    secondaries = residual_minus_dar(study, SECONDARIES)
    for family in (controls, secondaries):  # two questions: is it adaptive routing that helps, what else has changed
        adjust(family)
    result = {
        "schema_version": SCHEMA_VERSION,
        "label": pilot_label(primary["pilot"]),
        "images": cfg.n,
        "primary": primary,
        "controls": controls,
        "absent": study.absent,
        "secondaries": secondaries,
        "costs": residual_minus_dar(study, COSTS),
        "runs": study.rows,
    }
    result = jsonable(result)
    return {**result, "conclusion": conclusion(result)}


def compare(cfg: CompareConfig) -> None:
    """Sample, measure, compare; write compare.json and print tables and conclusion.

    Of several processes, each samples its share; the first one does the rest.
    """
    began = time.monotonic()
    processes = Processes.of(cfg.cpu)
    device = processes.device(cfg.cpu)
    groups = read_groups(cfg.arms)
    out = make_folder(cfg.out)
    teacher = Teacher.of(groups["residual"][0], device)
    require_teacher([run for runs in groups.values() for run in runs], teacher.weights)
    bench = Bench.of(cfg, teacher.network, device, teacher.codec, processes)
    if processes.main:
        print(f"sampling {cfg.n} images of the teacher and of {sum(map(len, groups.values()))} runs", file=sys.stderr)
    reference = teacher.sample_set(bench, cfg.solver_steps)
    study = sample_and_measure(groups, reference, bench)
    if not processes.main:
        return
    result = conclude(study, cfg)
    result["reference"] = jsonable(reference.facts.as_json())
    result["provenance"] = jsonable(provenance(device, time.monotonic() - began, **origin(cfg, groups)))
    write_atomic(out / "compare.json", json.dumps(result, indent=1, allow_nan=False))
    folder = make_folder(out / "runs")
    for name, record in run_records(result).items():
        write_atomic(folder / name, json.dumps(record, indent=1, allow_nan=False))
    print(table(result))
    print(f"\n{result['conclusion']}\nwritten: {Path(out) / 'compare.json'}")


def main(argv: Sequence[str] | None = None) -> None:
    config.run_job(CompareConfig, compare, argv, description=__doc__ or "")


if __name__ == "__main__":
    main()
