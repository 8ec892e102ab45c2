"""What a report compares: images that networks of runs make on the same noise, or folders of images."""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from dmd_dar.data.config import DataConfig
from dmd_dar.data.sources import Source
from dmd_dar.distillation.config import DistillConfig
from dmd_dar.messages import LOGGER
from dmd_dar.methods.solvers import Solver

from ..measure.ledger import Ledger
from ..samples.parallel import Processes
from ..samples.real import Real, named_real, open_fitting, read_real
from ..samples.sampling import Bench, with_costs
from ..samples.sets import ImageSet, read_set
from .convergence import twice_as_fine
from .kinds import told_apart
from .prompts import encoded_for
from .runs import GuidedTeacher, Run, read_runs, reference_guidance, require_teacher
from .students import student_set

CROPS = "real crops that are not compared"
OWN = "samples of the teacher that are not compared"


class InputKeys(Protocol):
    """The keys of a command's configuration that say what is compared; see `ReportConfig`."""

    @property
    def runs(self) -> tuple[str, ...]: ...
    @property
    def images(self) -> tuple[str, ...]: ...
    @property
    def reference(self) -> str: ...
    @property
    def real(self) -> str: ...
    @property
    def guidance_scale(self) -> float | None: ...
    @property
    def n(self) -> int: ...
    @property
    def seed(self) -> int: ...
    @property
    def ode(self) -> Solver: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def cache(self) -> str: ...
    @property
    def prompts(self) -> str: ...
    @property
    def text_encoder(self) -> str: ...
    @property
    def seeds(self) -> int: ...
    @property
    def cpu(self) -> bool: ...


@dataclass(frozen=True)
class Inputs:
    """What a report compares. `fit`: images and labels that features are fitted to; `fitted_to` says which."""

    reference: ImageSet
    real: ImageSet | None
    sets: list[ImageSet]
    runs: list[Run]  # of the students that could be sampled
    fit: tuple[Tensor, Tensor | None]
    fitted_to: str
    colour_labels: set[int] | None
    class_names: dict[int, str]
    data_hash: str | None = None
    prompts: dict[int, str] | None = None  # of the runs, by number, as far as their texts are known; None for labels
    bench: Bench | None = None  # None without networks
    twice: ImageSet | None = None  # the reference once more, solved with twice as many steps; None without networks

    @property
    def everything(self) -> list[ImageSet]:
        """The real images, the reference, and the sets that are compared with them."""
        return [one for one in (self.real, self.reference, *self.sets) if one is not None]

    def with_costs(self) -> "Inputs":
        """The same with what sampling each network costs in the facts of its set."""
        if self.bench is None:
            return self
        reference, *sets = with_costs([self.reference, *self.sets], self.bench)
        return replace(self, reference=reference, sets=sets)


def read_inputs(keys: InputKeys, device: torch.device, ledger: Ledger, processes: Processes) -> Inputs:
    """Images of the runs' networks, or without runs the reference, then the folders that are named beside.

    A folder or a student that cannot be compared is left out and stands in `ledger`.
    """
    inputs = sampled(keys, device, ledger, processes) if keys.runs else opened(keys)
    sets = list(inputs.sets)
    for folder in keys.images:
        one = ledger.attempt("every metric", folder, partial(read_set, folder))
        if one is not None:
            sets.append(as_prompted(one, inputs.prompts))
    return replace(inputs, sets=sets)


def sampled(keys: InputKeys, device: torch.device, ledger: Ledger, processes: Processes) -> Inputs:
    """Every network of the runs on the same noise, and images of their data where these fit the teacher's."""
    runs = read_runs(keys.runs, lambda run: encoded_for(run.folder, run.origin, keys, processes))
    teacher = GuidedTeacher.of(runs[0], device, reference_guidance(runs, keys.guidance_scale))
    require_teacher(runs, teacher.loaded)
    bench = teacher.bench(keys, device, processes, runs[0])
    named = named_real(keys.real, bench) if keys.real else None
    data = None if named else data_of(runs[0].cfg, bench, teacher, ledger)
    if processes.main:
        LOGGER.info(f"sampling {bench.count} images of the teacher and of {len(runs)} students")
    real = None if data is None else read_real(data, bench)
    reference = teacher.sample_set(bench, keys.ode)
    undistilled = teacher.undistilled_sets(bench, (run.few_steps for run in runs))
    baselines = [*(real.beside if real else []), *undistilled]
    students = told_apart({run.name: _student(run, bench, reference, ledger) for run in runs}, runs)
    inputs = Inputs(
        reference=_with_guidance(reference, teacher, runs, keys.guidance_scale),
        real=real.reference if real else named,
        sets=[*baselines, *(one for one in students.values() if one is not None)],
        runs=[run for run in runs if students[run.name] is not None],
        fit=real.fit if real else other_samples(teacher, bench, keys.ode),
        fitted_to=CROPS if real else OWN,
        colour_labels=real.colour_labels if real else None,
        class_names={},
        data_hash=real.hash if real else None,
        bench=bench,
        twice=twice_as_fine(teacher, bench, keys.ode),
    )
    return with_names(inputs, teacher, real)


