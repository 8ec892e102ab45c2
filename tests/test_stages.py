"""What the marked tests did is recorded by family and stage, and that alone."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.stages import STAGES, marked, merged, stages_of

ROOT = Path(__file__).parents[1]
MARKED = """
import pytest

@pytest.mark.stages("teacher", "distil", by="name")
@pytest.mark.parametrize("name, query, weights", [("dev", "timestep", "shared_lora"), ("dit", "residual", "full")])
def test_one(name, query, weights):
    assert name == "dit"

@pytest.mark.stages("words", family="dit", refused="labels alone")
def test_refused():
    pass

@pytest.mark.stages("codec", family=("sana", "PixArtTransformer2DModel"))
def test_skipped():
    pytest.skip("no VAE")
"""


def recorded(folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    (folder / "conftest.py").write_text("from tests.conftest import *\n")
    (folder / "test_marked.py").write_text(MARKED)
    command = [sys.executable, "-m", "pytest", "-q", "-c", str(ROOT / "pyproject.toml"), "--rootdir", str(folder)]
    given = {"RECORD_STAGES": str(folder / "families.json"), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command += [*more, str(folder)]
    return subprocess.run(command, cwd=folder, env=given, capture_output=True, text=True, timeout=200)


@pytest.mark.parametrize("workers", ["0", pytest.param("2", marks=pytest.mark.slow)])
def test_outcomes_stand_at_their_family_and_stage(tmp_path, workers):
    ran = recorded(tmp_path, "-n", workers)
    assert "1 failed, 2 passed, 1 skipped" in ran.stdout, ran.stdout + ran.stderr
    families = json.loads((tmp_path / "families.json").read_text())["families"]
    found = {(f, s): one for f, stages in families.items() for s, tests in stages.items() for one in tests}
    failed, passed = (
        {"test": f"test_marked.py::test_one[{name}]"} for name in ("dev-timestep-shared_lora", "dit-residual-full")
    )
    failed |= {"outcome": "failed"}
    passed |= {"outcome": "passed"}
    skipped = {"test": "test_marked.py::test_skipped", "outcome": "skipped", "reason": "Skipped: no VAE"}
    assert found == {
        **{("flux2", stage): failed for stage in ("teacher", "DAR", "shared_lora")},
        **{("dit", stage): passed for stage in ("teacher", "residual")},
        ("dit", "words"): {"test": "test_marked.py::test_refused", "outcome": "passed", "refused": "labels alone"},
        **{(family, "codec"): skipped for family in ("sana", "pixart")},
    }


class Item:
    """A test with one marker and parameters."""

    nodeid = "a test"

    def __init__(self, *stages: str, given: dict[str, str] | None = None, **named: str):
        self.mark, self.callspec = pytest.mark.stages(*stages, **named).mark, SimpleNamespace(params=given or {})

    def iter_markers(self, name: str) -> list[pytest.Mark]:
        return [self.mark] if name == "stages" else []


def test_a_name_that_is_not_known_ends_the_session():
    wrong = Item("teacher", family="unet"), Item("training", family="dit"), Item("teacher"), Item("codec", by="name")
    for item in wrong:
        with pytest.raises(pytest.UsageError, match="a test: no stage .*see tests/stages.py"):
            marked(item)  # type: ignore[arg-type]
    (cell,) = marked(Item("codec", by="name", given={"name": "klein"}))  # type: ignore[arg-type]
    assert cell == {"family": "flux2", "stage": "codec", "refused": ""}


def test_what_ran_again_takes_the_place_of_what_was(tmp_path):
    def found(outcome: str, stage: str) -> list[dict[str, str]]:
        return [{"family": "dit", "stage": stage, "outcome": outcome, "reason": "", "refused": ""}]

    file = tmp_path / "families.json"
    file.write_text(json.dumps(merged(file, {"a": found("failed", "teacher"), "b": found("passed", "teacher")})))
    again = merged(file, {"a": found("passed", "codec")})
    assert again["families"]["dit"]["teacher"] == [{"test": "b", "outcome": "passed"}]
    assert again["families"]["dit"]["codec"] == [{"test": "a", "outcome": "passed"}]
    assert list(again["stages"]) == list(STAGES) and stages_of(("report", "distil"), {}) == ["report", "DAR"]
