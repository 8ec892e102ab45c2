"""Which families of transformers were taken through which stages: the marker `stages` on tests, and its recording.

    @pytest.mark.stages("teacher", "guidance", family="qwen_image")
    @pytest.mark.stages("distil", by="name")                       # the test's parameter `name` says the family
    @pytest.mark.stages("lora", family="dit", refused="why")       # what passes shows that it is refused

A family is a module of dmd_dar/models/families, or several in a tuple. "distil" is what the test's parameters `query`
and `weights` say: residual or DAR, and shared_lora. RECORD_STAGES=docs/results/families.json puts the outcomes of the
tests that run into that file, in the place of their earlier ones; `python runs/tables.py` draws the table of
docs/teachers.md from it.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from dmd_dar.atomic import write_atomic
from dmd_dar.models.families import FAMILIES

STAGES = {
    "teacher": "asked as diffusers' own pipeline asks it",
    "encode": "prompts encoded as that pipeline does",
    "codec": "latents as its VAE has them",
    "guidance": "guided as that pipeline is",
    "residual": "a plain student is distilled and sampled",
    "DAR": "a student with routers",
    "shared_lora": "a student of adapters over a frozen base",
    "fsdp2": "two processes with sharded weights equal one",
    "words": "sampled by prompts in words",
    "pipeline": "`DiffusionPipeline.from_pretrained` makes the student's images",
    "lora": "the student as diffusers' LoRA file",
    "report": "`eval.report` on a student",
}
MODULES = {family.ask.__module__.rpartition(".")[2]: name for name, family in FAMILIES.items()}
ALSO = {**{name: module for module, name in MODULES.items()}, "klein": "flux2", "dev": "flux2", "schnell": "flux"}


def marked(item: pytest.Item) -> list[dict[str, Any]]:
    """family, stage and refused of each cell that the test speaks of. UsageError for a name that is not known."""
    given, cells = getattr(getattr(item, "callspec", None), "params", {}), []
    for mark in item.iter_markers("stages"):
        named = given.get(mark.kwargs["by"]) if "by" in mark.kwargs else mark.kwargs.get("family")
        for family in [named] if isinstance(named, str) else named or ("",):
            for stage in stages_of(mark.args, given):
                cell = {"family": ALSO.get(family, family), "stage": stage, "refused": mark.kwargs.get("refused", "")}
                if cell["family"] not in MODULES or stage not in STAGES:
                    raise pytest.UsageError(f"{item.nodeid}: no stage {stage} of family {family}; see tests/stages.py")
                cells.append(cell)
    return cells


def stages_of(named: tuple[str, ...], given: dict[str, Any]) -> list[str]:
    """The stages by name; those of distilling are in the parameters `given` to the test."""
    distilled = ["residual" if given.get("query") == "residual" else "DAR"]
    distilled += ["shared_lora"] if given.get("weights") == "shared_lora" else []
    return [stage for name in named for stage in (distilled if name == "distil" else [name])]


class Recorder:
    """Writes the outcomes of the marked tests of a session into `file`."""

    def __init__(self, file: Path):
        self.file, self.found = file, {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        cells = dict(report.user_properties).get("stages")
        if cells and (report.when == "call" or report.outcome != "passed"):
            reason = report.longrepr[2] if report.outcome == "skipped" else ""  # type: ignore[index]
            self.found[report.nodeid] = [{**cell, "outcome": report.outcome, "reason": reason} for cell in cells]

    def pytest_sessionfinish(self) -> None:
        if self.found:
            write_atomic(self.file, json.dumps(merged(self.file, self.found), indent=1))


def merged(file: Path, found: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """What `file` should hold: its tests that did not run, and those that were found, by family and stage."""
    families: dict[str, Any] = {family: {stage: [] for stage in STAGES} for family in MODULES}
    before = json.loads(file.read_text())["families"] if file.is_file() else {}
    for family in families:
        for stage, tests in families[family].items():
            tests += [one for one in before.get(family, {}).get(stage, []) if one["test"] not in found]
    for test, cells in found.items():
        for cell in cells:
            facts = {name: cell[name] for name in ("outcome", "reason", "refused") if cell[name]}
            families[cell["family"]][cell["stage"]].append({"test": test, **facts})
    for stages in families.values():
        for tests in stages.values():
            tests.sort(key=lambda one: one["test"])
    return {"stages": STAGES, "families": families}
