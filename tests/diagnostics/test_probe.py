import pytest
import torch

from dmd_dar.diagnostics.probe import halves, probe_r_squared, r_squared, ridge, timestep_probe
from dmd_dar.diagnostics.states import Inputs, Places
from dmd_dar.draws import Draws, sample_range

PAIRS, TIMES = 200, 4


def rows():
    torch.manual_seed(0)
    pair = torch.arange(PAIRS).repeat(TIMES)
    return pair, torch.rand(PAIRS * TIMES, dtype=torch.float64)


def test_a_leak_of_t_is_found():
    pair, t = rows()
    noise = torch.randn(len(t), 15, dtype=torch.float64)
    features = torch.cat([noise, (2 - 0.3 * t)[:, None]], dim=1) @ torch.randn(16, 16, dtype=torch.float64)
    assert probe_r_squared(features, t, pair) > 0.999
    features[:, 0] += torch.randn(len(t), dtype=torch.float64)  # one noisy feature of sixteen: a part of t is lost
    assert 0 < probe_r_squared(features, t, pair) < 0.9


def test_noise_says_nothing_of_t():
    pair, t = rows()
    assert abs(probe_r_squared(torch.randn(len(t), 64), t, pair)) < 0.05
    assert probe_r_squared(torch.ones(len(t), 8), t, pair) == pytest.approx(0, abs=0.02)


def test_no_pair_is_in_both_halves():
    pair = torch.tensor([7, 2, 2, 9, 7, 11, 9, 2])
    first, second = halves(pair)
    assert torch.equal(first, ~second) and first.any() and second.any()
    assert not set(pair[first].tolist()) & set(pair[second].tolist())


def test_recognising_the_pair_does_not_help():
    pair = torch.arange(PAIRS).repeat(TIMES)
    t = torch.rand(PAIRS, dtype=torch.float64).repeat(TIMES)  # one t for each pair: knowing the pair is knowing t
    fingerprint = torch.randn(PAIRS, 2 * PAIRS, dtype=torch.float64).repeat(TIMES, 1)
    by_row = torch.arange(len(pair)) < len(pair) // 2
    assert r_squared(ridge(fingerprint[by_row], t[by_row])(fingerprint[~by_row], 1e-8), t[~by_row]) > 0.99
    assert probe_r_squared(fingerprint, t, pair) < 0.05


@pytest.mark.parametrize("width", [5, 40])  # fewer and more features than rows
def test_ridge_solves_the_normal_equations(width):
    torch.manual_seed(0)
    x, y = 3 + torch.randn(20, width, dtype=torch.float64), torch.randn(20, dtype=torch.float64)
    z = x - x.mean(dim=0)
    penalty = 0.1 * z.square().sum() / width
    beta = torch.linalg.solve(z.T @ z + penalty * torch.eye(width, dtype=torch.float64), z.T @ (y - y.mean()))
    others = torch.randn(7, width, dtype=torch.float64)
    torch.testing.assert_close(ridge(x, y)(others, 0.1), (others - x.mean(dim=0)) @ beta + y.mean())


class Leaky(torch.nn.Module):
    """Its first state is noise, its second one holds t in every token."""

    def __init__(self):
        super().__init__()
        self.consumers = torch.nn.ModuleList(torch.nn.Identity() for _ in range(2))

    def forward(self, x, t, cond):
        tokens = x.flatten(2).mT  # (B, T, 3)
        self.consumers[0](tokens * 0 + cond[:, None, None])
        self.consumers[1](tokens * 0 + t[:, None, None])
        return x


@pytest.mark.parametrize("batch_size", [64, 7])
def test_the_probe_reads_each_state_against_its_own_t(batch_size):
    draws = Draws(0, "diagnostics_probe", 0, sample_range(0, 64))
    network, x0 = Leaky(), draws.normal("x0", 3, 4, 4)
    labels = draws.integers("label", 7).float()
    scores = timestep_probe(network, Places(tuple(network.consumers), (2,)), Inputs(x0, labels, draws, batch_size), 3)
    assert scores["states"][1] > 0.999 and abs(scores["states"][0]) < 0.1 and scores["input"] < 0.5