def _with_guidance(reference: ImageSet, teacher: GuidedTeacher, runs: list[Run], named: float | None) -> ImageSet:
    """The reference, whose facts tell its guidance where that is named or the runs differ in their steps."""
    if named is None and len({run.few_steps for run in runs}) == 1:
        return reference
    return replace(reference, facts=replace(reference.facts, guidance_scale=teacher.guidance_scale))


def _student(run: Run, bench: Bench, reference: ImageSet, ledger: Ledger) -> ImageSet | None:
    return ledger.attempt("every metric", run.name, lambda: student_set(run, bench, reference))


def other_samples(teacher: GuidedTeacher, bench: Bench, solver: Solver) -> tuple[Tensor, Tensor | None]:
    """Images of the teacher from other noise than those that are compared, and their labels; prompts are no classes."""
    other = teacher.sample_set(replace(bench, seed=bench.seed + 1), solver)
    return other.first(bench.count), other.labels if teacher.prompts is None else None


def with_names(inputs: Inputs, teacher: GuidedTeacher, real: Real | None) -> Inputs:
    """The same with the names of classes, or of prompts for a teacher that reads them."""
    prompts = prompts_of(teacher, inputs.reference)
    names = dict(enumerate(real.label_names if real else teacher.label_names)) or prompts or {}
    shown = None if inputs.real is None else as_prompted(inputs.real, prompts)
    reference, *sets = (as_prompted(one, prompts) for one in (inputs.reference, *inputs.sets))
    return replace(inputs, reference=reference, real=shown, sets=sets, prompts=prompts, class_names=names)


def as_prompted(one: ImageSet, prompts: dict[int, str] | None) -> ImageSet:
    """The set, whose labels are numbers of the runs' prompts unless it names them itself."""
    return one if prompts is None or one.names else replace(one, names=prompts, prompted=True)


def data_of(cfg: DistillConfig, bench: Bench, teacher: GuidedTeacher, ledger: Ledger) -> Source | None:
    """The run's data where they can stand beside the samples; those that it names by default were not requested."""
    named = teacher.prompts is not None and teacher.prompts.folder != cfg.teacher.prompts  # of which it was not trained
    requested = not named and (cfg.needs_data or cfg.data.name != DataConfig().name)
    return ledger.attempt("against real images", "", lambda: open_fitting(cfg.data, bench, teacher.loaded), requested)


def prompts_of(teacher: GuidedTeacher, reference: ImageSet) -> dict[int, str] | None:
    """The texts of the prompts that occur, as far as they are known; None for a teacher of labels."""
    if teacher.prompts is None or reference.labels is None:
        return None
    texts = teacher.prompts.texts()
    return {label: texts[label] for label in reference.labels.unique().tolist()} if texts else {}


def opened(keys: InputKeys) -> Inputs:
    """The folders of a report without runs."""
    reference = read_set(keys.reference, "teacher")
    real = _real_beside(reference, keys) if keys.real else None
    source = real or reference
    return Inputs(reference, real, [], [], (source.first(keys.n), None), f"{source.name} itself", None, {})


def _real_beside(reference: ImageSet, keys: InputKeys) -> ImageSet:
    """The real images, under a name of their own, since sets go by it; a folder that is both is opened once."""
    same = Path(keys.real).resolve() == Path(keys.reference).resolve()
    real = replace(reference, role="real") if same else read_set(keys.real, "real")
    return replace(real, name=f"{real.name} (real)") if real.name == reference.name else real
