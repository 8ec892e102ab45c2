"""python -m dmd_dar.pairs: the same pairs whoever makes them and however often they are stopped."""

import dataclasses
import errno
import math
import multiprocessing
import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dmd_dar import config, pairs
from dmd_dar.data.photos import NAMES
from dmd_dar.data.shards import MANIFEST, Shards, shard_name
from dmd_dar.distillation import job as distill
from dmd_dar.draws import Draws, sample_range
from dmd_dar.errors import DamagedFileError, UserError
from dmd_dar.flow import TimeLaw
from dmd_dar.losses import LossWeight
from dmd_dar.methods.dmd import DMD, Regression
from dmd_dar.methods.solvers import Solver
from dmd_dar.models.saved import ModelCard, load_network, save_network
from dmd_dar.pairs import PairsConfig, RegressionConfig, make_pairs, make_trajectories, open_pairs, trajectories_for
from tests.models.tiny_pipelines import public_file
from tests.tiny import TINY, tiny_sit, tiny_teacher

CPU = torch.device("cpu")
# On the cosine grid, from pure noise, where there is no step before to extrapolate from: DPM's first two are Euler's.
TWO_STEPS = ((1.0, math.sin(math.pi * 3 / 8) ** 2), (math.sin(math.pi * 3 / 8) ** 2, 0.5))
FORK = multiprocessing.get_context("fork")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    return tiny_teacher(tmp_path_factory.mktemp("teacher"))


def arguments(teacher: Path, out: Path, *more: str) -> list[str]:
    keys = ["n=10", "seed=3", "rungs=[1.0,0.5]", "solver_steps=4", "shard_size=4", "batch_size=2", "cpu=true"]
    return [f"teacher.path={teacher}", f"out={out}", *keys, *more]


def config_of(teacher: Path, out: Path, *more: str) -> PairsConfig:
    return config.load(PairsConfig, arguments(teacher, out, *more))


def run(teacher: Path, out: Path, *more: str) -> dict[str, bytes]:
    make_pairs(config_of(teacher, out, *more))
    return contents(out)


def command(*argv: str) -> int:
    """Exit code of the command, in this process."""
    with pytest.raises(SystemExit) as stop:
        config.run_job(PairsConfig, make_pairs, list(argv))
    return stop.value.code


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


