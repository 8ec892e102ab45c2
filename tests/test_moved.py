"""Modules that moved are found under their old names, with a warning at the importer's line."""

import importlib
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from dmd_dar.moved import MOVED, NAMES

ROOT = Path(__file__).parents[1]
LINES = (
    "from dmd_dar.train.loop import Loop",
    "from dmd_dar.train.runtime import Runtime",
    "from dmd_dar.distill import distill",
    "from eval.measure import measure",
    "from eval import stats",
    "from eval.compare import Study",
    "from eval.measure import compare",
    "from dmd_dar.methods.rollout import solve_ode",
)
IMPORTER = """
import warnings
import dmd_dar.distillation.job, eval.report
for line in LINES:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        exec(compile(line, "importer.py", "exec"))
    assert [one.category for one in caught] == [DeprecationWarning], (line, caught)
    assert caught[0].filename == "importer.py", (line, caught[0].filename)
"""


@pytest.mark.parametrize(("old", "new"), MOVED.items())
def test_an_old_name_is_the_new_module(old: str, new: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sys.modules.pop(old, None)
        assert importlib.import_module(old) is importlib.import_module(new)


@pytest.mark.parametrize(("old", "new"), NAMES.items())
def test_an_old_name_of_a_module_is_the_new_object(old: str, new: str) -> None:
    (before, name), (home, now) = old.rsplit(".", 1), new.rsplit(".", 1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        sys.modules.pop(before, None) if before in MOVED else None
        module = importlib.import_module(before)
        vars(module).pop(name, None) if hasattr(module, "__path__") else None
        assert getattr(module, name) is getattr(importlib.import_module(home), now)
    assert [one.category for one in caught] == [DeprecationWarning] * (2 if before in MOVED else 1)
    assert str(caught[-1].message).split(" is now ")[1].startswith(new)


def test_the_warning_stands_at_the_importer_s_line() -> None:
    code = f"LINES = {LINES}\n{IMPORTER}"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_a_name_that_never_was_is_not_found() -> None:
    with pytest.raises(ImportError):
        importlib.import_module("dmd_dar.train.never")
    with pytest.raises(ImportError, match="cannot import name 'never'"):
        exec("from dmd_dar.train.loop import never")
