"""The GAN term: who gets gradients, what meets what, and that nothing depends on the batch split."""

import copy
import dataclasses

import pytest
import torch

from dmd_dar import flow, losses
from dmd_dar.draws import Draws
from dmd_dar.losses import LossWeight
from dmd_dar.methods.dmd import DMD
from dmd_dar.methods.gan import GAN
from dmd_dar.methods.rollout import rung_of
from dmd_dar.models.denoiser import velocity_of
from dmd_dar.models.discriminator import Heads, features_of
from dmd_dar.models.sit import with_routing
from dmd_dar.routing.layout import RoutingConfig
from tests.methods.test_dmd import RUNGS, SHAPE, draws_for
from tests.tiny import tiny_sit

LAW = flow.TimeLaw(low=0.02, high=0.98)


def real(draws: Draws):
    return draws.normal("image", *SHAPE).tanh(), draws.integers("label", 7)


def shaken_heads(layers: int = 2, pool: str = "mean") -> Heads:
    torch.manual_seed(3)
    heads = Heads(16, layers, pool, hidden=8)
    with torch.no_grad():
        for p in heads.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return heads


@pytest.fixture
def game() -> tuple[DMD, dict[str, torch.nn.Module]]:
    teacher = tiny_sit().requires_grad_(False)
    fake_score = copy.deepcopy(teacher).requires_grad_(True)
    student = with_routing(teacher, RoutingConfig(query="timestep", chunk_size=2)).requires_grad_(True)
    velocity = velocity_of(fake_score)
    gan = GAN(
        features=features_of(fake_score, velocity, (1, 2)),
        heads=shaken_heads(),
        real=real,
        time=LAW,
        weight=LossWeight(0.3),
        r1_weight=0.5,
    )
    networks = {"student": velocity_of(student), "teacher": velocity_of(teacher), "fake_score": velocity}
    method = DMD(**networks, rungs=RUNGS, renoise=LAW, num_classes=7, shape=SHAPE, matching_weight=0.0, gan=gan)
    return method, {"student": student, "teacher": teacher, "fake_score": fake_score, "heads": gan.heads}


@pytest.fixture
def method(game) -> DMD:
    return game[0]


def receivers(modules: dict[str, torch.nn.Module]) -> set[str]:
    return {name for name, module in modules.items() if any(p.grad is not None for p in module.parameters())}


def test_each_side_of_the_game_trains_its_own_network_alone(game):
    method, modules = game
    method.student_loss(draws_for(0))[0].backward()
    assert receivers(modules) == {"student"}
    modules["student"].zero_grad()
    method.discriminator_loss(draws_for(0, phase="discriminator"))[0].backward()
    assert receivers(modules) == {"heads"}
    method.gan.heads.zero_grad()
    playing = dataclasses.replace(method, gan=dataclasses.replace(method.gan, feature_weight=0.5))
    (loss, metrics), flow_alone = playing.fake_score_loss(draws_for(0)), method.fake_score_loss(draws_for(0))[0]
    torch.testing.assert_close(loss, flow_alone + 0.5 * metrics["gan"])
    (loss - flow_alone).backward()
    assert receivers(modules) == {"fake_score"}


def test_the_student_s_gradient_is_that_of_softplus_through_the_features(game):
    method, modules = game
    draws, gan = draws_for(4), method.gan
    x0, cond, _ = method.generate(rung_of(draws, RUNGS), draws)
    t, eps = LAW.quantile(draws.uniform("gan_t")).float(), draws.normal("gan_eps", *SHAPE)
    logits = gan.heads(gan.features(flow.interpolate(x0, eps, t), t, cond))
    parameters = [p for p in modules["student"].parameters() if p.requires_grad]
    expected = torch.autograd.grad(0.3 * torch.nn.functional.softplus(-logits).mean(), parameters, allow_unused=True)
    loss, metrics = method.student_loss(draws)
    loss.backward()
    torch.testing.assert_close(metrics["gan"], torch.nn.functional.softplus(-logits).mean())
    for p, gradient in zip(parameters, expected, strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-4, atol=1e-7)


