"""`launch.compile`: when networks are compiled, what a run then leaves, and what it says where they cannot be."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file
from torch import nn

from dmd_dar.distillation import job
from dmd_dar.errors import UserError
from dmd_dar.train.processes import compiling
from dmd_dar.train.processes.compiling import COMPILED, EAGER, LONG, UNKNOWN, compile_run, decided, refusal
from dmd_dar.train.processes.runtime import LaunchConfig, Runtime
from tests.distillation.test_job import arguments
from tests.tiny import tiny_sit, tiny_teacher

CPU = torch.device("cpu")
ALONE = SimpleNamespace(sharded=False, device=CPU, of_main=lambda value: value, any=lambda flag: flag)


@pytest.mark.parametrize(
    ("compile", "before", "steps", "expected"),
    [
        ("on", UNKNOWN, 1, True),
        ("on", EAGER, 1, True),
        ("off", COMPILED, LONG, False),
        ("auto", UNKNOWN, LONG, True),
        ("auto", UNKNOWN, LONG - 1, False),
        ("auto", EAGER, LONG, False),
        ("auto", COMPILED, 1, True),
    ],
)
def test_auto_goes_by_the_length_of_the_run_and_keeps_to_what_was_begun(compile, before, steps, expected):
    assert decided(LaunchConfig(compile=compile), before, steps, CPU, {"student": tiny_sit()}) == expected


def test_auto_leaves_out_what_was_not_measured():
    auto, other = LaunchConfig(compile="auto"), nn.Identity()  # such as a DiffusersDenoiser
    assert not decided(auto, UNKNOWN, LONG, CPU, {"student": tiny_sit(), "teacher": other})  # type: ignore[dict-item]
    assert not decided(auto, UNKNOWN, LONG, torch.device("cuda"), {"student": tiny_sit()})


@pytest.mark.parametrize("cause", ["compiler", "sharding"])
def test_where_it_cannot_be_done_on_is_an_error_and_auto_goes_on(monkeypatch, caplog, cause):
    def broken(*args, **kwargs):
        raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found\nand a long story")

    if cause == "compiler":
        monkeypatch.setattr(torch, "compile", broken)
    runtime: Runtime = SimpleNamespace(**{**vars(ALONE), "sharded": cause == "sharding"})  # type: ignore[assignment]
    told = "No working C.. compiler found.*such as g.." if cause == "compiler" else "launch.sharding = fsdp2"
    cfg = SimpleNamespace(launch=LaunchConfig(compile="on"), steps=LONG)
    with pytest.raises(UserError, match=f"launch.compile = on: .*{told}.*; set it to off"):
        compile_run(cfg, runtime, None, {"student": tiny_sit()})
    network, cfg.launch = tiny_sit(), LaunchConfig(compile="auto")
    with caplog.at_level("INFO", logger="dmd_dar"):
        assert compile_run(cfg, runtime, None, {"student": network}) is None
    assert len(caplog.messages) == 1 and "long story" not in caplog.text
    assert network._compiled_call_impl is None


def run(teacher: Path, out: Path, *keys: str, recipe: str = "residual") -> dict[str, torch.Tensor]:
    short = ("regression.weight=0", "log.samples_every=100", "log.health_every=0")
    job.main(arguments(teacher, out, *short, *keys, recipe=recipe))
    return load_file(out / "student" / "transformer" / "model.safetensors")


def recorded(out: Path) -> str:
    return OmegaConf.load(out / "config.yaml").launch.compile


def test_a_run_compiles_its_three_networks_says_what_that_took_and_remembers_it(monkeypatch, caplog, tmp_path):
    compiled = []
    monkeypatch.setattr(compiling, "compile_network", compiled.append)
    monkeypatch.setattr(compiling, "refusal", lambda *given: "")
    teacher, out = tiny_teacher(tmp_path / "teacher"), tmp_path / "run"
    run(teacher, out, "launch.compile=on", "steps=1")
    assert len(compiled) == 3 and recorded(out) == "on"
    with caplog.at_level("INFO", logger="dmd_dar"):
        run(teacher, out, "launch.compile=auto", "steps=6")
    assert len(compiled) == 6 and recorded(out) == "on"
    lines = [line for line in caplog.messages if line.startswith("compiled: teacher, student, fake_score; the first")]
    assert len(lines) == 1
    run(teacher, out, "launch.compile=off", "steps=7")
    assert len(compiled) == 6 and recorded(out) == "off"


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["residual", "dar"])
def test_a_compiled_run_goes_on_bit_for_bit_and_in_the_other_mode(tmp_path, recipe):
    torch.compiler.reset()
    teacher, on = tiny_teacher(tmp_path / "teacher"), "launch.compile=on"
    whole = run(teacher, tmp_path / "whole", on, recipe=recipe)
    run(teacher, tmp_path / "parts", on, "steps=2", recipe=recipe)
    resumed = run(teacher, tmp_path / "parts", "launch.compile=auto", recipe=recipe)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    run(teacher, tmp_path / "other", "launch.compile=auto", "steps=2", recipe=recipe)
    assert recorded(tmp_path / "other") == "off"
    other = run(teacher, tmp_path / "other", on, recipe=recipe)
    assert whole.keys() == other.keys()
    assert all(torch.allclose(whole[name], other[name], rtol=1e-3, atol=1e-4) for name in whole)


@pytest.mark.slow
def test_the_compiler_of_this_machine_is_found():
    assert refusal(LaunchConfig(), ALONE) == ""  # type: ignore[arg-type]
