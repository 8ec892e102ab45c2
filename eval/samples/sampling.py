"""How images are made for an evaluation: the same noise, classes and decoding for every network, kept once made.

Legend: N images, B of a batch; latents are (N, C, h, w).
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from dmd_dar import spectrum
from dmd_dar.data.images import to_pixels
from dmd_dar.data.kept import Kept
from dmd_dar.draws import Draws, sample_range
from dmd_dar.errors import UserError
from dmd_dar.methods.generate import Generator, SampleRange, balanced_labels, generate
from dmd_dar.models.codecs import Codec
from dmd_dar.models.sit import SiT
from dmd_dar.models.sizes import pixels_of

from .cost import SamplingCost, flops, latencies, peak_memory
from .images import UnfitError, share_of
from .parallel import Processes, side_by_side
from .sets import ImageSet, Role

SMALL_BATCH = 16  # images that keep one thread busy
LATENCY_BATCH = 16
LATENCY_RUNS = 5


@dataclass(frozen=True)
class Made:
    """Images as they are measured, and of a latent model the latents that they were decoded from."""

    images: Tensor  # uint8 (N, 3, H, W)
    labels: Tensor  # (N,)
    latents: Tensor | None = None  # (N, C, h, w) float32

    def as_set(self, name: str, role: Role, paired: bool, **more: Any) -> ImageSet:
        return ImageSet(name, self.images, self.labels, role, paired, latents=self.latents, **more)

    def rows(self) -> dict[str, Tensor]:
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclass(frozen=True)
class Bench:
    """Row i of all that it makes has the noise and the class of sample i, whatever the batches and the processes."""

    count: int
    seed: int
    batch_size: int
    device: torch.device
    shape: tuple[int, ...]  # of what the networks make
    num_classes: int
    cache: Path
    codec: Codec | None = None
    codec_digest: str = ""
    shareable: bool = False  # whether threads may call one network at the same time
    processes: Processes = field(default_factory=Processes)

    @staticmethod
    def of(
        cfg: Any,
        network: Any,
        device: torch.device,
        codec: Codec | None = None,
        processes: Processes | None = None,
        shape: tuple[int, ...] | None = None,
    ) -> "Bench":
        """From a command's n, seed, batch_size and cache, and what `network` makes; UserError if that is too small.

        shape: (C, h, w), where it is not the network's own.
        """
        made: tuple[int, ...] = shape or network.shape
        height, width = pixels_of(made, 1 if codec is None else codec.factor)
        if min(height, width) < spectrum.MIN_SIZE:
            raise UserError(
                f"images of {height} x {width} pixels are too small: a spectrum needs {spectrum.MIN_SIZE} a side;"
                " evaluate a network of larger images"
            )
        return Bench(
            count=cfg.n,
            seed=cfg.seed,
            batch_size=cfg.batch_size,
            device=device,
            shape=made,
            num_classes=network.num_conditions,
            cache=Path(cfg.cache),
            codec=codec,
            codec_digest="" if codec is None else codec.digest(),
            # a SiT keeps nothing between two operations, as others may; a VAE decodes a few images to save memory
            shareable=isinstance(network, SiT) and codec is None,
            processes=processes or Processes(),
        )

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the images, in pixels."""
        return pixels_of(self.shape, 1 if self.codec is None else self.codec.factor)

    def decoded(self, x0: Tensor) -> Tensor:
        """What a network makes (B, C, S, S) as images (B, 3, H, W), about [-1, 1]."""
        return x0 if self.codec is None else self.codec.decode(x0)

    def seen(self, x0: Tensor, labels: Tensor, what: str, samples: Tensor) -> Made:
        """A batch of it as it is measured. UnfitError naming `what` and a sample that holds numbers not finite."""
        images = self.decoded(x0)
        broken = ~(images.flatten(1).isfinite().all(1) & x0.flatten(1).isfinite().all(1))
        if broken.any():
            raise UnfitError(
                f"{what}: sample {samples[broken][0].item()} holds numbers that are not finite; its network has"
                " diverged, leave it out"
            )
        latents = None if self.codec is None else x0.float().cpu()
        return Made(to_pixels(images).cpu(), labels.cpu(), latents)

    def workers(self) -> int:
        """Batches that are made at a time, which share batch_size and torch's threads."""
        most = self.batch_size // SMALL_BATCH if self.shareable and self.device.type == "cpu" else 1
        return max(1, min(torch.get_num_threads(), most))

    def joined(self, make: Callable[[Tensor], Made], what: str) -> Made:
        """All images, from make(samples (B,)), batch by batch and shared out among the processes."""
        workers = self.workers()
        size, threads = self.batch_size // workers, -(-torch.get_num_threads() // workers)

        def share(rank: int, world: int) -> dict[str, Tensor]:
            start, stop = share_of(self.count, rank, world)
            parts = []
            hidden = None if self.processes.main else True
            batches = [sample_range(first, min(first + size, stop), self.device) for first in range(start, stop, size)]
            with tqdm(total=stop - start, desc=what, unit="img", disable=hidden, leave=False) as bar, torch.no_grad():
                for part in side_by_side([partial(make, samples) for samples in batches], workers, threads):
                    parts.append(part.rows())
                    bar.update(len(part.labels))
            return {name: torch.cat([part[name] for part in parts]).contiguous() for name in parts[0]}

        return Made(**self.processes.joined(self.count, share))

    def images(self, generator: Generator, what: str = "sampling") -> Made:
        """One image of every sample."""

        def make(samples: Tensor) -> Made:
            x0, labels = generate(
                generator,
                SampleRange(len(samples), self.seed, "eval", first=int(samples[0])),
                shape=self.shape,
                num_classes=self.num_classes,
                batch_size=self.batch_size,
                device=self.device,
            )
            return self.seen(x0, labels, what, samples)

        return self.joined(make, what)

    def cached(self, facts: dict[str, Any], generator: Generator, what: str = "sampling") -> Made:
        """The images that `facts`, this bench and the code determine, made once; a broken file is made anew."""
        facts = {**facts, "count": self.count, "seed": self.seed, "shape": self.shape, "classes": self.num_classes}
        facts |= {"codec": self.codec_digest} if self.codec_digest else {}
        facts |= {"decode": "tiles"} if self.codec is not None and self.codec.tiled else {}
        kept = Kept.of(self.cache, self.device, facts)
        found = kept.find()
        if not self.processes.any(found is None):
            return Made(**found)  # type: ignore[arg-type]
        made = self.images(generator, what)
        if self.processes.main:
            kept.keep(made.rows())
        return made

    def call(self, generator: Generator, count: int = LATENCY_BATCH) -> Callable[[], Tensor]:
        """Samples and decodes `count` images, the same ones every time."""
        draws = Draws(self.seed, "latency", 0, sample_range(0, count, self.device))
        cond, noise = balanced_labels(draws.samples, self.num_classes), draws.normal("noise", *self.shape)
        make = partial(generator, cond, draws, noise)
        return make if self.codec is None else lambda: self.decoded(make())


