"""Each metric sees what it is there for and is blind to the rest; spoilers do what their names say."""

import csv
import json
import math

import pytest
import torch

from dmd_dar.config import ConfigError, load, run_job
from dmd_dar.draws import Draws, sample_range
from dmd_dar.spectrum import radial_psd
from eval.measure.provenance import contract_hash
from eval.metrics import spoil
from eval.metrics.features import compare_features
from eval.metrics.spectrum import band_gain_db
from eval.sensitivity import (
    SPOILERS,
    Labelled,
    SensitivityConfig,
    extractors_of,
    measure,
    metrics,
    mode_dropped,
    run,
    source,
)


def draws(count: int) -> Draws:
    return Draws(0, "spoil", 0, sample_range(0, count))


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sensitivity")
    run(SensitivityConfig(out=str(folder), n=252, size=32, nulls=4))
    return folder, json.loads((folder / "sensitivity.json").read_text())


def test_metrics_see_what_they_are_there_for(result):
    spoiled = result[1]["spoiled"]
    z = {name: row["z"] for name, row in spoiled.items()}
    assert list(spoiled) == list(SPOILERS)
    blurs = [z[f"blur {sigma}"]["gain HF, dB"] for sigma in ("0.3", "0.5", "0.7", "1.0")]
    assert blurs == sorted(blurs, reverse=True) and blurs[2] < -5 and blurs[3] < -10
    assert z["blur 0.5"]["fd_wavelet"] > 10 > 3 > abs(z["blur 0.5"]["fd_pca"])
    assert z["blur 1.0"]["slope difference"] < -10 and z["blur 1.0"]["sliced Wasserstein, level 0"] > 5
    for name in ("blur 0.7 + shaped noise", "HF phases scrambled"):
        assert z[name]["flat noise, dB"] > 3 and z[name]["parent-child difference"] < -5
        assert z[name]["fd_wavelet"] > 5 > abs(z[name]["fd_pca"])
    assert abs(z["blur 0.7 + shaped noise"]["gain HF, dB"] - z["identity"]["gain HF, dB"]) < 0.3
    assert z["noise 4/255"]["flat noise, dB"] > z["noise 2/255"]["flat noise, dB"] > 3
    for metric in ("gain HF, dB", "hf_kurtosis ratio", "flat noise, dB"):
        assert abs(z["brightness +8/255"][metric] - z["identity"][metric]) < 0.5
    assert z["mode drop"]["fd_pca"] > 3


def test_features_are_fitted_and_compared_as_a_report_does():
    """fd_pca in its own units, since a report does not standardise it, and fitted on crops of its own."""
    drawn, given = [], source(SensitivityConfig(n=64, size=32))

    def draw(name):
        drawn.append(name)
        return given(name)

    extractors = extractors_of(draw, 0)
    assert drawn == ["fit"] and [one.name for one in extractors] == ["fd_wavelet", "fd_pca"]
    images = [draw(name).images for name in ("reference", "fresh")]
    theirs, ours = (measure(one, extractors) for one in images)
    told = metrics(ours, theirs)
    for name in ("fd_wavelet", "fd_pca"):
        assert told[name] == pytest.approx(
            compare_features(ours.features[name], theirs.features[name]).value, rel=1e-12
        )


def test_the_gate(result):
    words = {name: row["verdict"]["word"] for name, row in result[1]["spoiled"].items()}
    assert words["identity"] == words["brightness +8/255"] == "preserved"
    assert {words[f"blur {sigma}"] for sigma in ("0.5", "0.7", "1.0")} == {"reduced"}
    assert words["blur 0.7 + shaped noise"] == "energy only"
    colours = {name: row["colour"]["word"] for name, row in result[1]["spoiled"].items()}
    assert {name: word for name, word in colours.items() if word not in ("colour ok", "colour inconclusive")} == {
        "brightness +16/255": "colour drift",
        "saturation x 1.2": "over-saturated",
        "saturation x 0.8": "washed out",
        "colour noise 4/255": "colour speckle",
        "columns 6/255, period 4": "grid",
    }
    assert {colours[name] for name in ("identity", "blur 1.0", "noise 4/255", "contrast x 0.9")} == {"colour ok"}


