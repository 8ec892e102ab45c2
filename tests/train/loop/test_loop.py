import math
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from dmd_dar.draws import Draws
from dmd_dar.errors import UserError
from dmd_dar.train.disk import checkpoint
from dmd_dar.train.disk.checkpoint import CheckpointConfig
from dmd_dar.train.disk.folder import RunFolder
from dmd_dar.train.disk.log import RunLog
from dmd_dar.train.loop.ema import Ema, Follower
from dmd_dar.train.loop.loop import Course, Loop, OpenRun, Phase, update
from dmd_dar.train.loop.optimise import Optimiser, OptimiserConfig
from dmd_dar.train.processes.runtime import LaunchConfig, Runtime


def phase_of(name: str = "student", optimiser: OptimiserConfig | None = None, width: int = 4) -> Phase:
    torch.manual_seed(0)
    network = nn.Linear(width, width).double()
    config = optimiser or OptimiserConfig(lr=1e-2)

    def loss(draws: Draws):
        x = draws.normal("x", width, dtype=torch.float64)
        return (network(x) - x.flip(1)).square().mean(), {"size": torch.tensor(float(len(x)))}

    return Phase(name, network, Optimiser(config, network.parameters()), loss, Ema(network, 0.9))


def loop_of(
    folder: RunFolder,
    steps: int,
    cycle: tuple[Phase, ...],
    *,
    identity: dict[str, str] | None = None,
    sample: Callable[[int], None] = lambda step: None,
    samples_every: int = 100,
) -> Loop:
    course = Course(0, steps, 8, CheckpointConfig(every=2, keep_last=2), log_every=1, samples_every=samples_every)
    home = OpenRun(Runtime(LaunchConfig(cpu=True)), folder, {"teacher": "a"} if identity is None else identity)
    return Loop(cycle, course, home, sample)


def open_folder(path: Path) -> RunFolder:
    return RunFolder.open(path, {"steps": 1})


def states(phase: Phase) -> list[torch.Tensor]:
    moments = [v for state in phase.optimiser.adamw.state.values() for v in state.values()]
    return [*phase.network.parameters(), *phase.ema.module.parameters(), *moments]


def test_resumed_equals_uninterrupted_bit_for_bit(tmp_path):
    whole = phase_of()
    with open_folder(tmp_path / "whole") as folder:
        loop_of(folder, 7, (whole,)).run(0, RunLog(None))
    first = phase_of()
    with open_folder(tmp_path / "parts") as folder:
        loop_of(folder, 3, (first,)).run(0, RunLog(None))
        second = phase_of()
        loop = loop_of(folder, 7, (second,))
        assert loop.restore(folder.checkpoints) == 3
        assert loop.run(3, RunLog(None))
    for ours, theirs in zip(states(second), states(whole), strict=True):
        assert torch.equal(ours, theirs)
    assert checkpoint.steps_saved(folder.checkpoints) == [6, 7]


def test_a_cycle_makes_exactly_k_fake_score_updates_per_student_update(tmp_path):
    fake, student = phase_of("fake_score"), phase_of("student")
    order = []
    for phase in (fake, student):
        inner = phase.loss
        phase.loss = lambda draws, inner=inner: order.append((draws.phase, draws.step)) or inner(draws)
    with open_folder(tmp_path) as folder:
        loop_of(folder, 2, (fake, fake, fake, student)).run(0, RunLog(None))
    fakes = [("fake_score", step) for step in range(6)]
    assert order == [*fakes[:3], ("student", 0), *fakes[3:], ("student", 1)]
    assert (fake.steps, student.steps) == (6, 2)


@pytest.mark.parametrize("accumulation", [2, 4, 8])
def test_accumulation_equals_one_big_batch(accumulation):
    whole, parts = phase_of(), phase_of()
    for _ in range(4):
        update(whole, 0, 8, Runtime(LaunchConfig(cpu=True)))
        metrics = update(parts, 0, 8, Runtime(LaunchConfig(cpu=True, accumulation=accumulation)))
    assert metrics["student/size"] == 8 / accumulation
    for ours, theirs in zip(states(parts), states(whole), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-13)


def test_an_uneven_split_is_refused():
    with pytest.raises(UserError, match="batch_size 8 .*multiple of 3"):
        Runtime(LaunchConfig(cpu=True, accumulation=3)).micro_batches(8)


