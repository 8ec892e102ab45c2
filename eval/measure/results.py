"""What a report holds, as frozen dataclasses whose fields are the keys of report.json.

Numbers that are not defined are NaN here and null in the file; an end of an interval that is infinite is unbounded.
`jsonable` makes the file's objects of them.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar

from ..metrics.classifier import Modes
from ..metrics.colour import ColourComparison
from ..metrics.convergence import Discretisation
from ..metrics.diversity import DiversityRatio
from ..metrics.features import FeatureDistance
from ..metrics.intervals import Interval
from ..metrics.neighbours import PlacedNeighbours
from ..metrics.perceptual import LpipsDiversity, LpipsPaired
from ..metrics.power_map import Directions, GridLine
from ..metrics.record import FLAT, OPTIONAL, jsonable
from ..metrics.sliced import LevelDistance
from ..metrics.verdict import Verdict
from ..samples.facts import RouterUse, SetFacts
from ..samples.sets import Role

__all__ = [
    "Against",
    "Bands",
    "Check",
    "ClipResult",
    "CodeState",
    "Comparison",
    "Contract",
    "Curve",
    "Forest",
    "ForestComparison",
    "LatentComparison",
    "LatentResult",
    "LatentRow",
    "Margins",
    "Measurements",
    "Origin",
    "Provenance",
    "Recorded",
    "Reference",
    "Report",
    "SeedCurves",
    "SeedDifference",
    "SetRow",
    "Skipped",
    "Wavelet",
    "jsonable",
]

T = TypeVar("T")
Reference = Literal["teacher", "real"]  # what a set is compared with


@dataclass(frozen=True)
class Skipped:
    """A metric that was not measured. `requested` is False where weights that nobody asked for are missing."""

    metric: str
    name: str  # of the set, empty where it concerns all
    reason: str
    requested: bool = True


@dataclass(frozen=True)
class Bands:
    """Names of the bands, HF last, and their edges in cycles per pixel (or per latent cell)."""

    names: tuple[str, ...]
    edges: tuple[float, ...]


@dataclass(frozen=True)
class Margins:
    """How far a set may be from its reference for the verdict to call detail preserved."""

    gain_db: float
    kurtosis: tuple[float, float]
    flat_noise_db: float


@dataclass(frozen=True)
class Wavelet:
    """Mean log energy and median excess kurtosis of sub-bands, (3, 3): finest level first, columns LH, HL, HH."""

    log_energy: list[list[float]]
    kurtosis: list[list[float]]


@dataclass(frozen=True, kw_only=True)
class ClipResult:
    """CLIP score of a set against its prompts: 100 times the mean cosine, with its interval."""

    value: float
    low: float
    high: float
    standard_error: float | None
    prompt: str
    facts: dict[str, Any] = field(metadata=FLAT)  # model, architecture, tag, prefix, preprocess, sha256, images
    comparable_to_published: bool


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A set against a reference. Gains are in dB: 0 preserved, below 0 lost, above 0 added."""

    reference: str
    paired: bool
    reference_images: int
    class_share_gap: float | None  # None where classes are not known
    verdict: Verdict  # on detail
    gain_db: dict[str, Interval]  # by band
    gain_db_median: dict[str, float] | None  # by band, of paired sets
    images_for_quarter_db: int | None
    hf_gain_by_class: dict[int, float]
    hf_gain_class_median: float | None
    gain_curve_db: list[float]  # (F,)
    lsd: float
    lsd_signed: float
    lsd_null: float
    hfer_difference: Interval
    slope_difference: float
    slope_hf_difference: float
    hf_kurtosis_ratio: Interval
    gradient_kurtosis_ratio: Interval
    parent_child_difference: Interval
    flat_noise_db: Interval
    wavelet_kurtosis_ratio: list[list[float]]  # (3, 3) as in `Wavelet`
    grid_lines: list[GridLine]
    map_sectors_db: dict[str, Directions]  # by band
    sliced_wasserstein: list[LevelDistance]  # finest level first
    diversity_ratio: dict[str, DiversityRatio]  # pixels, and wavelet where classes are known
    chroma: dict[str, dict[str, Interval]] | None  # gains by channel and band; None where no class has colour
    distances: dict[str, FeatureDistance] = field(metadata=FLAT)  # by extractor: fd_wavelet, fid, ...
    neighbours: dict[str, PlacedNeighbours]  # by extractor
    modes: Modes | None
    lpips_paired: LpipsPaired | None
    clip_difference: Interval | None = field(default=None, metadata=OPTIONAL)  # at the same noise and prompts
    colour: ColourComparison | None = field(default=None, metadata=OPTIONAL)  # None in files of earlier versions


@dataclass(frozen=True)
class Against(Generic[T]):
    """A set against the teacher and against real images; None against itself and where there are none."""

    teacher: T | None = None
    real: T | None = None

    def of(self, reference: Reference) -> T | None:
        """The one of that name."""
        return self.teacher if reference == "teacher" else self.real

    def measured(self) -> Iterator[tuple[Reference, T]]:
        """Those that there are, by name."""
        if self.teacher is not None:
            yield "teacher", self.teacher
        if self.real is not None:
            yield "real", self.real


@dataclass(frozen=True, kw_only=True)
class SetRow:
    """One set of images: what is measured on it alone, and against the references."""

    name: str
    role: Role
    paired: bool
    images: int
    facts: SetFacts
    frequencies: list[float]  # (F,) cycles per pixel
    power: list[float]  # (F,) radial power of luma
    hfer: float
    slope: float
    slope_hf: float
    hf_kurtosis: float
    gradient_kurtosis: float
    parent_child_corr: float
    wavelet: Wavelet
    map_sectors_db: dict[str, Directions]  # by band
    grid_lines: list[GridLine]
    clip: ClipResult | None = field(default=None, metadata=OPTIONAL)
    lpips_diversity: LpipsDiversity | None = field(default=None, metadata=OPTIONAL)
    fid_npz: FeatureDistance | None  # against statistics from a file
    against: Against[Comparison]


