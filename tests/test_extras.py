"""Every import is declared, optional packages are needed by those alone who measure, and a missing one is one error."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

from dmd_dar import commands
from dmd_dar.extras import EXTRA_OF, MissingPackageError, needed, require
from dmd_dar.models.perceptual import lpips_network

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OURS = {"dmd_dar", "eval", "tests", "benchmarks", "runs", "distill"}
FOLDERS = ("dmd_dar", "eval", "tests", "benchmarks", "runs")
NOT_OURS_TO_DECLARE = {
    "triton",  # torch brings it where there is a GPU for it
    *("fla", "liger_kernel", "torch_fidelity"),  # held against ours where somebody has installed them
}
MEASURING = ("dmd_dar/diagnostics", "eval")  # what an installation without the extras cannot import
WITHOUT = "import sys\nsys.modules.update(dict.fromkeys({modules!r}))\n"


def plain(name: str) -> str:
    """A distribution's name as pip compares it."""
    return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", name)[0]).lower()


def extra(name: str) -> set[str]:
    """The distributions that an extra brings, those of the extras that it names among them."""
    found = set()
    for requirement in PROJECT["optional-dependencies"][name]:
        if inner := re.fullmatch(r"dmd-dar\[(.*)\]", requirement):
            found |= set().union(*(extra(part) for part in inner[1].split(",")))
        else:
            found.add(plain(requirement))
    return found


BASE = {plain(requirement) for requirement in PROJECT["dependencies"]}
INSTALLED = {module: {plain(one) for one in names} for module, names in metadata.packages_distributions().items()}


def distributions(module: str) -> set[str]:
    return INSTALLED.get(module, {plain(module)})


def imports(source: str, at_import: bool) -> Iterator[str]:
    """The packages of others that a file imports, anywhere or only as soon as it is imported itself."""
    nodes = [ast.parse(source)]
    while nodes:
        node = nodes.pop()
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module or ""]
        yield from {name.partition(".")[0] for name in names} - sys.stdlib_module_names - OURS - NOT_OURS_TO_DECLARE
        if not (at_import and isinstance(node, ast.FunctionDef)):
            nodes += ast.iter_child_nodes(node)


def undeclared(folder: str, declared: set[str], at_import: bool = False, but: tuple[str, ...] = ()) -> list[str]:
    found = []
    for file in sorted((ROOT / folder).rglob("*.py")):
        path = file.relative_to(ROOT).as_posix()
        if not path.startswith(but):
            names = imports(file.read_text(), at_import)
            found += [f"{path}: {name}" for name in names if not distributions(name) & declared]
    return found


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_import_is_declared(folder):
    declared = {"dmd_dar": BASE | extra("all"), "eval": BASE | extra("evaluation")}
    assert undeclared(folder, declared.get(folder, BASE | extra("test"))) == []


def test_what_does_not_measure_is_imported_without_extras():
    assert undeclared("dmd_dar", BASE, at_import=True, but=MEASURING) == []


def test_an_import_that_nothing_declares_is_found():
    assert list(imports("import os\nfrom nowhere.at import all\nimport dmd_dar", False)) == ["nowhere"]
    late = "def f():\n    import nowhere"
    assert list(imports(late, False)) == ["nowhere"] and list(imports(late, True)) == []


def test_the_table_of_extras_is_that_of_the_installation():
    for name in set(EXTRA_OF.values()):
        listed = set().union(*(distributions(module) for module in EXTRA_OF if EXTRA_OF[module] == name))
        assert listed == extra(name)
    optional = set(EXTRA_OF.values()) | {"all", "test"}
    assert optional == set(PROJECT["optional-dependencies"]) and extra("all") < extra("test")
    assert not extra("all") & BASE


def test_every_requirement_is_pinned():
    pinned = {plain(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if line[0] != "#"}
    assert BASE | extra("test") <= pinned


def without(modules: tuple[str, ...], folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """A command in a process in which these packages cannot be imported."""
    (folder / "sitecustomize.py").write_text(WITHOUT.format(modules=modules))
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    words = [sys.executable, *command]
    return subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    ("module", "command"),
    [
        ("scipy", "-m dmd_dar report runs=[out/nothing]"),
        ("pywt", "-m eval.report runs=[out/nothing]"),
        ("matplotlib", "-m dmd_dar.eval.compare"),
        ("matplotlib", "-m dmd_dar.diagnostics run=teachers/photos32"),
        ("matplotlib", "-m dmd_dar diagnostics run=teachers/photos32"),
    ],
)
def test_a_command_whose_packages_are_missing_says_how_to_get_them(module, command, tmp_path):
    ended = without((module,), tmp_path, *command.split())
    room = "dmd_dar.diagnostics" if "diagnostics" in command else "the evaluation"
    line = f"error: {room} needs {module}, which is not installed: pip install 'dmd-dar[evaluation]'\n"
    assert (ended.returncode, ended.stderr, ended.stdout) == (2, line, "")


def test_a_missing_package_is_an_error_for_whoever_imports_the_room(monkeypatch):
    for module in ("scipy", "pywt"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingPackageError, match=r"^a room needs scipy, pywt, which are not installed: pip install"):
        require("a room", "scipy", "jinja2", "pywt")


@pytest.mark.parametrize(("module", "name"), [("lpips", "evaluation"), ("tensorboard", "tensorboard")])
def test_a_missing_package_names_its_extra(module, name, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingPackageError, match=rf"^{module} is not installed: pip install 'dmd-dar\[{name}\]'$"):
        needed(module)


def test_a_loss_whose_package_is_missing_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(MissingPackageError, match="lpips is not installed"):
        lpips_network({})


@pytest.mark.slow
def test_what_does_not_measure_works_without_extras(tmp_path):
    measuring = ("report", "compare", "teacher", "sensitivity", "statistics", "weights", "diagnostics")
    names = [name for name in commands.COMMANDS if name not in measuring]
    code = f"from dmd_dar import commands\nfor name in {names}:\n    commands.main([name, '--help'])"
    assert without(tuple(EXTRA_OF), tmp_path, "-c", code).returncode == 0
    run = [
        "config=configs/photos32/demo_dar.yaml",
        f"out_dir={tmp_path / 'run'}",
        "steps=2",
        "matching.start=1",
        "batch_size=4",
    ]
    run += ["regression.count=4", "regression.solver_steps=4", f"regression.cache={tmp_path / 'pairs'}"]
    run += ["log.health_samples=4", "log.wandb=disabled", "preflight=false", "launch.cpu=true"]
    ended = without(tuple(EXTRA_OF), tmp_path, "distill.py", *run)
    assert ended.returncode == 0, ended.stderr