def with_costs(sets: Iterable[ImageSet], bench: Bench) -> list[ImageSet]:
    """The sets, those of networks with what sampling costs (`costs_of`) in their facts."""
    sets = list(sets)
    costs = costs_of({one.name: one.generator for one in sets if one.generator is not None}, bench)
    return [replace(one, facts=replace(one.facts, cost=costs.get(one.name))) for one in sets]


def costs_of(generators: Mapping[str, Generator], bench: Bench) -> dict[str, SamplingCost]:
    """Time and peak memory of sampling and decoding LATENCY_BATCH images, floating-point operations of one.

    The networks take turns, so that a busy machine slows all of them.
    """
    calls = {name: bench.call(generator) for name, generator in generators.items()}
    costs: dict[str, SamplingCost] = {}
    for name, time in latencies(calls, bench.device, LATENCY_RUNS).items():
        memory = peak_memory(calls[name], bench.device)
        least, most = (round(end / LATENCY_BATCH, 3) for end in (time.least_ms, time.most_ms))
        costs[name] = SamplingCost(
            latency_ms_per_image=round(time.median_ms / LATENCY_BATCH, 3),
            latency_ms_range=(least, most),
            latency_runs=time.runs,
            cost_batch=LATENCY_BATCH,
            peak_memory_mb=round(memory.peak_bytes / 1e6, 3),
            peak_memory_method=memory.method,
            gflops_per_image=round(flops(bench.call(generators[name], 1)) / 1e9, 6),
        )
    return costs
