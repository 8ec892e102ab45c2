"""python -m dmd_dar.rungs: times at which bands of the teacher's samples meet the noise."""

import dataclasses
import math

import pytest
import torch

from dmd_dar import config, flow, rungs
from dmd_dar.data.photos import NAMES
from dmd_dar.models.saved import ModelCard, save_network
from dmd_dar.rungs import RungsConfig, meetings, spread_rungs
from dmd_dar.spectrum import radial_frequencies
from tests.tiny import TINY, tiny_sit, tiny_teacher


def test_a_signal_meets_the_noise_where_both_have_the_same_power():
    for t in (0.08, 0.2, 0.5, 0.9):
        power = (t / (1 - t)) ** 2
        assert flow.meeting_time(power) == pytest.approx(t, abs=1e-12)
        assert (1 - t) ** 2 * power == pytest.approx(t**2)


def test_a_power_law_meets_it_where_its_exponent_says():
    f, _ = radial_frequencies(64, 64)
    for slope, scale in ((-2.0, 1e-3), (-1.0, 1e-2)):
        met = meetings(f, scale * f**slope)
        assert [one.frequency for one in met] == [1 / 16, 1 / 8, 1 / 4, 3 / 8]
        for one in met:
            amplitude = math.sqrt(scale * one.frequency**slope)
            assert one.t == pytest.approx(amplitude / (1 + amplitude), rel=1e-9)


def test_rungs_are_even_in_the_ratio_of_signal_to_noise():
    chosen = spread_rungs(0.5, 0.05, 5)
    assert chosen[:2] == (1.0, 0.5) and chosen[-1] == 0.05
    ratios = [math.log((1 - t) / t) for t in chosen[1:]]
    steps = [b - a for a, b in zip(ratios, ratios[1:], strict=False)]
    assert steps == pytest.approx([math.log(19) / 3] * 3, abs=0.02)  # rungs are rounded to three places
    flow.check_rungs(chosen)
    assert spread_rungs(0.5, 0.05, 1) == (1.0,)
    assert spread_rungs(0.5, 0.05, 2) == (1.0, 0.187)  # 1 / (1 + sqrt(19))


@pytest.mark.parametrize(("coarse", "fine", "calls"), [(0.5, 0.48, 3), (0.5, 0.5, 3), (0.4, 0.5, 3), (0.5, 0.4, 9)])
def test_a_spectrum_that_is_flat_or_rises_is_refused(coarse, fine, calls):
    with pytest.raises(ValueError, match="too close"):
        spread_rungs(coarse, fine, calls)


def test_the_command_prints_rungs_that_a_run_takes(tmp_path, capsys, monkeypatch):
    teacher = tiny_teacher(tmp_path / "teacher")
    f, _ = radial_frequencies(32, 32)
    measured = {}

    def psd(samples, channel):
        measured.update(shape=tuple(samples.shape), channel=channel)
        return f, 1e-3 / f.square()

    monkeypatch.setattr(rungs, "radial_psd", psd)
    rungs.main([f"teacher.path={teacher}", "n=3", "batch_size=2", "solver_steps=2", "cpu=true", "calls=3"])
    assert measured == {"shape": (3, 3, 32, 32), "channel": "all"}
    line = capsys.readouterr().out.splitlines()[-1]
    times = [flow.meeting_time(1e-3 / edge**2) for edge in (1 / 16, 3 / 8)]
    assert line == f"rungs: [1, {round(times[0], 3):g}, {round(times[1], 3):g}]"


def test_a_teacher_without_detail_is_refused_by_name(tmp_path, capsys, monkeypatch):
    """The tiny network's samples are near white."""
    teacher = tiny_teacher(tmp_path / "teacher")
    f, _ = radial_frequencies(32, 32)
    monkeypatch.setattr(rungs, "radial_psd", lambda *_, **__: (f, torch.ones_like(f)))
    with pytest.raises(SystemExit) as stop:
        config.run_job(RungsConfig, rungs.choose, [f"teacher.path={teacher}", "n=2", "solver_steps=1", "cpu=true"])
    assert stop.value.code == 2
    assert "error: calls = 4: coarse and fine detail meet the noise at t = 0.50 and 0.50" in capsys.readouterr().err


def test_samples_too_small_for_a_spectrum_down_to_b1_are_refused(tmp_path, capsys):
    form = dataclasses.replace(TINY, input_size=16)
    save_network(tmp_path / "teacher", tiny_sit(form), ModelCard(label_names=NAMES))
    with pytest.raises(SystemExit) as stop:
        rungs.main([f"teacher.path={tmp_path / 'teacher'}", "n=1", "cpu=true"])
    assert stop.value.code == 2 and "have 16 pixels or latent cells a side" in capsys.readouterr().err
