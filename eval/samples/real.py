"""Real images beside the samples: crops of the run's own data, and for a latent model what its VAE makes of them; or
images of a folder.
"""

from dataclasses import dataclass, replace
from typing import cast

from torch import Tensor

from dmd_dar.data.config import DataConfig
from dmd_dar.data.images import to_model_range
from dmd_dar.data.latents import Latents
from dmd_dar.data.sources import Images, Source, open_data
from dmd_dar.draws import Draws
from dmd_dar.methods.generate import balanced_labels
from dmd_dar.models.codecs import sample_latents
from dmd_dar.models.teachers import Teacher

from .images import UnfitError
from .sampling import Bench, Made
from .sets import ImageSet, read_set

REMEDY = "name real images by real=FOLDER"
REAL_NAMES = ("real", "real, again", "VAE(real)", "VAE(real), again")


@dataclass(frozen=True)
class Real:
    """`reference` is what sets are compared with; `beside` are a second set like it, its null, and, where the
    reference went through a VAE, the images as they were. `fit`: images of its kind that are not compared, and labels.
    """

    reference: ImageSet
    beside: list[ImageSet]
    fit: tuple[Tensor, Tensor]
    colour_labels: set[int] | None
    label_names: tuple[str, ...]
    hash: str


def open_fitting(cfg: DataConfig, bench: Bench, teacher: Teacher) -> Source:
    """The run's data; UnfitError where their classes or sizes are not those of the samples."""
    data = open_data(cfg, bench.device)
    where = f"data.name = {cfg.name}"
    if not teacher.knows(tuple(data.label_names)):
        raise UnfitError(f"{where}: its classes are not the teacher's prompts; {REMEDY}")
    if data.num_classes != bench.num_classes:
        raise UnfitError(f"{where}: {data.num_classes} classes, but the teacher knows {bench.num_classes}; {REMEDY}")
    if teacher.label_names and data.label_names and teacher.label_names != tuple(data.label_names):
        raise UnfitError(f"{where}: its classes are others than the teacher's, first {data.label_names[0]!r}; {REMEDY}")
    if not isinstance(data, Latents) and (data.size, data.size) != bench.size:
        raise UnfitError(f"{where}: data.size is {data.size}, but the teacher's images are of {_shown(bench)} px")
    if isinstance(data, Latents):
        data.require(bench.codec_digest, bench.shape)
    return data


def _shown(bench: Bench) -> str:
    height, width = bench.size
    return str(height) if height == width else f"{height} x {width}"


def named_real(path: str, bench: Bench) -> ImageSet:
    """The real images of a folder, in the place of crops; UnfitError where they are not of the samples' size."""
    one = replace(read_set(path, "real"), name=REAL_NAMES[0])
    if one.stream.size != bench.size:
        size = " x ".join(map(str, one.stream.size))
        raise UnfitError(
            f"real = {path}: images of {size} px, but the teacher's are of {_shown(bench)}; give this size"
        )
    return one


def read_real(data: Source, bench: Bench) -> Real:
    """Sets of crops with the samples' classes: two to compare with and one to fit on.

    For a latent model these are VAE(real), what its decoder makes of encoded crops, since what the VAE loses is no
    fault of a network; images that are there as such stand beside. Latents are drawn from the encoder's distribution.
    """
    name = "real" if bench.codec is None else "VAE(real)"
    made = {phase: crops(data, bench, phase) for phase in ("real", "real_null", "fit")}
    beside = [made["real_null"].as_set(f"{name}, again", "null", paired=False)]
    if bench.codec is not None and not isinstance(data, Latents):
        original = bench.joined(lambda samples: _pixels(data, bench, "real", samples), "real images")
        beside.append(original.as_set("real", "real", paired=False))
    return Real(
        made["real"].as_set(name, "real", paired=False),
        beside,
        (made["fit"].images, made["fit"].labels),
        None if isinstance(data, Latents) else set(data.colour_labels),
        tuple(data.label_names),
        data.hash,
    )


def crops(data: Source, bench: Bench, phase: str) -> Made:
    """Training crops with the samples' labels, other ones for every `phase`, through the VAE where there is one."""

    def make(samples: Tensor) -> Made:
        if bench.codec is None:
            return _pixels(cast(Images, data), bench, phase, samples)  # `open_fitting` refuses others
        draws, labels = Draws(bench.seed, phase, 0, samples), balanced_labels(samples, bench.num_classes)
        if isinstance(data, Latents):
            return bench.seen(data.latents(labels, draws), labels, phase, samples)
        mean, std = bench.codec.encode(to_model_range(data.crops(labels, draws)))
        x0 = sample_latents(mean, std, draws.normal("latent", *mean.shape[1:]))
        return bench.seen(x0, labels, phase, samples)

    return bench.joined(make, f"{phase} images")


def _pixels(data: Images, bench: Bench, phase: str, samples: Tensor) -> Made:
    labels = balanced_labels(samples, bench.num_classes)
    return Made(data.crops(labels, Draws(bench.seed, phase, 0, samples)).cpu(), labels.cpu())


def real_sets(bench: Bench, data: Source) -> tuple[ImageSet, ImageSet]:
    """Two independent sets of training crops: the reference and its null."""
    return (
        crops(data, bench, "real").as_set("real", "real", paired=False),
        crops(data, bench, "real_null").as_set("real, again", "null", paired=False),
    )
