"""The whole latent path on a tiny random DiTPipeline saved by diffusers: encode, pairs, distill, sample, report."""

import json
import re
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dmd_dar import config
from dmd_dar.distillation import job as distill
from dmd_dar.draws import Draws, sample_range
from dmd_dar.encode import EncodeConfig, encode
from dmd_dar.methods.rollout import Rollout
from dmd_dar.models.denoiser import velocity_of
from dmd_dar.models.teachers import TeacherConfig, codec_of, load_teacher
from dmd_dar.pairs import PairsConfig, make_pairs
from dmd_dar.sample import SampleConfig, sample
from eval import report
from eval.measure import suite as distances
from eval.metrics.classifier import fit_classifier
from tests.models.tiny_pipelines import tiny_dit, tiny_vae
from tests.pictures import noise

RUNGS = "rungs=[1.0,0.9,0.5]"
SMALL = f"steps=2 batch_size=4 {RUNGS} fake_score.updates=1 student.routing.chunk_size=2 guidance_scale=1.5"
SMALL += " regression.weight=0.5 regression.solver_steps=4 log.every=1 log.wandb=disabled launch.cpu=true"
SMALL += " preflight=false log.health_samples=4"
SMALL += " gan.weight=0.1 student.lr=1e-4"


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A pipeline of two classes on 32 x 32 latents, images of two classes, their latents, the teacher's pairs."""
    from diffusers import DDIMScheduler, DiTPipeline

    root = tmp_path_factory.mktemp("path")
    chain = DDIMScheduler(beta_start=1e-4, beta_end=0.02, clip_sample=False)
    transformer = tiny_dit(sample_size=32, patch_size=4, num_embeds_ada_norm=2)
    DiTPipeline(transformer, tiny_vae(), chain).save_pretrained(root / "pipeline")
    for i in range(6):
        (root / "images" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise(72, 68, i)).save(root / "images" / "ab"[i % 2] / f"{i}.png")
    of_images = ["data.name=folder", f"data.path={root / 'images'}", "data.size=64", "data.held_out_share=0"]
    run(EncodeConfig, encode, f"codec={root / 'pipeline'}", f"out={root / 'latents'}", "cpu=true", *of_images)
    few = [RUNGS, "n=6", "solver_steps=4", "guidance_scale=1.5", "cpu=true"]
    run(PairsConfig, make_pairs, f"teacher.path={root / 'pipeline'}", f"out={root / 'pairs'}", *few)
    return root


def run(schema, job, *argv: str) -> None:
    config.run_job(schema, job, list(argv))


def arguments(made: Path, out: Path, *more: str) -> list[str]:
    data = ["data.name=latents", f"data.path={made / 'latents'}", f"regression.pairs={made / 'pairs'}"]
    return [f"teacher.path={made / 'pipeline'}", f"out_dir={out}", *data, *SMALL.split(), *more]


@pytest.fixture(scope="module")
def runs(made) -> dict[str, Path]:
    folders = {query: made / query for query in ("residual", "timestep")}
    for query, folder in folders.items():
        distill.main(arguments(made, folder, f"student.routing.query={query}"))
    return folders


@pytest.mark.parametrize("query", ["residual", "timestep"])
@torch.no_grad()
def test_a_student_is_trained_with_every_loss_and_sampled_as_images(runs, tmp_path, query):
    log = [json.loads(line) for line in (runs[query] / "log.jsonl").read_text().splitlines()]
    last = {name: value for record in log for name, value in record.items()}
    for term in ("dm", "regression", "gan"):
        assert np.isfinite(last[f"student/{term}"]), term
    assert last["discriminator/loss"] > 0

    folder = runs[query] / "student"
    sample(SampleConfig(student=str(folder), out=str(tmp_path / "images"), n=4, seed=3, cpu=True))
    student = load_teacher(TeacherConfig(str(folder)))
    assert student.network.config.routing.query == query
    draws = Draws(3, "sample", 0, sample_range(0, 4))
    noises = draws.normal("noise", 4, 32, 32)
    velocity = velocity_of(student.network, student.prediction)
    x0 = Rollout(velocity, draws.samples % 2, student.rungs, draws, noises, student.sampler).end()
    expected = codec_of(student).decode(x0).clamp(-1, 1)
    for i in range(4):
        image = np.asarray(Image.open(tmp_path / "images" / f"{i:06d}.png"))
        assert image.shape == (64, 64, 3)
        assert np.abs(image - (expected[i].permute(1, 2, 0).numpy() + 1) * 127.5).max() < 0.51


