"""A student ready to sample, in any process: `dmd_dar.load_pipeline(path)`."""

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dmd_dar.data.images import to_pixels
from dmd_dar.errors import UserError
from dmd_dar.flow import Sampler
from dmd_dar.methods.generate import SampleRange, decoded, few_step_generator, generate
from dmd_dar.models.adapters import CARD as ADAPTER
from dmd_dar.models.adapters import base_config, load_adapter
from dmd_dar.models.codecs import Codec
from dmd_dar.models.denoiser import velocity_of
from dmd_dar.models.teachers import Teacher, TeacherConfig, codec_of, load_teacher

Output = Literal["float", "uint8", "pil"]
Labels = int | str | Sequence[int | str] | Tensor | np.ndarray


@dataclass(frozen=True)
class StudentPipeline:
    """A few-step student and the codec of its latents (None for pixels), both on `device`."""

    student: Teacher
    codec: Codec | None
    device: torch.device

    @property
    def rungs(self) -> tuple[float, ...]:
        """The times of the network's calls, from 1 (noise) down: those that the student was trained at."""
        return self.student.rungs

    @property
    def label_names(self) -> tuple[str, ...]:
        """The classes' names; empty where the teacher had none."""
        return self.student.label_names

    @property
    def num_classes(self) -> int:
        return self.student.network.num_conditions

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, S, S) of the noise."""
        return self.student.network.shape

    @overload
    def __call__(
        self,
        labels: Labels | None = None,
        *,
        n: int | None = None,
        seed: int = 0,
        noise: Tensor | None = None,
        sampler: Sampler | None = None,
        batch_size: int = 64,
        output: Literal["float", "uint8"] = "float",
    ) -> Tensor: ...

    @overload
    def __call__(
        self,
        labels: Labels | None = None,
        *,
        n: int | None = None,
        seed: int = 0,
        noise: Tensor | None = None,
        sampler: Sampler | None = None,
        batch_size: int = 64,
        output: Literal["pil"],
    ) -> list[Image.Image]: ...

    def __call__(
        self,
        labels: Labels | None = None,
        *,
        n: int | None = None,
        seed: int = 0,
        noise: Tensor | None = None,
        sampler: Sampler | None = None,
        batch_size: int = 64,
        output: Output = "float",
    ) -> Tensor | list[Image.Image]:
        """Images: float32 (N, 3, H, W) about [-1, 1], not clamped; or uint8 (N, 3, H, W); or a list of PIL images.

        labels: class index or name of all `n` (default 1) images, or one for each image; None: the classes in turn.
        seed: the noise of image i depends on `seed` and i alone. noise (N, C, S, S), standard normal, takes the place
        of the initial noise. sampler: "stochastic" re-noises between calls, "deterministic" follows the ODE; None: the
        one that the student was trained for. batch_size changes no image beyond rounding.

        Raises UserError for labels that the student does not know, and for numbers of images that contradict.
        """
        labels = _plain(labels)
        count = _count(labels, n, noise)
        if noise is not None and tuple(noise.shape) != (count, *self.shape):
            raise UserError(f"noise of shape {tuple(noise.shape)}: must be {(count, *self.shape)}")
        if output not in ("float", "uint8", "pil"):
            raise UserError(f"output = {output!r}: must be float, uint8 or pil")
        velocity = velocity_of(self.student.network, self.student.prediction)
        generator = few_step_generator(velocity, self.rungs, sampler or self.student.sampler)
        indices = None if labels is None else self._indices(labels, count)
        x0, _ = generate(
            decoded(generator, self.codec and self.codec.decode),
            SampleRange(count, seed, labels=indices, noise=noise),
            shape=self.shape,
            num_classes=self.num_classes,
            batch_size=batch_size,
            device=self.device,
        )
        if output == "float":
            return x0
        pixels = to_pixels(x0)
        return pixels if output == "uint8" else [Image.fromarray(x.permute(1, 2, 0).cpu().numpy()) for x in pixels]

    def _indices(self, labels: Any, count: int) -> Tensor:
        """(count,) int64."""
        each = labels if isinstance(labels, list) else [labels] * count
        return torch.tensor([self._index(label) for label in each], dtype=torch.int64)

    def _index(self, label: Any) -> int:
        if isinstance(label, str):
            index = self.label_names.index(label) if self.label_names.count(label) == 1 else -1
        else:
            try:
                index = operator.index(label)
            except TypeError:
                index = -1
        if not 0 <= index < self.num_classes:
            names = f", by name {', '.join(self.label_names[:8])} ..." if self.label_names else " and has no names"
            raise UserError(f"label {label!r}: the student knows the classes 0 to {self.num_classes - 1}{names}")
        return index


def _plain(labels: Any) -> Any:
    """Arrays and tensors as numbers and texts, or lists of them; None, a number or a text as it is, others as lists."""
    if isinstance(labels, Tensor | np.ndarray | np.generic):
        labels = labels.tolist()
    return list(labels) if isinstance(labels, Iterable) and not isinstance(labels, str) else labels


def _count(labels: Any, n: int | None, noise: Tensor | None) -> int:
    """How many images were asked for; UserError where the arguments contradict, or none says it."""
    each = len(labels) if isinstance(labels, list) else None
    by_argument = {"labels": each, "n": n, "noise": None if noise is None else len(noise)}
    counts = {value for value in by_argument.values() if value is not None}
    if labels is not None and not counts:
        return 1
    if len(counts) != 1 or min(counts) < 1:
        contradiction = ", ".join(
            f"{name} for {value} images" for name, value in by_argument.items() if value is not None
        )
        raise UserError(f"{contradiction or 'no labels, n or noise'}: name the number of images, once and above 0")
    return counts.pop()


def load_pipeline(
    path: str, device: torch.device | str = "cpu", *, revision: str = "", prompts: str = "", base: str = ""
) -> StudentPipeline:
    """The student of `path`, a folder RUN/student or a hub id ("OWNER/NAME", at `revision`), ready to sample.

    prompts: a folder of encoded prompts for a student that reads prompts; empty: those that it was trained on.
    base: the teacher's path, where `path` is the adapter of a LoRA student, RUN/student/adapter.

    Raises UserError or a kind of it, naming the file and the remedy, where there is none, it is damaged, or it is a
    many-step network.
    """
    is_adapter = (Path(path) / ADAPTER).is_file()
    if is_adapter != bool(base):
        fault = "an adapter; name the teacher that it belongs to, base=PATH"
        raise UserError(f"{path}: {fault if is_adapter else 'no adapter; leave base out'}")
    if is_adapter:
        teacher = load_teacher(base_config(Path(path), base, revision, prompts), device)
        student = load_adapter(Path(path), teacher)
    else:
        student = load_teacher(TeacherConfig(str(path), revision, prompts=prompts), device)
    if not student.rungs:
        raise UserError(f"{path}: a many-step network, no few-step student; distil it")
    return StudentPipeline(student, codec_of(student, device), torch.device(device))
