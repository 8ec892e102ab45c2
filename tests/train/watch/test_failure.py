"""A failure in a network is one line of cause and remedy; its last batch is on the disk; no weight has moved."""

import copy
import errno
import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from dmd_dar import flow
from dmd_dar.distillation import job as distill
from dmd_dar.draws import Draws, sample_range
from dmd_dar.errors import DivergedError, UserError, users_line
from dmd_dar.methods.dmd import DMD
from dmd_dar.models.denoiser import velocity_of
from dmd_dar.models.sit import SiT
from dmd_dar.train.disk.checkpoint import CheckpointConfig
from dmd_dar.train.disk.log import RunLog
from dmd_dar.train.loop.ema import Ema
from dmd_dar.train.loop.loop import Course, Loop, OpenRun, Phase, Watch
from dmd_dar.train.loop.optimise import Optimiser, OptimiserConfig
from dmd_dar.train.processes.runtime import LaunchConfig, Runtime
from dmd_dar.train.watch.failure import Calls, NetworkError, Place, failed
from tests.tiny import tiny_sit, tiny_teacher

ROOT = Path(__file__).parents[3]
SHAPE = (3, 32, 32)


class Rig:
    """Three tiny networks in a loop of two phases."""

    def __init__(self, out: Path):
        self.teacher = tiny_sit().requires_grad_(False)
        self.student, self.fake_score = copy.deepcopy(self.teacher), copy.deepcopy(self.teacher)
        self.out, self.calls = out, Calls()
        for network in (self.student, self.fake_score):
            network.requires_grad_(True)
            network.pos_embed.requires_grad_(False)

    def run(self, sample=lambda step: None, **course) -> None:
        named = {"student": self.student, "teacher": self.teacher, "fake_score": self.fake_score}
        watched = {name: self.calls.watch(name, velocity_of(network)) for name, network in named.items()}
        rungs, law = (1.0, 0.5), flow.TimeLaw(low=0.02, high=0.98)
        method = DMD(**watched, rungs=rungs, renoise=law, num_classes=7, shape=SHAPE)
        losses = {"fake_score": method.fake_score_loss, "student": method.student_loss}
        cycle = tuple(
            Phase(name, named[name], Optimiser(OptimiserConfig(), named[name].backbone_parameters()), loss)
            for name, loss in losses.items()
        )
        course = {"checkpoints": CheckpointConfig(), "log_every": 1, "samples_every": 100, **course}
        home = OpenRun(Runtime(LaunchConfig(cpu=True)), None, {}, self.out)
        Loop(cycle, Course(0, 3, 4, **course), home, sample, Watch(self.calls)).run(0, RunLog(None))


@pytest.fixture
def rig(tmp_path) -> Rig:
    return Rig(tmp_path)


def output_of(network: SiT, call: int, value: float) -> None:
    """Let one value of the network's output be `value` from that call on."""
    count = [0]

    def poisoned(module, given, output):
        count[0] += 1
        if count[0] > call:
            output = output.clone()
            output[0, 0, 0, 0] = value
        return output

    network.register_forward_hook(poisoned)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(
    ("name", "call", "phase", "said"),
    [
        ("student", 0, "fake_score", "the student's output is not finite"),
        ("teacher", 0, "student", "the teacher's output is not finite"),
        ("fake_score", 0, "fake_score", "the fake_score's output is not finite"),
    ],
)
def test_a_number_that_is_not_finite_names_its_network(rig, name, call, phase, said, value):
    output_of(getattr(rig, name), call, value)
    before = copy.deepcopy(rig.student.state_dict())
    with pytest.raises(DivergedError) as told:
        rig.run()
    line = str(told.value)
    assert line.startswith(f"{phase}, optimiser step 0: ") and said in line and "\n" not in line
    assert f"lower {phase}.lr or {phase}.clip" in line and f"{rig.out}/failure/rank0" in line
    assert all(torch.equal(value, before[key]) for key, value in rig.student.state_dict().items())


def test_a_gradient_that_is_not_finite_leaves_the_weights_and_names_the_parameter(rig):
    rig.fake_score.blocks[1].mlp.fc1.weight.register_hook(lambda gradient: gradient * math.nan)
    before = copy.deepcopy(rig.fake_score.state_dict())
    with pytest.raises(DivergedError, match=r"norm is nan \(gradients not finite in 1 of \d+ .*mlp.fc1.weight"):
        rig.run()
    assert all(torch.equal(value, before[key]) for key, value in rig.fake_score.state_dict().items())


