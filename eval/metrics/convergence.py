"""Whether a teacher's samples are those of its ODE: the same noise solved with twice as many evaluations tells."""

from dataclasses import dataclass, fields
from typing import Any

from .intervals import Interval
from .verdict import FLAT_NOISE_DB, GAIN_MARGIN_DB, KURTOSIS_RANGE


@dataclass(frozen=True, kw_only=True)
class Discretisation:
    """What the teacher's samples are against those from the same noise by twice the solver's steps.

    Gains and noise in dB. By Richardson's rule a solver of order 2 leaves 4/3 of this difference to the ODE itself.
    """

    evaluations: int  # of the network, for one image of the teacher
    evaluations_twice: int
    images: int
    hf_gain_db: Interval
    hf_kurtosis_ratio: Interval
    flat_noise_db: Interval
    fd_wavelet: float
    fd_wavelet_null: float | None  # what halves of one set read at this number of images

    @property
    def exceeded(self) -> list[str]:
        """What is beyond the verdict's margins, or for fd_wavelet above its null, by name; not what is undefined."""
        (low, high), kurtosis = KURTOSIS_RANGE, self.hf_kurtosis_ratio.value
        beyond = {
            "HF gain": abs(self.hf_gain_db.value) > GAIN_MARGIN_DB,
            "kurtosis": kurtosis < low or kurtosis > high,
            "flat noise": abs(self.flat_noise_db.value) > FLAT_NOISE_DB,
            "fd_wavelet": self.fd_wavelet_null is not None and self.fd_wavelet > self.fd_wavelet_null,
        }
        return [name for name, is_beyond in beyond.items() if is_beyond]

    @property
    def converged(self) -> bool:
        """Whether a verdict against these samples speaks of the teacher and not of its solver."""
        return not self.exceeded

    def as_json(self) -> dict[str, Any]:
        """The numbers, and what they say."""
        numbers = {field.name: getattr(self, field.name) for field in fields(self)}
        return {**numbers, "converged": self.converged, "exceeded": self.exceeded}

    @property
    def sentence(self) -> str:
        """The numbers, and where one is beyond its margin what follows."""
        null = "" if self.fd_wavelet_null is None else f" (null {self.fd_wavelet_null:.2f})"
        numbers = (
            f"The teacher at {self.evaluations} calls against itself at {self.evaluations_twice}, same noise,"
            f" {self.images} images: HF gain {self.hf_gain_db.value:+.2f} dB, kurtosis ratio"
            f" {self.hf_kurtosis_ratio.value:.2f}, flat noise {self.flat_noise_db.value:+.2f} dB, fd_wavelet"
            f" {self.fd_wavelet:.2f}{null}"
        )
        if self.converged:
            return f"{numbers}: converged."
        return (
            f"{numbers}: not converged in {', '.join(self.exceeded)}. The verdicts compare with the solver's errors"
            " too; give more solver_steps, or another solver or solver_grid."
        )
