"""A student ready to sample, in any process: `dmd_dar.load_pipeline(path)`."""

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dmd_dar.data.images import to_pixels
from dmd_dar.errors import UserError
from dmd_dar.flow import Sampler
from dmd_dar.messages import LOGGER
from dmd_dar.methods.generate import SampleRange, decoded, few_step_generator, generate
from dmd_dar.models.adapters import CARD as ADAPTER
from dmd_dar.models.adapters import adapter_origin, base_config, load_adapter
from dmd_dar.models.codecs import Codec, Decoding
from dmd_dar.models.denoiser import velocity_of
from dmd_dar.models.diffusers_denoiser import DiffusersDenoiser
from dmd_dar.models.families.form import CELLS, Latents
from dmd_dar.models.hub import resolve
from dmd_dar.models.prompts import absent_prompts
from dmd_dar.models.saved import holds_network, read_card
from dmd_dar.models.sizes import Pixels, pixels_of, shape_at
from dmd_dar.models.teachers import Teacher, TeacherConfig, codec_of, load_teacher
from dmd_dar.models.words import Source, Words

Output = Literal["float", "uint8", "pil"]
Labels = int | str | Sequence[int | str] | Tensor | np.ndarray


@dataclass(frozen=True)
class StudentPipeline:
    """A few-step student and the codec of its latents (None for pixels), both on `device`.

    `words` encodes prompts for one that reads prompts; None for classes.
    """

    student: Teacher
    codec: Codec | None
    device: torch.device
    words: Words | None = None

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
        """(C, H, W) of the noise where no other size is asked for: the first that the student was trained at."""
        return self.shape_at()

    @property
    def trained_at(self) -> tuple[Pixels, ...]:
        """(height, width) of the images that the student was trained at, in pixels."""
        network, sizes = self.student.network, self.student.origin.get("sizes")
        return tuple((int(h), int(w)) for h, w in sizes) if sizes else (pixels_of(network.shape, self.factor),)

    @property
    def factor(self) -> int:
        """Pixels for each cell of the noise along one side."""
        return 1 if self.codec is None else self.codec.factor

    def shape_at(self, height: int = 0, width: int = 0) -> tuple[int, int, int]:
        """(C, H, W) of the noise of height x width pixels; 0: as the first size that the student was trained at.

        Raises UserError for a size that the network or the VAE cannot make, naming the nearest that they can.
        """
        first = self.trained_at[0]
        return shape_at(self.student.network, self.factor, height or first[0], width or first[1])

    @overload
    def __call__(
        self,
        labels: Labels | None = None,
        *,
        n: int | None = None,
        seed: int | Sequence[int] = 0,
        noise: Tensor | None = None,
        sampler: Sampler | None = None,
        height: int = 0,
        width: int = 0,
        batch_size: int = 64,
        output: Literal["float", "uint8"] = "float",
    ) -> Tensor: ...

    @overload
    def __call__(
        self,
        labels: Labels | None = None,
        *,
        n: int | None = None,
        seed: int | Sequence[int] = 0,
        noise: Tensor | None = None,
        sampler: Sampler | None = None,
        height: int = 0,
        width: int = 0,
        batch_size: int = 64,
        output: Literal["pil"],
    ) -> list[Image.Image]: ...

    def __call__(
        self,
        labels: Labels | None = None,
        *,
        n: int | None = None,
        seed: int | Sequence[int] = 0,
        noise: Tensor | None = None,
        sampler: Sampler | None = None,
        height: int = 0,
        width: int = 0,
        batch_size: int = 64,
        output: Output = "float",
    ) -> Tensor | list[Image.Image]:
        """Images: float32 (N, 3, H, W) about [-1, 1], not clamped; or uint8 (N, 3, H, W); or a list of PIL images.

        labels: class index or name of all `n` (default 1) images, or one for each image; None: the classes in turn. Of
        a student that reads prompts, a text is a prompt, which is encoded, and an index one of its own prompts.
        seed: the noise of image i depends on `seed` and i alone; of a list, one seed for each image, it is that of the
        first image of its own seed. noise (N, C, H, W), standard normal, takes the place of the initial noise; what is
        added between calls then depends on it alone, so that the base's pipeline of diffusers makes the same images of
        the same latents.
        sampler: "stochastic" re-noises between calls, "deterministic" follows the ODE; None: the one that the student
        was trained for. height, width: of the images, in pixels; 0: those of the first size that it was trained at.
        batch_size changes no image beyond rounding.

        Raises UserError for labels that the student does not know, for numbers of images that contradict, and where
        there are words and the text encoder is not there.
        """
        labels, own_seeds = _plain(labels), _own_seeds(seed)
        count = _count(labels, n, noise, own_seeds)
        shape = self.shape_at(height, width)
        if noise is not None and tuple(noise.shape) != (count, *shape):
            raise UserError(f"noise of shape {tuple(noise.shape)}: must be {(count, *shape)}")
        self._warn_of(pixels_of(shape, self.factor))
        if output not in ("float", "uint8", "pil"):
            raise UserError(f"output = {output!r}: must be float, uint8 or pil")
        network, indices = self._conditioned(labels, count)
        generator = few_step_generator(
            velocity_of(network, self.student.prediction), self.rungs, sampler or self.student.sampler
        )
        x0, _ = generate(
            decoded(generator, self.codec and self.codec.decode),
            SampleRange(
                count,
                operator.index(seed) if own_seeds is None else 0,  # pyright: ignore[reportArgumentType]
                labels=indices,
                noise=noise,
                own_seeds=own_seeds,
                latents=self._latents,
            ),
            shape=shape,
            num_classes=self.num_classes,
            batch_size=batch_size,
            device=self.device,
        )
        if output == "float":
            return x0
        pixels = to_pixels(x0)
        return pixels if output == "uint8" else [Image.fromarray(x.permute(1, 2, 0).cpu().numpy()) for x in pixels]

    @property
    def _latents(self) -> Latents:
        network = self.student.network
        return network.family.latents if isinstance(network, DiffusersDenoiser) else CELLS

    def _warn_of(self, size: Pixels) -> None:
        if size not in self.trained_at:
            known = ", ".join(f"{height} x {width}" for height, width in self.trained_at)
            LOGGER.warning(f"{size[0]} x {size[1]} pixels: the student was trained at {known}; look at what it makes")

    def _conditioned(self, labels: Any, count: int) -> tuple[Any, Tensor | None]:
        """The network, its prompts those that were given in words if any were, and the conditions (count,) int64."""
        each = labels if isinstance(labels, list) else [labels] * count
        network = self.student.network
        if self.words is not None and any(isinstance(label, str) for label in each):
            if wrong := [label for label in each if not isinstance(label, str)]:
                raise UserError(f"label {wrong[0]!r} among prompts in words: give words, or indices, for all images")
            if "" in each:
                raise UserError("one of the prompts is empty: write what the image shows")
            table = self.words.table(each, [network] if self.codec is None else [network, self.codec])
            order = {text: index for index, text in enumerate(table.texts())}
            return network.with_prompts(table), torch.tensor([order[text] for text in each])  # type: ignore[union-attr]
        if self.words is not None and not self.num_classes:
            raise UserError(
                f"the student's own prompts are not at {network.prompts and network.prompts.folder}: give prompts in"
                " words, or encoded ones, prompts=FOLDER"
            )
        indices = None if labels is None else torch.tensor([self._index(label) for label in each], dtype=torch.int64)
        return network, indices

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


