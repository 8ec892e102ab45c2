import dataclasses
import json
import math
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from dmd_dar import config
from dmd_dar.data.photos import Photos
from dmd_dar.distillation import job as distill
from dmd_dar.errors import UserError
from dmd_dar.methods.solvers import Solver
from eval import report
from eval.measure import suite as distances
from eval.measure.pair import ImageSet, jsonable
from eval.metrics.classifier import fit_classifier
from eval.metrics.power_map import mean_log_map
from eval.report import ReportConfig
from eval.samples import sampling as bench
from eval.samples.images import UnfitError
from eval.samples.parallel import Processes
from eval.samples.real import real_sets
from eval.samples.sampling import Bench, Made
from eval.study import forest, inputs, twins
from eval.study import runs as arms
from eval.study.checks import routing_comparisons
from eval.study.forest import Pair
from eval.study.students import student_set
from tests.eval.opened import of, weights_opened
from tests.eval.study.test_checks import checked
from tests.tiny import tiny_teacher

RECIPES = Path(__file__).parents[2] / "configs" / "photos32"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(distances, "fit_classifier", partial(fit_classifier, steps=5))


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
                "preflight=false",
                "log.health_samples=4",
                *more,
            ]
        )
    return root


def options(root: Path, *names: str, **changes) -> ReportConfig:
    argv = [f"runs=[{','.join(str(root / name) for name in names)}]", f"out={root / 'report'}", "n=70", "cpu=true"]
    argv += [
        "solver_steps=2",
        "metrics=[offline]",
        f"cache={root / 'cache'}",
        *(f"{name}={value}" for name, value in changes.items()),
    ]
    return config.load(ReportConfig, argv)


def sampled(cfg: ReportConfig) -> inputs.Inputs:
    return inputs.sampled(cfg, torch.device("cpu"), distances.Ledger(), Processes())


def test_a_report_over_real_runs_says_what_it_must(runs, capsys):
    with weights_opened() as opened:
        report.report(options(runs, "residual", "dar", "regression"))
    for network in (*(runs / name / "student" for name in ("residual", "dar", "regression")), runs / "teacher"):
        assert of(opened, network) == {"hash": 1, "load": 1}, network
    result = json.loads((runs / "report" / "report.json").read_text())
    rows = {row["name"]: row for row in result["sets"]}
    assert {"residual", "dar", "regression", "teacher", "real", "undistilled, Euler"} <= rows.keys()
    routing = rows["dar"]["facts"]["routing"]
    assert routing["deviation"] < 1e-3 and abs(routing["hf_gain_shift_db"]) < 0.1
    printed = capsys.readouterr().out
    assert rows["dar"]["facts"]["label"] == "router unused" and "router unused" in printed
    assert "label" not in rows["residual"]["facts"]
    assert sum(sentence.startswith("dar against residual:") for sentence in result["conclusions"]) == 1
    page = (runs / "report" / "report.html").read_text()
    assert "What was found" in page and "<script" not in page
    origin = result["provenance"]
    assert origin["runs"]["dar"]["student"]["routing"]["query"] == "timestep"
    assert {"commit", "dirty"} == origin["git"].keys() and len(origin["contract_hash"]) == 16
    assert origin["checkpoints"]["dar"] == rows["dar"]["facts"]["network"] != origin["checkpoints"]["residual"]
    assert origin["seeds"] == {
        "evaluation": 0,
        **{f"training of {name}": 0 for name in ("residual", "dar", "regression")},
    }
    assert f"runs=[{runs / 'residual'}," in origin["command"] and "metrics=[offline]" in origin["command"]
    costs = rows["dar"]["facts"]
    low, high = costs["latency_ms_range"]
    assert 0 < low <= costs["latency_ms_per_image"] <= high and costs["peak_memory_mb"] > 0
    assert rows["teacher"]["facts"]["latency_ms_per_image"] > 0 and "latency_ms_per_image" not in rows["real"]["facts"]
    error = result["discretisation"]
    assert (error["evaluations"], error["evaluations_twice"], error["images"]) == (2, 4, 70)
    said = "The teacher at 2 calls against itself at 4, same noise, 70 images: HF gain"
    assert said in page and said in printed and all(math.isfinite(error[name]["low"]) for name in ("hf_gain_db",))
    assert ("unconverged reference" in page) == (not error["converged"]) == bool(error["exceeded"])
    assert result["forest"] is None and result["skipped"] == []
    assert (runs / "report" / "report.csv").read_text().count("\ndar,student,teacher,") > 50


