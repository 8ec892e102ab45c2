import pytest
import torch

from benchmarks import performance
from benchmarks.memory import alone
from benchmarks.record import ratio
from eval.samples.cost import interleaved, peak_memory


def test_the_page_is_what_the_results_say():
    """After a new measurement: python -m benchmarks.performance"""
    assert performance.PAGE.read_text() == performance.page()


def test_a_device_that_was_not_measured_says_so():
    section = performance.routing("nowhere", "Title", "Aims.")(lambda name: None)
    assert section.startswith("## Title") and "not measured" in section


def test_an_aim_is_met_or_missed_by_its_own_sense():
    chain = {"form": "dense", "training_ratio": {"torch": 7.9}, "settled": {"training_ratio": {"torch": 4.1}}}
    chain["extra_bytes"] = {"torch": 1, "naive": 9}
    result = {"chain": [chain], "step": {"ratio": {"residual": 1.0, "stream, sum": 1.3}}}
    text = performance._aims(result, cuda=False)
    assert [line.split(" | ")[-1].strip(" |") for line in text.splitlines()[4:]] == ["missed", "met", "met", "missed"]


def test_rounds_are_interleaved_and_ratios_are_of_neighbours():
    order = []
    times = interleaved({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, runs=2)
    assert order == ["a", "b", "b", "a", "a", "b"] and [len(samples) for samples in times.values()] == [2, 2]
    assert ratio({"a": [1.0, 6.0, 30.0], "b": [1.0, 2.0, 10.0]}, "a", "b") == 3.0


def test_peak_memory_of_a_call_in_its_own_process():
    assert alone(peak_of_ones, 2**20) == pytest.approx(4 * 2**20, rel=1e-3)


def peak_of_ones(count: int) -> int:
    return peak_memory(lambda: torch.ones(count).add_(1), gradients=True).peak_bytes
