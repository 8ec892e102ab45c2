"""Did the detail survive? python -m eval.report runs=[RUN_A,RUN_B,...] out=DIR"""

import dataclasses
import os
import platform
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from dmd_dar import config
from dmd_dar.atomic import make_folder
from dmd_dar.data.photos import NAMES, Photos, data_hash
from dmd_dar.distill import DistillConfig
from dmd_dar.keys import key
from eval import arms
from eval.measure import ImageSet, measure
from eval.page import terminal_table, write_report
from eval.spectrum import BAND_NAMES, spectrum_of


@dataclass(frozen=True)
class ReportConfig:
    """python -m eval.report"""

    runs: tuple[str, ...] = key((), "run folders of distill.py; they share teacher, rungs and guidance", path=True)
    out: str = key("out/report", "folder for report.html, report.json and the figures")
    reference: Literal["teacher"] = key("teacher", "what the verdict compares with")
    n: int = key(1024, "images of each set", least=64)
    seed: int = key(0, "of the evaluation noise, the real crops and the bootstrap", least=0)
    solver_steps: int = key(15, "Heun steps of the teacher, two evaluations each", unit="steps", least=1)
    batch_size: int = key(64, "images at a time; changes no image beyond rounding", least=1)
    cache: str = key("out/cache", "folder in which the teacher's images are kept and found again")
    title: str = key("Did the detail survive?", "heading of the page")
    cpu: bool = key(False, "compute on the CPU although a GPU is there")

    def __post_init__(self) -> None:
        if not self.runs:
            raise ValueError("runs is empty: name at least one run folder, runs=[out/demo/residual,out/demo/dar]")


def hf_energy(images: Tensor) -> float:
    """Mean energy of the high band of uint8 images."""
    return float(spectrum_of(images.float() / 255).energies[:, BAND_NAMES.index("HF")].mean())


def hf_gain_db(images: Tensor, reference: Tensor) -> float:
    """Gain of the high band against `reference`, both uint8 (N, 3, H, W)."""
    ratio = torch.tensor(hf_energy(images) / hf_energy(reference), dtype=torch.float64)
    return float(10 * torch.log10(ratio))


def better_baseline(sets: list[ImageSet], result: dict[str, Any]) -> str:
    """The undistilled sampler nearer to the teacher by fd_wavelet: the one that students have to beat."""
    rows = {row["name"]: row for row in result["sets"]}
    names = [one.name for one in sets if one.role == "undistilled"]
    return min(names, key=lambda name: rows[name]["against"]["teacher"]["fd_wavelet"]["value"])


def distillation_checks(result: dict[str, Any], baseline: str) -> list[dict[str, Any]]:
    """For every student: fd_wavelet above its null as a share of the baseline's, HF gain, least class diversity."""
    rows = {row["name"]: row for row in result["sets"]}

    def against(name: str) -> dict[str, Any]:
        return rows[name]["against"]["teacher"]

    start = against(baseline)
    checks = []
    for name, row in rows.items():
        if row["role"] == "student":
            ours = against(name)
            checks.append(
                {
                    "name": name,
                    "baseline": baseline,
                    "fd_excess": ours["fd_wavelet"]["excess"],
                    "fd_excess_share": ours["fd_wavelet"]["excess"] / start["fd_wavelet"]["excess"],
                    "hf_gain_db": ours["gain_db"]["HF"]["value"],
                    "hf_gain_db_baseline": start["gain_db"]["HF"]["value"],
                    "least_class_diversity": ours["diversity_ratio"]["pixels"]["least"],
                    "routing": row["facts"].get("routing"),
                }
            )
    return checks


ARM_KEYS = ("student.routing.", "log.", "launch.", "checkpoint.", "out_dir", "resume")


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
    return [key for key, _, _ in config.differences(ours, theirs) if not key.startswith(ARM_KEYS)]