def test_sharded_gradients_are_looked_at_without_an_exchange():
    """The others may not be failing, and would not answer."""
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        mesh = init_device_mesh("cpu", (2,))
        network = nn.Linear(2, 4, bias=False)
        network.weight = nn.Parameter(DTensor.from_local(torch.ones(2, 2), mesh, [Shard(0)]))
        network.weight.grad = DTensor.from_local(torch.full((2, 2), math.nan), mesh, [Shard(0)])
        with CommDebugMode() as exchanges:
            place = Place("student", 0, 0, 0)
            error = failed(FloatingPointError("norm is nan"), place, network, Calls(), None)
        assert "gradients not finite in 1 of 1 parameters, first weight" in str(error)
        assert exchanges.get_total_counts() == 0
    finally:
        dist.destroy_process_group()


def test_a_loss_that_is_not_finite_is_refused_although_its_gradient_is(rig, monkeypatch):
    original = DMD.student_loss

    def loss(self, draws):
        value, metrics = original(self, draws)
        return value + math.inf, metrics  # the gradient of a constant is zero

    monkeypatch.setattr(DMD, "student_loss", loss)
    with pytest.raises(DivergedError, match="student, optimiser step 0: the loss is inf"):
        rig.run()


@pytest.mark.parametrize("name", ["student", "teacher", "fake_score"])
def test_an_exception_in_a_network_names_it_and_keeps_its_cause(rig, name):
    def broken(module, given, output):
        raise RuntimeError("mat1 and mat2 shapes\ncannot be multiplied")

    getattr(rig, name).register_forward_hook(broken)
    with pytest.raises(NetworkError) as told:
        rig.run()
    line = str(told.value)
    assert f"in a call of the {name} on x_t [4, 3, 32, 32]" in line and "\n" not in line
    assert "optimiser step 0: RuntimeError: mat1 and mat2 shapes cannot be multiplied" in line
    assert isinstance(told.value.__cause__, RuntimeError)
    assert "def broken" not in line and "in broken" in (rig.out / "failure" / "rank0.txt").read_text()


def test_a_users_error_in_a_network_stays_what_it_is(rig, monkeypatch):
    monkeypatch.setattr(DMD, "student_loss", lambda self, draws: (_ for _ in ()).throw(UserError("a.png is torn")))
    with pytest.raises(UserError, match="^a.png is torn$"):
        rig.run()


def test_out_of_memory_has_its_own_remedy(rig):
    def full(module, given, output):
        raise torch.OutOfMemoryError("tried to allocate 9 GB")

    rig.student.register_forward_hook(full)
    with pytest.raises(NetworkError, match="set launch.microbatch to fewer samples"):
        rig.run()


def test_a_failing_compiler_has_its_own_remedy(rig):
    class InductorError(RuntimeError):
        __module__ = "torch._inductor.exc"

    def unreadable(module, given, output):
        raise InductorError("ImportError: c7.main.so: file too short")

    rig.student.register_forward_hook(unreadable)
    with pytest.raises(NetworkError, match=r"file too short.*launch.compile=off .*TORCHINDUCTOR_CACHE_DIR"):
        rig.run()


def test_the_last_batch_is_on_the_disk_and_reproduces_the_call(rig):
    output_of(rig.teacher, 0, math.nan)
    with pytest.raises(DivergedError) as told:
        rig.run()
    tensors = load_file(rig.out / "failure" / "rank0.safetensors")
    facts = json.loads((rig.out / "failure" / "rank0.json").read_text())
    assert facts["error"] in str(told.value)
    assert (facts["phase"], facts["optimiser_step"], facts["seed"]) == ("student", 0, 0)
    v, x_t = facts["calls"]["teacher"]["v"], facts["calls"]["teacher"]["x_t"]
    assert v["not_finite"] == 1 and v["shape"] == [4, 3, 32, 32] and math.isfinite(v["std"])
    assert x_t["not_finite"] == 0 and x_t["std"] == pytest.approx(
        tensors["teacher.x_t"].double().std().item(), rel=1e-3
    )
    call = [tensors[f"fake_score.{part}"] for part in ("x_t", "t", "cond")]
    with torch.no_grad():
        torch.testing.assert_close(velocity_of(rig.fake_score)(*call), tensors["fake_score.v"])
    t = Draws(0, "student", 0, sample_range(0, 4)).uniform("score_t")
    torch.testing.assert_close(tensors["teacher.t"], (0.02 + 0.96 * t).float())


def test_a_disk_that_cannot_be_written_does_not_hide_the_cause(rig):
    rig.out.joinpath("failure").write_text("a file in the way")
    output_of(rig.teacher, 0, math.nan)
    with pytest.raises(DivergedError, match="the teacher's output is not finite.*could not be written"):
        rig.run()


