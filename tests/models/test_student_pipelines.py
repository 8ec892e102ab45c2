"""RUN/student in diffusers' own pipelines, in a fresh process: the images of `load_pipeline`, or an error."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dmd_dar import load_pipeline
from dmd_dar.models.diffusers_denoiser import DiffusersDenoiser
from dmd_dar.models.families import FAMILIES
from tests.models.student_pipelines import FORMS, TEXTS, noise_of, student_of

ROOT = Path(__file__).parents[2]
QUICK = [("sd3", "timestep")]
SLOW = [(name, query) for name in FORMS for query in ("residual", "timestep") if (name, query) not in QUICK]
EVERY = [*QUICK, *(pytest.param(*each, marks=pytest.mark.slow) for each in SLOW)]

FRESH = """
import json, sys
import diffusers, torch
from safetensors.torch import load_file, save_file
import dmd_dar
assert "dmd_dar.models" not in sys.modules
folder, given, call, guided, steps, texts = json.loads(sys.argv[1])
pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
pipe.set_progress_bar_config(disable=True)
noise = load_file(folder + "/noise.safetensors")
asked = []
pipe.transformer.register_forward_pre_hook(lambda module, args: asked.append(1))

def drawn(**more):
    asked.clear()
    if not noise:
        return pipe([1, 7], generator=torch.Generator().manual_seed(5), **given, **more)
    return pipe(prompt=[*texts], latents=noise["noise"].clone(), **given, **more)

images = drawn(num_inference_steps=steps, **call).images
calls, refused = len(asked), []
for wrong in [call, *({"num_inference_steps": n, **call} for n in (1, steps - 1, steps + 1)),
              *({"num_inference_steps": steps, **each} for each in guided)]:
    try:
        drawn(**wrong)
    except ValueError as error:
        refused.append([str(error), len(asked)])
again = drawn(num_inference_steps=steps, **call).images
assert torch.equal(images, again)
save_file({"images": images.contiguous()}, folder + "/images.safetensors")
kinds = [type(pipe).__name__, *(f"{type(x).__module__}.{type(x).__name__}" for x in (pipe.transformer, pipe.scheduler))]
print(json.dumps([kinds, calls, refused]))
"""


def test_every_family_is_among_these():
    made = {*FAMILIES} - {"Flux2Transformer2DModel"}
    assert len(FORMS) == len(made) + 3


@torch.no_grad()
@pytest.mark.parametrize(("name", "query"), EVERY)
@pytest.mark.stages("pipeline", by="name")
def test_the_base_s_pipeline_makes_the_images_of_load_pipeline(tmp_path, name, query):
    form, folder = FORMS[name], student_of(tmp_path, name, query)
    ours = load_pipeline(str(folder))
    noise, network = noise_of(ours.shape), ours.student.network
    assert isinstance(network, DiffusersDenoiser)
    save_file(form.noise(name, network.family, noise), folder / "noise.safetensors")
    given = json.dumps([str(folder), form.given(name), form.call, form.guided, len(form.rungs), TEXTS])
    done = subprocess.run([sys.executable, "-c", FRESH, given], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (pipeline, transformer, scheduler), calls, refused = json.loads(done.stdout.splitlines()[-1])
    base = json.loads((tmp_path / name / "model_index.json").read_text())
    root = type(network.transformer).__name__
    module = "dmd_dar" if query != "residual" else type(network.transformer).__module__
    assert (pipeline, scheduler) == (base["_class_name"], "dmd_dar.StudentScheduler")
    assert transformer == f"{module}.{root}" and calls == len(form.rungs)

    labels = [1, 7] if name == "dit" else [0, 1]
    images = load_file(folder / "images.safetensors")["images"]
    expected = (ours(labels, noise=noise) / 2 + 0.5).clamp(0, 1)
    other = (ours(labels, noise=noise.flip(0)) / 2 + 0.5).clamp(0, 1)
    assert (images - other).abs().max() > 1e-2 and expected.std() > 0.02
    print(f"{name} {query}: {(images - expected).abs().max():.1e} of {expected.std():.2f}")
    assert (images - expected).abs().max() <= 1e-5

    assert len(refused) == 4 + len(form.guided) and all(asked == 0 for _, asked in refused)
    steps = len(form.rungs)
    assert all(f"call the pipeline with num_inference_steps={steps}" in said for said, _ in refused[:4])
    unguided = network.family.unguided(network.transformer.config, network.fixed)
    remedy = f"call the pipeline with {unguided.argument}={unguided.value:g}"
    assert {unguided.argument: unguided.value} == form.call
    assert all("has learned its teacher's guidance" in said and remedy in said for said, _ in refused[4:])
    switched = ["true_cfg_scale=1" in said for said, _ in refused[4:]]
    assert switched == ["true_cfg_scale" in each for each in form.guided]
    assert not any(path.is_symlink() for path in (folder / "vae").rglob("*")) and not (folder / "vae").is_symlink()