def _own_seeds(seed: Any) -> list[int] | None:
    """A list of seeds, one for each image; None for one seed, of whatever type of whole numbers."""
    try:
        operator.index(seed)
    except TypeError:
        return [operator.index(one) for one in seed]
    return None


def _plain(labels: Any) -> Any:
    """Arrays and tensors as numbers and texts, or lists of them; None, a number or a text as it is, others as lists."""
    if isinstance(labels, Tensor | np.ndarray | np.generic):
        labels = labels.tolist()
    return list(labels) if isinstance(labels, Iterable) and not isinstance(labels, str) else labels


def _count(labels: Any, n: int | None, noise: Tensor | None, seeds: list[int] | None) -> int:
    """How many images were asked for; UserError where the arguments contradict, or none says it."""
    given = {"labels": labels if isinstance(labels, list) else None, "noise": noise, "seed": seeds}
    by_argument = {name: None if value is None else len(value) for name, value in given.items()} | {"n": n}
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
    path: str,
    device: torch.device | str = "cpu",
    *,
    revision: str = "",
    prompts: str = "",
    base: str = "",
    text_encoder: str = "",
    keep_text_encoder: bool = False,
    decode: Decoding = "whole",
) -> StudentPipeline:
    """The student of `path`, a folder RUN/student or a hub id ("OWNER/NAME", at `revision`), ready to sample.

    prompts: a folder of encoded prompts for a student that reads prompts; empty: those that it was trained on.
    base: the teacher's path, where `path` is the adapter of a LoRA student, RUN/student/adapter.
    text_encoder: path or hub id of the pipeline whose text encoder reads prompts that are given as words; empty: the
    base's, or the one that the card names. It is loaded for new prompts alone, unless keep_text_encoder leaves it.
    decode: latents of several images at a time ("whole"), of one ("slices"), or of one in tiles ("tiles"), which takes
    the least memory and differs a little where tiles meet.

    Raises UserError or a kind of it, naming the file and the remedy, where there is none, it is damaged, or it is a
    many-step network.
    """
    path, is_adapter = str(path), (Path(path) / ADAPTER).is_file()
    if is_adapter != bool(base):
        fault = "an adapter; name the teacher that it belongs to, base=PATH"
        raise UserError(f"{path}: {fault if is_adapter else 'no adapter; leave base out'}")
    place = Path(path)
    if is_adapter:
        table = None if prompts else absent_prompts(adapter_origin(place))
        teacher = load_teacher(base_config(place, base, revision, prompts, table), device, table=table)
        student = load_adapter(place, teacher)
    else:
        place = resolve(path, revision)
        saved = read_card(place) if place.is_dir() and holds_network(place) else None
        table = None if prompts or saved is None else absent_prompts(saved.card.origin)
        student = load_teacher(TeacherConfig(path, revision, prompts=prompts), device, saved, table)
    if not student.rungs:
        raise UserError(f"{path}: a many-step network, no few-step student; distil it")
    words = None
    if student.network.prompts is not None:
        card = (student.text_encoder, student.text_encoder_revision)
        places = ((text_encoder, ""),) if text_encoder else ((base, revision), (str(place), ""), card)
        words = Words(Source.of(student.origin), places, torch.device(device), keep_text_encoder)
    elif text_encoder:
        raise UserError(f"{path} reads class labels: leave text_encoder out")
    return StudentPipeline(
        student, codec_of(replace(student, codec_decode=decode), device), torch.device(device), words
    )
