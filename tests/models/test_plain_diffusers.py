"""What diffusers and peft make, without us, of a student whose base is a transformer alone, and of adapters: the
run's own images and numbers, or an error."""

import copy
import json
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import dmd_dar
from dmd_dar import config
from dmd_dar.distillation.networks import Memory, build_networks
from dmd_dar.encode import EncodeConfig, encode
from dmd_dar.flow import Schedule
from dmd_dar.methods import generate
from dmd_dar.models.adapters import DIFFUSERS, write_adapter
from dmd_dar.models.families.form import packed, unpacked
from dmd_dar.models.saved import ModelCard, network_hash, save_network
from dmd_dar.models.shared_lora import LoraConfig, LoraDenoiser, merged
from dmd_dar.models.teachers import Teacher, TeacherConfig, codec_of, load_teacher, origin_of
from dmd_dar.routing.layout import RoutingConfig
from tests.models.tiny_pipelines import tiny_flux, tiny_pipeline, tiny_pixart, tiny_sana, tiny_sd3

TEXT = "a red cat"
CHAIN = (1.0, *Schedule().level(torch.tensor([700.0, 300.0])).tolist())  # whole timesteps, all that LCMScheduler knows
FLOW = (1.0, 0.9, 0.75, 0.5)
SMALL = {"height": 16, "width": 16}


@dataclass(frozen=True)
class Family:
    make: Any
    rungs: tuple[float, ...] = FLOW
    call: dict[str, Any] | None = None  # of its pipeline; None for classes, whose pipeline takes no latents
    opened: dict[str, Any] | None = None  # what the teacher's files leave open


FAMILIES = {
    "sd3": Family(tiny_sd3, FLOW, {"num_inference_steps": 4, **SMALL}),
    "sana": Family(tiny_sana, FLOW, {"num_inference_steps": 4, "height": 32, "width": 32}),
    "flux": Family(tiny_flux, FLOW, {"num_inference_steps": 4, **SMALL}, {"input_size": 8, "embedded_guidance": 2.5}),
    "pixart": Family(tiny_pixart, CHAIN, {"timesteps": [999, 700, 300], **SMALL}),
    "dit": Family(tiny_pipeline, CHAIN),
}
LOADED = ("sd3", "sana", "flux")  # diffusers loads adapters into these


def exported(root: Path, name: str, query: str) -> LoraDenoiser:
    """ROOT/NAME_QUERY, as a run hands out a student whose adapters and routers have moved, with its adapter."""
    given, folder = FAMILIES[name], root / f"{name}_{query}"
    teacher = loaded(root, name)
    student = build_networks(
        copy.deepcopy(teacher.network), RoutingConfig(query, 2), memory=Memory("shared_lora", LoraConfig(3, 6.0))
    ).student
    assert isinstance(student, LoraDenoiser)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in student.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    codec = codec_of(teacher)
    origin = {"teacher": teacher.digest, **origin_of(replace(teacher, base=None), codec)}
    card = ModelCard(teacher.prediction, given.rungs, (), origin)
    save_network(folder, merged(student.eval()), card, codec)
    write_adapter(folder / "adapter", student, card, network_hash(folder))
    return student


def loaded(root: Path, name: str) -> Teacher:
    prompts = "" if name == "dit" else f"{root / name}_prompts"
    return load_teacher(TeacherConfig(str(root / name), prompts=prompts, **(FAMILIES[name].opened or {})))


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Every teacher, its prompt and its students; `given.safetensors` holds the noise of each."""
    root = tmp_path_factory.mktemp("plain")
    (root / "prompts.txt").write_text(TEXT + "\n")
    for name, family in FAMILIES.items():
        family.make(root / name)
        if name != "dit":
            given = [f"prompts={root / 'prompts.txt'}", f"pipeline={root / name}", f"out={root / name}_prompts"]
            encode(config.load(EncodeConfig, [*given, "cpu=true", "dtype=float32"]))
        exported(root, name, "residual")
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    made = {name: packed(noise) if name == "flux" else noise.clone() for name in FAMILIES}
    save_file(made, root / "given.safetensors")
    (root / "calls.json").write_text(json.dumps({name: family.call for name, family in FAMILIES.items()}))
    return root


# No line of it knows this package: the student's transformer and scheduler, or its adapter, in the teacher's pipeline.
FRESH = """
import json, sys
from pathlib import Path
import diffusers, torch
from safetensors.torch import load_file, save_file
root = Path(sys.argv[1])
noise, calls = load_file(root / "given.safetensors"), json.loads((root / "calls.json").read_text())
images, refused = {}, {}

def part(folder, name):
    kind = json.loads((folder / "model_index.json").read_text())[name][1]
    return getattr(diffusers, kind).from_pretrained(folder / name)

def drawn(pipe, name, **given):
    torch.manual_seed(2)
    scale = 2.5 if name == "flux" else 1.0
    if calls[name] is None:
        return pipe([1], guidance_scale=scale, **given).images
    given = {**({"use_resolution_binning": False} if name in ("sana", "pixart") else {}), **given}
    return pipe("a red cat", guidance_scale=scale, latents=noise[name].clone(), output_type="latent", **given).images

