"""What a report, and the judgement of a teacher, are given: what is read once, told apart, or refused in one line."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from dmd_dar import config
from dmd_dar.data import folder, sources
from dmd_dar.data.config import DataConfig
from dmd_dar.data.images import png_bytes
from dmd_dar.diagnostics.command import DiagnosticsConfig, data_of
from dmd_dar.distillation import job as distill
from dmd_dar.errors import UserError
from dmd_dar.models.saved import ModelCard, network_hash, save_network, weight_count
from dmd_dar.models.sit import SiTConfig, with_routing
from dmd_dar.models.teachers import TeacherConfig
from dmd_dar.routing.layout import RoutingConfig
from eval import report
from eval import teacher as teachers
from eval.measure.ledger import Ledger
from eval.measure.pair import Compared, ImageSet, jsonable, measure
from eval.metrics.spectrum import hf_gain_db, spectrum_of
from eval.report import ReportConfig
from eval.samples.cost import SamplingCost
from eval.samples.facts import SetFacts
from eval.samples.images import UnfitError
from eval.samples.parallel import Processes
from eval.samples.real import open_fitting
from eval.samples.sampling import Bench
from eval.study import inputs, pairing
from eval.study import runs as arms
from eval.study.checks import conclusions, student_checks
from tests.data.test_latents import stored
from tests.eval.opened import of, weights_opened
from tests.tiny import TINY, tiny_sit

CFG = distill.DistillConfig()


@pytest.fixture
def run(tmp_path) -> Path:
    """A finished run, as far as its folder says."""
    folder = tmp_path / "dar"
    network = with_routing(tiny_sit(), RoutingConfig("timestep", 2))
    save_network(folder / "student", network, ModelCard(rungs=CFG.rungs, origin={"steps": CFG.steps}))
    (folder / "config.yaml").write_text(config.to_yaml(CFG))
    return folder


def test_the_card_of_a_student_is_read_without_its_weights_being_loaded(run):
    with weights_opened() as opened:
        (arm,) = arms.read_runs((str(run),))
        pairing.require_different_networks("dar", [arm])
        assert arm.origin == {"steps": CFG.steps} and of(opened, run) == {"hash": 1}
        student = arm.student()
        assert student.digest == arm.saved.digest and of(opened, run) == {"hash": 1, "load": 1}
        assert weight_count(run / "student") == sum(p.numel() for p in student.network.parameters())


def test_a_run_is_called_as_its_folder_wherever_the_command_stands(run, monkeypatch):
    monkeypatch.chdir(run)
    assert [arm.name for arm in (arms.read_run("."), arms.read_run("../dar/"), arms.read_run("student/.."))] == 3 * [
        "dar"
    ]


def test_a_student_that_changes_under_a_report_is_refused(run):
    (arm,) = arms.read_runs((str(run),))
    weights = run / "student" / "transformer" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    with pytest.raises(config.ConfigError, match="dar/student has changed since this command began"):
        arm.student()
    with pytest.raises(
        config.ConfigError, match=r"runs: .*dar: .*is not the network that denoiser.json was saved with"
    ):
        arms.read_runs((str(run),))


@pytest.mark.parametrize("text", ["a: [1", "- 1", "1", "\x00", "a: 1\na: 2"])
def test_a_damaged_configuration_of_a_run_is_named(run, text):
    (run / "config.yaml").write_text(text)
    for read in (lambda: arms.read_runs((str(run),)), lambda: data_of(DiagnosticsConfig(run=str(run)))):
        with pytest.raises(
            config.ConfigError, match=r"dar/config.yaml is no configuration that a run wrote: .*restore"
        ):
            read()


@pytest.mark.parametrize("real", ["b/x", "a/x", "a/../a/x"])
def test_real_and_reference_of_one_name_are_told_apart(tmp_path, crops, monkeypatch, real):
    """Two folders called x, or one given as both: measured under one name, each would read the other's numbers."""
    opened, pixels = [], {}
    for place, seed in (("a/x", 0), ("b/x", 1), ("ours", 2)):
        (tmp_path / place).mkdir(parents=True)
        pixels[place] = crops(32, 2, seed)[0] // (1 + seed)
        np.save(tmp_path / place / "all.npy", pixels[place].numpy())
    read_set = inputs.read_set
    monkeypatch.setattr(inputs, "read_set", lambda path, *role: opened.append(path) or read_set(path, *role))
    argv = [f"images=[{tmp_path / 'ours'}]", f"reference={tmp_path / 'a' / 'x'}", f"real={tmp_path / real}"]
    report.report(config.load(ReportConfig, [*argv, f"out={tmp_path / 'report'}", "metrics=[offline]", "cpu=true"]))
    result = json.loads((tmp_path / "report" / "report.json").read_text())
    rows = {row["name"]: row["against"] for row in result["sets"]}
    assert (result["teacher"], result["real"]) == ("x", "x (real)") and set(rows) == {"x", "x (real)", "ours"}
    assert len(opened) == (3 if real == "b/x" else 2)
    for target, place in (("teacher", "a/x"), ("real", real.replace("../a/", ""))):
        ours = hf_gain_db(spectrum_of(pixels["ours"]), spectrum_of(pixels[place]))
        assert rows["ours"][target]["gain_db"]["HF"]["value"] == pytest.approx(ours, abs=1e-6)
    between = hf_gain_db(spectrum_of(pixels["b/x" if real == "b/x" else "a/x"]), spectrum_of(pixels["a/x"]))
    assert rows["x (real)"]["teacher"]["gain_db"]["HF"]["value"] == pytest.approx(between, abs=1e-6)
    assert between < -2 if real == "b/x" else between == 0


