"""What a report compares: images of the teacher, of its few-step baseline and of the students, on the same noise."""

import contextlib
import copy
import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from dmd_dar import config
from dmd_dar.atomic import make_folder, write_atomic
from dmd_dar.data.images import to_model_range, to_pixels
from dmd_dar.data.sources import Source
from dmd_dar.diagnostics.usage import routing_usage
from dmd_dar.distill import DistillConfig
from dmd_dar.draws import Draws, sample_range
from dmd_dar.guidance import Velocity, guided
from dmd_dar.methods.generate import (
    Generator,
    balanced_labels,
    few_step_generator,
    generate,
    ode_generator,
)
from dmd_dar.methods.rollout import Sampler
from dmd_dar.models.denoiser import velocity_of
from dmd_dar.models.saved import load_network, network_hash
from dmd_dar.models.sit import SiT
from eval.cost import latencies, peak_memory
from eval.sets import ImageSet

LATENCY_BATCH = 16
LATENCY_RUNS = 5
USAGE_IMAGES = 56
ROUTER_USED_DB = 0.1  # HF gain that resetting the routers must move
SAMPLERS: dict[str, Sampler] = {"Euler": "deterministic", "re-noised": "stochastic"}


@dataclass(frozen=True)
class Arm:
    """One run folder, read back."""

    name: str
    folder: Path
    cfg: DistillConfig
    raw: dict[str, Any] = field(repr=False)


@dataclass(frozen=True)
class Bench:
    """How images are made for a report: the same noise, labels and batch for every network."""

    count: int
    seed: int
    batch_size: int
    device: torch.device
    shape: tuple[int, ...]
    num_classes: int
    cache: Path

    def images(self, generator: Generator) -> tuple[Tensor, Tensor]:
        """uint8 (N, 3, S, S) and labels (N,): row i shares noise and class across generators."""
        x0, labels = generate(
            generator,
            self.count,
            seed=self.seed,
            shape=self.shape,
            num_classes=self.num_classes,
            phase="eval",
            batch_size=self.batch_size,
            device=self.device,
        )
        return to_pixels(x0).cpu(), labels.cpu()

    def cached(self, facts: dict[str, Any], generator: Generator) -> tuple[Tensor, Tensor]:
        """The images that `facts` and this bench determine, made once; a damaged file is made anew."""
        identity = {**facts, "count": self.count, "seed": self.seed, "shape": self.shape, "classes": self.num_classes}
        name = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
        path = self.cache / f"{name}.safetensors"
        if path.is_file():
            with contextlib.suppress(SafetensorError):
                kept = load_file(path)
                return kept["images"], kept["labels"]
        images, labels = self.images(generator)
        make_folder(self.cache)
        write_atomic(path, save({"images": images, "labels": labels}, metadata={"identity": json.dumps(identity)}))
        return images, labels

    @staticmethod
    def of(cfg: Any, network: SiT, device: torch.device) -> "Bench":
        """From a command's n, seed, batch_size and cache, and the shape of what `network` makes."""
        shape = network.config
        return Bench(
            count=cfg.n,
            seed=cfg.seed,
            batch_size=cfg.batch_size,
            device=device,
            shape=(shape.in_channels, shape.input_size, shape.input_size),
            num_classes=shape.num_classes,
            cache=Path(cfg.cache),
        )

    def call(self, generator: Generator) -> Callable[[], Tensor]:
        """Samples LATENCY_BATCH images, the same ones every time."""
        draws = Draws(self.seed, "latency", 0, sample_range(0, LATENCY_BATCH, self.device))
        cond, noise = balanced_labels(draws.samples, self.num_classes), draws.normal("noise", *self.shape)
        return partial(generator, cond, draws, noise)


RESERVED = ("real", "real, again", "teacher")