for name, call in calls.items():
    student = root / f"{name}_residual"
    pipe = diffusers.DiffusionPipeline.from_pretrained(root / name)
    pipe.set_progress_bar_config(disable=True)
    base = pipe.transformer
    pipe.transformer, pipe.scheduler = part(student, "transformer"), part(student, "scheduler")
    if call is not None:
        images[name] = drawn(pipe, name, **call)
    size = {key: call[key] for key in ("height", "width")} if call else {}
    refused[name] = []
    for steps in (1, 3, 5):
        try:
            drawn(pipe, name, num_inference_steps=steps, **size)
        except ValueError as error:
            refused[name].append(steps)
    if hasattr(pipe, "load_lora_weights"):
        pipe.transformer = base
        pipe.load_lora_weights(student / "adapter")
        assert pipe.get_active_adapters(), name
        images[name + " adapter"] = drawn(pipe, name, **call)
        for way, prefix in (("pytorch_lora_weights", "transformer"), ("adapter_model", "base_model.model")):
            pipe.unload_lora_weights()
            pipe.transformer.load_lora_adapter(student / "adapter", weight_name=way + ".safetensors", prefix=prefix)
            images[f"{name} {way}"] = drawn(pipe, name, **call)
save_file({name: image.contiguous() for name, image in images.items()}, root / "images.safetensors")
(root / "refused.json").write_text(json.dumps(refused))
"""


class Replayed:
    """Draws whose noise is that of a torch generator, in the order and form in which diffusers asks for it."""

    def __init__(self, name: str):
        self.name, self.generator = name, torch.Generator().manual_seed(2)

    def normal(self, name: str, *shape: int) -> Tensor:
        if self.name == "flux":
            return unpacked(torch.randn(1, 16, 16, generator=self.generator), 4, 4)
        return torch.randn(1, *shape, generator=self.generator)


def ours(root: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """What `load_pipeline` makes of the same noise, before it is decoded."""
    monkeypatch.setattr(generate, "DrawsOfNoise", lambda *given: Replayed(name))
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    latents = replace(dmd_dar.load_pipeline(str(root / f"{name}_residual")), codec=None)(0, noise=noise)
    return packed(latents) if name == "flux" else latents


@torch.no_grad()
@pytest.mark.stages("lora", family=("sd3", "sana", "flux"))
def test_diffusers_samples_at_the_rungs_or_not_at_all_and_takes_the_adapter(root, monkeypatch):
    subprocess.run([sys.executable, "-c", FRESH, str(root)], cwd=root, check=True, timeout=300)
    images, refused = load_file(root / "images.safetensors"), json.loads((root / "refused.json").read_text())
    assert {name: set(steps) for name, steps in refused.items()} == dict.fromkeys(FAMILIES, {1, 3, 5})
    for name, family in FAMILIES.items():
        if family.call is None:
            continue
        expected = ours(root, name, monkeypatch)
        assert expected.std() > 0.02, name
        for way in ("", *((" adapter", " pytorch_lora_weights", " adapter_model") if name in LOADED else ())):
            difference = (images[name + way] - expected).abs().max().item()
            assert difference <= 2e-3 * expected.std(), (name, way, difference)


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in LOADED])
@pytest.mark.stages("lora", by="name", refused="diffusers loads no adapters into its transformer; peft does")
def test_diffusers_file_is_left_out_where_no_pipeline_reads_it(root, name):
    import diffusers

    adapter = root / f"{name}_residual" / "adapter"
    assert (root / f"{LOADED[0]}_residual" / "adapter" / DIFFUSERS).is_file() and not (adapter / DIFFUSERS).exists()
    pipe = diffusers.DiffusionPipeline.from_pretrained(root / name)
    assert not hasattr(pipe, "load_lora_weights") and not hasattr(pipe.transformer, "load_lora_adapter")


def inputs(network: Any) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    return x, torch.tensor([300.0, 999.0]), torch.tensor([0, 1])


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_peft_reads_the_adapter_with_its_scale(root, name):
    from peft import PeftModel

    network, student = loaded(root, name).network, load_teacher(TeacherConfig(str(root / f"{name}_residual"))).network
    before = network(*inputs(network))
    adapted = PeftModel.from_pretrained(network.transformer, root / f"{name}_residual" / "adapter")
    network.transformer = adapted.base_model.model
    after, expected = network(*inputs(network)), student(*inputs(student))
    torch.testing.assert_close(after, expected, rtol=1e-4, atol=1e-4)
    assert (before - expected).abs().max() > 1e-2


@pytest.mark.parametrize("name", FAMILIES)
def test_the_adapter_of_a_routed_student_is_refused_without_its_routers(root, name):
    import diffusers
    from peft import PeftModel

    exported(root, name, "timestep")
    adapter, pipe = root / f"{name}_timestep" / "adapter", diffusers.DiffusionPipeline.from_pretrained(root / name)
    tries = [lambda: PeftModel.from_pretrained(pipe.transformer, adapter)]
    if name in LOADED:
        load, names = pipe.transformer.load_lora_adapter, ("pytorch_lora_weights", "adapter_model")
        given = [{"weight_name": f"{name}.safetensors"} for name in names]
        tries += [
            lambda: pipe.load_lora_weights(adapter),
            lambda: load(adapter, **given[0]),
            lambda: load(adapter, **given[1], prefix="base_model.model"),
        ]
    for attempt in tries:
        with pytest.raises((ValueError, KeyError), match="it has routers, load it with dmd_dar's load_pipeline"):
            attempt()
    assert not hasattr(pipe.transformer, "peft_config") or not pipe.transformer.peft_config
