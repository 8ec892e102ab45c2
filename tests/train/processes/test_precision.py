"""Which calls of networks compute in bfloat16, and that what is made of their outputs does not."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from dmd_dar import flow
from dmd_dar.draws import Draws, sample_range
from dmd_dar.errors import UserError
from dmd_dar.methods.dmd import DMD
from dmd_dar.methods.turns import Turns
from dmd_dar.models.denoiser import velocity_of
from dmd_dar.train.processes.runtime import LaunchConfig, Runtime, usual_precision
from tests.tiny import tiny_sit

PARTS = ("rollout", "score")
RUNGS = flow.default_rungs(4)


def runtime(gradient_free: str, narrow: bool = False) -> Runtime:
    """Of a CPU; `narrow`: as under launch.precision=bf16, which accelerate holds for a process's whole life."""
    one = Runtime(LaunchConfig(cpu=True, gradient_free=gradient_free))  # type: ignore[arg-type]
    if narrow:
        one.accelerator = SimpleNamespace(mixed_precision="bf16")  # type: ignore[assignment]
    return one


@pytest.mark.parametrize(
    ("gradient_free", "narrow", "expected"),
    [
        ("auto", False, (False, False)),
        ("float32", False, (False, False)),
        ("rollouts", False, (True, False)),
        ("bfloat16", False, (True, True)),
        ("auto", True, (True, True)),
        ("float32", True, (False, False)),
        ("rollouts", True, (True, False)),
        ("bfloat16", True, (True, True)),
    ],
)
def test_the_key_decides_calls_without_gradients_and_no_others(gradient_free, narrow, expected):
    def velocity(x_t, t, cond, *rung):
        assert rung == (3,)
        seen.append(torch.is_autocast_enabled("cpu"))
        return x_t

    one, seen, x = runtime(gradient_free, narrow), [], torch.zeros(1)
    with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                for part in PARTS:
                    one.without_gradients(velocity, part)(x, x, x, 3)
        assert torch.is_autocast_enabled("cpu") == narrow
    assert tuple(seen) == (*expected, narrow, narrow)


def test_sharded_weights_that_travel_in_bfloat16_cannot_be_computed_with_in_float32():
    one = runtime("rollouts", narrow=True)
    one.sharded = True
    one.without_gradients(lambda *given: given[0], "rollout")
    with pytest.raises(UserError, match=r"launch\.gradient_free = rollouts: .* set it to auto"):
        one.without_gradients(lambda *given: given[0], "score")


@pytest.mark.parametrize(("there", "computes", "cpu", "expected"), [
    (True, True, False, "bf16"), (True, False, False, "no"), (True, True, True, "no"), (False, True, False, "no"),
])  # fmt: skip
def test_auto_is_bf16_on_a_gpu_that_computes_in_it(monkeypatch, there, computes, cpu, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation or computes)
    assert usual_precision(LaunchConfig(cpu=cpu)) == expected


def gradients(gradient_free: str) -> dict[str, torch.Tensor]:
    """Of a student update and a fake score's, flat, and their losses; all networks differ."""
    one, networks = runtime(gradient_free), {}
    for seed, name in enumerate(("student", "teacher", "fake_score")):
        networks[name] = tiny_sit(seed=seed)
    student, teacher, fake = (
        one.without_gradients(velocity_of(network), "rollout" if name == "student" else "score")
        for name, network in networks.items()
    )
    shape = networks["student"].shape
    turns = Turns({"fake_score": 1, "student": 1}, student, RUNGS, 1, shape)
    law = flow.TimeLaw(low=0.02, high=0.98)
    method = DMD(student, teacher, lambda x, t, c, rung: fake(x, t, c), RUNGS, law, 1, shape, turns=turns)
    found = {}
    for name, loss_of in (("fake_score", method.fake_score_loss), ("student", method.student_loss)):
        loss, metrics = loss_of(Draws(0, name, 0, sample_range(0, 8)))
        assert loss.dtype == torch.float32 and all(value.dtype == torch.float32 for value in metrics.values())
        wanted = networks[name].backbone_parameters()
        found[name] = torch.cat([g.flatten() for g in torch.autograd.grad(loss, wanted)])
    return found


def test_gradients_of_both_updates_point_as_in_float32():
    exact, rollouts, narrow = (gradients(mode) for mode in ("float32", "rollouts", "bfloat16"))
    assert all(torch.equal(value, gradients("auto")[name]) for name, value in exact.items())
    for found in (rollouts, narrow):
        for name, expected in exact.items():
            assert not torch.equal(found[name], expected)
            assert F.cosine_similarity(found[name], expected, dim=0) > 0.999
            assert found[name].norm() == pytest.approx(expected.norm().item(), rel=0.02)
    assert torch.equal(rollouts["fake_score"], narrow["fake_score"])  # no score is asked for there
    assert not torch.equal(rollouts["student"], narrow["student"])
