"""A checkout that cannot be measured ends in one line; what one costs is measured by hand, since none is here."""

import sys
from pathlib import Path
from unittest.mock import patch

import pytest

from benchmarks.peer import FILE, PACKAGES, FastGen
from dmd_dar.errors import UserError


@pytest.fixture(autouse=True)
def own_modules(monkeypatch):
    """What an import adds is gone after the test."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    with patch.dict(sys.modules):
        yield


def test_a_folder_that_is_no_checkout_is_named(tmp_path):
    with pytest.raises(UserError, match=rf"peer = '{tmp_path}'.*dmd2.py is not in it; clone"):
        FastGen.of(tmp_path)


def test_a_missing_package_is_named_with_all_that_are_needed(tmp_path):
    write(tmp_path / FILE)
    write(tmp_path / "fastgen" / "configs" / "methods" / "config_dmd2.py", "import no_such_package")
    with pytest.raises(UserError, match=rf"imports no_such_package, .* pip install {' '.join(PACKAGES)}"):
        FastGen.of(tmp_path)


def write(path: Path, text: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