def test_two_sets_of_one_name_that_nothing_tells_apart_are_refused(crops):
    one = ImageSet("x", crops(32, 2, 0)[0], None, "teacher", False)
    with pytest.raises(UnfitError, match="the reference and the real images are called 'x'; rename one"):
        measure(Compared([], one, ImageSet("x", crops(32, 2, 1)[0], None, "real", False)))


def test_a_report_of_fewer_images_than_classes_is_concluded(crops):
    """No class has two images, as with 1000 classes, or with more prompts than images."""
    images, facts = crops(32, 2, 0)[0], SetFacts(cost=SamplingCost(1.0, (1.0, 1.0), 5, 16, 1.0, "", 1.0))

    def made(name: str, role: str, step: int) -> ImageSet:
        pixels = (images // step).to(torch.uint8)
        return ImageSet(name, pixels, torch.arange(len(images)), role, True, facts=facts)  # type: ignore[arg-type]

    reference = made("teacher", "teacher", 1)
    sets = [made("undistilled, Euler", "undistilled", 3), made("residual", "student", 2)]
    checks = student_checks(measure(Compared(sets, reference)).sets)
    assert [jsonable(check)["least_class_diversity"] for check in checks] == [None]
    (sentence,) = conclusions(checks, [arms.Run("residual", Path("residual"), CFG, {})])
    assert "class diversity is not known, since no class has two images" in sentence


@pytest.mark.parametrize(
    ("shape", "card", "message"),
    [
        ({}, ModelCard(rungs=(1.0, 0.5)), "a student of 2 steps, .* eval.report"),
        ({"num_classes": 3}, ModelCard(), "3 channels and 3 classes"),
        ({"input_size": 96}, ModelCard(), "images of 96 px, .* up to 64"),
        ({}, ModelCard(label_names=tuple("abcdefg")), "its classes are a, b, c"),
    ],
)
def test_what_is_no_teacher_of_the_photographs_is_not_judged(tmp_path, shape, card, message):
    save_network(tmp_path / "one", tiny_sit(SiTConfig(**{**vars(TINY), **shape})), card)
    cfg = teachers.TeacherReportConfig(path=str(tmp_path / "one"), out=str(tmp_path / "out"), cpu=True)
    with pytest.raises(config.ConfigError, match=message):
        teachers.judge_teacher(cfg)
    assert not (tmp_path / "out").exists()


def test_a_teacher_is_hashed_and_loaded_once(tmp_path, monkeypatch):
    save_network(tmp_path / "one", tiny_sit(), ModelCard())
    monkeypatch.setattr(teachers, "measure", lambda *_: {"sets": []})
    monkeypatch.setattr(teachers, "judge", lambda *_: {"bars": {}, "gain_db": {}})
    monkeypatch.setattr(teachers, "print_judgement", lambda _: None)
    argv = [
        f"path={tmp_path / 'one'}",
        f"out={tmp_path / 'out'}",
        f"cache={tmp_path / 'cache'}",
        "n=64",
        "solver_steps=1",
    ]
    with weights_opened() as opened:
        teachers.judge_teacher(config.load(teachers.TeacherReportConfig, [*argv, "neighbours=8", "cpu=true"]))
    assert of(opened, tmp_path / "one") == {"hash": 1, "load": 1} and (tmp_path / "out" / "quality.json").is_file()


@pytest.fixture
def on_a_folder(tmp_path, crops) -> Path:
    """A finished run on a folder of two classes of images."""
    for name, seed in (("cats", 0), ("dogs", 1)):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i, image in enumerate(crops(48, 1, seed)[0]):
            (tmp_path / "images" / name / f"{i}.png").write_bytes(png_bytes(image))
    two = SiTConfig(**{**vars(TINY), "num_classes": 2})
    save_network(tmp_path / "teacher", tiny_sit(two), ModelCard(label_names=("cats", "dogs")))
    origin = {"steps": CFG.steps, "teacher": network_hash(tmp_path / "teacher")}
    save_network(tmp_path / "run" / "student", tiny_sit(two, 1), ModelCard(rungs=(1.0, 0.5), origin=origin))
    data = DataConfig("folder", path=str(tmp_path / "images"))
    teacher = TeacherConfig(str(tmp_path / "teacher"))
    cfg = dataclasses.replace(CFG, data=data, teacher=teacher, rungs=(1.0, 0.5), guidance_scale=1.0)
    (tmp_path / "run" / "config.yaml").write_text(config.to_yaml(cfg))
    return tmp_path / "run"


def options(run: Path) -> ReportConfig:
    argv = [f"runs=[{run}]", f"out={run.parent / 'report'}", f"cache={run.parent / 'cache'}", "metrics=[offline]"]
    return config.load(ReportConfig, [*argv, "n=64", "solver_steps=1", "cpu=true"])


def test_the_data_of_a_run_are_opened_and_hashed_once_in_a_report(on_a_folder, monkeypatch):
    opened = []
    for module in (sources, folder):
        real = module.list_images
        monkeypatch.setattr(module, "list_images", lambda path, real=real: opened.append(path) or real(path))
    made = inputs.sampled(options(on_a_folder), torch.device("cpu"), Ledger(), Processes())
    assert opened == [str(on_a_folder.parent / "images")]
    assert made.real is not None and made.data_hash and made.class_names == {0: "cats", 1: "dogs"}


def test_latents_of_another_codec_are_not_beside_a_report(on_a_folder, tmp_path):
    arm, data = arms.read_run(str(on_a_folder)), DataConfig("latents", path=str(stored(tmp_path / "latents")))
    closed = dataclasses.replace(arm.cfg, data=DataConfig("latents", path="nowhere"))  # a teacher needs no data
    teacher = arms.GuidedTeacher.of(dataclasses.replace(arm, cfg=closed), torch.device("cpu"))
    bench = Bench.of(options(on_a_folder), teacher.network, torch.device("cpu"))
    loaded = dataclasses.replace(teacher.loaded, label_names=())
    with pytest.raises(UserError, match="its latents are those of another VAE"):
        open_fitting(data, dataclasses.replace(bench, num_classes=3), loaded)
