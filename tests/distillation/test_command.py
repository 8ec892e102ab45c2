"""python distill.py as a command: in several processes however they are started, and as the docs type it."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from dmd_dar.train.disk import log
from tests.distillation.test_job import ROOT, arguments, run
from tests.test_pairs_workers import children, gone, until
from tests.tiny import tiny_teacher


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    return tiny_teacher(tmp_path_factory.mktemp("teacher"))


def in_two_processes(*args: str) -> subprocess.CompletedProcess:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_addr=127.0.0.1"]
    command += [f"--master_port={port}", "distill.py", *args]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def test_two_processes_equal_one_however_started_sharded_or_not(teacher, tmp_path, capfd):
    whole = run(teacher, tmp_path / "one")
    ran = in_two_processes(*arguments(teacher, tmp_path / "two", "steps=2"))
    assert ran.returncode == 0, ran.stderr[-2000:]
    two = "launch.processes=2", "launch.sharding=fsdp2"
    both = run(teacher, tmp_path / "two", *two)
    assert both.keys() == whole.keys()
    for name, value in whole.items():
        torch.testing.assert_close(both[name], value, rtol=1e-4, atol=2e-5, msg=f"{name} differs")
    grids = [tmp_path / name / "samples" / "step_00000004.png" for name in ("one", "two")]
    one, other = (numpy.asarray(Image.open(grid), dtype=float) for grid in grids)
    assert numpy.abs(one - other).max() <= 2 and one.std() > 10
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        run(teacher, tmp_path / "two", *two, "seed=5")
    printed = capfd.readouterr().err.splitlines()
    assert stop.value.code == 2 and sum("another configuration" in line for line in printed) == 1


def test_a_killed_worker_ends_a_run_within_half_a_minute(teacher, tmp_path):
    given = arguments(teacher, tmp_path / "run", "launch.processes=2", "launch.threads=1", "steps=100000")
    environment = {name: value for name, value in os.environ.items() if name != "WORLD_SIZE"}
    command = [sys.executable, "distill.py", *given]
    parent = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        until(lambda: len(log.read(tmp_path / "run" / "log.jsonl")) > 1 or parent.poll() is not None)
        workers = [pid for pid in children(parent.pid) if "spawn_main" in told(pid)]
        assert parent.poll() is None and len(workers) == 2
        os.kill(workers[1], signal.SIGKILL)
        began = time.monotonic()
        said = parent.communicate(timeout=60)[1]
    finally:
        if parent.poll() is None:  # it would train on for hours
            parent.terminate()
            parent.wait(60)
    assert time.monotonic() - began < 30 and parent.returncode == 1
    assert "process 1 of 2 was ended by SIGKILL" in said.splitlines()[-1]
    assert all(gone(pid) for pid in workers)


def told(pid: int) -> str:
    """The command line of a process."""
    return Path(f"/proc/{pid}/cmdline").read_text()


@pytest.mark.slow
def test_a_folder_of_images_becomes_a_few_step_student_by_the_documented_commands(tmp_path, monkeypatch):
    text = (ROOT / "docs" / "own_images.md").read_text()
    monkeypatch.chdir(tmp_path)
    exec(re.search(r"<!-- example -->\n```python\n(.*?)```", text, re.DOTALL)[1], {})
    said = re.findall(r"^    \$ (python .*?)\n    (?!    )", text, re.DOTALL | re.MULTILINE)
    commands = [
        " ".join(one.replace("\\\n", " ").split()) for one in said if "data.path=my_images" in one or "sample" in one
    ]
    assert [re.findall(r"dmd_dar\.\w+|distill\.py", one)[0] for one in commands[:3]] == [
        "dmd_dar.pretrain",
        "distill.py",
        "dmd_dar.sample",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "WANDB_MODE": "disabled"}
    for one in commands[:3]:
        words = (
            one.replace("config=configs", f"config={ROOT}/configs").replace("distill.py", f"{ROOT}/distill.py").split()
        )
        ran = subprocess.run([sys.executable, *words[1:]], env=environment, capture_output=True, text=True, timeout=900)
        assert ran.returncode == 0, ran.stderr[-2000:]
    assert len(list((tmp_path / "out" / "images").glob("0*.png"))) == 24


@pytest.mark.slow
def test_accelerate_starts_it_too(teacher, tmp_path):
    whole = run(teacher, tmp_path / "one", "steps=2")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes=2", "--num_machines=1"]
    command += ["--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0", "distill.py"]
    command += arguments(teacher, tmp_path / "two", "steps=2")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr[-2000:]
    both = load_file(tmp_path / "two" / "student" / "transformer" / "model.safetensors")
    for name, value in whole.items():
        torch.testing.assert_close(both[name], value, rtol=1e-4, atol=2e-5, msg=f"{name} differs")
