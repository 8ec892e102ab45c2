"""What a comparison over training seeds holds, as frozen dataclasses whose fields are the keys of compare.json.

Numbers that are not defined are NaN here and null in the file; an end of an interval that is infinite is unbounded.
Arms go by name: residual, dar, and the controls.
"""

from dataclasses import dataclass, field

from ..measure.results import Curve, Provenance, Recorded, SeedCurves, SeedDifference
from ..metrics.intervals import Interval
from ..metrics.record import FLAT, OPTIONAL
from ..metrics.wavelet import Distance
from ..samples.cost import SamplingCost
from ..samples.facts import NetworkFacts, SetFacts
from .endpoint import Power
from .few_steps import FewSteps

__all__ = [
    "AgainstTeacher",
    "ArmComparison",
    "Curve",
    "NetworkRow",
    "PairedDifference",
    "RunRecord",
    "SeedCurves",
    "SeedDifference",
    "StepsResult",
    "StudyResult",
    "AdjustedDifference",
]


@dataclass(frozen=True, kw_only=True)
class AgainstTeacher:
    """How far the images of one network are from the teacher's."""

    gain_db: dict[str, float]  # by band; NaN for a band without a mode
    lsd: float  # dB
    lsd_signed: float
    fd_wavelet: Distance
    hf_kurtosis_ratio: float
    diversity_ratio: float  # least over the classes
    flat_noise_db: float | None = field(default=None, metadata=OPTIONAL)  # None: a file of before it was measured


@dataclass(frozen=True, kw_only=True)
class NetworkRow:
    """The numbers of one network: a run's student, or what a control made of it."""

    folder: str
    seed: int
    updates: int
    network: NetworkFacts = field(metadata=FLAT)
    cost: SamplingCost = field(metadata=FLAT)
    training_step_seconds: float  # NaN where the run kept no log
    against: AgainstTeacher = field(metadata=FLAT)
    reset_shift_db: float | None = field(default=None, metadata=OPTIONAL)  # HF gain with routers reset; of DAR alone


@dataclass(frozen=True, kw_only=True)
class ArmComparison:
    """The endpoint D = |HF gain of baseline| - |HF gain of DAR| in dB; above 0 DAR is nearer to the teacher."""

    baseline: str
    seeds: list[int]
    pilot: bool  # too few seeds to decide
    per_seed: list[SeedDifference]
    gain_db: dict[str, float]  # signed, mean over seeds, by arm
    absolute_gain_db: dict[str, float]
    difference_db: Interval  # D, by `method`, chosen for `reason`
    method: str
    reason: str
    intervals: dict[str, Interval]  # D by every method
    coverage: dict[str, float]  # simulated, by method
    least_coverage: float
    p: float  # exact sign-flip test
    least_p: float  # that so many seeds can reach
    variance_db2: dict[str, float]  # of D: seed, and own and shared of one image
    power: Power
    curve: SeedCurves
    p_holm: float | None = field(default=None, metadata=OPTIONAL)  # within the controls, or the primaries over steps


@dataclass(frozen=True, kw_only=True)
class PairedDifference:
    """A quantity in both arms, means over seeds, and residual - DAR pair by pair: above 0 in favour of DAR.

    All None where it is not defined for a run, as `skipped` says.
    """

    title: str
    residual: float | None = None
    dar: float | None = None
    difference: Interval | None = None  # Student's t
    per_seed: list[float] | None = field(default=None, metadata=OPTIONAL)
    p: float | None = None  # exact sign-flip test
    skipped: str | None = field(default=None, metadata=OPTIONAL)


@dataclass(frozen=True, kw_only=True)
class AdjustedDifference(PairedDifference):
    """One of a family of tests: `p_holm` is its p-value after Holm, None where it was skipped."""

    p_holm: float | None = None


@dataclass(frozen=True, kw_only=True)
class StudyResult:
    """All that compare.json holds of runs of equal steps."""

    schema_version: int
    label: str  # empty where the study can decide
    images: int  # of each network
    primary: ArmComparison
    controls: dict[str, ArmComparison]
    absent: dict[str, str]  # controls that could not be made, and why
    secondaries: dict[str, AdjustedDifference]
    costs: dict[str, PairedDifference]
    runs: dict[str, list[NetworkRow]]  # by arm, in the order of the seeds
    few_steps: FewSteps | None = field(default=None, metadata=OPTIONAL)  # of its runs, beside others of other steps
    conclusion: str = ""
    reference: SetFacts | Recorded = field(default_factory=Recorded)  # facts about the teacher's images
    provenance: Provenance | Recorded = field(default_factory=Recorded)


@dataclass(frozen=True, kw_only=True)
class StepsResult:
    """All that compare.json holds of several steps: a comparison of each, in the order of calls, by what tells them
    apart. Their primaries are one family of tests.
    """

    schema_version: int
    label: str  # empty where all of them can decide
    images: int
    steps: dict[str, StudyResult]  # without reference and provenance, which are shared
    conclusion: str
    reference: SetFacts | Recorded = field(default_factory=Recorded)
    provenance: Provenance | Recorded = field(default_factory=Recorded)


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """The small file of one network: its row with what a reader needs to place it."""

    schema_version: int
    label: str
    images: int
    arm: str
    row: NetworkRow = field(metadata=FLAT)
    provenance: Recorded  # code, contract and versions alone
