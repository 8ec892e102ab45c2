import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dmd_dar.draws import sample_range
from dmd_dar.errors import UserError
from dmd_dar.train.processes import parts, replicas, runtime
from dmd_dar.train.processes.runtime import LaunchConfig, Runtime
from tests.train.workers import CYCLES, config, dits, loras, single_gradients, trained

ROOT = Path(__file__).parents[3]


def tensors(state: Any) -> dict[str, Tensor]:
    return {path: value for path, value in replicas.leaves(state) if isinstance(value, Tensor)}


def furthest(found: Any, expected: Any) -> float:
    """The largest difference in any weight, average or moment; steps made must be equal."""
    ours, theirs = tensors(found), tensors(expected)
    assert ours.keys() == theirs.keys()
    assert [found[name]["steps"] for name in found] == [expected[name]["steps"] for name in expected]
    return max((ours[name] - theirs[name]).abs().max().item() for name in ours)


@pytest.fixture(scope="module")
def alone() -> dict[int, Any]:
    return {k: trained(config("none"), k) for k in CYCLES}


@pytest.fixture(scope="module")
def six(alone) -> dict[int, Any]:
    """Six cycles of each k."""
    return {k: alone[k] if cycles == 6 else trained(config("none"), k, 6) for k, cycles in CYCLES.items()}