@pytest.fixture(scope="module")
def whole(teacher, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("pairs") / "whole"
    run(teacher, path)
    return path


def test_pairs_are_the_trajectories_of_their_own_noise_and_label(teacher, whole):
    recipe, velocity = pairs.recipe_and_teacher(config_of(teacher, whole), CPU)
    held, direct = open_pairs(str(whole), recipe, CPU), make_trajectories(recipe, velocity, CPU)
    assert held.count == direct.count == 10
    for rung in range(2):
        for ours, theirs in zip(held.at(rung, torch.arange(10)), direct.at(rung, torch.arange(10)), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-5)
    states, ends, cond = held.at(0, torch.tensor([9, 4]))
    assert torch.equal(states, Draws(3, "pairs", 0, torch.tensor([9, 4])).normal("noise", 3, 32, 32))
    assert cond.tolist() == [9 % 7, 4] and (ends - states).abs().mean() > 0.1
    x, label = states[1:], cond[1:]
    for t, t_next in TWO_STEPS:
        x = x + (t_next - t) * velocity(x, torch.tensor([t]), label)
    torch.testing.assert_close(held.at(1, torch.tensor([4]))[0], x, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(
    "more", [("shard_size=2",), ("shard_size=10",), ("batch_size=3",), ("batch_size=8",), ("n=7", "shard_size=5")]
)
def test_shards_and_batches_of_any_size_hold_the_same_pairs(teacher, whole, tmp_path, more):
    run(teacher, tmp_path, *more)
    ours, theirs = Shards(tmp_path), Shards(whole)
    index = torch.arange(len(ours))
    for name in pairs.TENSORS:
        torch.testing.assert_close(ours.rows(name, index), theirs.rows(name, index), rtol=1e-4, atol=2e-5)
        aligned = more[0] in ("shard_size=2", "shard_size=10")  # the same batches: the same bits
        assert not aligned or torch.equal(ours.rows(name, index), theirs.rows(name, index))


def test_another_rank_makes_the_same_folder(teacher, whole, tmp_path, monkeypatch, capsys):
    order, make = [], pairs.make_trajectories

    def noting(recipe, velocity, device, first, *rest):
        order.append(first)
        return make(recipe, velocity, device, first, *rest)

    monkeypatch.setattr(pairs, "make_trajectories", noting)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run(teacher, tmp_path) == contents(whole) and order == [4, 6, 0, 2, 8]
    assert run(teacher, tmp_path) == contents(whole) and order == [4, 6, 0, 2, 8]
    assert capsys.readouterr() == ("", "")
    with pytest.raises(UserError, match="workers = 2: WORLD_SIZE = 2"):
        run(teacher, tmp_path, "workers=2")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_command_with_the_shard_and_the_same_command_continues(
    teacher, whole, tmp_path, number, monkeypatch, capsys
):
    made, make, handlers = [], pairs.make_trajectories, [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]

    def signalling(*args):
        made.append(args[3])
        if len(made) == 3:  # the first batch of the second shard
            os.kill(os.getpid(), number)
        return make(*args)

    monkeypatch.setattr(pairs, "make_trajectories", signalling)
    assert command(*arguments(teacher, tmp_path)) == 143
    assert "stopped with 2 of 3 shards" in capsys.readouterr().err
    assert {shard_name(0), shard_name(1)} <= set(contents(tmp_path)) and shard_name(2) not in contents(tmp_path)
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == handlers
    assert run(teacher, tmp_path) == contents(whole) and made == [0, 2, 4, 6, 8]
    said = capsys.readouterr()
    assert "10 pairs in" in said.out and "10/10 pairs" in said.err and "pairs/s  ETA 00:00" in said.err


def test_a_second_signal_ends_it_at_once_and_nothing_half_made_counts(teacher, whole, tmp_path):
    def twice() -> None:
        make = pairs.make_trajectories

        def signalling(*args):
            if args[3] == 4:
                os.kill(os.getpid(), signal.SIGTERM)
                os.kill(os.getpid(), signal.SIGTERM)
            return make(*args)

        pairs.make_trajectories = signalling
        run(teacher, tmp_path)

    process = FORK.Process(target=twice)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGTERM
    assert [name for name in sorted(contents(tmp_path)) if name.startswith("shard")] == [shard_name(0)]
    assert run(teacher, tmp_path) == contents(whole)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("seed=4", "seed: 3 -> 4"),
        ("n=11", "n: 10 -> 11"),
        ("guidance_scale=1.5", "guidance_scale: 1.0 -> 1.5"),
        ("rungs=[1.0,0.5015]", "rungs: [1.0, 0.5] -> [1.0, 0.5015]"),
        ("solver_steps=5", "solver_steps: 4 -> 5"),
        ("solver=heun", 'solver: "dpm" -> "heun"'),
        ("solver_grid=sqrt", 'solver_grid: "cosine" -> "sqrt"'),
        ("shard_size=5", "shard_size: 4 -> 5"),
    ],
)
def test_other_pairs_in_the_same_folder_are_refused(teacher, whole, more, said, capsys):
    before = contents(whole)
    assert command(*arguments(teacher, whole, more)) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert said in message and message.count(" -> ") == 1 and "Use another folder" in message
    assert contents(whole) == before