def compare_pair(routed: dict[str, Any], plain: dict[str, Any]) -> str:
    """Absolute HF gain and fd_wavelet above its null of a routed arm against its residual twin, as plain words."""

    def word(ours: float, theirs: float, digits: int) -> str:
        ours, theirs = round(ours, digits), round(theirs, digits)
        return "equal" if ours == theirs else "better" if ours < theirs else "worse"

    gain = word(abs(routed["hf_gain_db"]), abs(plain["hf_gain_db"]), 2)
    distance = word(routed["fd_excess"], plain["fd_excess"], 2)
    return (
        f"{routed['name']} against {plain['name']}: HF gain {gain} ({routed['hf_gain_db']:+.2f} dB, there"
        f" {plain['hf_gain_db']:+.2f}); fd_wavelet above its null {distance} ({routed['fd_excess']:.2f}, there"
        f" {plain['fd_excess']:.2f}). One training seed: no test of significance."
    )


def check_sentence(check: dict[str, Any]) -> str:
    """What a student's checks say, in words."""
    text = (
        f"{check['name']}: fd_wavelet above its null is {check['fd_excess_share']:.2f} of that of"
        f" '{check['baseline']}';"
        f" HF gain {check['hf_gain_db']:+.2f} dB (there {check['hf_gain_db_baseline']:+.2f});"
        f" least diversity of a class {check['least_class_diversity']:.2f} of the teacher's"
    )
    if routing := check["routing"]:
        text += (
            f"; routers: mean |n alpha - 1| {routing['deviation']:.3f},"
            f" range of n alpha over t {routing['change_over_t']:.3f},"
            f" HF gain shifts by {routing['hf_gain_shift_db']:+.2f} dB when they are reset"
            f" ({'used' if routing['used'] else 'router unused'})"
        )
    return text + "."


def provenance(cfg: ReportConfig, read: list[arms.Arm], device: torch.device, seconds: float) -> dict[str, Any]:
    """Where the numbers come from."""
    return {
        "command": command_line(cfg),
        "git": git_state(),
        "runs": {arm.name: arm.raw for arm in read},
        "report": dataclasses.asdict(cfg),
        "data_hash": data_hash(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "device": f"{device}, {os.cpu_count()} CPU cores, {torch.get_num_threads()} threads, {platform.machine()}",
        "seconds": round(seconds, 1),
    }


def command_line(cfg: ReportConfig) -> str:
    """The command that makes this report again, with every key that is not at its default."""
    given = config.differences(ReportConfig(runs=("",)), cfg)
    values = {key: f"[{','.join(value)}]" if isinstance(value, list | tuple) else value for key, _, value in given}
    return shlex.join(["python", "-m", "eval.report", *(f"{key}={value}" for key, value in values.items())])


def git_state() -> str:
    """Commit and whether the tree differs from it; "unknown" outside a checkout."""
    root = Path(__file__).parent.parent
    try:
        command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
        return subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def report(cfg: ReportConfig) -> None:
    """Sample every network on the same noise, measure, write the report, print its table."""
    began = time.monotonic()
    device = torch.device("cuda" if torch.cuda.is_available() and not cfg.cpu else "cpu")
    read = arms.read_arms(cfg.runs)
    teacher = arms.Teacher.of(read[0].cfg, device)
    if teacher.network.config.num_classes != len(NAMES):
        raise config.ConfigError("runs: their teacher has other classes than photos; nothing real to compare with")
    make_folder(cfg.out)
    bench = arms.Bench.of(cfg, teacher.network, device)
    print(f"sampling {cfg.n} images of the teacher and of {len(read)} students", file=sys.stderr)
    real, null = arms.real_sets(bench, Photos(read[0].cfg.data.size, device))
    reference = teacher.sample_set(bench, cfg.solver_steps)
    sets = [null, *teacher.undistilled_sets(bench)]
    sets += [arms.student_set(arm, bench, reference, lambda x: hf_gain_db(x, reference.images)) for arm in read]
    names = dict(enumerate(NAMES))
    result = measure(sets, reference, real, set(Photos.colour_labels), cfg.seed, names)
    result["checks"] = distillation_checks(result, better_baseline(sets, result))
    result["conclusions"] = [check_sentence(check) for check in result["checks"]]
    result["conclusions"] += routing_comparisons(result["checks"], read)
    facts = provenance(cfg, read, device, time.monotonic() - began)
    write_report(result, [real, reference, *sets], Path(cfg.out), cfg.title, facts)
    print(terminal_table(result))
    print(*result["conclusions"], sep="\n")
    print(f"report: {Path(cfg.out) / 'report.html'}")


if __name__ == "__main__":
    config.run_job(ReportConfig, report, sys.argv[1:], description=__doc__ or "")