def read_arm(run: str) -> Arm:
    """A finished run; a ConfigError where it is none, or its student is not what its configuration asks for."""
    folder = Path(run)
    if not (folder / "config.yaml").is_file():
        raise config.ConfigError(f"runs: {run} holds no config.yaml; name run folders of distill.py")
    if not (folder / "student" / "model.safetensors").is_file():
        raise config.ConfigError(f"runs: {run} has no student yet; let the run finish (the same command continues it)")
    raw = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))
    cfg = config.from_dict(DistillConfig, raw, where=str(folder / "config.yaml"))
    origin = load_network(folder / "student")[1].origin
    if origin.get("steps") != cfg.steps:
        raise config.ConfigError(
            f"runs: {run} holds a student of {origin.get('steps')} of {cfg.steps} steps; let it finish"
        )
    if origin.get("teacher") != network_hash(cfg.teacher.path):
        raise config.ConfigError(f"runs: {run} was distilled from another teacher than {cfg.teacher.path} holds now")
    if folder.name in RESERVED:
        raise config.ConfigError(f"runs: {run} has a name that the report uses itself; rename the folder")
    return Arm(folder.name, folder, cfg, raw)


def read_arms(runs: tuple[str, ...]) -> list[Arm]:
    """The finished runs; a ConfigError where they do not share teacher, data, rungs and guidance."""
    arms = [read_arm(run) for run in runs]
    names = [arm.name for arm in arms]
    if len(set(names)) < len(names):
        raise config.ConfigError(f"runs: several folders are called {names}; give each a name of its own")
    for arm in arms[1:]:
        for what in ("rungs", "guidance_scale", "data", "teacher"):
            ours, theirs = getattr(arms[0].cfg, what), getattr(arm.cfg, what)
            if ours != theirs:
                fault = f"{what} {theirs} in {arm.name}, {ours} in {arms[0].name}"
                raise config.ConfigError(f"runs: {fault}; compare equals")
    return arms


def real_crops(bench: Bench, data: Source, phase: str) -> tuple[Tensor, Tensor]:
    """Training crops uint8 (N, 3, S, S) with the samples' labels (N,), other ones for every `phase`."""
    samples = sample_range(0, bench.count, bench.device)
    labels = balanced_labels(samples, bench.num_classes)
    return data.crops(labels, Draws(bench.seed, phase, 0, samples)).cpu(), labels.cpu()


def real_sets(bench: Bench, data: Source) -> tuple[ImageSet, ImageSet]:
    """Two independent sets of training crops: the reference and its null."""
    return (
        ImageSet("real", *real_crops(bench, data, "real"), "real", paired=False),
        ImageSet("real, again", *real_crops(bench, data, "real_null"), "null", paired=False),
    )


def with_costs(sets: Iterable[ImageSet], bench: Bench) -> list[ImageSet]:
    """The sets, those of networks with the time and the peak memory of sampling LATENCY_BATCH images in their facts.

    The networks take turns, so that a busy machine slows all of them.
    """
    sets = list(sets)
    calls = {one.name: bench.call(one.generator) for one in sets if one.generator is not None}
    timed = latencies(calls, bench.device, LATENCY_RUNS)
    facts: dict[str, dict[str, Any]] = {one.name: {} for one in sets}
    for name, time in timed.items():
        memory = peak_memory(calls[name], bench.device)
        facts[name] = {
            "latency_ms_per_image": round(time.median_ms / LATENCY_BATCH, 3),
            "latency_ms_range": [round(end / LATENCY_BATCH, 3) for end in (time.least_ms, time.most_ms)],
            "latency_runs": time.runs,
            "cost_batch": LATENCY_BATCH,
            "peak_memory_mb": round(memory.peak_bytes / 1e6, 3),
            "peak_memory_method": memory.method,
        }
    return [replace(one, facts={**one.facts, **facts[one.name]}) for one in sets]


