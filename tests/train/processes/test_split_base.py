"""A frozen base in parts: two processes over one equal one process, and read, hold and hand out what they should."""

import pytest
import torch
from safetensors.torch import save_file

from dmd_dar.models.frozen import block_layers
from tests.distillation.test_command import in_two_processes
from tests.distillation.test_job import (
    arguments,
    run,
    teacher,  # noqa: F401
)
from tests.distillation.test_memory import SHARED
from tests.train.processes.test_runtime import by_processes, furthest
from tests.train.workers import config, loras, over_a_half_base, trained


def test_two_processes_over_a_base_in_parts_equal_one(tmp_path):
    weights = {"a": torch.randn(3, 5).bfloat16(), "b": torch.arange(4), "c": torch.tensor(2.0)}
    save_file(weights, tmp_path / "weights.safetensors")
    by_processes(tmp_path, 2, "base")
    found, other = (torch.load(tmp_path / f"found{rank}.pt", weights_only=True) for rank in (0, 1))
    assert furthest(found["plain"], trained(config("none"), 2, 2, made=loras)) < 1e-12
    whole = trained(config("none"), 2, 2, made=over_a_half_base)
    assert furthest(found["offload"], whole) < 1e-12
    start = over_a_half_base(torch.float64)[1].state_dict()
    moved = max(float((whole["student"]["network"][name] - value).abs().max()) for name, value in start.items())
    assert moved > 1e-3
    count = sum(p.numel() for layer in block_layers(loras(torch.float64)[0]) for p in layer.parameters(recurse=False))
    assert count / 2 <= found["held"] == other["held"] <= count / 2 + 30
    assert found["merged"] and found["merged dit"] and other["merged dit"]
    assert all(
        torch.equal(found["read"][name], x) and torch.equal(other["read"][name], x) for name, x in weights.items()
    )


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("launch.offload=true", "frozen_dtype=bfloat16", "launch.checkpointing=true")])
def test_a_whole_run_over_a_base_in_parts_equals_one_process(teacher, tmp_path, more):  # noqa: F811
    whole = run(teacher, tmp_path / "one", *SHARED, *more)
    ran = in_two_processes(*arguments(teacher, tmp_path / "two", "launch.sharding=fsdp2", *SHARED, *more))
    assert ran.returncode == 0, ran.stderr[-2000:]
    both = run(teacher, tmp_path / "two", *SHARED, *more)  # finished: it reads what is there
    assert both.keys() == whole.keys()
    for name, value in whole.items():
        torch.testing.assert_close(both[name], value, rtol=1e-4, atol=2e-5, msg=f"{name} differs")