def test_a_replaced_teacher_is_noticed(whole, tmp_path, capsys):
    save_network(tmp_path, tiny_sit(seed=1), ModelCard(label_names=NAMES))
    assert command(*arguments(tmp_path, whole)) == 2
    assert "holds other samples: teacher: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"teacher": "another"}, "teacher: "),
        ({"guidance_scale": 2.0}, "guidance_scale: 1.0 -> 2.0"),
        ({"rungs": (1.0, 0.5015)}, "rungs: [1.0, 0.5] -> [1.0, 0.5015]"),
        ({"solver": Solver(solver_steps=15)}, "solver_steps: 4 -> 15"),
        ({"solver": Solver(solver_steps=4, solver_grid="even")}, "solver_grid: "),
        ({"num_classes": 1000}, "num_classes: 7 -> 1000"),
        ({"shape": (4, 32, 32)}, "shape: "),
        ({"seed": 9, "count": 12}, None),
    ],
)
def test_a_run_takes_only_the_pairs_that_it_would_make_itself(teacher, whole, changes, said):
    recipe, velocity = pairs.recipe_and_teacher(config_of(teacher, whole), CPU)
    wanted, regression = dataclasses.replace(recipe, **changes), RegressionConfig(pairs=str(whole))
    if said is None:
        assert trajectories_for(regression, wanted, velocity, CPU).count == 10
        return
    with pytest.raises(UserError, match="regression.pairs = .*Restore these keys, or make pairs") as refused:
        trajectories_for(regression, wanted, velocity, CPU)
    assert said in str(refused.value)


def test_a_folder_of_before_there_were_grids_is_one_of_heun_on_an_even_grid(teacher, tmp_path):
    run(teacher, tmp_path, "solver=heun", "solver_grid=even")
    content = Shards(tmp_path).layout.content
    assert content["solver"] == "heun" and content["solver_steps"] == 4 and "solver_grid" not in content
    recipe, velocity = pairs.recipe_and_teacher(config_of(teacher, tmp_path, "solver=heun", "solver_grid=even"), CPU)
    assert trajectories_for(RegressionConfig(pairs=str(tmp_path)), recipe, velocity, CPU).count == 10


def test_training_on_the_folder_is_training_on_the_trajectories(teacher, tmp_path):
    run(teacher, tmp_path / "pairs", "batch_size=64", "shard_size=64")
    recipe, velocity = pairs.recipe_and_teacher(config_of(teacher, tmp_path), CPU)
    student, losses = tiny_sit(seed=2), []
    for folder in ("", str(tmp_path / "pairs")):
        regression = RegressionConfig(pairs=folder, cache=str(tmp_path / "cache"))
        method = DMD(
            student=lambda x, t, c: student(x, t, c),
            teacher=velocity,
            fake_score=velocity,
            rungs=recipe.rungs,
            renoise=TimeLaw(),
            num_classes=7,
            shape=recipe.shape,
            matching_weight=0.0,
            regression=Regression(trajectories_for(regression, recipe, velocity, CPU), LossWeight(1.0)),
        )
        draws = [Draws(0, "student", step, sample_range(0, 6)) for step in range(4)]
        losses.append([method.student_loss(step)[0].item() for step in draws])
    assert losses[0] == losses[1] and len(set(losses[0])) == 4


def test_damage_is_found_when_the_run_reads_it(teacher, tmp_path):
    run(teacher, tmp_path)
    path = tmp_path / shard_name(1)
    path.write_bytes(path.read_bytes()[:-1] + b"\x07")
    recipe, _ = pairs.recipe_and_teacher(config_of(teacher, tmp_path), CPU)
    held = open_pairs(str(tmp_path), recipe, CPU)
    held.at(0, torch.tensor([0, 9]))
    with pytest.raises(DamagedFileError, match=f"{shard_name(1)} is damaged"):
        held.at(0, torch.tensor([0, 5]))


def test_a_full_disk_is_one_line_and_keeps_what_is_complete(teacher, whole, tmp_path, monkeypatch, capsys):
    rename, calls = os.replace, []

    def full(source, target):
        calls.append(Path(target).name)
        if calls.count(shard_name(1)):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        assert command(*arguments(teacher, tmp_path)) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert "No space left" in message and shard_name(1) in message and "free some space" in message
    assert {file.name for file in tmp_path.iterdir()} == {".lock", MANIFEST, shard_name(0)}
    assert run(teacher, tmp_path) == contents(whole)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("n=0", "n = 0"),
        ("rungs=[0.9,0.5]", "rungs"),
        ("solver_steps=1", "solver_steps = 1"),
        ("teacher.path=/nowhere", "/nowhere"),
        ("guidance_scal=2.0", "nearest valid key: guidance_scale"),
        ("out=", "out = ''"),
    ],
)
def test_mistakes_end_with_one_line_and_exit_code_2(teacher, tmp_path, wrong, said, capsys):
    assert command(*arguments(teacher, tmp_path / "out", wrong)) == 2
    message = capsys.readouterr().err.splitlines()
    assert len(message) == 1 and message[0].startswith("error: ") and said in message[0]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["SiT-latent.pt", "DiT-latent.pt"])