def network_facts(network: SiT, evaluations: int, latency: float | None, identity: str) -> dict[str, Any]:
    """`latency` in milliseconds per image, None where it is measured later."""
    routers = sum(p.numel() for p in network.router_parameters())
    return {
        "evaluations": evaluations,
        **({} if latency is None else {"latency_ms_per_image": round(latency, 3)}),
        "parameters": sum(p.numel() for p in network.parameters()),
        "router_parameters": routers,
        "network": identity,
    }


@dataclass(frozen=True)
class Teacher:
    """The teacher of all arms, guided as they were."""

    network: SiT
    velocity: Velocity
    weights: str
    rungs: tuple[float, ...]
    guidance_scale: float

    @staticmethod
    def of(cfg: DistillConfig, device: torch.device) -> "Teacher":
        network, card = load_network(cfg.teacher.path, device)
        velocity = guided(velocity_of(network, card.prediction), cfg.guidance_scale, network.config.num_classes)
        return Teacher(network, velocity, network_hash(cfg.teacher.path), cfg.rungs, cfg.guidance_scale)

    def sample_set(self, bench: Bench, solver_steps: int) -> ImageSet:
        """The reference: Heun in `solver_steps` steps."""
        generator = ode_generator(self.velocity, solver_steps)
        facts = {"teacher": self.weights, "guidance": self.guidance_scale, "heun_steps": solver_steps}
        images, labels = bench.cached(facts, generator)
        facts = network_facts(self.network, 2 * solver_steps, None, self.weights)
        return ImageSet("teacher", images, labels, "teacher", paired=True, facts=facts, generator=generator)

    def undistilled_sets(self, bench: Bench) -> list[ImageSet]:
        """The teacher itself at the students' rungs, along the ODE and re-noised: what distillation has to beat."""
        sets = []
        for name, sampler in SAMPLERS.items():
            generator = few_step_generator(self.velocity, self.rungs, sampler)
            facts = {"teacher": self.weights, "guidance": self.guidance_scale, "rungs": self.rungs, "sampler": sampler}
            images, labels = bench.cached(facts, generator)
            facts = network_facts(self.network, len(self.rungs), None, self.weights)
            sets.append(ImageSet(f"undistilled, {name}", images, labels, "undistilled", True, facts, generator))
        return sets


def student_set(arm: Arm, bench: Bench, teacher_images: ImageSet, hf_gain: Callable[[Tensor], float]) -> ImageSet:
    """The arm's images, with what its routers do: `hf_gain` gives the HF gain in dB of a set of images."""
    network, card = load_network(arm.folder / "student", bench.device)
    generator = few_step_generator(velocity_of(network, card.prediction), card.rungs, card.sampler)
    identity = {"student": network_hash(arm.folder / "student"), "rungs": card.rungs}
    images, labels = bench.cached(identity, generator)
    facts = network_facts(network, len(card.rungs), None, identity["student"])
    facts |= {"updates": card.origin["steps"], "seed": arm.cfg.seed}
    if network.dar is not None:
        draws = Draws(bench.seed, "usage", 0, sample_range(0, USAGE_IMAGES, bench.device))
        x0 = to_model_range(teacher_images.images[:USAGE_IMAGES]).to(bench.device)
        cond = teacher_images.labels[:USAGE_IMAGES].to(bench.device)
        facts["routing"] = routing_usage(network, x0, cond, card.rungs, draws)
        plain = copy.deepcopy(network)
        plain.dar.reset()
        without = few_step_generator(velocity_of(plain, card.prediction), card.rungs, card.sampler)
        reset, _ = bench.cached({**identity, "routers": "reset"}, without)
        shift = hf_gain(reset) - hf_gain(images)
        facts["routing"] |= {"hf_gain_shift_db": shift, "used": abs(shift) >= ROUTER_USED_DB}
        facts["label"] = "router used" if abs(shift) >= ROUTER_USED_DB else "router unused"
    return ImageSet(arm.name, images, labels, "student", True, facts, generator)