@pytest.mark.slow
def test_both_arms_are_reported_in_pixels_and_in_latents(made, runs, monkeypatch):
    monkeypatch.setattr(distances, "fit_classifier", partial(fit_classifier, steps=5))
    given = [f"runs=[{runs['residual']},{runs['timestep']}]", f"out={made / 'report'}", f"cache={made / 'cache'}"]
    report.main([*given, "n=64", "solver_steps=1", "metrics=[offline]", "strict=true", "cpu=true"])
    told = json.loads((made / "report" / "report.json").read_text())
    assert told["image_size"] == [64, 64] and told["real"] == "VAE(real)"
    assert (told["latent"]["channels"], told["latent"]["size"]) == (4, [32, 32])
    for part, gains in ((told, "gain_db"), (told["latent"], "gain_db")):
        against = {one["name"]: one["against"] for one in part["sets"]}
        for name in ("residual", "timestep"):
            assert np.isfinite(against[name]["teacher"][gains]["HF"]["value"])
            assert np.isfinite(against[name]["real"][gains]["HF"]["value"])


def test_what_does_not_belong_together_is_refused(made, tmp_path, capsys):
    tiny_vae(scaling_factor=0.3).save_pretrained(tmp_path / "vae")
    for i, (more, said) in enumerate(
        (
            ([f"teacher.codec={tmp_path / 'vae'}"], "its latents are those of another VAE"),
            (["data.name=photos", "data.path="], "real data like the teacher's, [4, 32, 32] in 2 classes"),
            (["guidance_scale=2.0"], "guidance_scale"),
            ([f"data.path={made / 'pairs'}"], "holds no latents"),
            ([f"regression.pairs={made / 'latents'}"], "holds other pairs than this run needs"),
        )
    ):
        with pytest.raises(SystemExit) as stop:
            distill.main(arguments(made, tmp_path / f"run {i}", *more))
        message = capsys.readouterr().err.splitlines()
        assert stop.value.code == 2 and said in message[-1], message


def test_the_documented_example_gives_what_is_printed(tmp_path, monkeypatch, capsys):
    text = (Path(__file__).parents[1] / "docs" / "latents.md").read_text()
    monkeypatch.chdir(tmp_path)
    exec(re.search(r"<!-- example -->\n```python\n(.*?)```", text, re.DOTALL)[1], {})
    encodings = re.findall(r"\$ python -m dmd_dar.encode ((?:.*\\\n)*.*tiny/.*(?:\n.*out=.*)?)", text)
    assert len(encodings) == 2
    for typed in encodings:
        run(EncodeConfig, encode, "cpu=true", *typed.replace("\\", " ").split())
        assert f"    {capsys.readouterr().out}" in text


def test_a_run_whose_latents_were_replaced_is_not_continued(made, tmp_path, capsys):
    shutil.copytree(made / "latents", tmp_path / "latents")
    small = ["gan.weight=0", "regression.weight=0", f"data.path={tmp_path / 'latents'}"]
    distill.main(arguments(made, tmp_path / "run", *small, "steps=1"))
    shutil.rmtree(tmp_path / "latents")
    images = ["data.name=folder", f"data.path={made / 'images'}", "data.size=64", "data.held_out_share=0.4", "cpu=true"]
    run(EncodeConfig, encode, f"codec={made / 'pipeline'}", f"out={tmp_path / 'latents'}", *images)
    with pytest.raises(SystemExit):
        distill.main(arguments(made, tmp_path / "run", *small))
    assert "data has changed" in capsys.readouterr().err.splitlines()[-1]