def test_without_real_images_features_are_fitted_to_other_samples_of_the_teacher(runs, monkeypatch):
    def unfit(*_: object) -> None:
        raise UserError("no images of this kind")

    monkeypatch.setattr(inputs, "open_fitting", unfit)
    made = sampled(options(runs, "residual"))
    images, labels = made.fit
    assert made.real is None and made.fitted_to == inputs.OWN and torch.equal(labels, made.reference.labels)
    same = (images == made.reference.images).flatten(1).float().mean(1)
    assert len(images) == 70 and same.max() < 0.5, "none of the images that are compared"
    other = dataclasses.replace(made.bench, seed=made.bench.seed + 1)
    teacher = arms.GuidedTeacher.of(made.runs[0], torch.device("cpu"))
    assert torch.equal(images, teacher.sample_set(other, Solver(solver_steps=2)).images)


def test_students_and_baselines_start_from_the_same_noise(runs, monkeypatch):
    seen = {}
    original = bench.generate

    def recording(generator, samples, **settings):
        def noting(cond, draws, noise):
            seen.setdefault("noise", []).append(noise[:2].clone())
            return generator(cond, draws, noise)

        return original(noting, samples, **settings)

    monkeypatch.setattr(bench, "generate", recording)
    sampled(options(runs, "residual", "dar", cache=runs / "fresh"))
    first = [noise for noise in seen["noise"] if len(noise) == 2][::2]
    assert len(first) >= 5 and all(torch.equal(noise, first[0]) for noise in first)


def test_the_teachers_images_are_kept_and_do_not_depend_on_the_batch(runs):
    for cache, batch_size in (("one", 64), ("two", 9)):
        cfg = options(runs, "residual", cache=runs / cache, batch_size=batch_size)
        sampled(cfg)
    names = [sorted(path.name for path in (runs / cache).iterdir()) for cache in ("one", "two")]
    assert names[0] == names[1] and len(names[0]) == 5  # with the teacher by twice as many steps
    for name in names[0]:
        ours, theirs = (load_file(runs / cache / name)["images"].int() for cache in ("one", "two"))
        assert (ours - theirs).abs().max() <= 1


def test_the_runs_of_one_teacher_share_what_health_measures_of_it(runs):
    held = []
    for path in (runs / "pairs").iterdir():
        with safe_open(path, framework="pt") as file:
            held.append(json.loads(file.metadata().get("identity", "{}")).get("what", "pairs"))
    assert sorted(held) == ["health samples of the teacher", "pairs"]


def test_damaged_kept_images_are_made_anew(runs, tmp_path):
    (arm,) = arms.read_runs((str(runs / "residual"),))
    network = arms.GuidedTeacher.of(arm, torch.device("cpu")).network
    maker = Bench.of(options(runs, "residual", cache=tmp_path), network, torch.device("cpu"))
    made = maker.cached({"a": 1}, lambda cond, draws, noise: noise)
    (kept,) = tmp_path.iterdir()
    kept.write_bytes(kept.read_bytes()[:-5])
    again = maker.cached({"a": 1}, lambda cond, draws, noise: noise)
    assert torch.equal(made.images, again.images) and torch.equal(load_file(kept)["images"], made.images)


