"""How close does a solver of the teacher's ODE come in so many evaluations? python -m benchmarks.solvers

Images of teachers/photos32 by every solver and grid at equal evaluations, against the ODE's own from the same noise:
Heun on the cosine grid with many steps. The result is benchmarks/results/solvers.json.
"""

from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from benchmarks.record import save
from dmd_dar import config
from dmd_dar.data.images import to_pixels
from dmd_dar.device import chosen_device
from dmd_dar.flow import SolverGrid
from dmd_dar.keys import key
from dmd_dar.methods.generate import SampleRange, generate, ode_generator
from dmd_dar.methods.solvers import EVALUATIONS, METHODS, Solver
from dmd_dar.models.guided import guided_velocity
from dmd_dar.models.teachers import Teacher, TeacherConfig, load_teacher
from eval.metrics.spectrum import as_floats, hf_gain_db, spectrum_of
from eval.metrics.structure import flat_gain, flat_patch_energy, hf_kurtosis
from eval.metrics.wavelet import fd_wavelet, wavelet_features


@dataclass(frozen=True)
class SolverBenchmark:
    """python -m benchmarks.solvers"""

    n: int = key(210, "images, classes in turn", least=64)
    evaluations: tuple[int, ...] = key((16, 30, 60), "of the teacher for one image", least=2)
    reference_steps: int = key(150, "Heun steps on the cosine grid that stand for the ODE itself", least=10)
    seed: int = key(0, "of the noise", least=0)
    cpu: bool = key(False, "compute on the CPU although a GPU is there")


def images_of(bench: SolverBenchmark, teacher: Teacher, solver: Solver, device: torch.device) -> Tensor:
    """x0 (N, 3, H, W) in about [-1, 1], on the CPU."""
    network = teacher.network
    generator = ode_generator(guided_velocity(network, teacher.prediction, 1.0), solver)
    x0, _ = generate(
        generator,
        SampleRange(bench.n, bench.seed),
        shape=network.shape,
        num_classes=network.num_conditions,
        device=device,
    )
    return x0.cpu()


def against(images: Tensor, truth: Tensor) -> dict[str, float]:
    """The report's measures of detail, and the plain distance in the images' own units."""
    ours, theirs = (as_floats(to_pixels(x0)) for x0 in (images, truth))
    kurtosis = [float(np.median(hf_kurtosis(x))) for x in (ours, theirs)]
    flat = [flat_patch_energy(x) for x in (ours, theirs)]
    features = [wavelet_features(x) for x in (ours, theirs)]
    return {
        "rms": (images - truth).square().mean().sqrt().item(),
        "hf_gain_db": hf_gain_db(spectrum_of(ours), spectrum_of(theirs)),
        "kurtosis_ratio": kurtosis[0] / kurtosis[1],
        "flat_noise_db": float(flat_gain(*flat)),
        "fd_wavelet": fd_wavelet(features[0], features[1], 0.0, ("solver", "ODE")).value,
    }


def measure(bench: SolverBenchmark) -> None:
    device = chosen_device(bench.cpu)
    teacher = load_teacher(TeacherConfig("teachers/photos32"), device)
    truth = images_of(bench, teacher, Solver("heun", bench.reference_steps, "cosine"), device)
    rows: list[dict[str, Any]] = []
    for calls in bench.evaluations:
        for name in METHODS:
            for law in get_args(SolverGrid):
                solver = Solver(name, calls // EVALUATIONS[name], law)
                found = against(images_of(bench, teacher, solver, device), truth)
                rows.append({"solver": name, "grid": law, "evaluations": solver.evaluations, **found})
                print({key: round(value, 4) if isinstance(value, float) else value for key, value in rows[-1].items()})
    result = {"n": bench.n, "reference_steps": bench.reference_steps, "rows": rows}
    print(save("solvers", device, result))


if __name__ == "__main__":
    config.run_job(SolverBenchmark, measure, description=__doc__ or "")
