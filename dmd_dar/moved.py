"""Names of before, and where they are now: importing an old one still works, with a DeprecationWarning."""

import importlib
import importlib.util
import sys
import warnings
from collections.abc import Sequence
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
    "dmd_dar.train.world": "dmd_dar.train.processes.world",
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

# names that are not where their module went, or are called otherwise there; some take other arguments now (CHANGELOG)
NAMES: dict[str, str] = {
    "dmd_dar.distill.build_gan": "dmd_dar.distillation.method.build_gan",
    "dmd_dar.distill.distance_of": "dmd_dar.distillation.method.distance_of",
    "dmd_dar.distill.open_source": "dmd_dar.distillation.identity.open_source",
    "dmd_dar.distill.open_teacher": "dmd_dar.models.teachers.open_teacher",
    "dmd_dar.distill.real_batches": "dmd_dar.distillation.method.real_batches",
    "dmd_dar.distill.recipe_of": "dmd_dar.distillation.identity.recipe_of",
    "dmd_dar.distill_config.networks_of": "dmd_dar.distillation.networks.networks_of",
    "dmd_dar.encode.told_by": "dmd_dar.encode.wanted_by",
    "dmd_dar.methods.rollout.solve_ode": "dmd_dar.methods.solvers.heun",
    "dmd_dar.models.families.packed": "dmd_dar.models.families.form.packed",
    "dmd_dar.models.families.unpacked": "dmd_dar.models.families.form.unpacked",
    "dmd_dar.models.teachers.guided_velocity": "dmd_dar.models.guided.guided_velocity",
    "dmd_dar.models.text.sana_instruction": "dmd_dar.models.families.sana.instruction",
    "dmd_dar.pairs.shard_maker": "dmd_dar.pairs.batch_maker",
    "dmd_dar.pairs.told_by": "dmd_dar.pairs.wanted_by",
    "dmd_dar.train.advice.Told": "dmd_dar.train.watch.advice.Warnings",
    "dmd_dar.train.filling.LOOK": "dmd_dar.train.processes.supervisor.LOOK",
    "dmd_dar.train.filling.Make": "dmd_dar.data.batches.Make",
    "dmd_dar.train.folder.ABSENT": "dmd_dar.keys.ABSENT",
    "dmd_dar.train.launch.LOOK": "dmd_dar.train.processes.supervisor.LOOK",
    "dmd_dar.train.launch.first_failed": "dmd_dar.train.processes.supervisor.first_failed",
    "dmd_dar.train.launch.watch": "dmd_dar.train.processes.supervisor.watch",
    "dmd_dar.train.model_card.model_card": "dmd_dar.train.disk.readme.readme",
    "dmd_dar.train.runtime.like": "dmd_dar.train.processes.parts.like",
    "dmd_dar.train.runtime.load_network": "dmd_dar.train.processes.parts.load_network",
    "dmd_dar.train.runtime.load_optimiser": "dmd_dar.train.processes.parts.load_optimiser",
    "dmd_dar.train.runtime.local": "dmd_dar.train.processes.parts.local",
    "dmd_dar.train.processes.memory.free_memory": "dmd_dar.device.free_memory",
    "eval.arms.Arm": "eval.study.runs.Run",
    "eval.arms.ROUTER_USED_DB": "eval.study.students.ROUTER_USED_DB",
    "eval.arms.Teacher": "eval.study.runs.GuidedTeacher",
    "eval.arms.USAGE_IMAGES": "eval.study.students.USAGE_IMAGES",
    "eval.arms.read_arm": "eval.study.runs.read_run",
    "eval.arms.read_arms": "eval.study.runs.read_runs",
    "eval.arms.student_set": "eval.study.students.student_set",
    "eval.arms.usage_of": "eval.study.students.usage_of",
    "eval.bench.code_digest": "dmd_dar.data.kept.code_digest",
    "eval.compare.AT_MEAN": "eval.study.sampled.AT_MEAN",
    "eval.compare.COSTS": "eval.study.differences.COSTS",
    "eval.compare.Measured": "eval.study.sampled.SampledSet",
    "eval.compare.ORIGIN": "eval.study.records.ORIGIN",
    "eval.compare.SCHEMA_VERSION": "eval.study.differences.SCHEMA_VERSION",
    "eval.compare.SECONDARIES": "eval.study.differences.SECONDARIES",
    "eval.compare.Student": "eval.study.students.Student",
    "eval.compare.Study": "eval.study.sampled.Study",
    "eval.compare.compare_arms": "eval.study.differences.compare_arms",
    "eval.compare.curves": "eval.study.differences.gain_curves",
    "eval.compare.measure_run": "eval.study.sampled.measure_network",
    "eval.compare.origin": "eval.compare.origin_of",
    "eval.compare.paired": "eval.study.differences.paired",
    "eval.compare.residual_minus_dar": "eval.study.differences.residual_minus_dar",
    "eval.compare.students": "eval.study.sampled.seed_students",
    "eval.conclusion.table": "eval.study.wording.seed_table",
    "eval.distances.Skipped": "eval.measure.results.Skipped",
    "eval.distances.lpips_paired": "eval.measure.suite.mean_lpips",
    "eval.features.compare": "eval.metrics.features.compare_features",
    "eval.frechet.Distance": "eval.metrics.wavelet.Distance",
    "eval.frechet.LEVELS": "eval.metrics.wavelet.LEVELS",
    "eval.frechet.class_diversity": "eval.metrics.diversity.class_diversity",
    "eval.frechet.diversity_ratio": "eval.metrics.diversity.diversity_ratio",
    "eval.frechet.diversity_ratios": "eval.metrics.diversity.diversity_ratios",
    "eval.frechet.fd_null": "eval.metrics.wavelet.fd_null",
    "eval.frechet.fd_wavelet": "eval.metrics.wavelet.fd_wavelet",
    "eval.frechet.wavelet_features": "eval.metrics.wavelet.wavelet_features",
    "eval.latent.Latent": "eval.measure.latent.LatentSpectra",
    "eval.measure.compare": "eval.measure.pair.compare_sets",
    "eval.measured.Measured": "eval.measure.one_set.MeasuredSet",
    "eval.pairing.Groups": "eval.study.pairing.RunsByArm",
    "eval.pairing.Role": "eval.study.pairing.ArmName",
    "eval.pairing.different_networks": "eval.study.pairing.require_different_networks",
    "eval.pairing.same_data": "eval.study.pairing.require_same_data",
    "eval.panels.JOINT": "eval.page.html.JOINT",
    "eval.panels.span": "eval.page.cells.span",
    "eval.provenance.code_state": "eval.measure.provenance.code_now",
    "eval.real.NAMES": "eval.samples.real.REAL_NAMES",
    "eval.report.CROPS": "eval.study.inputs.CROPS",
    "eval.report.OWN": "eval.study.inputs.OWN",
    "eval.report.as_prompted": "eval.study.inputs.as_prompted",
    "eval.report.better_baseline": "eval.study.checks.better_baseline",
    "eval.report.check_sentence": "eval.study.checks.check_sentence",
    "eval.report.compare_pair": "eval.study.checks.compare_pair",
    "eval.report.conclude": "eval.study.checks.conclusions",
    "eval.report.cost_words": "eval.study.checks.cost_words",
    "eval.report.data_of": "eval.study.inputs.data_of",
    "eval.report.distillation_checks": "eval.study.checks.student_checks",
    "eval.report.opened": "eval.study.inputs.opened",
    "eval.report.origin": "eval.report.origin_of",
    "eval.report.prompts_of": "eval.study.inputs.prompts_of",
    "eval.report.routing_comparisons": "eval.study.checks.routing_comparisons",
    "eval.report.sampled": "eval.study.inputs.sampled",
    "eval.report.seed_pairs": "eval.study.twins.seed_pairs",
    "eval.report.unequal": "eval.study.twins.unequal",
    "eval.report.with_network_costs": "eval.samples.sampling.with_costs",
    "eval.sensitivity.paired_verdict": "eval.sensitivity.paired_verdicts",
    "eval.verdict.verdict": "eval.metrics.verdict.verdict_of",
    "eval.weights.ALEXNET": "eval.metrics.weight_files.ALEXNET",
    "eval.weights.CLIP_CONFIG": "eval.metrics.weight_files.CLIP_CONFIG",
    "eval.weights.CLIP_FILES": "eval.metrics.weight_files.CLIP_FILES",
    "eval.weights.CLIP_REPO": "eval.metrics.weight_files.CLIP_REPO",
    "eval.weights.DINO_MODEL": "eval.metrics.weight_files.DINO_MODEL",
    "eval.weights.Found": "eval.metrics.weight_files.Found",
    "eval.weights.INCEPTION": "eval.metrics.weight_files.INCEPTION",
    "eval.weights.TORCHVISION_INCEPTION": "eval.metrics.weight_files.TORCHVISION_INCEPTION",
    "eval.weights.VGG16": "eval.metrics.weight_files.VGG16",
    "eval.weights.clip_weights": "eval.metrics.weight_files.clip_weights",
    "eval.weights.dinov2_weights": "eval.metrics.weight_files.dinov2_weights",
    "eval.weights.download": "eval.metrics.weight_files.download",
    "eval.weights.file_hash": "eval.metrics.weight_files.file_hash",
    "eval.weights.load_state": "eval.metrics.weight_files.load_state",
    "eval.weights.locate": "eval.metrics.weight_files.locate",
    "eval.weights.needed": "dmd_dar.extras.needed",
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
        keep_names(MOVED[old])


def warn(old: str, new: str, level: int) -> None:
    """Say that a name has moved, at the line of the importer: `level` frames above, the import system's not counted."""
    warnings.warn(f"{old} is now {new}; the old name will go", DeprecationWarning, stacklevel=level)


def install() -> None:
    """Let old names be found, once a process."""
    if not any(isinstance(finder, MovedFinder) for finder in sys.meta_path):
        sys.meta_path.append(MovedFinder())


def keep_names(module: str, successor: str = "") -> None:
    """Let `module` answer for its names in NAMES, and a package that was a module for all of `successor`'s.

    For modules that stayed where they were; those of MOVED do so from the first import by their old name on.
    """
    names = {old.rpartition(".")[2]: new for old, new in NAMES.items() if _holder(old) == module}
    if not names and not successor:  # the same code under another name: __main__, or dmd_dar.eval in a wheel
        return
    namespace = vars(sys.modules[module])

    def answer(name: str) -> object:
        inside = "__path__" in namespace and importlib.util.find_spec(f"{module}.{name}")
        new = names.get(name, f"{successor}.{name}" if successor else "")
        if name.startswith("__") or inside or not new:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        home, _, now = new.rpartition(".")
        value = getattr(importlib.import_module(home), now, None)
        if value is None:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        warn(f"{module}.{name}", new, 3)
        if "__path__" in namespace:  # one import from a package asks twice
            namespace[name] = value
        return value

    namespace["__getattr__"] = answer


def _holder(old: str) -> str:
    """The module that is asked for the old name now."""
    module = old.rpartition(".")[0]
    return MOVED.get(module, module)