def test_images_of_other_code_are_not_found_again(runs, tmp_path, monkeypatch):
    (arm,) = arms.read_runs((str(runs / "residual"),))
    network = arms.GuidedTeacher.of(arm, torch.device("cpu")).network
    maker = Bench.of(options(runs, "residual", cache=tmp_path), network, torch.device("cpu"))
    for digest in ("one", "one", "two"):
        monkeypatch.setattr("dmd_dar.data.kept.code_digest", lambda digest=digest: digest)
        maker.cached({"a": 1}, lambda cond, draws, noise: noise)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_student_that_has_diverged_is_left_out_and_told(runs, tmp_path, monkeypatch):
    saved = arms.Run.student

    def student(arm: arms.Run, device: torch.device | str = "cpu"):
        found = saved(arm, device)
        if arm.name == "broken":
            next(found.network.parameters()).data.fill_(math.nan)
        return found

    monkeypatch.setattr(arms.Run, "student", student)
    broken = shutil.copytree(runs / "residual", tmp_path / "broken")
    cfg = options(runs, "residual", strict=True, cache=tmp_path / "cache")
    cfg = dataclasses.replace(cfg, runs=(str(broken), *cfg.runs), out=str(tmp_path / "report"))
    with pytest.raises(UserError, match="1 metrics that were asked for were skipped, .*: broken: sample 0 holds"):
        report.report(cfg)
    result = json.loads((tmp_path / "report" / "report.json").read_text())
    names = {row["name"] for row in result["sets"]}
    assert {"residual", "teacher", "real"} <= names and "broken" not in names
    assert [check["name"] for check in result["checks"]] == ["residual"]


