"""Latency is the median of interleaved calls; peak memory is what the call held at once."""

import os

import pytest
import torch

from eval.samples.cost import flops, latencies, peak_memory


def test_calls_take_turns_and_the_first_round_does_not_count():
    now, order = [0.0], []
    slow = iter([100.0, 3.0, 1.0, 2.0])

    def call(name, seconds):
        def run():
            order.append((name, torch.is_grad_enabled()))
            now[0] += next(slow) if seconds is None else seconds

        return run

    result = latencies({"a": call("a", None), "b": call("b", 0.5)}, runs=3, clock=lambda: now[0])
    assert "".join(name for name, _ in order) == "abbaabba" and not any(grad for _, grad in order)
    assert result["a"].median_ms == 2000 and (result["a"].least_ms, result["a"].most_ms) == (1000, 3000)
    assert result["b"].median_ms == 500 and result["b"].runs == 3


def test_a_call_that_takes_long_runs_less_often():
    now, order = [0.0], []

    def call(name, seconds):
        def run():
            order.append(name)
            now[0] += seconds

        return run

    first = iter([5.0])

    def compiled_once():
        now[0] += next(first, 0.1)

    calls = {"slow": call("slow", 0.9), "quick": call("quick", 0.1), "compiled": compiled_once}
    result = latencies(calls, runs=5, clock=lambda: now[0])
    assert {name: one.runs for name, one in result.items()} == {"slow": 3, "quick": 5, "compiled": 5}
    assert result["slow"].median_ms == pytest.approx(900) and order.count("slow") == 4 and order[-2:] == ["quick"] * 2


def test_peak_memory_is_that_of_tensors_held_at_once(capfd):
    unit = torch.zeros(250_000)  # 1 MB, held before and so not counted

    def call():
        first = unit + 1
        second = torch.cat([first, unit])
        del first
        third = second + second
        del second, third
        return unit + 2

    measured = peak_memory(call)
    assert abs(measured.peak_bytes - 4_000_000) < 10_000 and "CPU" in measured.method
    assert peak_memory(lambda: None).peak_bytes == 0
    assert capfd.readouterr() == ("", "")
    peak_memory(lambda: os.write(2, b"a line of the call\n"))
    assert capfd.readouterr() == ("", "a line of the call\n")


def test_with_gradients_a_call_holds_what_the_backward_pass_needs():
    x = torch.zeros(250_000, requires_grad=True)

    def call():
        x.exp().exp().exp()

    assert peak_memory(call).peak_bytes == 2_000_000  # the last result and the one that it is made of
    assert peak_memory(call, gradients=True).peak_bytes == 3_000_000


def test_flops_are_those_of_products_convolutions_and_attention():
    x, kernel, heads = torch.ones(3, 5), torch.ones(4, 2, 3, 3), torch.ones(2, 8, 16, 4)
    assert flops(lambda: x @ x.T + 1) == 2 * 3 * 3 * 5
    assert flops(lambda: torch.conv2d(torch.ones(1, 2, 6, 6), kernel)) == 2 * 4 * 4 * 4 * 2 * 9
    attention = torch.nn.functional.scaled_dot_product_attention
    assert flops(lambda: attention(heads, heads, heads)) == 2 * 2 * (2 * 8) * 16 * 16 * 4
