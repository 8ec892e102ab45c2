"""guided = uncond + g (cond - uncond), in one batched call."""

import pytest
import torch

from dmd_dar.guidance import CONVENTIONS, convert, guided

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
}


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_a_converted_value_guides_as_it_did_in_its_own_convention(convention):
    for value, cond, uncond in ((3.5, 0.3, -1.2), (0.0, 2.0, 5.0), (1.0, 2.0, 5.0)):
        ours = uncond + convert(value, convention) * (cond - uncond)
        assert ours == pytest.approx(FORMULAS[convention](value, cond, uncond), abs=1e-12)
    assert convert(3.5, "causvid") == 4.5 and FORMULAS.keys() == CONVENTIONS.keys()


@pytest.mark.parametrize(
    ("convention", "said"), [("embedded", "no g is equal to it"), ("imagenet", "choose one of ours")]
)
def test_a_value_without_a_g_is_refused(convention, said):
    with pytest.raises(ValueError, match=said):
        convert(3.5, convention)