def test_a_stopped_run_leaves_a_checkpoint_and_resumes_bit_for_bit(tmp_path):
    whole, phase, second = phase_of(), phase_of(), phase_of()
    with open_folder(tmp_path / "whole") as folder:
        loop_of(folder, 7, (whole,)).run(0, RunLog(None))
    inner = phase.loss

    def loss(draws):
        if draws.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return inner(draws)

    phase.loss = loss
    with open_folder(tmp_path / "stopped") as folder:
        loop = loop_of(folder, 7, (phase,))
        with loop.stop:
            assert not loop.run(0, RunLog(None))
        loop = loop_of(folder, 7, (second,))
        assert loop.restore(folder.checkpoints) == 3
        assert loop.run(3, RunLog(None))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(states(second), states(whole), strict=True))


@pytest.mark.parametrize("identity", [{"teacher": "b"}, {"teacher": "a", "pairs": "p"}, {}])
def test_whatever_the_checkpoint_was_made_with_must_be_there_unchanged(tmp_path, identity):
    with open_folder(tmp_path) as folder:
        loop_of(folder, 2, (phase_of(),)).run(0, RunLog(None))
        with pytest.raises(UserError, match=f"{'pairs' if 'pairs' in identity else 'teacher'} has changed since"):
            loop_of(folder, 4, (phase_of(),), identity=identity).restore(folder.checkpoints)


def test_a_checkpoint_of_other_networks_is_refused(tmp_path):
    with open_folder(tmp_path) as folder:
        loop_of(folder, 2, (phase_of(),)).run(0, RunLog(None))
        for other in (phase_of(width=5), phase_of("pretrain")):
            with pytest.raises(UserError, match=f"step 2 does not fit this run's {other.name}"):
                loop_of(folder, 4, (other,)).restore(folder.checkpoints)


def test_a_run_continues_from_before_a_damaged_checkpoint_and_ends_the_same(tmp_path):
    whole, first, second = phase_of(), phase_of(), phase_of()
    with open_folder(tmp_path / "whole") as folder:
        loop_of(folder, 7, (whole,)).run(0, RunLog(None))
    with open_folder(tmp_path / "parts") as folder:
        loop_of(folder, 6, (first,)).run(0, RunLog(None))
        os.truncate(folder.checkpoints / "step_00000006" / "state.pt", 99)
        loop = loop_of(folder, 7, (second,))
        assert loop.restore(folder.checkpoints) == 4
        assert loop.run(4, RunLog(None))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(states(second), states(whole), strict=True))


def test_the_best_checkpoint_outlives_the_newest(tmp_path):
    with open_folder(tmp_path) as folder:
        loop = loop_of(folder, 9, (phase_of(),))
        for step, score in enumerate((3.0, 1.0, None, 2.0, None), 1):
            loop.save(step, score)
        assert checkpoint.steps_saved(folder.checkpoints) == [2, 4, 5] and checkpoint.best(folder.checkpoints) == 2


def test_a_damaged_best_checkpoint_is_left_out_with_a_line(tmp_path, capsys):
    phase = phase_of()
    with open_folder(tmp_path) as folder:
        loop = loop_of(folder, 9, (phase,))
        loop.save(1, 1.0)
        before = [x.detach().clone() for x in states(phase)]
        with torch.no_grad():
            phase.network.weight.add_(1)
        assert loop.take_best(folder.checkpoints) == 1 and torch.equal(states(phase)[0], before[0])
        with torch.no_grad():
            phase.network.weight.add_(1)
        file = folder.checkpoints / "step_00000001" / "state.pt"
        content = bytearray(file.read_bytes())
        place = content.find(before[0].numpy().tobytes())
        content[place + 3] ^= 1
        file.write_bytes(bytes(content))
        assert loop.take_best(folder.checkpoints) == 0 and torch.equal(states(phase)[0], before[0] + 1)
    (line,) = capsys.readouterr().err.splitlines()
    assert "SHA-256 of state.pt" in line and "the best checkpoint is left out" in line


def test_a_stop_that_was_asked_for_before_the_first_step_trains_nothing(tmp_path):
    phase = phase_of()
    with open_folder(tmp_path) as folder:
        loop = loop_of(folder, 7, (phase,))
        with loop.stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert not loop.run(0, RunLog(None))
        assert phase.steps == 0 and checkpoint.steps_saved(folder.checkpoints) == []


