"""The networks of a study, sampled and measured seed by seed: students, and DAR with its routers frozen or reset.

Legend: N images of each network.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from dmd_dar.messages import LOGGER
from dmd_dar.models.denoiser import network_time

from ..measure.one_set import LUMA, chosen_rows, class_spread
from ..metrics import features, structure, wavelet
from ..metrics.diversity import diversity_ratios
from ..metrics.spectrum import BAND_NAMES, HF, Spectrum, gain_curve, hf_gain_db, pooled_gains, spectrum_of
from ..samples.cost import SamplingCost
from ..samples.sampling import Bench, costs_of
from ..samples.sets import ImageSet
from .controls import frozen_at_mean, unfreezable
from .endpoint import Arms
from .pairing import RunsByArm
from .results import AgainstTeacher, NetworkRow
from .runs import Run
from .students import Student

AT_MEAN = "frozen_at_mean"  # the DAR students themselves, their routers held at the mean over the rungs


@dataclass(frozen=True)
class SampledSet:
    """What the comparisons need of one set of N images."""

    labels: np.ndarray  # (N,)
    luma: Spectrum
    kurtosis: float  # median over images
    flat: np.ndarray  # (N, 2) energy and number of the flat patches of each image
    features: Tensor  # (N, 20)
    diversity: dict[int, float]  # of each class, in pixels

    @property
    def hf(self) -> np.ndarray:
        """(N,) energy of the high band."""
        return self.luma.energies[:, HF]

    @staticmethod
    def of(one: ImageSet) -> "SampledSet":
        """By the code that measures a set of a report. ValueError where the classes of the images are not known."""
        if one.classes is None:
            raise ValueError(f"{one.name}: its classes are not known")
        rows = chosen_rows(one, LUMA, "hf_kurtosis", "patches")
        patches = (rows.groups["patches"][name].numpy() for name in ("coarse", "fine"))
        return SampledSet(
            labels=one.classes,
            luma=rows.spectrum(),
            kurtosis=float(np.median(rows.groups["hf_kurtosis"]["values"].numpy())),
            flat=structure.flat_energy(*patches),
            features=features.extract(one.stream, features.wavelet()).values,
            diversity=class_spread(one),
        )


@dataclass(frozen=True)
class SampledNetwork:
    """The numbers of a network and the images that they are of."""

    row: NetworkRow
    images: SampledSet


@dataclass(frozen=True)
class Yardstick:
    """The teacher's images, and what fd_wavelet reads between two sets of them."""

    teacher: SampledSet
    null: float

    @staticmethod
    def of(reference: ImageSet, bench: Bench) -> "Yardstick":
        teacher = SampledSet.of(reference)
        null = wavelet.fd_null(teacher.features, bench.count, np.random.default_rng(bench.seed))
        return Yardstick(teacher, null)


@dataclass(frozen=True)
class Study:
    """All that is measured of K seeds: the networks of each arm in the order of the seeds, and the teacher's images."""

    teacher: SampledSet
    networks: dict[str, list[SampledNetwork]]  # by arm
    absent: dict[str, str] = field(default_factory=dict)  # controls that could not be made, and why

    @property
    def runs(self) -> dict[str, list[NetworkRow]]:
        return {arm: [one.row for one in networks] for arm, networks in self.networks.items()}

    def arms(self, baseline: str, energies: Callable[[SampledSet], np.ndarray]) -> Arms:
        """DAR beside `baseline`; `energies` takes what is compared, (N, ...), from a set."""
        baselines, routed = (
            np.stack([energies(one.images) for one in self.networks[arm]]) for arm in (baseline, "dar")
        )
        return Arms(baselines, routed, energies(self.teacher), self.teacher.labels)


