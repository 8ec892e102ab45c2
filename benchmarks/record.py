"""What every benchmark shares: ratios and medians of interleaved rounds, and a record of where they were taken."""

import json
import platform
import shlex
import statistics
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from dmd_dar.atomic import make_folder, write_atomic
from eval.measure.machine import Machine, versions
from eval.measure.provenance import code_now

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "triton", "numpy")


def ratio(times: dict[str, list[float]], slow: str, fast: str) -> float:
    """Median over rounds of slow / fast: the two of a round ran side by side."""
    return statistics.median(a / b for a, b in zip(times[slow], times[fast], strict=True))


def spread(samples: list[float]) -> dict[str, float]:
    return {"median": statistics.median(samples), "least": min(samples), "most": max(samples), "rounds": len(samples)}


def machine(device: torch.device) -> dict[str, Any]:
    """Processor, cores, memory, versions, commit and command of this run, as a benchmark's JSON holds them."""
    return {
        **asdict(Machine.of(device)),
        "python": platform.python_version(),
        "versions": versions(PACKAGES),
        "commit": commit(),
        "command": shlex.join(["python", "-m", *_module(), *sys.argv[1:]]),
    }


def _module() -> list[str]:
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    return [spec.name if spec else sys.argv[0]]


def commit() -> str:
    """The commit, with `+` behind it where tracked source files differ from it; DMD_DAR_COMMIT where it is set."""
    code = code_now()
    if not code.dirty:
        return code.commit
    # results that are written anew make the tree differ too, and no other code
    source = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", "*.py"], cwd=RESULTS.parents[1])
    return code.commit + ("+" if source.returncode else "")


def save(name: str, device: torch.device, result: dict[str, Any]) -> Path:
    """benchmarks/results/NAME.json: the machine, then the result."""
    make_folder(RESULTS)
    path = RESULTS / f"{name}.json"
    text = json.dumps({"machine": machine(device), **result}, indent=1, sort_keys=False)
    write_atomic(path, (text + "\n").encode())
    return path
