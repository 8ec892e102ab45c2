"""A student of each family in a pipeline of its base's class, and how that pipeline is called for its images."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dmd_dar import config
from dmd_dar.encode import EncodeConfig, encode
from dmd_dar.flow import Schedule
from dmd_dar.models.diffusers_denoiser import routed_copy
from dmd_dar.models.families.form import Family
from dmd_dar.models.saved import ModelCard, save_network
from dmd_dar.models.teachers import Teacher, TeacherConfig, codec_of, load_teacher, origin_of
from dmd_dar.routing.layout import RoutingConfig
from tests.models.families.test_flux2 import tiny_flux2
from tests.models.families.test_qwen_image import tiny_qwen_image
from tests.models.families.test_z_image import tiny_z_image
from tests.models.tiny_pipelines import tiny_flux, tiny_pipeline, tiny_pixart, tiny_sana, tiny_sd3

TEXTS = ["a red cat", "dogs on the grass"]
FLOW = (1.0, 0.9, 0.5, 0.31)  # on no curve of diffusers'
CHAIN = (1.0, *Schedule().level(torch.tensor([700.4, 300.7])).tolist())  # between whole timesteps


@dataclass(frozen=True)
class Form:
    """One class of pipelines: how it is made, called for the student's own images, and called wrongly."""

    make: Callable[[Path], Path]
    pixels: int = 16
    rungs: tuple[float, ...] = FLOW
    opened: dict[str, Any] = field(default_factory=dict)  # what the teacher's files leave open
    call: dict[str, Any] = field(default_factory=lambda: {"guidance_scale": 1.0})
    guided: tuple[dict[str, Any], ...] = ({}, {"guidance_scale": 3.0})

    def noise(self, name: str, family: Family, noise: Tensor) -> dict[str, Tensor]:
        """The noise (B, C, H, W) as the pipeline takes it: that of DiT none, those of FLUX.2 before they pack it."""
        if name == "dit":
            return {}
        return {"noise": noise if name in ("klein", "dev") else family.latents.of_cells(noise).contiguous()}

    def given(self, name: str) -> dict[str, Any]:
        """Of a call, all but prompts, noise, steps and guidance."""
        if name == "dit":
            return {"output_type": "pt"}
        binned = {"use_resolution_binning": False} if name in ("sana", "pixart") else {}
        return {"height": self.pixels, "width": self.pixels, "output_type": "pt", **binned}


EMBEDDED, SIDE = {"embedded_guidance": 2.5}, {"input_size": 8}
TRUE = {"true_cfg_scale": 2.0, "negative_prompt": "x"}
STRONG = ({}, {"guidance_scale": 9.0})
FORMS = {
    "dit": Form(tiny_pipeline, rungs=CHAIN),
    "pixart": Form(tiny_pixart, rungs=CHAIN),
    "sana": Form(tiny_sana, 32),
    "sd3": Form(tiny_sd3),
    "flux": Form(
        tiny_flux,
        opened=EMBEDDED | SIDE,
        call={"guidance_scale": 2.5},
        guided=(*STRONG, {"guidance_scale": 2.5, **TRUE}),
    ),
    "schnell": Form(partial(tiny_flux, guidance_embeds=False), opened=SIDE, guided=(TRUE,)),
    "qwen_image": Form(tiny_qwen_image, opened=SIDE, call={"true_cfg_scale": 1.0}, guided=(TRUE,)),
    "z_image": Form(tiny_z_image, opened=SIDE, call={"guidance_scale": 0.0}, guided=({}, {"guidance_scale": 0.5})),
    "klein": Form(tiny_flux2, opened={"input_size": 4}),
    "dev": Form(
        partial(tiny_flux2, dev=True), opened=EMBEDDED | {"input_size": 4}, call={"guidance_scale": 2.5}, guided=STRONG
    ),
}


def loaded(root: Path, name: str) -> Teacher:
    """The pipeline ROOT/NAME as a teacher, with the prompts of TEXTS; made where it is not there."""
    folder, prompts = root / name, "" if name == "dit" else str(root / f"{name}_prompts")
    if not folder.exists():
        FORMS[name].make(folder)
        if prompts:
            (root / "prompts.txt").write_text("\n".join(TEXTS) + "\n")
            given = [f"prompts={root / 'prompts.txt'}", f"pipeline={folder}", f"out={prompts}", "cpu=true"]
            encode(config.load(EncodeConfig, [*given, "dtype=float32"]))
    return load_teacher(TeacherConfig(str(folder), prompts=prompts, **FORMS[name].opened))


def student_of(root: Path, name: str, query: Any, sampler: Any = "stochastic") -> Path:
    """The folder of a student whose weights and routers have moved."""
    teacher, folder = loaded(root, name), root / f"{name}_{query}_{sampler}"
    own: Any = teacher.network
    network = routed_copy(copy.deepcopy(own), RoutingConfig(query, 2))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=generator))
    codec = codec_of(teacher)
    card = ModelCard(teacher.prediction, FORMS[name].rungs, teacher.label_names, origin_of(teacher, codec), sampler)
    save_network(folder, network.eval(), card, codec)
    return folder


def noise_of(shape: tuple[int, ...]) -> Tensor:
    """That of two images, as DiTPipeline draws it."""
    return torch.randn(2, *shape, generator=torch.Generator().manual_seed(5))
