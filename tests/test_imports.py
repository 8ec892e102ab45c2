"""Imports point down: each floor of the package sees the floors below it and nothing else."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
GROUND = {
    "errors",
    "extras",
    "messages",
    "keys",
    "atomic",
    "colour",
    "device",
    "draws",
    "flow",
    "guidance",
    "losses",
    "spectrum",
    "stop",
    "moved",
}
JOBS = {"pretrain", "distillation", "plan", "sample", "push", "pairs", "encode", "rungs"}
CONFIG = {"config", "schema"}
FLOORS = {"routing", "models", "data", "methods", "pipeline", "diagnostics", "train"}
ROOT_JOBS = {"distill.py"}
# commands of a floor; nothing imports them
FLOOR_JOBS = {
    f"dmd_dar/{floor}/{name}.py" for floor in ("routing/layout", "diagnostics") for name in ("command", "__main__")
}
TOP = {"commands", "__main__"}  # nothing imports these
# they read the configuration, and some the runs of jobs back
COMMANDS = ("report", "teacher", "compare", "weights", "sensitivity", "statistics")
ROOM_JOBS = ("study/runs", "study/pairing", "study/inputs", "study/prompts", "study/twins")
EVAL_JOBS = {f"eval/{name}.py" for name in (*COMMANDS, *ROOM_JOBS)}
# the rooms of eval; each sees those before it, the last two not each other
ROOMS = ("samples", "metrics", "measure", "study", "page")

SEES = (
    {
        "routing": {"routing"},
        "models": {
            "routing",
            "data",
            "models",
        },  # data sees no other floor: networks may look conditions up in its shards
        "data": {"data"},
        "methods": {"routing", "models", "methods"},
        "pipeline": {"routing", "models", "data", "methods"},
        "diagnostics": {"routing", "models", "methods", "diagnostics"},
        "train": FLOORS,
        "schema": set(),
        "config": {"schema"},
        "eval": FLOORS,
    }
    | {job: FLOORS | CONFIG | JOBS for job in JOBS | ROOT_JOBS | FLOOR_JOBS | EVAL_JOBS}
    | {"__main__": {"commands"}}
)

OPEN_TO_FEW = {
    "accelerate": {"dmd_dar/train/processes/runtime.py"},
    "torch.distributed": {"dmd_dar/train/processes/runtime.py", "dmd_dar/train/processes/parts.py"},
    "triton": {"dmd_dar/routing/ops/triton.py"},
}
# they show results on stdout; all other messages go through the logger, whose screen is messages.py
PRINTING = {
    f"dmd_dar/{name}.py" for name in ("messages", "config", "sample", "plan", "push", "pairs", "encode", "rungs")
} | {"dmd_dar/commands/__init__.py"}
OPEN_TO_NONE = ("pickle", "cloudpickle", "dill", "joblib")
NOT_IN_METHODS = ("torch.optim",)


def files() -> list[Path]:
    found = [*ROOT.glob("*.py"), *ROOT.glob("dmd_dar/**/*.py"), *ROOT.glob("eval/**/*.py")]
    return sorted(file.relative_to(ROOT) for file in found)


def used_names(source: str, package: str) -> Iterator[str]:
    """Dotted names of all that a file imports, and the attribute chains of torch that it writes out."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parent = package.rsplit(".", node.level - 1)[0] if node.level else ""
            module = ".".join(part for part in (parent, node.module) if part)
            yield from (f"{module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute) and ast.unparse(node).startswith("torch."):
            yield ast.unparse(node)


def floor_of(path: str) -> str:
    """The floor that a file stands on: a ground module, a folder of the package, a job, or `eval`."""
    if path in SEES:
        return path
    parts = Path(path).with_suffix("").parts
    return parts[0] if parts[0] == "eval" else parts[1]


def room_below(path: Path, parts: list[str]) -> bool:
    """Whether a file of eval may import these names of eval: those of its room or of one before it, at the root all."""
    if len(path.parts) == 2:
        return True
    own, room = path.parts[1], parts[1]
    return room in ROOMS[: ROOMS.index(own) + 1] and {own, room} != {"study", "page"}


def below(name: str, *modules: str) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def violations(path: str, source: str) -> list[str]:
    """What a file imports against the rules, as dotted names."""
    return sorted({name for name in used_names(source, ".".join(Path(path).parts[:-1])) if not allowed(path, name)})


def allowed(path: str, name: str) -> bool:
    floor, parts = floor_of(path), name.split(".")
    if below(name, *OPEN_TO_NONE) or "__main__" in parts:
        return False
    if any(below(name, module) and path not in homes for module, homes in OPEN_TO_FEW.items()):
        return False
    if floor == "methods" and below(name, *NOT_IN_METHODS):
        return False
    if parts[0] == "dmd_dar":
        sees = SEES.get(floor, set())
        return len(parts) > 1 and parts[1] in GROUND | sees
    if parts[0] == "distill":
        return False
    if parts[0] == "eval":
        return floor.startswith("eval") and room_below(Path(path), parts)
    return floor not in GROUND or parts[0] in sys.stdlib_module_names | {"torch", "jaxtyping"}


@pytest.mark.parametrize("path", files(), ids=str)
def test_imports_point_down(path: Path) -> None:
    if path.as_posix() != "dmd_dar/__init__.py":
        assert violations(path.as_posix(), (ROOT / path).read_text()) == []


@pytest.mark.parametrize("path", files(), ids=str)
def test_no_file_is_unpickled(path: Path) -> None:
    keywords = [node for node in ast.walk(ast.parse((ROOT / path).read_text())) if isinstance(node, ast.keyword)]
    allowing = {"weights_only": False, "allow_pickle": True}
    told = [(word.arg, ast.unparse(word.value)) for word in keywords if word.arg in allowing]
    assert all(value == str(not allowing[name]) for name, value in told), told


def unsafe_loads(source: str) -> list[str]:
    """Calls that unpickle unless they are told not to, and are not told in so many words."""
    safe = {"np.load": "allow_pickle=False", "numpy.load": "allow_pickle=False", "torch.load": "weights_only=True"}
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    named = [(ast.unparse(call.func), [ast.unparse(word) for word in call.keywords]) for call in calls]
    return [name for name, words in named if name in safe and safe[name] not in words]


@pytest.mark.parametrize("path", files(), ids=str)
def test_every_load_says_that_it_does_not_unpickle(path: Path) -> None:
    assert unsafe_loads((ROOT / path).read_text()) == []


def test_a_load_without_its_keyword_is_found() -> None:
    assert unsafe_loads("x = np.load(file)\ny = torch.load(f, map_location='cpu')") == ["np.load", "torch.load"]
    assert unsafe_loads("np.load(f, allow_pickle=True)") == ["np.load"]
    assert unsafe_loads("np.load(f, allow_pickle=False)\ntorch.load(f, weights_only=True)\njson.load(f)") == []


def prints(source: str) -> int:
    """How many calls of print a file makes."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    return sum(ast.unparse(call.func) == "print" for call in calls)


@pytest.mark.parametrize("path", files(), ids=str)
def test_only_commands_print(path: Path) -> None:
    if path.as_posix() not in PRINTING | FLOOR_JOBS | EVAL_JOBS:
        assert prints((ROOT / path).read_text()) == 0


def test_every_module_has_its_place() -> None:
    package = {entry.stem for entry in (ROOT / "dmd_dar").iterdir() if entry.suffix == ".py" or any(entry.glob("*.py"))}
    assert package - {"__init__"} <= GROUND | JOBS | CONFIG | FLOORS | TOP
    assert {file.name for file in ROOT.glob("*.py")} <= ROOT_JOBS
    package_file = ast.parse((ROOT / "dmd_dar" / "__init__.py").read_text())
    imported = [ast.unparse(node) for node in package_file.body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert imported == ["import os", "from typing import TYPE_CHECKING, Any", "from dmd_dar import moved"]


@pytest.mark.parametrize(
    ("path", "line", "name"),
    [
        ("dmd_dar/flow.py", "import numpy", "numpy"),
        ("dmd_dar/flow.py", "from dmd_dar.routing import layout", "dmd_dar.routing.layout"),
        ("dmd_dar/losses.py", "from dmd_dar import config", "dmd_dar.config"),
        ("dmd_dar/config.py", "from dmd_dar.train.disk import folder", "dmd_dar.train.disk.folder"),
        ("dmd_dar/routing/router.py", "from dmd_dar.models.sit import SiT", "dmd_dar.models.sit.SiT"),
        ("dmd_dar/routing/layout/__init__.py", "from dmd_dar import config", "dmd_dar.config"),
        ("dmd_dar/pretrain.py", "from dmd_dar.routing.layout import __main__", "dmd_dar.routing.layout.__main__"),
        ("dmd_dar/routing/ops/naive.py", "from ...models import sit", "dmd_dar.models.sit"),
        ("dmd_dar/routing/ops/torch.py", "import triton.language as tl", "triton.language"),
        ("dmd_dar/models/sit.py", "from dmd_dar.train.loop import ema", "dmd_dar.train.loop.ema"),
        ("dmd_dar/models/sit.py", "import dmd_dar.methods.dmd", "dmd_dar.methods.dmd"),
        ("dmd_dar/data/photos.py", "from dmd_dar.routing import layout", "dmd_dar.routing.layout"),
        ("dmd_dar/methods/dmd.py", "from dmd_dar.data import photos", "dmd_dar.data.photos"),
        ("dmd_dar/methods/dmd.py", "from torch import optim", "torch.optim"),
        ("dmd_dar/methods/dmd.py", "import torch\ntorch.optim.AdamW", "torch.optim.AdamW"),
        ("dmd_dar/methods/dmd.py", "from torch.distributed import barrier", "torch.distributed.barrier"),
        ("dmd_dar/methods/dmd.py", "def f():\n    import accelerate", "accelerate"),
        ("dmd_dar/diagnostics/mixing.py", "from dmd_dar.train import loop", "dmd_dar.train.loop"),
        ("dmd_dar/train/loop/loop.py", "from accelerate import Accelerator", "accelerate.Accelerator"),
        ("dmd_dar/train/loop/loop.py", "from dmd_dar.config import load", "dmd_dar.config.load"),
        ("dmd_dar/train/loop/loop.py", "from dmd_dar.schema import Slot", "dmd_dar.schema.Slot"),
        ("dmd_dar/train/disk/checkpoint.py", "import pickle", "pickle"),
        ("dmd_dar/sample.py", "from eval import report", "eval.report"),
        ("dmd_dar/sample.py", "import distill", "distill"),
        ("dmd_dar/sample.py", "import dmd_dar", "dmd_dar"),
        ("eval/metrics/intervals.py", "from dmd_dar import config", "dmd_dar.config"),
        ("eval/metrics/intervals.py", "from dmd_dar import sample", "dmd_dar.sample"),
        ("eval/metrics/intervals.py", "from ..measure import suite", "eval.measure.suite"),
        ("eval/page/html.py", "from ..study import forest", "eval.study.forest"),
        ("eval/samples/sets.py", "from ..weights import show", "eval.weights.show"),
    ],
)
def test_the_rules_catch_what_they_forbid(path: str, line: str, name: str) -> None:
    assert name in violations(path, line)


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("dmd_dar/flow.py", "import math\nfrom torch import Tensor\nfrom jaxtyping import Float\nimport dmd_dar.keys"),
        ("dmd_dar/routing/ops/triton.py", "import triton"),
        ("dmd_dar/train/processes/runtime.py", "import torch\nimport accelerate\ntorch.distributed.barrier()"),
        ("dmd_dar/methods/dmd.py", "from dmd_dar import flow, losses\nfrom dmd_dar.models import denoiser"),
        ("dmd_dar/pretrain.py", "from dmd_dar import config\nfrom dmd_dar.train import loop"),
        ("dmd_dar/routing/layout/command.py", "from dmd_dar import config\nfrom dmd_dar.routing import traffic"),
        ("distill.py", "from dmd_dar import config, pairs"),
        ("eval/report.py", "from dmd_dar import config\nfrom .metrics import intervals"),
    ],
)
def test_the_rules_let_pass_what_they_allow(path: str, line: str) -> None:
    assert violations(path, line) == []