@dataclass(frozen=True, kw_only=True)
class LatentComparison:
    """A set's latents against another's; all channels pooled but for `hf_gain_db_by_channel`."""

    paired: bool
    gain_db: dict[str, Interval]  # by band
    hf_gain_db_by_channel: list[Interval]
    gain_curve_db: list[float]
    lsd: float
    lsd_signed: float
    lsd_null: float


@dataclass(frozen=True, kw_only=True)
class LatentRow:
    """Spectra of one set's latents; `power` is the mean over channels."""

    name: str
    role: Role
    images: int
    facts: SetFacts
    frequencies: list[float]  # (F,) cycles per latent cell
    power: list[float]
    power_by_channel: list[list[float]]
    hfer: float
    slope: float
    slope_hf: float
    against: Against[LatentComparison]


@dataclass(frozen=True)
class LatentResult:
    """The spectra of all sets that have latents; `teacher` and `real` name those that they are compared with."""

    channels: int
    size: tuple[int, int]  # cells
    bands: Bands
    teacher: str
    real: str | None
    sets: list[LatentRow]


@dataclass(frozen=True)
class SeedDifference:
    """HF gain of each arm for one training seed, and by how much DAR is nearer to the teacher, in dB."""

    seed: int
    gain_db: dict[str, float]  # by arm
    difference_db: Interval


@dataclass(frozen=True, kw_only=True)
class ForestComparison:
    """DAR against one arm, seed by seed and over all of them, in dB. `steps` tells several numbers of steps apart.

    `p_holm` is p after Holm, within the endpoints over several steps or within the controls.
    """

    baseline: str
    steps: str | None = field(default=None, metadata=OPTIONAL)
    method: str
    pilot: bool
    p: float
    p_holm: float | None = field(default=None, metadata=OPTIONAL)
    seeds: list[int]
    per_seed: list[SeedDifference]
    gain_db: dict[str, float]  # by arm
    difference_db: Interval


@dataclass(frozen=True)
class Curve:
    """Values over frequency with a band, in dB."""

    value: list[float]
    low: list[float]
    high: list[float]


@dataclass(frozen=True)
class SeedCurves:
    """Gain over frequency of both arms and their difference, means over training seeds."""

    frequencies: list[float]
    curves: dict[str, Curve] = field(metadata=FLAT)  # by arm, and "difference"


@dataclass(frozen=True, kw_only=True)
class Forest:
    """What the figure seed by seed shows; `source` says where it comes from."""

    source: str
    label: str
    conclusion: str
    curve: SeedCurves | None = field(default=None, metadata=OPTIONAL)
    comparisons: list[ForestComparison]


@dataclass(frozen=True, kw_only=True)
class Check:
    """A student beside the better undistilled sampler, its `baseline`.

    fd_excess: fd_wavelet above its null; fd_excess_share: as a share of the baseline's, None where that is near its
    null itself. hf_gain_db in dB; least_class_diversity as a ratio to the teacher's; NaN where it is not known.
    """

    name: str
    baseline: str
    fd_excess: float
    fd_excess_share: float | None
    hf_gain_db: float
    hf_gain_db_baseline: float
    least_class_diversity: float
    routing: RouterUse | None
    latency_ms_per_image: float
    peak_memory_mb: float


@dataclass(frozen=True)
class Origin:
    """What a command itself knows of where its numbers come from; those that know more add their own fields."""

    command: str


@dataclass(frozen=True)
class CodeState:
    """The commit, `unknown` outside a checkout; whether tracked files differ from it, None where that is not known."""

    commit: str
    dirty: bool | None


Constant = str | float | tuple["Constant", ...]


@dataclass(frozen=True)
class Contract:
    """How images become numbers, as the constants of the code by name."""

    constants: dict[str, Constant] = field(metadata=FLAT)


@dataclass(frozen=True)
class Recorded:
    """Facts read back from a file, which an earlier version may have written: by their names there, as they are."""

    facts: dict[str, Any] = field(default_factory=dict, metadata=FLAT)


@dataclass(frozen=True)
class Provenance:
    """Where the numbers of a file come from. Those of equal `contract_hash` may be compared."""

    origin: Recorded | Origin = field(metadata=FLAT)
    git: CodeState
    contract_hash: str
    contract: Contract
    versions: dict[str, str]  # by package
    device: str
    seconds: float  # of wall time


@dataclass(frozen=True, kw_only=True)
class Measurements:
    """Every set against the teacher and against real images, which are named, and the scales to read them by."""

    schema_version: int
    seed: int
    teacher: str
    real: str | None
    class_names: dict[int, str]
    image_size: tuple[int, int]
    bands: Bands
    margins: Margins
    skipped: list[Skipped]
    sets: list[SetRow]

    def row(self, name: str) -> SetRow:
        """The set of that name. KeyError where there is none."""
        return {row.name: row for row in self.sets}[name]


@dataclass(frozen=True, kw_only=True)
class Report(Measurements):
    """All that report.json holds."""

    latent: LatentResult | None = None
    forest: Forest | None = None
    # of the reference; None where no network made it
    discretisation: Discretisation | None = field(default=None, metadata=OPTIONAL)
    fitted_to: str = ""
    checks: list[Check] = field(default_factory=list)
    conclusions: list[str] = field(default_factory=list)
    title: str = ""
    provenance: Provenance | None = None
