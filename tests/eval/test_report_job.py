import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dmd_dar import config, distill
from dmd_dar.data.photos import Photos
from eval import arms, report, teacher
from eval.report import ReportConfig
from tests.tiny import tiny_teacher

RECIPES = Path(__file__).parents[2] / "configs" / "photos32"


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    folder = tiny_teacher(root / "teacher")
    for name, more in (("residual", []), ("dar", []), ("regression", ["matching.weight=0"])):
        distill.main(
            [
                f"config={RECIPES / ('dar' if name == 'dar' else 'residual')}.yaml",
                f"teacher.path={folder}",
                f"out_dir={root / name}",
                f"regression.cache={root / 'pairs'}",
                "steps=2",
                "batch_size=4",
                "student.routing.chunk_size=2",
                "student.routing.lr=1e-9",
                "fake_score.updates=1",
                "regression.count=4",
                "regression.solver_steps=4",
                "log.wandb=disabled",
                "launch.cpu=true",
                *more,
            ]
        )
    return root


def options(root: Path, *names: str, **changes) -> ReportConfig:
    argv = [f"runs=[{','.join(str(root / name) for name in names)}]", f"out={root / 'report'}", "n=70", "cpu=true"]
    argv += ["solver_steps=2", f"cache={root / 'cache'}", *(f"{name}={value}" for name, value in changes.items())]
    return config.load(ReportConfig, argv)


def test_a_report_over_real_runs_says_what_it_must(runs, capsys):
    report.report(options(runs, "residual", "dar", "regression"))
    result = json.loads((runs / "report" / "report.json").read_text())
    rows = {row["name"]: row for row in result["sets"]}
    assert {"residual", "dar", "regression", "teacher", "real", "undistilled, Euler"} <= rows.keys()
    routing = rows["dar"]["facts"]["routing"]
    assert routing["deviation"] < 1e-3 and abs(routing["hf_gain_shift_db"]) < 0.1
    assert rows["dar"]["facts"]["label"] == "router unused" and "router unused" in capsys.readouterr().out
    assert "label" not in rows["residual"]["facts"]
    assert sum(sentence.startswith("dar against residual:") for sentence in result["conclusions"]) == 1
    page = (runs / "report" / "report.html").read_text()
    assert "What was found" in page and "<script" not in page
    assert result["provenance"]["runs"]["dar"]["student"]["routing"]["query"] == "timestep"


def test_students_and_baselines_start_from_the_same_noise(runs, monkeypatch):
    seen = {}
    original = arms.generate

    def recording(generator, count, **settings):
        def noting(cond, draws, noise):
            seen.setdefault("noise", []).append(noise[:2].clone())
            return generator(cond, draws, noise)

        return original(noting, count, **settings)

    monkeypatch.setattr(arms, "generate", recording)
    report.report(options(runs, "residual", "dar", cache=runs / "fresh"))
    first = [noise for noise in seen["noise"] if len(noise) == 2][::2]
    assert len(first) >= 5 and all(torch.equal(noise, first[0]) for noise in first)


def test_the_teachers_images_are_kept_and_do_not_depend_on_the_batch(runs):
    report.report(options(runs, "residual", cache=runs / "one"))
    report.report(options(runs, "residual", cache=runs / "two", batch_size=9))
    names = [sorted(path.name for path in (runs / cache).iterdir()) for cache in ("one", "two")]
    assert names[0] == names[1] and len(names[0]) == 4
    for name in names[0]:
        ours, theirs = (load_file(runs / cache / name)["images"].int() for cache in ("one", "two"))
        assert (ours - theirs).abs().max() <= 1


def test_damaged_kept_images_are_made_anew(runs, tmp_path):
    (arm,) = arms.read_arms((str(runs / "residual"),))
    network = arms.Teacher.of(arm.cfg, torch.device("cpu")).network
    bench = arms.Bench.of(options(runs, "residual", cache=tmp_path), network, torch.device("cpu"))
    made = bench.cached({"a": 1}, lambda cond, draws, noise: noise)
    (kept,) = tmp_path.iterdir()
    kept.write_bytes(kept.read_bytes()[:-5])
    again = bench.cached({"a": 1}, lambda cond, draws, noise: noise)
    assert torch.equal(made[0], again[0]) and torch.equal(load_file(kept)["images"], made[0])


def test_runs_that_cannot_be_compared_are_refused(runs, tmp_path):
    with pytest.raises(config.ConfigError, match="no config.yaml"):
        arms.read_arms((str(tmp_path),))
    with pytest.raises(config.ConfigError, match="several folders"):
        arms.read_arms((str(runs / "dar"), str(runs / "dar")))
    with pytest.raises(config.ConfigError, match="runs"):
        config.load(ReportConfig, ["out=/tmp/x"])


def test_the_better_baseline_and_the_comparison_have_the_right_sign():
    def check(name, gain, excess):
        return {"name": name, "hf_gain_db": gain, "fd_excess": excess}

    better = report.compare_pair(check("dar", -0.5, -0.2), check("residual", 2.0, 0.4))
    assert "HF gain better (-0.50 dB, there +2.00)" in better and "above its null better (-0.20, there 0.40)" in better
    worse = report.compare_pair(check("dar", 3.0, 0.05), check("residual", -2.0, -0.01))
    assert "HF gain worse" in worse and "above its null worse" in worse
    assert "HF gain equal" in report.compare_pair(check("dar", 1.0, 1.0), check("residual", -1.0, 1.0))


def test_runs_that_differ_in_more_than_routing_are_not_called_a_comparison(runs):
    read = arms.read_arms(tuple(str(runs / name) for name in ("regression", "dar")))
    checks = [{"name": arm.name, "hf_gain_db": 0.0, "fd_excess": 0.0} for arm in read]
    (sentence,) = report.routing_comparisons(checks, read)
    assert "matching.weight" in sentence and "not a comparison" in sentence


def test_resetting_routers_that_add_detail_shows_as_a_negative_shift(runs, monkeypatch):
    """The shift is what resetting does: here it empties the images, so the gain must fall."""
    (arm,) = arms.read_arms((str(runs / "dar"),))
    device = torch.device("cpu")
    network = arms.Teacher.of(arm.cfg, device).network
    bench = arms.Bench.of(options(runs, "dar"), network, device)
    real, _ = arms.real_sets(bench, Photos(32))
    given = iter([real.images, torch.div(real.images, 2, rounding_mode="floor")])
    monkeypatch.setattr(arms.Bench, "cached", lambda self, facts, generator: (next(given), real.labels))
    one = arms.student_set(arm, bench, real, lambda x: report.hf_gain_db(x, real.images))
    assert one.facts["routing"]["hf_gain_shift_db"] == pytest.approx(-6.0, abs=0.2)
    assert one.facts["label"] == "router used"


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
