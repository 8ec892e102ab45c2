"""A student in a fresh process makes the run's images; plain diffusers loads it where it can, else it must refuse."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import dmd_dar
from dmd_dar.errors import DamagedFileError, MissingWeightsError, UserError
from dmd_dar.methods import rollout
from dmd_dar.methods.generate import SampleRange, decoded, few_step_generator, generate
from dmd_dar.models.codecs import load_codec
from dmd_dar.models.denoiser import MEANINGS, velocity_of
from dmd_dar.models.diffusers_denoiser import routed_copy
from dmd_dar.models.saved import Denoiser, ModelCard, save_network
from dmd_dar.models.sit import with_routing
from dmd_dar.models.teachers import TeacherConfig, load_teacher
from dmd_dar.routing.layout import RoutingConfig
from tests.models.tiny_pipelines import tiny_pipeline
from tests.tiny import TINY, tiny_sit

ROOT = Path(__file__).parents[1]
RUNGS = (1.0, 0.8, 0.4)
KINDS = ("sit_residual", "sit_dar", "dit_residual", "dit_dar")
FRESH = """
import sys
from safetensors.torch import save_file
import dmd_dar
made = {}
for path in sys.argv[2:]:
    pipe = dmd_dar.load_pipeline(path)
    made[path] = pipe(n=5, seed=3).contiguous()
    along = pipe([2, 0, 2], seed=3, batch_size=2, sampler="deterministic")
    made[path + ".labels"] = along.contiguous()