def by_processes(folder: Path, processes: int, *more: str) -> Path:
    """`folder`, with found0.pt by the main process, found1.pt by the next, and so on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tests.train.workers", str(folder), str(port), str(processes), *more]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    torch.save(trained(config("none"), 2, CYCLES[2] // 2), folder / "halfway.pt")
    return by_processes(folder, 2)


@pytest.fixture(scope="module")
def two(folder) -> dict[str, Any]:
    return torch.load(folder / "found0.pt", weights_only=True)


# Key biases have a true gradient of zero (softmax forgets what all keys share). AdamW would turn rounding into steps of
# the learning rate in float32; in float64 its eps, 1e-8, is far above the rounding, so none is left out here.
@pytest.mark.parametrize("k", CYCLES)
@pytest.mark.parametrize("accumulation", [2, 5])
def test_accumulation_equals_one_big_batch(six, accumulation, k):
    found = trained(config("none", accumulation), k, 6)
    assert (found["student"]["steps"], found["fake_score"]["steps"]) == (6, 6 * k)
    assert furthest(found, six[k]) < 1e-12


@pytest.mark.parametrize("sharding", ["none", "fsdp2"])
def test_two_processes_that_accumulate_equal_one(alone, two, sharding):
    assert furthest(two[f"{sharding} whole"], alone[5]) < 1e-12


@pytest.mark.stages("fsdp2", family="dit")
def test_a_sharded_diffusers_transformer_trains_as_a_whole_one(two):
    assert furthest(two["dit"], trained(config("none"), 1, 2, made=dits)) < 1e-12


def test_two_processes_with_adapters_over_one_base_equal_one(two):
    expected = trained(config("none"), 2, 3, made=loras)
    assert furthest(two["loras"], expected) < 1e-12
    assert all(".lora." in name or ".dar." in name for name in expected["student"]["network"])
    fake = expected["fake_score"]["network"]
    assert fake and all(".lora." in name or ".rungs." in name for name in fake)


def test_processes_keep_the_threads_that_were_chosen(two):
    assert two["threads"] == [7, 5]


def test_bfloat16_is_the_same_choice_sharded_or_not(two):
    exact, expected = single_gradients(config("none")), single_gradients(config("none", precision="bf16"))

    def flat(gradients: dict[str, Tensor]) -> Tensor:
        return torch.cat([gradients[name].flatten() for name in exact])

    rounding = (flat(expected) - flat(exact)).norm()
    assert 0 < rounding < 0.1 * flat(exact).norm()
    assert (flat(two["bf16"]) - flat(expected)).norm() < rounding
    assert all(gradient.dtype == torch.float32 for gradient in two["bf16"].values())


@pytest.mark.slow
def test_two_processes_equal_one_over_six_cycles(six, tmp_path):
    """Of 2 and of 5 fake-score updates, in parts of five samples."""
    found = torch.load(by_processes(tmp_path, 2, "long") / "found0.pt", weights_only=True)
    for k in CYCLES:
        assert found[str(k)]["student"]["steps"] == 6 and furthest(found[str(k)], six[k]) < 1e-9


@pytest.mark.parametrize("sharding", ["none", "fsdp2"])
def test_float32_gradients_of_two_processes_equal_those_of_one(two, sharding):
    expected, found = single_gradients(config("none", 5)), two[f"{sharding} gradients"]
    assert expected.keys() == found.keys()
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


@pytest.mark.parametrize("sharding", ["none", "fsdp2"])
def test_a_checkpoint_resumes_on_another_number_of_processes(alone, two, sharding, tmp_path):
    assert furthest(two[f"{sharding} resumed"], alone[2]) < 1e-12  # from one to two, which compute activations again
    torch.save(two[f"{sharding} halfway"], tmp_path / "halfway.pt")
    found = trained(config("none"), 2, CYCLES[2] // 2, tmp_path / "halfway.pt")  # from two to one
    assert found["student"]["steps"] == 6 and furthest(found, alone[2]) < 1e-12


def test_a_divergence_ends_all_processes_within_the_interval_with_one_message(two, folder):
    weight, replica, rate, none = two["replicas"]
    assert two["replicas"] == torch.load(folder / "found1.pt", weights_only=True)["replicas"]
    for message in (weight, replica):
        assert "step 4: process 1 holds another student/ema/0.9/blocks.1.mlp.fc1.weight than process 0" in message
        assert "(1 of" in message and "same command continues" in message
    assert "step 4: process 1 holds another student/network/" not in rate and "base_lr" in rate
    assert none == "6 steps"


@pytest.mark.slow
def test_copies_of_sharded_networks_train_as_one_and_are_compared(alone, tmp_path):
    """Four processes: 0 and 1 hold one copy, 2 and 3 the other."""
    by_processes(tmp_path, 4)
    found = [torch.load(tmp_path / f"found{rank}.pt", weights_only=True) for rank in range(4)]
    assert furthest(found[0]["whole"], alone[5]) < 1e-12
    harmed, none = found[0]["replicas"]
    assert "process 3 holds another student/ema/0.9/blocks.1.mlp.fc1.weight than process 1 (1 of" in harmed
    assert none == "6 steps" and all(one["replicas"] == [harmed, none] for one in found)


def test_a_checksum_sees_every_bit_and_every_exchange_of_two_values():
    value = torch.randn(64, dtype=torch.float32)
    for place in (0, 63):
        for bit in (0, 31):
            other = value.clone()
            other.view(torch.int32)[place] ^= torch.tensor(1, dtype=torch.int64).bitwise_left_shift(bit).int()
            assert replicas.checksum(other) != replicas.checksum(value)
    assert replicas.checksum(value.flip(0)) != replicas.checksum(value)
    assert replicas.checksum(value.reshape(8, 8)[:, :4]) == replicas.checksum(value.reshape(8, 8)[:, :4].contiguous())
    assert replicas.checksum(1e-3) != replicas.checksum(1e-3 + 1e-18) or 1e-3 == 1e-3 + 1e-18


def test_buckets_run_backwards_and_split_by_size_and_dtype(monkeypatch):
    monkeypatch.setattr(runtime, "BUCKET", 16)
    sizes = [nn.Parameter(torch.zeros(n)) for n in (1, 2, 3, 4)] + [nn.Parameter(torch.zeros(1).double())]
    found = [[p.numel() for p in bucket] for bucket in runtime.buckets(sizes)]
    assert found == [[1], [4], [3, 2], [1]]


def test_an_outline_holds_no_weights_and_takes_them_back():
    network = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    network[0].bias.requires_grad_(False)
    copied = parts.outline(network)
    assert all(p.is_meta for p in copied.parameters()) and not any(b.is_meta for b in copied.buffers())
    copied.load_state_dict(network.state_dict(), assign=True)
    x = torch.randn(4, 3)
    assert torch.equal(copied.eval()(x), network.eval()(x)) and not copied[0].bias.requires_grad


def test_the_parts_of_a_batch_are_its_samples_once():
    processes = []
    for rank in (0, 1):
        one = Runtime(LaunchConfig(accumulation=2))
        one.rank, one.processes = rank, 2
        processes += one.micro_batches(8)
    assert torch.equal(torch.cat(processes), sample_range(0, 8)) and len(processes) == 4
    with pytest.raises(UserError, match="multiple of 4"):
        one.micro_batches(6)