def test_a_failure_on_one_process_ends_both(tmp_path):
    """Through the launcher: no process hangs in an exchange that its partner never reaches."""
    tiny_teacher(tmp_path / "teacher")
    script = tmp_path / "planted.py"
    script.write_text(
        "import os, sys\n"
        "from dmd_dar import distill\n"
        "from dmd_dar.methods.dmd import DMD\n"
        "original = DMD.student_loss\n"
        "def loss(self, draws):\n"
        "    if os.environ['RANK'] == '1' and draws.step == 1:\n"
        "        raise RuntimeError('planted')\n"
        "    return original(self, draws)\n"
        "DMD.student_loss = loss\n"
        "distill.main(sys.argv[1:])\n"
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node=2",
        f"--master_port={port}",
    ]
    command += [
        str(script),
        f"config={ROOT}/configs/photos32/residual.yaml",
        f"teacher.path={tmp_path}/teacher",
        "steps=4",
    ]
    command += ["batch_size=4", "fake_score.updates=1", "regression.weight=0", "preflight=false", "launch.cpu=true"]
    command += ["log.wandb=disabled", f"out_dir={tmp_path}/run"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert ran.returncode != 0
    assert "error: student, optimiser step 1: RuntimeError: planted" in ran.stderr
    assert (tmp_path / "run" / "failure" / "rank1.json").is_file()


def test_a_failing_run_exits_with_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(DMD, "student_loss", lambda self, draws: (_ for _ in ()).throw(KeyError("weights")))
    argv = [f"config={ROOT}/configs/photos32/residual.yaml", f"teacher.path={tiny_teacher(tmp_path / 'teacher')}"]
    argv += ["steps=2", "batch_size=2", "fake_score.updates=1", "regression.weight=0", "preflight=false"]
    argv += ["log.wandb=disabled", "launch.cpu=true", f"out_dir={tmp_path / 'run'}"]
    with pytest.raises(SystemExit) as stop:
        distill.main(argv)
    last = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2
    assert last.startswith("error: student, optimiser step 0: KeyError: 'weights'; its weights are those of the last")


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (["log.health_every=1"], "health, optimiser step 1: {}; log.health_every=0 leaves the health signals out"),
        (
            ["log.health_every=0", "log.samples_every=1"],
            "pictures, optimiser step 1: {}; a larger log.samples_every puts the pictures off",
        ),
    ],
)
def test_a_failure_while_samples_are_drawn_names_them_their_network_and_how_to_do_without(
    tmp_path, capsys, monkeypatch, keys, said
):
    def broken(module, given, output):
        raise RuntimeError("shapes\ncannot be multiplied")

    def average(*given):
        ema = Ema(*given)
        ema.module.register_forward_hook(broken)
        return ema

    monkeypatch.setattr(distill, "Ema", average)
    run = tmp_path / "run"
    argv = [f"config={ROOT}/configs/photos32/residual.yaml", f"teacher.path={tiny_teacher(tmp_path / 'teacher')}"]
    argv += ["steps=2", "batch_size=2", "fake_score.updates=1", "regression.weight=0", "preflight=false"]
    argv += ["log.wandb=disabled", "log.health_samples=4", "launch.cpu=true", f"out_dir={run}"]
    with pytest.raises(SystemExit) as stop:
        distill.main([*argv, *keys])
    last = capsys.readouterr().err.splitlines()[-1]
    count = 4 if "health" in said[:6] else 49
    cause = (
        rf"RuntimeError: shapes cannot be multiplied (in a call of the averaged_student on x_t [{count}, 3, 32, 32])"
    )
    assert stop.value.code == 2 and last.startswith(f"error: {said.format(cause)}")
    assert last.endswith(
        f"continues from the last checkpoint; the last batch and the traceback are in {run}/failure/rank0.*"
    )
    tensors = load_file(run / "failure" / "rank0.safetensors")
    assert tensors["averaged_student.x_t"].shape == (count, 3, 32, 32) and "averaged_student.v" not in tensors
    assert "in broken" in (run / "failure" / "rank0.txt").read_text()


@pytest.mark.parametrize(
    "code, said", [(errno.ENOSPC, "free some space"), (errno.EACCES, "pictures, optimiser step 1")]
)
def test_a_full_disk_under_a_picture_stays_what_it_is(rig, code, said):
    def full(step):
        raise OSError(code, os.strerror(code))

    with pytest.raises(OSError if code == errno.ENOSPC else NetworkError) as told:
        rig.run(sample=full, samples_every=1)
    assert said in users_line(told.value)
