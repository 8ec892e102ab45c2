"""Rows of a comparison over training seeds, made of a few numbers."""

from typing import Any

from eval.metrics.wavelet import Distance
from eval.samples.cost import SamplingCost
from eval.samples.facts import NetworkFacts
from eval.study.results import AgainstTeacher, NetworkRow

UNKNOWN = float("nan")


def network_row(
    seed: int = 0, *, latency: float = 1.0, parameters: int = 1000, kurtosis: float = 1.0, **changes: Any
) -> NetworkRow:
    """A network of that time per image, that size and that kurtosis ratio."""
    against = AgainstTeacher(
        gain_db={"HF": -1.0},
        lsd=1.0,
        lsd_signed=-1.0,
        fd_wavelet=Distance(2.0, 1.0),
        hf_kurtosis_ratio=kurtosis,
        diversity_ratio=1.0,
        flat_noise_db=0.5,
    )
    return NetworkRow(
        folder=f"run_{seed}",
        seed=seed,
        updates=2,
        network=NetworkFacts(4, parameters, 0, "digest"),
        cost=SamplingCost(latency, (latency, latency), 5, 16, UNKNOWN, "", UNKNOWN),
        **{"training_step_seconds": UNKNOWN, "against": against, "reset_shift_db": None, **changes},
    )