def test_r1_perturbs_the_noised_real_data_and_nothing_else(method):
    draws = draws_for(2, phase="discriminator")
    x0_student, cond, _ = (x.detach() for x in method.generate(rung_of(draws, RUNGS), draws))
    x_t, t, conds = method.gan.inputs(x0_student, cond, draws)
    noised, fake, perturbed = x_t.chunk(3)
    x0_real, cond_real = real(dataclasses.replace(draws, phase="discriminator_real"))
    level = t[:8]
    assert torch.equal(t, level.repeat(3)) and torch.equal(conds, torch.cat([cond_real, cond, cond_real]))
    torch.testing.assert_close(noised, flow.interpolate(x0_real, draws.normal("gan_real_eps", *SHAPE), level))
    torch.testing.assert_close(fake, flow.interpolate(x0_student, draws.normal("gan_eps", *SHAPE), level))
    torch.testing.assert_close((perturbed - noised).flatten(1).std(1), torch.full((8,), 0.1), rtol=0.1, atol=0)
    loss, metrics = method.discriminator_loss(draws)
    logits = [
        method.gan.heads(method.gan.features(x, level, c))
        for x, c in zip((noised, fake, perturbed), conds.chunk(3), strict=True)
    ]
    r1 = (logits[2] - logits[0]).square().mean() / 0.1**2
    torch.testing.assert_close(metrics["r1"], r1, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(loss, losses.discriminator_loss(logits[0], logits[1]) + 0.5 * r1, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("which", ["student_loss", "discriminator_loss", "fake_score_loss"])
def test_a_batch_in_parts_has_the_same_mean_loss(method, which):
    method = dataclasses.replace(method, gan=dataclasses.replace(method.gan, feature_weight=0.5))
    loss = getattr(method, which)
    whole = loss(draws_for(2))[0]
    parts = [loss(draws_for(2, start, start + 2))[0] for start in range(0, 8, 2)]
    torch.testing.assert_close(torch.stack(parts).mean(), whole, rtol=1e-5, atol=1e-6)


def test_heads_that_know_nothing_leave_the_student_alone(game):
    method, modules = game
    fresh = dataclasses.replace(method, gan=dataclasses.replace(method.gan, heads=Heads(16, 2)))
    loss, metrics = fresh.student_loss(draws_for(0))
    loss.backward()
    assert metrics["gan_gradient"] == 0
    assert all(p.grad is None or not p.grad.any() for p in modules["student"].parameters())


def test_the_game_pulls_the_student_s_samples_to_the_data():
    """Data at +1, student at -1, a discriminator of the mean: its steps and the student's bring them together."""
    heads, place = torch.nn.Linear(1, 1), torch.nn.Parameter(torch.tensor(-1.0))

    def at(draws: Draws):
        return torch.ones(len(draws.samples), 1, 2, 2), torch.zeros_like(draws.samples)

    gan = GAN(
        features=lambda x_t, t, cond, rung: [x_t.flatten(1).mean(1, keepdim=True)],
        heads=lambda features: heads(features[0]),
        real=at,
        time=LAW,
        weight=LossWeight(1.0),
        r1_weight=0.1,
    )
    method = DMD(
        student=lambda x_t, t, cond: x_t - place,
        teacher=None,
        fake_score=None,
        rungs=(1.0,),
        renoise=LAW,
        num_classes=1,
        shape=(1, 2, 2),
        matching_weight=0.0,
        gan=gan,
    )
    judge, mover = torch.optim.Adam(heads.parameters(), 0.1), torch.optim.Adam([place], 0.02)
    for step in range(200):
        for loss, optimiser in ((method.discriminator_loss, judge), (method.student_loss, mover)):
            optimiser.zero_grad()
            loss(draws_for(step, stop=32))[0].backward()
            optimiser.step()
    assert abs(place.item() - 1) < 0.3


def test_every_sample_of_the_game_is_read_at_the_rung_of_the_step(game):
    method, rungs = game[0], []

    def features(x_t, t, cond, rung):
        rungs.append((cond, rung))
        return [x_t.flatten(1)[:, None, :16]] * 2

    gan = dataclasses.replace(method.gan, features=features)
    method = dataclasses.replace(method, gan=gan)
    for step in range(4):
        for loss, phase in ((method.student_loss, "student"), (method.discriminator_loss, "discriminator")):
            draws = draws_for(step, phase=phase)
            loss(draws)
            labels, theirs = (
                d.integers("label", 7) for d in (draws, dataclasses.replace(draws, phase=f"{phase}_real"))
            )
            expected = labels if phase == "student" else torch.cat([theirs, labels, theirs])
            assert torch.equal(rungs[-1][0], expected) and rungs[-1][1] == rung_of(draws, RUNGS)