save_file(made, sys.argv[1])
"""


def network_of(kind: str, pipeline: Path) -> Denoiser:
    routing = RoutingConfig("timestep" if kind.endswith("dar") else "residual", 2)
    if kind.startswith("sit"):
        network = with_routing(tiny_sit(replace(TINY, input_size=16)), routing)
    else:
        network = routed_copy(load_teacher(TeacherConfig(str(pipeline))).network, routing)
    with torch.no_grad():
        for p in network.router_parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    return network.eval()


@pytest.fixture(scope="module")
def students(tmp_path_factory) -> dict[str, tuple[Path, Denoiser]]:
    root = tmp_path_factory.mktemp("students")
    pipeline, made = tiny_pipeline(root / "pipeline"), {}
    for kind in KINDS:
        latent = kind.startswith("dit")
        names = tuple(f"class {i}" for i in range(1000)) if latent else ("a", "b", "c", "d", "e", "f", "g")
        card = ModelCard(MEANINGS["dit"] if latent else "flow", RUNGS, names)
        network = network_of(kind, pipeline)
        save_network(root / kind, network, card, load_codec(str(pipeline)) if latent else None)
        made[kind] = root / kind, network
    return made


def run_generator(kind: str, network: Denoiser, folder: Path, sampler: rollout.Sampler = "stochastic"):
    """What a run samples with."""
    velocity = velocity_of(network, MEANINGS["dit"] if kind.startswith("dit") else "flow")
    decode = load_codec(str(folder)).decode if kind.startswith("dit") else None
    return decoded(few_step_generator(velocity, RUNGS, sampler), decode)


def test_a_fresh_process_makes_the_runs_images(students, tmp_path):
    paths = [str(path) for path, _ in students.values()]
    command = [sys.executable, "-c", FRESH, str(tmp_path / "made.safetensors"), *paths]
    subprocess.run(command, cwd=ROOT, check=True, timeout=300)
    made = load_file(tmp_path / "made.safetensors")
    for kind, (folder, network) in students.items():
        config = network.config
        form = dict(shape=(config.in_channels, config.input_size, config.input_size), num_classes=config.num_classes)
        expected, _ = generate(run_generator(kind, network, folder), SampleRange(5, seed=3), **form)
        assert expected.std() > 0.05 and (made[str(folder)] - expected).abs().max() <= 1e-6
        along = run_generator(kind, network, folder, "deterministic")
        expected, _ = generate(along, SampleRange(3, seed=3, labels=torch.tensor([2, 0, 2])), **form)
        assert (made[f"{folder}.labels"] - expected).abs().max() <= 1e-6


def test_labels_noise_and_outputs(students):
    pipe = dmd_dar.load_pipeline(students["sit_dar"][0])
    assert pipe.rungs == RUNGS and pipe.label_names[:2] == ("a", "b") and pipe.shape == (3, 16, 16)
    images = pipe(n=3, seed=1)
    assert torch.equal(images, pipe(["a", "b", "c"], seed=1)) and torch.equal(images[1:2], pipe([0, 1], seed=1)[1:])
    assert torch.equal(pipe("b", n=2, seed=1)[1], images[1]) and pipe(4).shape == (1, 3, 16, 16)
    for two in (torch.tensor(2), np.int64(2), np.array(2), [np.int64(2)], [torch.tensor(2)], np.array(["c"]), (2,)):
        assert torch.equal(pipe(two, seed=1), pipe(2, seed=1))
    assert torch.equal(pipe(np.arange(3), seed=1), images) and torch.equal(
        pipe(torch.tensor(1), n=2, seed=1)[1], images[1]
    )
    pixels, pictures = pipe(n=3, seed=1, output="uint8"), pipe(n=3, seed=1, output="pil")
    assert pixels.dtype == torch.uint8 and (pixels.float() / 127.5 - 1 - images.clamp(-1, 1)).abs().max() < 0.0041
    assert pictures[2].size == (16, 16) and pictures[2].tobytes() == pixels[2].permute(1, 2, 0).numpy().tobytes()
    noise = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    given = pipe(noise=noise, sampler="deterministic")
    assert torch.equal(given, pipe([0, 1], noise=noise, sampler="deterministic", seed=9))
    assert not torch.allclose(given, pipe(n=2, sampler="deterministic"))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "name the number of images"),
        ({"labels": [0, 1], "n": 3}, "labels for 2 images, n for 3 images"),
        ({"labels": 7}, "label 7: the student knows the classes 0 to 6"),
        ({"labels": ["z"]}, "label 'z': the student knows"),
        ({"labels": [0.5]}, "label 0.5"),
        ({"labels": torch.tensor(0.5)}, "label 0.5"),
        ({"labels": [torch.tensor(0.5)]}, "label tensor"),
        ({"labels": torch.zeros(1, 2, dtype=torch.int64)}, r"label \[0, 0\]"),
        ({"labels": np.int64(-1)}, "label -1"),
        ({"n": 0}, "above 0"),
        ({"noise": torch.zeros(2, 3, 8, 8)}, r"noise of shape \(2, 3, 8, 8\): must be \(2, 3, 16, 16\)"),
        ({"n": 1, "output": "jpeg"}, "output = 'jpeg'"),
    ],
)
def test_what_the_student_cannot_do_is_said(students, given, said):
    with pytest.raises(UserError, match=said):
        dmd_dar.load_pipeline(students["sit_residual"][0])(**given)


def test_a_teacher_a_missing_vae_and_a_changed_one_are_refused(students, tmp_path):
    import shutil

    with pytest.raises(UserError, match="no few-step student"):
        dmd_dar.load_pipeline(ROOT / "teachers" / "photos32")
    with pytest.raises(UserError, match="no adapter; leave base out"):
        dmd_dar.load_pipeline(students["sit_dar"][0], base="teachers/photos32")
    shutil.copytree(students["dit_dar"][0], tmp_path / "student")
    shutil.rmtree(tmp_path / "student" / "vae")
    with pytest.raises(MissingWeightsError, match="vae"):
        dmd_dar.load_pipeline(tmp_path / "student")
    shutil.copy(students["dit_residual"][0] / "denoiser.json", tmp_path / "student" / "denoiser.json")
    with pytest.raises(DamagedFileError, match="is not the network"):
        dmd_dar.load_pipeline(tmp_path / "student")


@torch.no_grad()
def test_diffusers_loads_a_plain_dit_student_and_its_transformer_agrees(students):
    from diffusers import DiTPipeline

    folder, network = students["dit_residual"]
    theirs = DiTPipeline.from_pretrained(folder)
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    time, labels = torch.tensor([999.0, 250.0]), torch.tensor([1, 7])
    out = theirs.transformer(x, timestep=time, class_labels=labels).sample
    assert out.std() > 0.1 and (out - network(x, time, labels)).abs().max() <= 1e-6
    assert theirs.labels["class 7"] == 7 and theirs.scheduler.config.rungs == list(RUNGS)
    with pytest.raises(ValueError, match="num_inference_steps"):  # it cannot know the rungs, so it must not guess
        theirs([1], num_inference_steps=len(RUNGS), guidance_scale=1.0)


class Replayed:
    """Draws whose noise is that of a torch generator, in the order in which diffusers asks for it."""

    def __init__(self, seed: int):
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, name: str, *shape: int) -> Tensor:
        return torch.randn(2, *shape, generator=self.generator)


@torch.no_grad()
@pytest.mark.parametrize("prediction", ["flow", "dit"])
def test_the_saved_scheduler_steps_as_our_sampler_does(tmp_path, prediction):
    """With the rungs of a chain given by hand, whole timesteps, which are all that LCMScheduler knows."""
    import diffusers

    meaning, network = MEANINGS[prediction], tiny_sit(replace(TINY, input_size=16)).eval()
    rungs = RUNGS
    if meaning.schedule is not None:
        rungs = (1.0, *meaning.schedule.level(torch.tensor([700.0, 300.0])).tolist())
    save_network(tmp_path, network, ModelCard(prediction, rungs))
    said = json.loads((tmp_path / "scheduler" / "scheduler_config.json").read_text())
    scheduler = getattr(diffusers, said["_class_name"]).from_pretrained(tmp_path, subfolder="scheduler")
    if prediction == "flow":
        scheduler.set_timesteps(len(rungs))
    else:
        assert scheduler.config.rung_timesteps == [999, 700, 300]
        scheduler.set_timesteps(timesteps=scheduler.config.rung_timesteps)
    labels, noise = torch.tensor([0, 5]), torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    ours = rollout.Rollout(velocity_of(network, prediction), labels, rungs, Replayed(2), noise).end()
    generator, x = torch.Generator().manual_seed(2), noise
    for t in scheduler.timesteps:
        asked = t / scheduler.config.num_train_timesteps if prediction == "flow" else t
        x = scheduler.step(network(x, asked.float().expand(2), labels), t, x, generator=generator).prev_sample
    torch.testing.assert_close(x, ours, rtol=1e-3, atol=1e-3 * ours.abs().max().item())


@pytest.mark.parametrize("kind", ["sit_residual", "sit_dar", "dit_dar"])
def test_plain_diffusers_refuses_what_it_would_sample_wrongly(students, kind):
    import diffusers

    folder = students[kind][0]
    tries = [
        lambda: diffusers.DiffusionPipeline.from_pretrained(folder),
        lambda: diffusers.DiTPipeline.from_pretrained(folder),
        lambda: diffusers.AutoModel.from_pretrained(folder, subfolder="transformer"),
        lambda: diffusers.DiTTransformer2DModel.from_pretrained(folder / "transformer"),
        lambda: diffusers.DiTTransformer2DModel.from_pretrained(folder / "transformer", use_safetensors=True),
    ]
    for load in tries:
        with pytest.raises((OSError, ValueError, AttributeError)):
            load()