def test_of_two_sets_with_one_name_the_first_is_drawn(tmp_path, crops, monkeypatch):
    images, shown = crops(32, 6, 0)[0].numpy(), {}
    for place, kept in (("a", images), ("b", images[:7] // 2), ("truth", images[::-1])):
        (tmp_path / place / "x").mkdir(parents=True)
        np.save(tmp_path / place / "x" / "all.npy", kept)
    (tmp_path / "truth" / "x").rename(tmp_path / "truth" / "y")

    def write(result, sets, out, planes):
        shown.update(sets=[(one.name, one.count) for one in sets], planes=planes)

    monkeypatch.setattr(report, "write_report", write)
    argv = [f"images=[{tmp_path / 'a' / 'x'},{tmp_path / 'b' / 'x'}]", f"reference={tmp_path / 'truth' / 'y'}"]
    report.report(config.load(ReportConfig, [*argv, f"out={tmp_path / 'report'}", "metrics=[offline]"]))
    assert shown["sets"] == [("y", len(images)), ("x", len(images))]
    torch.testing.assert_close(shown["planes"]["x"], mean_log_map(torch.from_numpy(images)), rtol=0, atol=1e-4)


@pytest.fixture(scope="module")
def folders(tmp_path_factory, crops) -> Path:
    """Sets of files, some of which no metric can take."""
    root = tmp_path_factory.mktemp("folders")
    for name in ("truth", "ours", "nan", "mixed", "grey", "few", "pickled", "empty"):
        (root / name).mkdir()
    images = crops(32, 6, 0)[0].numpy()
    np.save(root / "truth" / "all.npy", images)
    np.save(root / "ours" / "all.npy", np.clip(images.astype(int) + 8, 0, 255).astype(np.uint8))
    broken = images[:8].astype(np.float32) / 255
    broken[3, 0, 0, 0] = np.nan
    np.save(root / "nan" / "all.npy", broken)
    for name, size in (("a", 32), ("b", 40)):
        np.save(root / "mixed" / f"{name}.npy", np.zeros((2, 3, size, size), dtype=np.uint8))
    np.save(root / "grey" / "all.npy", np.zeros((8, 1, 32, 32), dtype=np.uint8))
    np.save(root / "few" / "all.npy", images[:2])
    np.save(root / "pickled" / "all.npy", np.array([{}], dtype=object), allow_pickle=True)
    return root


BAD = {
    "nan": "1 images hold numbers that are not finite, first 3",
    "mixed": "40 x 40, but 32 x 32 in a.npy",
    "grey": "shape (8, 1, 32, 32)",
    "few": "2 images are too few",
    "pickled": "no plain array",
    "empty": "no .png or .npy in this folder",
}


def from_folders(root: Path, *names: str, **changes) -> ReportConfig:
    images = ",".join(str(root / name) for name in names)
    argv = [f"images=[{images}]", f"reference={root / 'truth'}", f"out={root / 'report'}", "metrics=[offline]"]
    return config.load(ReportConfig, argv + [f"{name}={value}" for name, value in changes.items()])


def test_folders_without_runs_and_inputs_that_no_metric_can_take(folders, capsys):
    for i in range(7):
        (folders / "ours" / f"{i}.jpg").write_bytes(b"")
    cfg = from_folders(folders, "ours", *BAD, strict=True)
    with pytest.raises(UserError, match=r"6 metrics that were asked for were skipped.*report\.json"):
        report.report(cfg)
    result = json.loads((folders / "report" / "report.json").read_text())
    rows = {row["name"]: row for row in result["sets"]}
    assert rows.keys() == {"truth", "ours"}  # partial results are kept
    against = rows["ours"]["against"]["teacher"]
    assert abs(against["gain_db"]["HF"]["value"]) < 0.2  # brighter, no sharper
    assert against["modes"] is None and against["hf_gain_class_median"] is None
    told = {Path(one["name"]).name: one["reason"] for one in result["skipped"] if one["requested"]}
    assert told.keys() == BAD.keys() and all(words in told[name] for name, words in BAD.items())
    errors = capsys.readouterr().err
    assert errors.count("not measured: every metric of") == len(BAD)
    assert "ours: 42 images; other files, left out: 7 .jpg" in errors and rows["ours"]["facts"]["left_out"] == "7 .jpg"
    assert "What was not measured" in (folders / "report" / "report.html").read_text()


def test_without_strict_a_skip_is_no_failure(folders, capsys):
    report.report(from_folders(folders, "ours", "empty", real=folders / "truth"))
    out = capsys.readouterr()
    assert "against truth" in out.out and "no .png or .npy" in out.err


def test_the_flag_is_the_key(monkeypatch, folders):
    seen = []
    monkeypatch.setattr(report, "report", seen.append)
    report.main([f"images=[{folders / 'ours'}]", f"reference={folders / 'truth'}", "--strict"])
    assert seen[0].strict and not dataclasses.replace(seen[0], strict=False).strict


@pytest.mark.parametrize(
    "argv, message",
    [
        (["images=[{ours}]"], "reference is the teacher of runs, but there are none"),
        (["runs=[{ours}]", "reference={ours}"], "leave it out"),
        (["runs=[{ours}]", "metrics=[auto,fid]"], "alone"),
        (["runs=[{ours}]", "metrics=[fld]"], "one of auto, offline, fid"),
        (["runs=[{ours}]", "statistics=/nowhere.npz"], "no such file"),
    ],
)
def test_requests_that_make_no_sense(folders, argv, message):
    with pytest.raises(config.ConfigError, match=message):
        config.load(ReportConfig, [word.format(ours=folders / "ours") for word in argv])


def test_seeds_in_pairs_make_the_forest(crops, blur, eight_bit, runs):
    images, labels = crops(32, 8, 0)
    clean = images.double() / 255

    def student(name: str, sigma: float) -> ImageSet:
        return ImageSet(name, eight_bit(blur(clean, sigma)), labels, "student", True)

    reference = ImageSet("teacher", images, labels, "teacher", True)
    pairs = [Pair(s, student(f"residual_{s}", 0.5 + 0.05 * s), student(f"dar_{s}", 0.3)) for s in (1, 0)]
    told = jsonable(forest.from_runs(pairs, reference, 0))
    (one,) = told["comparisons"]
    assert one["seeds"] == [0, 1] and one["pilot"] and "pilot" in told["label"]
    for seed in one["per_seed"]:
        gains, nearer = seed["gain_db"], seed["difference_db"]
        assert gains["residual"] < gains["dar"] < 0 < nearer["low"] < nearer["value"] < nearer["high"]
        assert nearer["value"] == pytest.approx(abs(gains["residual"]) - abs(gains["dar"]))
    (arm, *_) = arms.read_runs((str(runs / "residual"),))
    routed = dataclasses.replace(arm.cfg, student=dataclasses.replace(arm.cfg.student, routing=arms_routing(runs)))
    read = []
    for s in (0, 1):
        for name, cfg in (("residual", arm.cfg), ("dar", routed)):
            read.append(dataclasses.replace(arm, name=f"{name}_{s}", cfg=dataclasses.replace(cfg, seed=s)))
    sets = [one for pair in pairs for one in (pair.residual, pair.dar)]
    paired = [(pair.seed, pair.residual.name, pair.dar.name) for pair in twins.seed_pairs(read, sets)]
    assert paired == [(s, f"residual_{s}", f"dar_{s}") for s in (0, 1)]
    ledger, made = distances.Ledger(), inputs.Inputs(reference, None, sets, read, (images, labels), "", None, {})
    assert report.seed_by_seed(options(runs, "residual"), made, ledger) is None  # one training, counted twice
    assert "hold the same student" in ledger.skipped[0].reason and ledger.skipped[0].metric == "seed by seed"
    with pytest.raises(UnfitError, match="17 training seeds: an exact test takes 16 at the most"):
        forest.from_runs([dataclasses.replace(pairs[0], seed=s) for s in range(17)], reference, 0)


def arms_routing(runs: Path):
    return arms.read_run(str(runs / "dar")).cfg.student.routing


def test_runs_that_cannot_be_compared_are_refused(runs, tmp_path):
    with pytest.raises(config.ConfigError, match="no config.yaml"):
        arms.read_runs((str(tmp_path),))
    with pytest.raises(config.ConfigError, match="several folders"):
        arms.read_runs((str(runs / "dar"), str(runs / "dar")))
    with pytest.raises(config.ConfigError, match="runs"):
        config.load(ReportConfig, ["out=/tmp/x"])


def test_images_without_a_spectrum_are_refused_before_any_is_made(runs):
    small = SimpleNamespace(shape=(3, 16, 16), num_conditions=7)
    with pytest.raises(UserError, match="images of 16 x 16 pixels .* needs 32 a side"):
        Bench.of(options(runs, "dar"), small, torch.device("cpu"))


def test_runs_that_differ_in_more_than_routing_are_not_called_a_comparison(runs):
    both = arms.read_runs(tuple(str(runs / name) for name in ("regression", "dar")))
    (sentence,) = routing_comparisons([checked(arm.name) for arm in both], both)
    assert "matching.weight" in sentence and "not a comparison" in sentence


def test_resetting_routers_that_add_detail_shows_as_a_negative_shift(runs, monkeypatch):
    """The shift is what resetting does: here it empties the images, so the gain must fall."""
    (arm,) = arms.read_runs((str(runs / "dar"),))
    device = torch.device("cpu")
    network = arms.GuidedTeacher.of(arm, device).network
    maker = Bench.of(options(runs, "dar"), network, device)
    real, _ = real_sets(maker, Photos(32))
    given = iter([real.images, torch.div(real.images, 2, rounding_mode="floor")])
    monkeypatch.setattr(Bench, "cached", lambda self, facts, generator, what: Made(next(given), real.labels))
    one = student_set(arm, maker, real)
    assert one.facts.routing.hf_gain_shift_db == pytest.approx(-6.0, abs=0.2)
    assert one.facts.routing.label == "router used"
