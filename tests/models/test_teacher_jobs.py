"""The whole job on teachers that users have: public .pt files, latents with their codec, a DiTPipeline."""

import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from dmd_dar import config, flow, plan
from dmd_dar.distillation import job as distill
from dmd_dar.models.diffusers_denoiser import DiffusersDenoiser
from dmd_dar.models.saved import ModelCard, save_network
from dmd_dar.models.teachers import Teacher, TeacherConfig, load_teacher
from dmd_dar.sample import SampleConfig, sample
from tests.models.tiny_pipelines import public_file, tiny_pipeline, tiny_vae
from tests.tiny import TINY

ROOT = Path(__file__).parents[2]


def load(path: Path) -> Teacher:
    return load_teacher(TeacherConfig(str(path)))


def run(teacher: Path, out: Path, *more: str) -> Path:
    recipe = "configs/imagenet256/sit_xl.yaml"
    small = "steps=2 batch_size=4 student.warmup=0 student.routing.chunk_size=2 fake_score.updates=1 regression.count=3"
    small += " regression.solver_steps=4 log.every=1 log.wandb=disabled launch.cpu=true"
    small += " preflight=false log.health_samples=4"
    small += " teacher.codec= teacher.heads=2 teacher.prediction=auto"
    given = [f"teacher.path={teacher}", f"out_dir={out}", f"regression.cache={out}/pairs", "regression.weight=0.25"]
    distill.main([f"config={ROOT / recipe}", *small.split(), *given, *more])
    return out / "student"


def test_a_public_pt_distils_as_our_own_folder_of_the_same_network_does(tmp_path):
    network = public_file(tmp_path / "SiT-tiny.pt", TINY)
    save_network(tmp_path / "ours", network, ModelCard("sit"))
    students = [run(tmp_path / name, tmp_path / f"run_{name}", "data.size=32") for name in ("SiT-tiny.pt", "ours")]
    theirs, ours = (load_file(student / "transformer" / "model.safetensors") for student in students)
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)
    assert any(not torch.equal(ours[name], value) for name, value in network.state_dict().items())
    assert json.loads((students[0] / "denoiser.json").read_text())["prediction"] == "sit"


@pytest.mark.parametrize("name", ["SiT-latent.pt", "DiT-latent.pt"])
def test_a_latent_pt_is_distilled_with_its_codec_and_shown_decoded(tmp_path, name):
    public_file(tmp_path / name)
    tiny_vae().save_pretrained(tmp_path / "vae")
    student = run(tmp_path / name, tmp_path / "run", f"teacher.codec={tmp_path / 'vae'}")
    back = load(student)
    assert back.prediction == name[:3].lower() and back.codec == str(student / "vae") and len(back.rungs) == 4
    assert back.network.dar is not None and back.network.config.in_channels == 4
    width, height = Image.open(tmp_path / "run" / "samples" / "step_00000002.png").size
    assert (width, height) == (5 * (2 * 16 + 2) - 2, 7 * (2 * 16 + 2) - 2)  # 5 classes, 16-pixel images doubled
    assert_samples(student, tmp_path / "images")


def assert_samples(student: Path, out: Path) -> None:
    """The sampling command decodes: RGB images of the codec's size."""
    sample(SampleConfig(student=str(student), out=str(out), n=3, cpu=True))
    images = [Image.open(out / f"{i:06d}.png") for i in range(3)]
    assert {(image.mode, image.size) for image in images} == {("RGB", (16, 16))}
    assert len({image.tobytes() for image in images}) == 3


@pytest.mark.stages("DAR", family="dit")
def test_a_pipeline_is_distilled_into_a_routed_transformer(tmp_path):
    from diffusers import DiTTransformer2DModel

    pipeline = tiny_pipeline(tmp_path / "pipeline")
    student = run(pipeline, tmp_path / "run")
    back = load(student)
    assert isinstance(back.network, DiffusersDenoiser) and back.network.config.routing.query == "timestep"
    assert back.rungs == flow.default_rungs(4) and back.codec == str(student / "vae")
    assert_samples(student, tmp_path / "images")
    start = load(pipeline).network.transformer.state_dict()
    weights = back.network.transformer.state_dict()
    assert any(not torch.equal(weights[name], value) for name, value in start.items())
    with pytest.raises((OSError, ValueError)):  # diffusers itself must not sample it without its routers
        DiTTransformer2DModel.from_pretrained(student / "transformer")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ((), "set teacher.codec to the VAE"),
        (("teacher.codec=/nowhere",), "teacher.path = .*/nowhere"),
        (("teacher.prediction=flow", "teacher.revision=main"), "leave revision out"),
    ],
)
def test_a_latent_teacher_without_its_codec_is_refused(tmp_path, capsys, more, said):
    public_file(tmp_path / "SiT-latent.pt")
    with pytest.raises(SystemExit) as stop:
        run(tmp_path / "SiT-latent.pt", tmp_path / "run", *more)
    assert stop.value.code == 2 and re.search(said, capsys.readouterr().err.splitlines()[-1])


@pytest.mark.parametrize("name", ["sit_xl", "dit_xl"])
def test_the_xl_recipes_are_planned_without_weights(name, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(plan, "footprint", lambda *given: plan.Footprint(kept=10**9, peak=10**9))
    distill.main([f"config=configs/imagenet256/{name}.yaml", "--dry-run", "launch.accumulation=32"])
    planned = capsys.readouterr().out
    assert "675,129,632" in planned and "# fits, with 10% left free: 24 GB no, 40 GB yes" in planned
    (tmp_path / "again.yaml").write_text(planned)
    config.load(distill.DistillConfig, [f"config={tmp_path / 'again.yaml'}"])
    distill.main([f"config=configs/imagenet256/{name}.yaml", "--dry-run", "teacher.path=nowhere.pt"])
    assert "# no plan: teacher.path = nowhere.pt" in capsys.readouterr().out
    for said in ("query: timestep", "chunk_size: 4", "summary: sum", "scale: stream", f"prediction: {name[:3]}"):
        assert said in planned