@pytest.mark.parametrize("during", ["sample", "save"])
def test_a_signal_during_a_picture_or_a_save_ends_the_run_with_a_checkpoint(tmp_path, during, monkeypatch):
    phase = phase_of()
    save = checkpoint.save

    def signalling(root, step, *args, **more):
        save(root, step, *args, **more)
        if during == "save" and step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(checkpoint, "save", signalling)
    with open_folder(tmp_path) as folder:

        def sample(step):
            if during == "sample" and step == 3:
                os.kill(os.getpid(), signal.SIGTERM)

        loop = loop_of(folder, 7, (phase,), sample=sample, samples_every=3)
        with loop.stop:
            assert not loop.run(0, RunLog(None))
        reached = {"sample": 3, "save": 2}[during]
        assert phase.steps == reached and checkpoint.steps_saved(folder.checkpoints)[-1] == reached


def test_ema_follows_by_its_decay():
    module = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(module.weight)
    ema = Ema(module, 0.99)
    nn.init.ones_(module.weight)
    ema.update(module, 1)
    first = 1 - 2 / 11
    assert ema.module.weight.item() == pytest.approx(first)
    ema.update(module, 10_000)
    assert ema.module.weight.item() == pytest.approx(1 - 0.99 * (1 - first))
    assert not ema.module.weight.requires_grad


def test_a_follower_goes_its_share_of_the_way_after_each_update_of_its_leader():
    leader, follower = phase_of(), phase_of()
    follower.network.register_parameter("rung", nn.Parameter(torch.ones(2)))
    before = {name: p.detach().clone() for name, p in follower.network.named_parameters()}
    leader.follower = Follower(follower.network, 0.25)
    update(leader, 0, 4, Runtime(LaunchConfig(cpu=True)))
    theirs = dict(leader.network.named_parameters())
    for name, mine in follower.network.named_parameters():
        wanted = before[name] if name == "rung" else 0.75 * before[name] + 0.25 * theirs[name]
        torch.testing.assert_close(mine.detach(), wanted.detach())
    assert not all(torch.equal(before[name], p) for name, p in follower.network.named_parameters())
    assert follower.steps == 0 and not follower.optimiser.adamw.state


def test_routers_have_their_own_rate_and_no_weight_decay():
    backbone, router = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimiser = Optimiser(OptimiserConfig(lr=1e-2, weight_decay=0.5, clip=1e9), [backbone], ([router], 0.1))
    backbone.grad, router.grad = torch.ones(3), torch.ones(3)
    norm = optimiser.norm()
    optimiser.step(0, norm)
    assert norm.item() == pytest.approx(math.sqrt(6))
    torch.testing.assert_close(router.data, torch.full((3,), 0.9))
    torch.testing.assert_close(backbone.data, torch.full((3,), 1 - 1e-2 * 0.5 - 1e-2))


def test_the_rate_warms_up_and_decays():
    config = OptimiserConfig(lr=1.0, warmup=9, decay_start=100, decay_steps=50)
    assert [config.factor(s) for s in (0, 9, 100)] == [0.1, 1.0, 1.0]
    assert config.factor(125) == pytest.approx(0.5)
    assert config.factor(150) == config.factor(900) == pytest.approx(0)


def test_gradients_are_clipped_before_the_update(monkeypatch):
    p = nn.Parameter(torch.zeros(2))
    optimiser, seen = Optimiser(OptimiserConfig(clip=1.0), [p]), []
    monkeypatch.setattr(optimiser.adamw, "step", lambda: seen.append(p.grad.clone()))
    p.grad = torch.tensor([3.0, 4.0])
    assert optimiser.norm().item() == pytest.approx(5.0)
    optimiser.step(0, optimiser.norm())
    torch.testing.assert_close(seen[0], torch.tensor([0.6, 0.8]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fault", ["loss", "gradient norm"])
def test_a_step_that_is_not_finite_moves_nothing(fault):
    """sqrt at 0 has a finite value and an infinite gradient."""
    network = nn.Linear(2, 1, bias=False)
    nn.init.zeros_(network.weight)
    losses = {"loss": lambda: (network.weight / 0).sum(), "gradient norm": lambda: network.weight.abs().sqrt().sum()}
    optimiser = Optimiser(OptimiserConfig(), network.parameters())
    phase = Phase("student", network, optimiser, lambda draws: (losses[fault](), {}), Ema(network, 0.9))
    with pytest.raises(FloatingPointError, match=f"the {fault} is (nan|inf)"):
        update(phase, 0, 2, Runtime(LaunchConfig(cpu=True)))
    assert not network.weight.any() and not optimiser.adamw.state and phase.steps == 0
