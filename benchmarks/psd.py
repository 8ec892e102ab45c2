"""How fast is the power spectrum? python -m benchmarks.psd n=10000

`radial_psd` against the plain way, a float64 rfft2 and a bincount image by image, on the same images. The ways take
turns; the result is benchmarks/results/psd.json.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from benchmarks.record import ratio, save, spread
from dmd_dar import config
from dmd_dar.keys import key
from dmd_dar.spectrum import LUMA, modes, radial_frequencies, radial_psd
from eval.samples.cost import interleaved

PLAIN, ONE, ALL = "float64 rfft2 and bincount, image by image", "radial_psd, 1 thread", "radial_psd, all threads"


@dataclass(frozen=True)
class PsdBenchmark:
    """python -m benchmarks.psd"""

    n: int = key(512, "images of each round", least=1)
    size: int = key(256, "side of an image", unit="pixels", least=32)
    batch_size: int = key(64, "images in memory, read again until there are n", least=1)
    rounds: int = key(5, "interleaved turns of each way", least=1)


def stream(images: Tensor, count: int) -> Iterator[Tensor]:
    """The images over and over, `count` in all."""
    for start in range(0, count, len(images)):
        yield images[: count - start]


def plain_psd(batches: Iterator[Tensor], size: int) -> np.ndarray:
    """R of bins 2 .. S / 2 in float64, one image after the other: (F,)."""
    grid = modes(size, size)
    bins, multiplicity = grid.radial_bin.numpy().ravel(), grid.multiplicity.numpy()
    row = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(size) / size)
    window = row[:, None] * row
    total, count = np.zeros(size // 2 + 2), 0
    for batch in batches:
        for image in batch.numpy():
            red, green, blue = image.astype(np.float64)
            luma = LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue
            transform = np.fft.rfft2((luma - (luma * window).sum() / window.sum()) * window)
            power = multiplicity * np.abs(transform) ** 2
            total += np.bincount(bins, weights=power.ravel(), minlength=size // 2 + 2)
            count += 1
    _, modes_per_bin = radial_frequencies(size, size)
    return total[2 : size // 2 + 1] / (count * (window**2).sum() * modes_per_bin.numpy())


def ways(images: Tensor, cfg: PsdBenchmark) -> dict[str, Callable[[], np.ndarray]]:
    every = torch.get_num_threads()

    def ours(threads: int) -> np.ndarray:
        torch.set_num_threads(threads)
        try:
            return radial_psd(stream(images, cfg.n))[1].numpy()
        finally:
            torch.set_num_threads(every)

    return {
        PLAIN: lambda: plain_psd(stream(images, cfg.n), cfg.size),
        ONE: lambda: ours(1),
        ALL: lambda: ours(every),
    }


def run(cfg: PsdBenchmark) -> None:
    """Measure, print, save."""
    shape = (min(cfg.batch_size, cfg.n), 3, cfg.size, cfg.size)
    images = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    todo = ways(images, cfg)
    curves = {name: way() for name, way in todo.items()}
    times = interleaved(todo, runs=cfg.rounds)
    result = {
        "n": cfg.n,
        "size": cfg.size,
        "seconds": {name: spread(samples) for name, samples in times.items()},
        "times_faster": {name: ratio(times, PLAIN, name) for name in (ONE, ALL)},
        "largest_relative_difference": {
            name: float(abs(curves[name] / curves[PLAIN] - 1).max()) for name in (ONE, ALL)
        },
    }
    for name in todo:
        milliseconds = 1000 * result["seconds"][name]["median"] / cfg.n
        print(f"{name:<44} {milliseconds:7.3f} ms per image {result['times_faster'].get(name, 1.0):6.2f} x")
    print(f"largest relative difference {max(result['largest_relative_difference'].values()):.1e}")
    print(save("psd", torch.device("cpu"), result))


if __name__ == "__main__":
    config.run_job(PsdBenchmark, run, sys.argv[1:], description=__doc__ or "")
