"""What decides whether a teacher is worth distilling."""

import pytest
import torch

from eval import teacher


def test_nearest_distance_in_levels():
    bank = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    bank[1] = 100
    images = torch.full((1, 3, 4, 4), 90, dtype=torch.uint8)
    torch.testing.assert_close(teacher.nearest_distance(images, bank), torch.tensor([10.0]))


@pytest.mark.parametrize("hf, passes", [(0.9, True), (-1.1, False)])
def test_the_bars_of_a_teacher(hf, passes):
    def row(name, gain):
        bands = {band: {"value": 0.2} for band in ("B1", "B2", "B3", "B4")} | {"B0": {"value": None}}
        against = {"gain_db": {**bands, "HF": {"value": gain}}, "hf_gain_by_class": {}, "hf_gain_class_median": 0.0}
        return {"name": name, "against": {"real": {**against, "fd_wavelet": {}, "hf_kurtosis_ratio": {}}}}

    judged = teacher.judge({"sets": [row("teacher", hf), row("held-out", 0), row("real, again", 0)]}, "teacher")
    assert judged["bars"] == {"B1-B4 within 1.5 dB": True, "HF within 1.0 dB": passes}
    assert "B0" not in judged["gain_db"]
