"""A latent teacher and its student in a report: tiny random DiTPipeline, images of the run's own folder."""

import csv
import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dmd_dar import config
from dmd_dar.data.images import to_model_range
from dmd_dar.distillation import job as distill
from dmd_dar.models.codecs import load_codec
from eval import report
from eval.measure import suite as distances
from eval.measure.latent import latent_spectra
from eval.measure.ledger import Ledger
from eval.metrics.classifier import fit_classifier
from eval.report import ReportConfig
from eval.samples.parallel import Processes
from eval.samples.sets import ImageSet
from eval.study.inputs import sampled
from tests.models import tiny_pipelines

SIDE = 64  # pixels; 32 x 32 latent cells


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(distances, "fit_classifier", partial(fit_classifier, steps=5))


@pytest.fixture(scope="module")
def root(tmp_path_factory, crops) -> Path:
    """Images of two classes and a student of one step, distilled from a pipeline of two classes."""
    from diffusers import DDIMScheduler, DiTPipeline

    root = tmp_path_factory.mktemp("latent")
    images, labels = crops(SIDE, 6, 0)
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        if label < 2:
            (root / "images" / f"class{label}").mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(root / "images" / f"class{label}" / f"{i}.png")
    network = tiny_pipelines.tiny_dit(sample_size=32, patch_size=8, num_embeds_ada_norm=2)
    chain = DDIMScheduler(beta_start=1e-4, beta_end=0.02, clip_sample=False)
    DiTPipeline(network, tiny_pipelines.tiny_vae(sample_size=SIDE), chain).save_pretrained(root / "teacher")
    distill.main(
        [
            *(f"teacher.path={root / 'teacher'}", "data.name=folder", f"data.path={root / 'images'}"),
            *(f"data.size={SIDE}", f"out_dir={root / 'dar'}", "steps=1", "batch_size=2", "rungs=[1.0,0.5]"),
            *("student.routing.query=timestep", "student.routing.chunk_size=2", "fake_score.updates=1"),
            *("regression.weight=0", "log.wandb=disabled", "launch.cpu=true", "preflight=false", "student.lr=1e-4"),
        ]
    )
    return root


@pytest.fixture(scope="module")
def result(root) -> dict:
    argv = [f"runs=[{root / 'dar'}]", f"out={root / 'report'}", "n=64", "cpu=true", "solver_steps=1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distances, "fit_classifier", partial(fit_classifier, steps=5))
        report.main([*argv, "metrics=[offline]", f"cache={root / 'cache'}", "strict=true"])
    return json.loads((root / "report" / "report.json").read_text())


def row(rows: list[dict], name: str) -> dict:
    return next(one for one in rows if one["name"] == name)


def test_pixels_are_compared_with_what_the_vae_makes_of_real_images(result, root):
    names = [one["name"] for one in result["sets"]]
    assert names[:4] == ["VAE(real)", "teacher", "VAE(real), again", "real"] and result["real"] == "VAE(real)"
    assert result["image_size"] == [SIDE, SIDE] and result["class_names"] == {"0": "class0", "1": "class1"}
    for name in ("teacher", "dar", "real"):
        assert row(result["sets"], name)["against"]["real"]["gain_db"]["HF"]["value"] is not None
    student = row(result["sets"], "dar")
    assert student["against"]["teacher"]["paired"] and student["facts"]["routing"]["by_router"]
    assert student["facts"]["latency_ms_per_image"] > 0 and student["facts"]["evaluations"] == 2
    page = (root / "report" / "report.html").read_text()
    assert "Latent space</h2>" in page and (root / "report" / "latent.png").is_file()


def test_latents_are_compared_channel_by_channel(result, root):
    latent = result["latent"]
    assert (latent["channels"], latent["size"], latent["real"]) == (4, [32, 32], "VAE(real)")
    names = [one["name"] for one in latent["sets"]]
    assert "real" not in names and {"VAE(real)", "VAE(real), again", "teacher", "dar"} <= set(names)
    against = row(latent["sets"], "dar")["against"]
    assert against["teacher"]["paired"] and not against["real"]["paired"]
    assert len(against["teacher"]["hf_gain_db_by_channel"]) == 4
    again = row(latent["sets"], "VAE(real), again")["against"]["real"]
    assert again["gain_db"]["HF"]["low"] < 0.5 and again["lsd"] < 4 * again["lsd_null"]
    with (root / "report" / "report.csv").open() as lines:
        metrics = {one["metric"] for one in csv.DictReader(lines) if (one["set"], one["against"]) == ("dar", "real")}
    assert {"latent_gain_db.HF", "latent_gain_db.channel3.HF", "latent_lsd"} <= metrics


def test_what_stands_for_real_is_decoded_from_encoded_crops(root):
    cfg = config.load(ReportConfig, [f"runs=[{root / 'dar'}]", "n=64", "solver_steps=1", f"cache={root / 'cache'}"])
    inputs = sampled(cfg, torch.device("cpu"), Ledger(), Processes())
    original = next(one for one in inputs.sets if one.name == "real")
    codec = load_codec(str(root / "teacher"))
    mean, std = codec.encode(to_model_range(original.images[:4]))
    assert torch.equal(inputs.real.labels, original.labels)
    distance = (inputs.real.latents[:4] - mean).abs() / std
    assert 0.5 < distance.mean() < 1.1  # E|N(0, 1)| = 0.8: drawn from the encoder's distribution
    decoded = codec.decode(inputs.real.latents[:4]).clamp(-1, 1)
    assert (to_model_range(inputs.real.images[:4]) - decoded).abs().max() <= 0.5 / 127.5 + 1e-5


def made(name: str, latents: torch.Tensor, paired: bool = True) -> ImageSet:
    images = torch.zeros(len(latents), 3, 64, 64, dtype=torch.uint8)
    role = "teacher" if name == "teacher" else "student"
    return ImageSet(name, images, torch.zeros(len(latents)), role, paired, latents=latents)


@pytest.mark.parametrize("side", [16, 32])
def test_a_channel_that_loses_detail_is_found_in_latent_space(side):
    noise = torch.randn(40, 3, side, side, generator=torch.Generator().manual_seed(0))
    other = noise.clone()
    other[:, 1] *= 0.5  # -6.02 dB in one channel of three of equal power
    found = latent_spectra([made("teacher", noise), made("x", other)], made("teacher", noise), None, 0, Ledger())
    gains = next(one for one in found.sets if one.name == "x").against.teacher
    by_channel = [gain.value for gain in gains.hf_gain_db_by_channel]
    assert by_channel == pytest.approx([0, 20 * np.log10(0.5), 0], abs=1e-5)
    assert gains.gain_db["HF"].value == pytest.approx(10 * np.log10(2.25 / 3), abs=0.05 * 32 / side)
    assert [np.isnan(gains.gain_db[band].value) for band in ("B0", "B1", "B2")] == [True, side == 16, False]
    assert list(found.bands.edges) == sorted(found.bands.edges)
    assert found.sets[0].name == "teacher" and not list(found.sets[0].against.measured())


def test_small_latents_are_told_and_models_of_pixels_have_none():
    ledger, small = Ledger(), made("teacher", torch.randn(4, 4, 8, 8))
    assert latent_spectra([small], small, None, 0, ledger) is None
    assert "8 x 8 cells" in ledger.skipped[0].reason and not ledger.skipped[0].requested
    plain = ImageSet("teacher", torch.zeros(4, 3, 32, 32, dtype=torch.uint8), None, "teacher", True)
    assert latent_spectra([plain], plain, None, 0, Ledger()) is None
