"""What every benchmark shares: interleaved medians, and a record of where and how they were taken."""

import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from dmd_dar.atomic import make_folder, write_atomic
from eval.measure.provenance import COMMIT, code_state

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "triton", "numpy")


def seconds(run: Callable[[], Any], device: torch.device) -> float:
    """Wall time of one call, the device's queue included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def interleaved(runs: dict[str, Callable[[], Any]], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of every run in every round, in turn, after one uncounted round."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            spent = seconds(run, device)
            if number:
                times[name].append(spent)
    return times


def ratio(times: dict[str, list[float]], slow: str, fast: str) -> float:
    """Median over rounds of slow / fast: the two of a round ran side by side."""
    return statistics.median(a / b for a, b in zip(times[slow], times[fast], strict=True))


def spread(samples: list[float]) -> dict[str, float]:
    return {"median": statistics.median(samples), "least": min(samples), "most": max(samples), "rounds": len(samples)}


def machine(device: torch.device) -> dict[str, Any]:
    """Processor, cores, memory, versions, commit and command of this run."""
    facts: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "commit": _commit(),
        "command": shlex.join(["python", "-m", *_module(), *sys.argv[1:]]),
    }
    return facts


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _module() -> list[str]:
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    return [spec.name if spec else sys.argv[0]]


def _commit() -> str:
    """The commit, with `+` behind it where tracked source files differ from it; DMD_DAR_COMMIT where it is set."""
    if os.environ.get(COMMIT):
        return code_state()["commit"]
    root = Path(__file__).parents[1]
    git = ["git", "-C", str(root)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run(
            [*git, "status", "--porcelain", "-uno", "*.py"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return code_state()["commit"]
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")


def save(name: str, device: torch.device, result: dict[str, Any]) -> Path:
    """benchmarks/results/NAME.json: the machine, then the result."""
    make_folder(RESULTS)
    path = RESULTS / f"{name}.json"
    text = json.dumps({"machine": machine(device), **result}, indent=1, sort_keys=False)
    write_atomic(path, (text + "\n").encode())
    return path
