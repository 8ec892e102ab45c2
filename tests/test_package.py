"""What is installed: the package and its evaluation whole, with their files, and nothing else; its commands work."""

import json
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import pytest

from dmd_dar.models.saved import ModelCard, save_network
from tests.tiny import tiny_sit

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FOLDERS = {name: ROOT / folder for name, folder in PROJECT["tool"]["setuptools"]["package-dir"].items()}
RUNGS = (1.0, 0.8, 0.4)
NOT_BUILT = (".*", "__pycache__", "out", "build", "*.egg-info", "docs", "wandb")


def installed_files() -> dict[str, Path]:
    """The files below the package's folders, by the name under which they are installed."""
    named = {}
    for package, folder in FOLDERS.items():
        for file in folder.rglob("*"):
            if file.is_file() and "__pycache__" not in file.parts:
                named[f"{package.replace('.', '/')}/{file.relative_to(folder).as_posix()}"] = file
    return named


def test_every_package_is_listed():
    found = {name.rpartition("/")[0].replace("/", ".") for name in installed_files() if name.endswith("/__init__.py")}
    assert sorted(PROJECT["tool"]["setuptools"]["packages"]) == sorted(found)


def test_every_file_that_is_no_module_is_package_data():
    data = PROJECT["tool"]["setuptools"]["package-data"]
    patterns = [f"{package.replace('.', '/')}/{pattern}" for package in data for pattern in data[package]]
    others = [name for name in installed_files() if not name.endswith(".py")]
    assert "dmd_dar/py.typed" in others and "dmd_dar/data/photos/camera.png" in others
    assert [name for name in others if not any(fnmatch(name, pattern) for pattern in patterns)] == []


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy, so that no earlier build's files are in it."""
    source = tmp_path_factory.mktemp("source") / "tree"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(*NOT_BUILT))
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(source / "dist")]
    done = subprocess.run([*command, str(source)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (built,) = (source / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def fresh(wheel, tmp_path_factory) -> Path:
    """The programs of an environment that holds the wheel; what it depends on is seen where it is installed."""
    folder = tmp_path_factory.mktemp("fresh") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True, timeout=120)
    (site,) = folder.glob("lib/python*/site-packages")
    shared = [path for path in sys.path if path.endswith("site-packages")]
    (site / "shared.pth").write_text("\n".join(shared))  # a .pth in there, an editable installation's, is not read
    python = str(folder / "bin" / "python")
    command = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", str(wheel)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder / "bin"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """A folder with a student of few steps and a set of images to hold it against."""
    folder = tmp_path_factory.mktemp("inputs")
    save_network(folder / "student", tiny_sit(), ModelCard(rungs=RUNGS))
    (folder / "truth").mkdir()
    images = np.random.default_rng(0).integers(0, 256, (40, 3, 32, 32), dtype=np.uint8)
    np.save(folder / "truth" / "images.npy", images)
    return folder


def run(command: list[str | Path], folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_the_wheel_holds_the_package_whole_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
        (scripts,) = (name for name in archive.namelist() if name.endswith("entry_points.txt"))
        assert archive.read(scripts).decode().split() == ["[console_scripts]", "dmd-dar", "=", "dmd_dar.commands:main"]
    assert held == installed_files().keys()


@pytest.mark.slow
def test_the_installed_commands_work_from_anywhere(fresh, inputs, tmp_path):
    code = "import dmd_dar, dmd_dar.eval; print(dmd_dar.__file__, dmd_dar.eval.__file__)"
    shown = run([fresh / "python", "-c", code], tmp_path)
    assert shown.stdout.count(str(fresh.parent)) == 2, shown.stdout + shown.stderr
    listings = [
        run([*start, "--help"], tmp_path) for start in ([fresh / "dmd-dar"], [fresh / "python", "-m", "dmd_dar"])
    ]
    assert all(one.returncode == 0 and "  sensitivity " in one.stdout for one in listings), listings
    sampled = run([fresh / "dmd-dar", "sample", f"student={inputs / 'student'}", "n=24", "out=ours"], tmp_path)
    assert sampled.returncode == 0 and len(list((tmp_path / "ours").glob("0*.png"))) == 24, sampled.stderr


@pytest.mark.slow
def test_the_installed_report_has_the_numbers_of_the_repository_s(fresh, inputs, tmp_path):
    sampled = run([fresh / "dmd-dar", "sample", f"student={inputs / 'student'}", "n=24", "out=ours"], tmp_path)
    assert sampled.returncode == 0, sampled.stderr
    keys = [f"images=[{tmp_path / 'ours'}]", f"reference={inputs / 'truth'}", "metrics=[offline]"]
    ways = {
        "command": ([fresh / "dmd-dar", "report"], tmp_path),
        "module": ([fresh / "python", "-m", "dmd_dar.eval.report"], tmp_path),
        "repository": ([sys.executable, "-m", "eval.report"], ROOT),
    }
    for name, (start, folder) in ways.items():
        done = run([*start, *keys, f"out={tmp_path / name}"], folder)
        assert done.returncode == 0, f"{name}: {done.stderr}"
        assert (tmp_path / name / "report.html").read_text().count("<style>") == 1
    reports = [tmp_path / name / "report.json" for name in ways]
    assert len(json.loads(reports[0].read_text())["sets"]) == 2
    for other in reports[1:]:
        same = run([sys.executable, ROOT / "runs" / "same_numbers.py", reports[0], other], tmp_path)
        assert same.returncode == 0, same.stdout
