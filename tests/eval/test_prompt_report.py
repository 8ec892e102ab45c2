"""A report on a student of prompts: CLIP reads its own prompts, and photographs that nobody asked for are no fault."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dmd_dar import config
from dmd_dar.distillation import job as distill
from dmd_dar.encode import EncodeConfig, encode
from dmd_dar.sample import SampleConfig, sample
from eval import report
from eval.measure import suite as distances
from eval.measure.ledger import Ledger
from eval.measure.suite import Suite
from eval.metrics import perceptual
from eval.metrics.classifier import fit_classifier
from eval.report import ReportConfig
from eval.samples.images import UnfitError
from eval.samples.parallel import Processes
from eval.samples.sets import read_set
from eval.study.inputs import sampled
from tests.models.tiny_pipelines import tiny_sd3

PROMPTS = ["a red cat", "dogs on the grass"]
SMALL = "steps=1 batch_size=2 rungs=[1.0,0.5] fake_score.updates=1 regression.weight=0 log.wandb=disabled"
SMALL += " log.health_samples=2 launch.cpu=true"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A student of two prompts on 4 x 16 x 16 latents, whose run names no data."""
    root = tmp_path_factory.mktemp("prompted")
    tiny_sd3(root / "sd3", sample_size=16)
    (root / "prompts.jsonl").write_text("\n".join(json.dumps({"prompt": prompt}) for prompt in PROMPTS))
    given = [f"prompts={root / 'prompts.jsonl'}", f"pipeline={root / 'sd3'}", f"out={root / 'prompts'}", "cpu=true"]
    encode(config.load(EncodeConfig, given))
    distill.main(
        [
            f"teacher.path={root / 'sd3'}",
            f"teacher.prompts={root / 'prompts'}",
            f"out_dir={root / 'run'}",
            *SMALL.split(),
        ]
    )
    return root / "run"


@pytest.fixture
def read(monkeypatch) -> dict[int, list[str]]:
    """The texts that CLIP reads, by the number of images."""
    seen: dict[int, list[str]] = {}

    def scored(clip, images, prompts):
        seen.setdefault(len(images), []).extend(prompts)
        return perceptual.ClipScore(1.0, np.ones(len(images)), {"model": "none"})

    monkeypatch.setattr(perceptual, "load_clip", lambda allow_download, device: "clip")
    monkeypatch.setattr(perceptual, "clip_score", scored)
    monkeypatch.setattr(distances, "fit_classifier", partial(fit_classifier, steps=5))
    return seen


def asked(run: Path, out: Path, *more: str) -> ReportConfig:
    argv = [f"runs=[{run}]", f"out={out}", f"cache={out / 'cache'}", "n=64", "solver_steps=1", "cpu=true"]
    return config.load(ReportConfig, [*argv, "metrics=[clip]", "strict=true", *more])


@pytest.mark.stages("report", family="sd3")
def test_strict_passes_and_each_image_is_scored_with_its_prompt(run, tmp_path, read):
    report.report(asked(run, tmp_path))
    result = json.loads((tmp_path / "report.json").read_text())
    assert read.keys() == {64} and set(read[64]) == set(PROMPTS) and read[64][:4] == 2 * PROMPTS
    rows = {row["name"]: row for row in result["sets"]}
    assert rows["run"]["clip"]["prompt"] == "{}" and result["class_names"] == dict(zip("01", PROMPTS, strict=True))
    (left,) = [one for one in result["skipped"] if one["metric"] == "against real images"]
    assert not left["requested"] and "photos: its classes are not the teacher's prompts; name real" in left["reason"]
    assert result["real"] is None


def test_real_images_of_a_folder_stand_beside_the_samples(run, tmp_path):
    for name, side in (("photographs", 32), ("large", 40)):
        (tmp_path / name).mkdir()
        for i in range(6):
            pixels = torch.randint(256, (side, side, 3), generator=torch.Generator().manual_seed(i), dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(tmp_path / name / f"{i}.png")
        (tmp_path / name / "samples.json").write_text(json.dumps({"labels": [0, 1] * 3}))
    ledger, device = Ledger(), torch.device("cpu")
    inputs = sampled(asked(run, tmp_path, f"real={tmp_path / 'photographs'}"), device, ledger, Processes())
    assert (inputs.real.name, inputs.real.count, inputs.real.role) == ("real", 6, "real") and not ledger.skipped
    assert (
        inputs.real.prompted and inputs.real.names == dict(enumerate(PROMPTS)) and inputs.everything[0] is inputs.real
    )
    with pytest.raises(UnfitError, match="real = .*large: images of 40 x 40 px, but the teacher's are of 32"):
        sampled(asked(run, tmp_path, f"real={tmp_path / 'large'}"), device, ledger, Processes())


def test_a_folder_of_its_samples_knows_its_prompts(run, tmp_path, read):
    sample(SampleConfig(student=str(run / "student"), out=str(tmp_path), n=4, cpu=True))
    score = distances.clip_result(read_set(str(tmp_path)), Suite((), clip="clip"), {}, Ledger())
    assert read[4] == 2 * PROMPTS and score.prompt == "{}"
