"""The nulls of the measures of colour: in the groups that are measured, at the sizes that are compared."""

import math

import numpy as np
import pytest
from torch import Tensor

from dmd_dar.data.photos import Photos
from eval.measure.ledger import Ledger
from eval.measure.nulls import NULL_SPLITS, Target, colour_nulls
from eval.measure.one_set import MeasuredSet, measure_one, read_one
from eval.measure.pair import Compared, measure
from eval.measure.suite import Suite
from eval.metrics.colour import colour_values, groups_of, halved_null, neutral
from eval.metrics.intervals import Sample
from eval.samples.sets import ImageSet

SEED, COLOURED = 3, set(Photos.colour_labels)


@pytest.fixture(scope="module")
def photographs(crops) -> tuple[Tensor, Tensor]:
    """56 images of all classes."""
    return crops(32, 8, 0)


def measured(images: Tensor, labels: Tensor | None, role: str = "student") -> MeasuredSet:
    one = ImageSet(role, images, labels, role, False)  # type: ignore[arg-type]
    return measure_one(one, read_one(one, Suite(), Ledger()), SEED)


@pytest.mark.parametrize("labelled", [True, False])
def test_every_measure_of_colour_has_its_null(photographs, crops, labelled):
    """A folder of images without classes is measured as one group."""
    images, labels = crops(32, 8, 1)
    folder = ImageSet("folder", images, labels if labelled else None, "student", False)
    ours, second = photographs, crops(32, 8, 2)
    teacher, real = (ImageSet(role, ours[0], ours[1], role, False) for role in ("teacher", "real"))
    again = ImageSet("real, again", second[0], second[1], "null", False)
    against = measure(Compared([folder, again], teacher, real, COLOURED)).row("folder").against
    for found in (against.teacher, against.real):  # halves of the teacher's, a second real set
        found = found and found.colour
        assert found is not None
        assert ("saturation_ratio.grey" in found.measures) == labelled
        assert all(math.isfinite(one.null) for one in found.measures.values())


@pytest.mark.parametrize(("share", "factor"), [(1, 0.5**0.5), (4, 1.25**0.5)])
def test_halves_are_scaled_to_the_sizes_that_are_compared(photographs, share, factor):
    """Of n images, halves differ as 4 / n in variance, two sets of n as 2 / n, and n / 4 images from n as 5 / n."""
    images, labels = photographs
    target = Target(measured(images, labels, "teacher"), None, SEED, Ledger())
    sample = Sample(target.measured.colour, np.asarray(labels))
    halves = halved_null(sample, COLOURED, np.random.default_rng([SEED, 5]), NULL_SPLITS)
    found = colour_nulls(measured(images[::share], labels[::share]), target, COLOURED)
    assert found == pytest.approx({name: factor * null for name, null in halves.items()}) and min(found.values()) > 0


@pytest.mark.parametrize(("share", "factor"), [(1, 1.0), (4, 2.5**0.5)])
def test_a_second_set_is_scaled_alike(photographs, crops, share, factor):
    images, labels = photographs
    others = crops(32, 8, 2)
    first, second = measured(images, labels, "real"), measured(others[0], others[1], "null")
    groups = groups_of(second.source.classes, first.source.classes, COLOURED)
    off = {name: abs(v - neutral(name)) for name, v in colour_values(second.colour, first.colour, groups).items()}
    one = measured(images[::share], labels[::share])
    found = colour_nulls(one, Target(first, second, SEED, Ledger()), COLOURED)
    assert found == pytest.approx({name: factor * value for name, value in off.items()})