def test_a_public_latent_teacher_has_pairs_of_latents(tmp_path, name):
    public_file(tmp_path / name)
    run(tmp_path / name, tmp_path / "pairs", "teacher.heads=2", "guidance_scale=2.0")
    held = Shards(tmp_path / "pairs")
    assert held.layout.tensors["states"].shape == (2, 4, 8, 8) and held.layout.content["num_classes"] == 5
    assert held.rows("cond", torch.arange(10)).tolist() == [0, 1, 2, 3, 4] * 2
    again = [*arguments(tmp_path / name, tmp_path / "pairs"), "teacher.heads=4", "guidance_scale=2.0"]
    with pytest.raises(UserError, match="holds other samples: teacher: "):  # the heads are not in the file
        make_pairs(config.load(PairsConfig, again))


def test_dry_run_and_help_make_nothing(teacher, tmp_path, capsys):
    config.run_job(PairsConfig, make_pairs, arguments(teacher, tmp_path / "out", "--dry-run"))
    assert "solver_steps: 4" in capsys.readouterr().out
    config.run_job(PairsConfig, make_pairs, ["--help"], description=pairs.__doc__)
    assert "shard_size" in capsys.readouterr().out and not (tmp_path / "out").exists()


def test_guidance_is_in_the_pairs(teacher, whole, tmp_path):
    run(teacher, tmp_path, "guidance_scale=3.0", "n=2")
    network, _ = load_network(teacher)
    guided, plain = Shards(tmp_path), Shards(whole)
    index = torch.tensor([1])
    assert torch.equal(guided.rows("states", index, 0), plain.rows("states", index, 0))
    x, label, none = guided.rows("states", index, 0), torch.tensor([1]), torch.tensor([TINY.num_classes])

    def velocity(x, t):
        return network(x, t, none) + 3 * (network(x, t, label) - network(x, t, none))

    for t, t_next in TWO_STEPS:
        x = x + (t_next - t) * velocity(x, torch.tensor([t]))
    torch.testing.assert_close(guided.rows("states", index, 1), x, rtol=1e-4, atol=2e-5)
    assert (guided.rows("ends", index) - plain.rows("ends", index)).abs().max() > 1e-3


def test_a_run_trains_on_a_folder_of_pairs_as_on_its_own(teacher, tmp_path, capsys):
    """The same pairs from the disk and from memory give the same student; other pairs are refused by key."""
    config.run_job(PairsConfig, make_pairs, arguments(teacher, tmp_path / "pairs"))
    small = "steps=2 batch_size=4 rungs=[1.0,0.5] data.size=32 log.every=1 log.wandb=disabled launch.cpu=true"
    small += " fake_score.updates=1 regression.weight=1 regression.solver_steps=4 preflight=false log.health_samples=4"
    runs = {
        "own": ["regression.count=10", "regression.seed=3", f"regression.cache={tmp_path / 'cache'}"],
        "stored": [f"regression.pairs={tmp_path / 'pairs'}"],
    }
    weights = []
    for name, more in runs.items():
        distill.main([f"teacher.path={teacher}", *small.split(), f"out_dir={tmp_path / name}", *more])
        weights.append(load_file(tmp_path / name / "student" / "transformer" / "model.safetensors"))
    assert weights[0].keys() == weights[1].keys()
    assert max((weights[0][key] - value).abs().max().item() for key, value in weights[1].items()) < 1e-6
    with pytest.raises(SystemExit) as exit_:
        distill.main(
            [
                f"teacher.path={teacher}",
                *small.split(),
                f"out_dir={tmp_path / 'x'}",
                *runs["stored"],
                "guidance_scale=2",
            ]
        )
    assert exit_.value.code == 2 and "guidance_scale" in capsys.readouterr().err
