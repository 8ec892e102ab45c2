"""The scheduler of a student's pipeline makes what our rollout makes of the same noise, and needs nothing of ours."""

import ast
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dmd_dar import flow
from dmd_dar.methods.generate import DrawsOfNoise
from dmd_dar.methods.rollout import Rollout
from dmd_dar.models import student_scheduler
from dmd_dar.models.denoiser import MEANINGS, Meaning, velocity_of
from dmd_dar.models.families.form import CELLS, PACKED, TOKENS
from dmd_dar.models.schedulers import faults_of, student_config
from dmd_dar.models.student_scheduler import StudentScheduler, noise_after

RUNGS = (1.0, 0.83, 0.4, 0.0004)  # the last below what a chain knows
EVERY = [
    MEANINGS["flow"],
    MEANINGS["sit"],
    MEANINGS["dit"],
    Meaning("flow", time_scale=1000.0),
    Meaning("v", flow.Schedule("cosine")),
    Meaning("x0", flow.Schedule("scaled_linear", 50, 0.00085, 0.012)),
    Meaning("eps"),
]


def network(x: Tensor, time: Tensor, cond: Tensor) -> Tensor:
    """Near to x: where a predicted eps is all of x, x0 would be thousands."""
    return 0.9 * x + 0.1 * torch.sin(x.flip(-1) + 0.01 * time.reshape(-1, 1, 1, 1).to(x))


@pytest.mark.parametrize("sampler", ["stochastic", "deterministic"])
@pytest.mark.parametrize("meaning", EVERY)
def test_it_steps_as_a_rollout_does(meaning, sampler: Any):
    noise, cond = torch.randn(2, 4, 4, 6, generator=torch.Generator().manual_seed(0)), torch.zeros(2)
    expected = Rollout(velocity_of(network, meaning), cond, RUNGS, DrawsOfNoise(noise, CELLS), noise, sampler).end()
    said = student_config(meaning, RUNGS, sampler)
    scheduler = StudentScheduler.from_config(said)
    assert isinstance(scheduler, StudentScheduler) and not faults_of(said, meaning, RUNGS, sampler)
    assert faults_of(said, meaning, (*RUNGS[:3], 0.0005), sampler)
    assert faults_of(said, meaning, RUNGS, "deterministic" if sampler == "stochastic" else "stochastic")
    for _ in range(2):  # anew at each call
        scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25], mu=1.7)
        x = noise
        for t in scheduler.timesteps:
            x = scheduler.step(network(x, t.expand(2), cond), t, x, return_dict=False)[0]
        assert (x - expected).abs().max() <= 1e-5 * max(1.0, expected.abs().max().item()) and expected.std() > 0.01
    with pytest.raises(ValueError, match="is not the next of"):
        scheduler.step(x, scheduler.timesteps[0], x)
    wrong_calls: list[dict[str, Any]] = [{}, {"num_inference_steps": 3}, {"timesteps": [1, 2]}]
    for given in wrong_calls:
        with pytest.raises(ValueError, match="call the pipeline with num_inference_steps=4"):
            scheduler.set_timesteps(**given)


def test_noise_is_that_of_each_first_one_in_any_precision_and_batch():
    first = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    drawn = noise_after(first, "renoise_1")
    assert torch.equal(drawn, noise_after(first.bfloat16(), "renoise_1"))
    assert torch.equal(drawn[1:2], noise_after(first[1:2], "renoise_1"))
    assert (noise_after(first, "renoise_2") - drawn).abs().mean() > 0.5 and (drawn[0] - drawn[1]).abs().mean() > 0.5
    assert abs(drawn.mean()) < 0.1 and abs(drawn.std() - 1) < 0.1
    for latents in (PACKED, TOKENS):
        theirs = noise_after(latents.of_cells(first), "renoise_1")
        ours = DrawsOfNoise(first, latents).normal("renoise_1", 4, 8, 8)
        assert torch.equal(latents.of_cells(ours), theirs) and not torch.equal(ours, drawn)


def test_it_travels_alone():
    tree = ast.parse(Path(student_scheduler.__file__).read_text())
    names = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    names += [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    assert not [name for name in names if not name or name.startswith("dmd_dar")]


class Perturbing:
    """As a pipeline of diffusers with perturbed attention is called."""

    do_classifier_free_guidance = False

    def __init__(self, scheduler: StudentScheduler, scale: float):
        self.scheduler, self.do_perturbed_attention_guidance = scheduler, scale > 0

    def __call__(self, guidance_scale: float = 1.0) -> None:
        self.scheduler.set_timesteps(2)


def test_what_guides_is_named_with_its_own_switch():
    scheduler = StudentScheduler((1.0, 0.5), (1000.0, 500.0), call={"guidance_scale": 1.0})
    Perturbing(scheduler, 0)()
    with pytest.raises(ValueError, match="guidance is on.*with guidance_scale=1 and pag_scale=0$"):
        Perturbing(scheduler, 3)()
