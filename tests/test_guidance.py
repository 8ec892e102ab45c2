"""guided = uncond + g (cond - uncond), in one batched call."""

import pytest
import torch

from dmd_dar.guidance import guided

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
