"""A draw is a function of (seed, phase, step, sample, name) and of nothing else."""

import math

import pytest
import torch

from dmd_dar.draws import Draws, Habits, philox, sample_range


def draws(seed=0, phase="student", step=3, samples=None, count=64) -> Draws:
    return Draws(seed, phase, step, sample_range(0, count) if samples is None else torch.as_tensor(samples))


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    return torch.corrcoef(torch.stack([a.flatten(), b.flatten()]).double())[0, 1].item()


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ("00000000 " * 4, "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff " * 4, "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_gives_the_published_known_answers(counter, key, expected):
    words = tuple(torch.tensor([int(word, 16)]) for word in counter.split())
    k0, k1 = (int(word, 16) for word in key.split())
    assert [f"{word.item():08x}" for word in philox(words, (k0, k1))] == expected.split()


def test_the_draws_of_a_run_stay_what_they_were():
    there = Draws(7, "pretrain", 11, torch.tensor([5, 2**33 + 1]))
    expected = [[0.253311357810162, 0.01275121106300503], [0.15911237883847207, 0.027385194436646998]]
    assert torch.equal(there.uniform("t", 2), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("splits", [[1] * 37, [30, 7], [5, 16, 16]])
@pytest.mark.parametrize("kind", ["uniform", "normal32", "normal64", "integers"])
def test_a_sample_is_the_same_in_any_batch(kind, splits):
    def of(samples):
        there = draws(samples=samples)
        if kind == "uniform":
            return there.uniform("x", 3, 5)
        if kind == "integers":
            return there.integers("x", 1000, 3, 5)
        return there.normal("x", 3, 5, dtype=torch.float32 if kind == "normal32" else torch.float64)

    whole = of(sample_range(0, 37))
    parts = torch.cat([of(part) for part in sample_range(0, 37).split(splits)])
    order = torch.randperm(37, generator=torch.Generator().manual_seed(0))
    assert torch.equal(parts, whole)
    assert torch.equal(of(order), whole[order])


@pytest.mark.parametrize(
    "other",
    [
        draws(seed=1).normal("x", 256),
        draws(phase="fake_score").normal("x", 256),
        draws(step=4).normal("x", 256),
        draws(samples=range(64, 128)).normal("x", 256),
        draws(samples=range(2**16, 2**16 + 64)).normal("x", 256),
        draws(samples=range(2**32, 2**32 + 64)).normal("x", 256),
        draws(samples=range(2**40, 2**40 + 64)).normal("x", 256),
        draws().normal("y", 256),
        draws().normal("x", 257)[:, 1:],
    ],
    ids=["seed", "phase", "step", "sample", "sample>16bit", "sample>32bit", "sample>40bit", "name", "neighbour"],
)
def test_each_part_of_the_key_gives_other_draws(other):
    here = draws().normal("x", 256)
    assert (here == other).sum() <= 2
    assert abs(correlation(here, other)) < 4 / math.sqrt(here.numel())


def test_uniform_is_uniform_on_the_open_interval():
    u = draws(count=100).uniform("x", 1000)
    assert u.dtype == torch.float64 and u.min() > 0 and u.max() < 1
    grid = (torch.arange(u.numel(), dtype=torch.float64) + 0.5) / u.numel()
    assert (u.flatten().sort().values - grid).abs().max() < 1.95 / math.sqrt(u.numel())  # Kolmogorov, p = 0.001


@pytest.mark.parametrize("numel", [1, 3, 1000])
def test_normal_is_normal_and_its_values_are_independent(numel):
    z = draws(count=90_000 // numel).normal("x", numel, dtype=torch.float64)
    grid = (torch.arange(z.numel(), dtype=torch.float64) + 0.5) / z.numel()
    assert (torch.special.ndtr(z.flatten().sort().values) - grid).abs().max() < 1.95 / math.sqrt(z.numel())
    assert abs(z.mean()) < 4 / math.sqrt(z.numel())
    assert abs(z.var() - 1) < 4 * math.sqrt(2 / z.numel())
    assert abs(z.pow(4).mean() - 3) < 4 * math.sqrt(96 / z.numel())
    neighbours = [(z[1:], z[:-1])] + [(z[:, i], z[:, j]) for i in range(min(numel, 3)) for j in range(i)]
    if numel == 1000:
        neighbours.append((z[:, :500], z[:, 500:]))  # the two halves of each Box-Muller pair
    for a, b in neighbours:
        for f in (lambda x: x, torch.square):
            assert abs(correlation(f(a), f(b))) < 4 / math.sqrt(a.numel())


def test_integers_reach_every_value_below_high_and_no_other():
    high = torch.tensor([1, 2, 7, 1000]).repeat(10_000)
    drawn = draws(samples=range(40_000)).integers("x", high)
    for bound in (1, 2, 7, 1000):
        counts = torch.bincount(drawn[high == bound], minlength=bound)
        assert len(counts) == bound and counts.min() > 0
        expected = 10_000 / bound
        assert (counts - expected).square().sum() / expected < bound - 1 + 4 * math.sqrt(2 * bound)  # chi squared


@pytest.mark.parametrize("high", [1, 3, 4])
def test_shared_integer_is_uniform_over_steps_and_knows_no_sample(high):
    drawn = torch.tensor([draws(step=step).shared_integer("rung", high) for step in range(6000)])
    counts = torch.bincount(drawn, minlength=high)
    assert len(counts) == high
    assert (counts - 6000 / high).square().sum() / (6000 / high) < 16
    assert abs(correlation(drawn[1:], drawn[:-1])) < 4 / math.sqrt(6000) if high > 1 else True
    assert all(draws(step=s, samples=[s + 9]).shared_integer("rung", high) == drawn[s] for s in range(20))


def a_step(step: int, habits: Habits | None, count: int = 6) -> list[torch.Tensor]:
    """The draws of a step that draws otherwise at each of three rungs, and more at step 7."""
    here = Draws(3, "student", step, sample_range(0, count), habits)
    rung = here.shared_integer("rung", 3)
    made = [here.integers("label", 10), here.normal("noise", 3, 5, 5)]
    made += [here.normal(f"renoise_{j}", 3, 5, 5) for j in range(rung)]
    made += [here.uniform("score_t"), here.normal("score_eps", 7 if step == 7 else 9, dtype=torch.float64)]
    return [*made, here.normal("noise", 3, 5, 5)]  # a name drawn twice gives the same again


def test_foreseen_draws_are_those_that_are_not_and_take_one_pass_a_step(monkeypatch):
    passes, habits = [], Habits()
    monkeypatch.setattr("dmd_dar.draws.philox", lambda *given: passes.append(1) or philox(*given))
    for step in range(12):
        expected = a_step(step, None)
        passes.clear()
        assert all(map(torch.equal, a_step(step, habits), expected))
    assert len(habits.of_kind) == 3 and len(passes) == 2  # all of the step, and the name that was drawn again


def test_many_numbers_are_not_made_together(monkeypatch):
    monkeypatch.setattr("dmd_dar.draws.TOGETHER", 64)
    passes, habits = [], Habits()
    monkeypatch.setattr("dmd_dar.draws.philox", lambda *given: passes.append(1) or philox(*given))
    for _ in range(2):
        passes.clear()
        assert all(map(torch.equal, a_step(0, habits), a_step(0, None)))
    assert len(passes) == 2 * len(a_step(0, None))
