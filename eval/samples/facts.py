"""What is known of a set beside its images: which network made it, how that was trained, and what sampling it costs."""

from dataclasses import asdict, dataclass
from typing import Any

from dmd_dar.diagnostics.usage import RoutingUsage
from dmd_dar.models.teachers import Denoiser

from .cost import SamplingCost


@dataclass(frozen=True)
class NetworkFacts:
    """A network as it is sampled. `network` is the hash of its weights."""

    evaluations: int  # of the network, for one image
    parameters: int
    router_parameters: int
    network: str

    @staticmethod
    def of(network: Denoiser, evaluations: int, digest: str) -> "NetworkFacts":
        """Count the parameters; `digest` is the hash of the weights, found when they were read."""
        parameters, routers = (
            sum(p.numel() for p in counted) for counted in (network.parameters(), network.router_parameters())
        )
        return NetworkFacts(evaluations, parameters, routers, digest)


@dataclass(frozen=True)
class RouterUse:
    """What the routers of a student do, at its rungs, and what resetting them changes."""

    usage: RoutingUsage
    hf_gain_shift_db: float  # HF gain of the student with its routers reset, against itself
    used: bool  # whether that shift is large enough to say so

    @property
    def label(self) -> str:
        return "router used" if self.used else "router unused"

    @property
    def deviation(self) -> float:
        """Mean |n alpha - 1|; 0 is the residual stream."""
        return self.usage.deviation

    @property
    def change_over_t(self) -> float:
        """Mean range of n alpha over the rungs."""
        return self.usage.change_over_t

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self.usage), "hf_gain_shift_db": self.hf_gain_shift_db, "used": self.used}


@dataclass(frozen=True)
class SetFacts:
    """Facts about one set; those that do not apply to it are None."""

    folder: str | None = None
    left_out: str | None = None  # other files of that folder, in words
    network: NetworkFacts | None = None
    updates: int | None = None  # of the student
    seed: int | None = None  # of its training
    routing: RouterUse | None = None
    cost: SamplingCost | None = None
    rungs: tuple[float, ...] | None = None  # like the next ones, where the runs of a report differ in rungs or guidance
    guidance_scale: float | None = None  # of the teacher: the reference's, or with which it was distilled
    sampler: str | None = None  # Euler or re-noised
    kind: str | None = None  # what is equal, but for its steps, to other sets

    def as_json(self) -> dict[str, Any]:
        """The facts that apply, flat, by the names that they have in report.json."""
        facts: dict[str, Any] = {"folder": self.folder, "left_out": self.left_out}
        facts |= {} if self.network is None else asdict(self.network)
        facts |= {"updates": self.updates, "seed": self.seed}
        if self.routing is not None:
            facts |= {"routing": self.routing.as_json(), "label": self.routing.label}
        facts |= {} if self.cost is None else asdict(self.cost)
        facts |= {name: getattr(self, name) for name in ("rungs", "guidance_scale", "sampler", "kind")}
        return {name: value for name, value in facts.items() if value is not None}
