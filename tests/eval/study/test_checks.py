"""What is said of a student: the sign of every comparison, and shares of hardly anything."""

import math

import pytest

from eval.measure.results import Check
from eval.study.checks import check_sentence, compare_pair, share_of_excess


def checked(name: str, gain: float = 0.0, excess: float = 0.0, share: float | None = 1.0, time: float = 1.0) -> Check:
    return Check(
        name=name,
        baseline="Euler",
        fd_excess=excess,
        fd_excess_share=share,
        hf_gain_db=gain,
        hf_gain_db_baseline=0.0,
        least_class_diversity=math.nan,
        routing=None,
        latency_ms_per_image=time,
        peak_memory_mb=2 * time,
    )


def test_the_comparison_has_the_right_sign():
    better = compare_pair(checked("dar", -0.5, -0.2, time=3.0), checked("residual", 2.0, 0.4, time=2.0))
    assert "HF gain better (-0.50 dB, there +2.00)" in better and "above its null better (-0.20, there 0.40)" in better
    assert "1.50 times its time and 1.50 times its peak memory" in better
    worse = compare_pair(checked("dar", 3.0, 0.05), checked("residual", -2.0, -0.01))
    assert "HF gain worse" in worse and "above its null worse" in worse
    assert "HF gain equal" in compare_pair(checked("dar", 1.0, 1.0), checked("residual", -1.0, 1.0))


@pytest.mark.parametrize(
    ("far", "share", "words"),
    [
        (4.0, 0.25, "is 0.25 of that of 'Euler';"),
        (0.1, None, "is 1.00, where 'Euler' is near its null already;"),
        (-0.5, None, "is 1.00, where"),
    ],
)
def test_a_share_of_hardly_anything_is_left_out(far, share, words):
    assert share_of_excess(1.0, far, null=0.2) == share
    assert words in check_sentence(checked("dar", excess=1.0, share=share))
    assert "class diversity is not known" in check_sentence(checked("dar"))