def test_numbers_of_the_files_agree(result):
    folder, told = result
    assert told["provenance"]["contract_hash"] == contract_hash() and "nulls=4" in told["provenance"]["command"]
    rows = list(csv.DictReader((folder / "sensitivity.csv").read_text().splitlines()))
    assert len(rows) == len(told["spoiled"]) * len(told["null"])
    for row in rows:
        where, metric = told["spoiled"][row["spoiled"]], row["metric"]
        value, null = where["values"][metric], told["null"][metric]
        assert float(row["value"]) == value and row["verdict"] == where["verdict"]["word"]
        assert row["colour"] == where["colour"]["word"]
        assert where["z"][metric] == pytest.approx((value - null["mean"]) / null["deviation"])
    assert (folder / "sensitivity.png").read_bytes().startswith(b"\x89PNG")
    assert told["null"]["gain HF, dB"]["deviation"] > 0 and told["config"]["n"] == 252


def test_textures_are_a_source_too():
    assert load(SensitivityConfig, ["data=textures", "n=64"]).data == "textures"
    with pytest.raises(ConfigError, match="data = 'paintings'"):
        load(SensitivityConfig, ["data=paintings"])


def test_help_names_the_keys(capsys):
    run_job(SensitivityConfig, run, ["--help"])
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("out", "data", "size", "nulls"))


def test_shaped_noise_has_the_energy_of_every_band(crops):
    images = crops(64, 8, 0)[0]
    spoiled = spoil.eight_bit(spoil.with_shaped_noise(images.float() / 255, 0.7, draws(len(images))))
    gains = band_gain_db(spoiled, images, paired=True)
    assert max(abs(gain.value) for gain in gains.values()) < 0.05


def test_scrambled_phases_keep_every_amplitude():
    images = torch.rand(3, 3, 32, 48, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    before = torch.fft.rfft2(images)
    for above in (0.0, 0.25):
        spoiled = spoil.phase_scrambled(images, draws(3), above)
        after = torch.fft.rfft2(spoiled)
        assert torch.allclose(after.abs(), before.abs(), rtol=1e-9)
        moved = ((after - before).abs() > 1e-6 * before.abs()).double().mean().item()
        assert (0.95 if above == 0 else 0.7) < moved <= (1.0 if above == 0 else 0.85)  # 1 - pi / 16 of the square
        assert torch.allclose(spoiled.mean((-2, -1)), images.mean((-2, -1)))


def test_noise_brightness_and_contrast_are_in_8_bit_levels():
    images = torch.full((200, 3, 32, 32), 0.5, dtype=torch.float64)
    noisy = spoil.with_white_noise(images, 4, draws(200))
    assert (noisy - images).std().item() * 255 == pytest.approx(4, rel=0.01)
    assert torch.equal(noisy[:, 0], noisy[:, 1]) and not torch.equal(noisy[0], noisy[1])
    _, power = radial_psd(noisy)
    assert power[1:].mean().item() == pytest.approx((4 / 255) ** 2, rel=0.02)
    assert (spoil.eight_bit(spoil.brighter(images, 8)).float() - spoil.eight_bit(images).float()).unique() == 8
    assert torch.allclose(
        spoil.contrast(noisy, 0.9) - spoil.contrast(noisy, 0.4), 0.5 * (noisy - noisy.mean((-2, -1), True))
    )
    assert spoil.eight_bit(torch.tensor([-0.1, 0.0, 0.0019, 0.002, 1.0, math.inf])).tolist() == [0, 0, 0, 1, 255, 255]


def test_a_dropped_mode_is_gone_and_the_rest_stays():
    labels = torch.arange(60) % 3
    images = (labels * 10).to(torch.uint8)[:, None, None, None].expand(-1, 3, 4, 4)
    kept = mode_dropped(Labelled(images, labels), draws(60))
    assert kept.labels.unique().tolist() == [0, 1]
    assert torch.equal(kept.labels[labels < 2], labels[labels < 2])
    assert torch.equal(kept.images[:, 0, 0, 0], (kept.labels * 10).to(torch.uint8))
