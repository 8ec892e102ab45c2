"""guided = uncond + g (cond - uncond), in one batched call; rescaled, and within an interval of t."""

import pytest
import torch

from dmd_dar import config
from dmd_dar.distillation.config import DistillConfig
from dmd_dar.errors import UserError
from dmd_dar.guidance import CONVENTIONS, GuidanceConfig, Rule, convert, guided, token_norm

UNCOND = 7
X_T, T, COND = torch.randn(3, 2, generator=torch.Generator().manual_seed(0)), torch.tensor([0.1, 0.5, 1.0]), (0, 3, 7)


def recorded(calls: list):
    def velocity(x_t, t, cond):
        calls.append((x_t, t, cond))
        return x_t * t[:, None] + 10.0 * cond[:, None]

    return velocity


@pytest.mark.parametrize("g", [0.0, 0.5, 1.5, 4.0, -1.0])
def test_the_value_extrapolates_from_the_unconditional_branch(g):
    calls, cond = [], torch.tensor(COND)
    v = guided(recorded(calls), g, UNCOND)(X_T, T, cond)
    expected = X_T * T[:, None] + 10.0 * (UNCOND + g * (cond[:, None] - UNCOND))
    assert torch.allclose(v, expected, atol=1e-5)
    assert len(calls) == 1 and calls[0][2].dtype == cond.dtype
    assert calls[0][0].shape == (6, 2) and calls[0][1].shape == (6,)
    assert calls[0][2].tolist() == [*COND, UNCOND, UNCOND, UNCOND]


def test_no_guidance_is_the_callable_itself():
    velocity = recorded([])
    assert guided(velocity, 1.0, UNCOND) is velocity


FORMULAS = {  # as their papers and code write them, cond and uncond being numbers
    "ours": lambda w, cond, uncond: uncond + w * (cond - uncond),
    "imagen": lambda w, cond, uncond: w * cond + (1 - w) * uncond,
    "glide": lambda w, cond, uncond: uncond + w * (cond - uncond),
    "diffusers": lambda w, cond, uncond: uncond + w * (cond - uncond),
    "dit": lambda w, cond, uncond: uncond + w * (cond - uncond),
    "sit": lambda w, cond, uncond: uncond + w * (cond - uncond),
    "classifier_free": lambda w, cond, uncond: (1 + w) * cond - w * uncond,
    "causvid": lambda w, cond, uncond: cond + w * (cond - uncond),
    "self_forcing": lambda w, cond, uncond: cond + w * (cond - uncond),
    "qwen_image": lambda w, cond, uncond: uncond + w * (cond - uncond),
    "flux2_klein": lambda w, cond, uncond: uncond + w * (cond - uncond),
    "z_image": lambda w, cond, uncond: cond + w * (cond - uncond),
}


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_a_converted_value_guides_as_it_did_in_its_own_convention(convention):
    for value, cond, uncond in ((3.5, 0.3, -1.2), (0.0, 2.0, 5.0), (1.0, 2.0, 5.0)):
        ours = uncond + convert(value, convention) * (cond - uncond)
        assert ours == pytest.approx(FORMULAS[convention](value, cond, uncond), abs=1e-12)
    assert convert(3.5, "causvid") == 4.5 and FORMULAS.keys() == CONVENTIONS.keys()


@pytest.mark.parametrize(
    ("convention", "said"),
    [("embedded", "no g is equal to it"), ("flux2", "no g is equal to it"), ("imagenet", "choose one of ours")],
)
def test_a_value_without_a_g_is_refused(convention, said):
    with pytest.raises(ValueError, match=said):
        convert(3.5, convention)


def fields(cells: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(3, 2, 2 * cells, 3 * cells, generator=generator, dtype=torch.float64) for _ in range(2))


@pytest.mark.parametrize("cells", [1, 2, 3])
def test_a_rescaled_token_has_the_norm_of_cond_and_the_direction_of_the_plain_one(cells):
    (cond, uncond), t = fields(cells), torch.tensor([0.1, 0.5, 1.0])
    plain = uncond + 4 * (cond - uncond)
    rescaled = Rule("rescaled", cells).apply(cond, uncond, t, 4.0)
    for row, column in ((0, 0), (1, 2)):  # two tokens by hand
        at = (..., slice(row * cells, (row + 1) * cells), slice(column * cells, (column + 1) * cells))
        c, p, r = (x[at].flatten(1) for x in (cond, plain, rescaled))
        torch.testing.assert_close(r, p * (c.norm(dim=1) / p.norm(dim=1))[:, None])
    assert token_norm(cond, cells).shape == (3, 1, 2 * cells, 3 * cells)


def test_beyond_its_interval_guidance_leaves_cond():
    (cond, uncond), t = fields(), torch.tensor([0.1, 0.5, 1.0])
    for form in ("plain", "rescaled"):
        everywhere, within = (Rule(form, 2, i).apply(cond, uncond, t, 4.0) for i in ((0.0, 1.0), (0.5, 0.9)))
        assert torch.equal(within[[0, 2]], cond[[0, 2]]) and torch.equal(within[1], everywhere[1])
        assert not torch.equal(within[1], cond[1])
    assert Rule().facts() == {} and Rule(interval=(0.5, 0.9)).facts() == {"interval": [0.5, 0.9]}
    assert Rule("rescaled", 2).facts() == {"form": "rescaled", "cells": 2}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("guidance.form=cosine", r"guidance.form = .cosine. .*expected one of auto, plain, rescaled, embedded"),
        ("guidance.interval=[0.8,0.2]", "interval must rise"),
        ("guidance.interval=[0.2,1.5]", "guidance.interval = .*out of range"),
        ("guidance.interval=[0.2]", "guidance.interval"),
    ],
)
def test_a_wrong_key_is_one_line(given, said):
    with pytest.raises(UserError, match=said) as error:
        config.load(DistillConfig, ["out_dir=unused", given])
    assert "\n" not in str(error.value)
    assert config.load(DistillConfig, ["out_dir=unused"]).guidance == GuidanceConfig()
