"""Names of modules before, and where they are now: importing an old one still works, with a DeprecationWarning."""

import importlib
import importlib.util
import sys
import warnings
from collections.abc import Mapping, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

MOVED: dict[str, str] = {
    "dmd_dar.distill": "dmd_dar.distillation.job",
    "dmd_dar.distill_config": "dmd_dar.distillation.config",
    "dmd_dar.models.students": "dmd_dar.distillation.networks",
    "dmd_dar.train.advice": "dmd_dar.train.watch.advice",
    "dmd_dar.train.checkpoint": "dmd_dar.train.disk.checkpoint",
    "dmd_dar.train.ema": "dmd_dar.train.loop.ema",
    "dmd_dar.train.export": "dmd_dar.train.disk.export",
    "dmd_dar.train.failure": "dmd_dar.train.watch.failure",
    "dmd_dar.train.filling": "dmd_dar.train.processes.filling",
    "dmd_dar.train.folder": "dmd_dar.train.disk.folder",
    "dmd_dar.train.health": "dmd_dar.train.watch.health",
    "dmd_dar.train.job": "dmd_dar.train.loop.job",
    "dmd_dar.train.launch": "dmd_dar.train.processes.launch",
    "dmd_dar.train.log": "dmd_dar.train.disk.log",
    "dmd_dar.train.model_card": "dmd_dar.train.disk.readme",
    "dmd_dar.train.optimise": "dmd_dar.train.loop.optimise",
    "dmd_dar.train.preflight": "dmd_dar.train.watch.preflight",
    "dmd_dar.train.replicas": "dmd_dar.train.processes.replicas",
    "dmd_dar.train.runtime": "dmd_dar.train.processes.runtime",
    "dmd_dar.train.stop": "dmd_dar.stop",
    "eval.arms": "eval.study.runs",
    "eval.bench": "eval.samples.sampling",
    "eval.classifier": "eval.metrics.classifier",
    "eval.columns": "eval.page.columns",
    "eval.conclusion": "eval.study.wording",
    "eval.controls": "eval.study.controls",
    "eval.cost": "eval.samples.cost",
    "eval.dino": "eval.metrics.dino",
    "eval.distances": "eval.measure.suite",
    "eval.features": "eval.metrics.features",
    "eval.figures": "eval.page.figures",
    "eval.forest": "eval.study.forest",
    "eval.frechet": "eval.metrics.frechet",
    "eval.grids": "eval.page.grids",
    "eval.images": "eval.samples.images",
    "eval.inception": "eval.metrics.inception",
    "eval.latent": "eval.measure.latent",
    "eval.maps": "eval.metrics.power_map",
    "eval.measured": "eval.measure.one_set",
    "eval.moments": "eval.metrics.moments",
    "eval.neighbours": "eval.metrics.neighbours",
    "eval.numbers": "eval.page.csv",
    "eval.pairing": "eval.study.pairing",
    "eval.panels": "eval.page.sections",
    "eval.perceptual": "eval.metrics.perceptual",
    "eval.processes": "eval.samples.parallel",
    "eval.provenance": "eval.measure.provenance",
    "eval.real": "eval.samples.real",
    "eval.sectors": "eval.metrics.power_map",
    "eval.seeds": "eval.study.endpoint",
    "eval.sets": "eval.samples.sets",
    "eval.sliced": "eval.metrics.sliced",
    "eval.spectrum": "eval.metrics.spectrum",
    "eval.spoil": "eval.metrics.spoil",
    "eval.stats": "eval.metrics.intervals",
    "eval.structure": "eval.metrics.structure",
    "eval.style": "eval.page.style",
    "eval.targets": "eval.measure.nulls",
    "eval.threads": "eval.samples.parallel",
    "eval.verdict": "eval.metrics.verdict",
}


class MovedFinder(MetaPathFinder, Loader):
    """Answers for the modules of MOVED with the ones that took their place; it knows nothing of others."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname in MOVED else None

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        old = module.__name__
        warn(old, MOVED[old], 3)
        sys.modules[old] = importlib.import_module(MOVED[old])


def warn(old: str, new: str, level: int) -> None:
    """Say that a name has moved, at the line of the importer: `level` frames above, the import system's not counted."""
    warnings.warn(f"{old} is now {new}; the old name will go", DeprecationWarning, stacklevel=level)


def install() -> None:
    """Let old names be found, once a process."""
    if not any(isinstance(finder, MovedFinder) for finder in sys.meta_path):
        sys.meta_path.append(MovedFinder())


def attribute(package: str, successor: str, name: str) -> object:
    """`name` of a package that was a module before, or of a module that held it: from where its code is now.

    Raises AttributeError for names that it does not have either, for the package's own modules and for names of
    the import system.
    """
    inside = "__path__" in vars(sys.modules[package]) and importlib.util.find_spec(f"{package}.{name}")
    if name.startswith("__") or inside:
        raise AttributeError(f"module {package!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(successor), name, None)
    if value is None:
        raise AttributeError(f"module {package!r} has no attribute {name!r}")
    warn(f"{package}.{name}", f"{successor}.{name}", 4)
    setattr(sys.modules[package], name, value)  # one import asks twice
    return value


def renamed(module: str, names: Mapping[str, str], name: str) -> object:
    """`name` of a module that calls it `names[name]` now. Raises AttributeError for others."""
    if name not in names:
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    warn(f"{module}.{name}", f"{module}.{names[name]}", 4)
    return getattr(sys.modules[module], names[name])
