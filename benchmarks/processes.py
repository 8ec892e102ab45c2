"""Images a second of a distillation in one process and in two, on a CPU: python -m benchmarks.processes

Each is the command of docs/scaling.md in a folder of its own, `python distill.py config=configs/photos32/dar.yaml
launch.processes=2`, without the regression loss, health signals and wandb. Wall time of all turns but the first, by the
run's own log; an image is a sample in one optimiser step of either network.
"""

import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.record import save, spread
from dmd_dar import config
from dmd_dar.keys import key
from dmd_dar.train.disk.log import read

ROOT = Path(__file__).parents[1]
LAUNCHES = {"1 process, 1 thread": (1, 1), "1 process, 2 threads": (1, 2), "2 processes, 1 thread each": (2, 1)}
LEFT_OUT = ("regression.weight=0", "log.health_every=0", "log.wandb=disabled")


@dataclass(frozen=True)
class ProcessesBenchmark:
    """python -m benchmarks.processes"""

    rounds: int = key(2, "interleaved rounds", least=1)
    turns: int = key(3, "of a run; the first does not count", least=2)
    batch_size: int = key(32, "over all processes", least=2)
    updates: int = key(5, "of the fake score for one of the student", least=1)


def rate(bench: ProcessesBenchmark, processes: int, threads: int) -> float:
    """Images a second of a run of its own."""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    with tempfile.TemporaryDirectory() as folder:
        keys = [f"launch.processes={processes}", f"launch.threads={threads}", "launch.cpu=true", "log.every=1"]
        keys += [f"steps={bench.turns}", f"batch_size={bench.batch_size}", f"fake_score.updates={bench.updates}"]
        command = [sys.executable, "distill.py", "config=configs/photos32/dar.yaml", f"out_dir={folder}/run"]
        subprocess.run([*command, *keys, *LEFT_OUT], cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
        since_start = [record["step"] / record["steps_per_second"] for record in read(Path(folder, "run", "log.jsonl"))]
    images = (len(since_start) - 1) * (bench.updates + 1) * bench.batch_size
    return images / (since_start[-1] - since_start[0])


def measure(bench: ProcessesBenchmark) -> None:
    load = os.getloadavg()[0]
    rates: dict[str, list[float]] = {name: [] for name in LAUNCHES}
    for _ in range(bench.rounds):
        for name, launch in LAUNCHES.items():
            rates[name].append(rate(bench, *launch))
    result = {"B": bench.batch_size, "updates": bench.updates, "turns": bench.turns - 1}
    result |= {"images_per_second": {name: spread(values) for name, values in rates.items()}}
    result |= {"load_average": {"before": load, "after": os.getloadavg()[0]}}
    print({name: round(values["median"], 2) for name, values in result["images_per_second"].items()})
    print(save("processes_cpu", torch.device("cpu"), result))


if __name__ == "__main__":
    config.run_job(ProcessesBenchmark, measure, description=__doc__ or "")