def seed_students(runs: Mapping[str, Run], device: torch.device) -> dict[str, Student]:
    """The networks of one training seed by arm, and DAR, where it can be, once more with its routers frozen over t."""
    students = {}
    for arm, run in runs.items():
        students[arm] = Student.of(run, device)
        if arm == "dar" and not unfreezable(students[arm].network):
            students[AT_MEAN] = with_frozen_routers(students[arm])
    return students


def with_frozen_routers(student: Student) -> Student:
    """The student with its routers held at their mean over its own rungs."""
    saved = student.saved
    rungs = torch.tensor(saved.rungs, dtype=torch.float64)
    times = tuple(network_time(saved.prediction, rungs).tolist())
    return replace(student, network=frozen_at_mean(student.network, times), routers=AT_MEAN)  # type: ignore[arg-type]


def sample_seed(students: dict[str, Student], yardstick: Yardstick, bench: Bench) -> dict[str, SampledNetwork]:
    """The networks of one training seed, sampled and measured, by arm; {} in all processes but the first.

    Every process makes its share of the images.
    """
    main, sampled = bench.processes.main, {}
    costs = costs_of({arm: one.generator for arm, one in students.items()}, bench) if main else {}
    for arm, student in students.items():
        if main:
            LOGGER.info(f"{arm}: {student.run.folder}")
        images = student.sampled(bench, arm)
        reset = student.without_routers().sampled(bench, "routers reset") if arm == "dar" else None
        if main:
            sampled[arm] = measure_network(student, images, reset, costs[arm], yardstick)
    return sampled


def measure_network(
    student: Student, images: ImageSet, reset: ImageSet | None, cost: SamplingCost, yardstick: Yardstick
) -> SampledNetwork:
    """`reset` are the images of the student with its routers reset: near 0, the shift says that they are not used."""
    one = SampledSet.of(images)
    row = NetworkRow(
        folder=str(student.run.folder),
        seed=student.run.cfg.seed,
        updates=student.run.updates,
        network=student.facts,
        cost=cost,
        training_step_seconds=student.run.step_seconds(),
        against=against_teacher(one, yardstick, str(student.run.folder)),
        reset_shift_db=None if reset is None else hf_gain_db(spectrum_of(reset.batches()), one.luma),
    )
    return SampledNetwork(row, one)


def against_teacher(ours: SampledSet, yardstick: Yardstick, name: str) -> AgainstTeacher:
    """UnfitError naming the set, by `name`, whose features cannot be compared."""
    teacher = yardstick.teacher
    gains = pooled_gains(ours.luma.energies, teacher.luma.energies)  # NaN for B0 of 32-px images, which has no mode
    _, distance, signed = gain_curve(ours.luma, teacher.luma)
    kurtosis = structure.tail_ratio(*(np.array(one.kurtosis) for one in (ours, teacher)))
    return AgainstTeacher(
        gain_db=dict(zip(BAND_NAMES, gains.tolist(), strict=True)),
        lsd=distance,
        lsd_signed=signed,
        fd_wavelet=wavelet.fd_wavelet(ours.features, teacher.features, yardstick.null, (name, "teacher")),
        hf_kurtosis_ratio=float(kurtosis),
        flat_noise_db=float(structure.flat_gain(ours.flat, teacher.flat)),
        diversity_ratio=diversity_ratios(ours.diversity, teacher.diversity).least,
    )


def sample_and_measure(groups: RunsByArm, yardstick: Yardstick, bench: Bench) -> Study | None:
    """Every run of every arm, seed by seed; None in all processes but the first, which measures."""
    networks: dict[str, list[SampledNetwork]] = {}
    absent: dict[str, str] = {}
    for index in range(len(groups["residual"])):
        students = seed_students({arm: runs[index] for arm, runs in groups.items()}, bench.device)
        if AT_MEAN not in students:
            absent[AT_MEAN] = unfreezable(students["dar"].network)
        for arm, one in sample_seed(students, yardstick, bench).items():
            networks.setdefault(arm, []).append(one)
    return Study(yardstick.teacher, networks, absent) if bench.processes.main else None
