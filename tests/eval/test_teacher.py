"""What decides whether a teacher is worth distilling."""

import pytest
import torch

from dmd_dar.data.photos import NAMES
from eval import teacher
from eval.measure.pair import Compared, measure
from eval.samples.sets import ImageSet

NULLS = {1: "held-out", 2: "real, again"}


def test_nearest_distance_in_levels():
    bank = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    bank[1] = 100
    images = torch.full((1, 3, 4, 4), 90, dtype=torch.uint8)
    torch.testing.assert_close(teacher.nearest_distance(images, bank), torch.tensor([10.0]))


@pytest.mark.parametrize("blur_px, passes", [(0.0, True), (0.7, False)])
def test_the_bars_of_a_teacher(crops, blur, eight_bit, blur_px, passes):
    """Held-out and other crops are far from the bars here, being few; the bars are the teacher's alone."""
    images, labels = crops(32, 8, 0)
    made = eight_bit(blur(images.double() / 255, blur_px)) if blur_px else images
    sets = [ImageSet(name, crops(32, 8, seed)[0], labels, "real", False) for seed, name in NULLS.items()]
    compared = Compared(
        sets, ImageSet("teacher", made, labels, "teacher", False), ImageSet("real", images, labels, "real", False)
    )
    judged = teacher.judge(measure(compared), "teacher")
    assert judged.bars == {"B1-B4 within 1.5 dB": passes, "HF within 1.0 dB": passes}
    assert "B0" not in judged.gain_db and judged.hf_gain_by_class.keys() == set(NAMES)
    assert judged.gain_db["HF"] == pytest.approx(0.0) if passes else judged.gain_db["HF"] < -3
