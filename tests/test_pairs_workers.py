"""The workers of python -m dmd_dar.pairs workers=N: stopped, killed and dying in the middle of their work."""

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
import torch

from dmd_dar import config, pairs
from dmd_dar.data.photos import NAMES
from dmd_dar.data.shards import MANIFEST
from dmd_dar.models.saved import ModelCard, save_network
from dmd_dar.pairs import PairsConfig, make_pairs
from tests.test_pairs import FORK, arguments, command, contents
from tests.tiny import tiny_sit, tiny_teacher


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    return tiny_teacher(tmp_path_factory.mktemp("teacher"))


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def gone(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status")
    return not status.exists() or "State:\tZ" in status.read_text()


def until(true, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture
def forked(monkeypatch):
    """Workers without the seconds of a fresh interpreter; they do not notice their parent's death then."""
    monkeypatch.setattr(multiprocessing, "get_context", lambda name: FORK)


def many(teacher: Path, out: Path, *more: str) -> list[str]:
    return arguments(teacher, out, "n=160", "solver_steps=8", *more)


def listed(out: Path) -> int:
    return len(json.loads((out / MANIFEST).read_text())["shards"]) if (out / MANIFEST).exists() else 0


@pytest.fixture(scope="module")
def alone(teacher, tmp_path_factory) -> dict[str, bytes]:
    path = tmp_path_factory.mktemp("alone") / "pairs"
    make_pairs(config.load(PairsConfig, many(teacher, path)))
    return contents(path)


def test_workers_die_with_their_killed_parent_and_the_next_command_makes_the_same_bytes(teacher, alone, tmp_path):
    cfg = config.load(PairsConfig, many(teacher, tmp_path, "workers=2", "threads=1"))
    killed = FORK.Process(target=make_pairs, args=(cfg,))
    killed.start()
    until(lambda: listed(tmp_path) >= 2)
    family = children(killed.pid)
    killed.kill()
    killed.join()
    until(lambda: all(gone(pid) for pid in family), 10)
    assert len(family) >= 2 and 2 <= listed(tmp_path) < 40
    make_pairs(config.load(PairsConfig, many(teacher, tmp_path)))
    assert contents(tmp_path) == alone


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_workers_stop_at_a_shards_end_and_continue(teacher, alone, tmp_path, number, forked):
    cfg = config.load(PairsConfig, many(teacher, tmp_path, "workers=3", "threads=1"))
    stopped = FORK.Process(target=make_pairs, args=(cfg,))
    stopped.start()
    until(lambda: listed(tmp_path) >= 3)
    workers = children(stopped.pid)
    for _ in range(2):  # a terminal signals the whole group: workers leave that to their parent
        for pid in workers:
            os.kill(pid, number)
        time.sleep(0.1)
    assert len(workers) == 3 and not any(gone(pid) for pid in workers)
    os.kill(stopped.pid, number)
    stopped.join(30)
    assert stopped.exitcode == 143 and 3 <= listed(tmp_path) < 40
    assert {name for name in contents(tmp_path) if name.endswith(".tmp")} == set()
    make_pairs(cfg)
    assert contents(tmp_path) == alone


def test_a_second_signal_takes_the_workers_along_in_the_middle_of_a_shard(teacher, tmp_path, forked, monkeypatch):
    monkeypatch.setattr(pairs, "make_trajectories", lambda *args: time.sleep(60))
    cfg = config.load(PairsConfig, many(teacher, tmp_path, "workers=2"))
    stopped = FORK.Process(target=make_pairs, args=(cfg,))
    stopped.start()
    until(lambda: len(children(stopped.pid)) == 2)
    workers = children(stopped.pid)
    time.sleep(0.3)
    os.kill(stopped.pid, signal.SIGTERM)
    time.sleep(0.1)
    os.kill(stopped.pid, signal.SIGTERM)
    stopped.join(10)
    assert stopped.exitcode == -signal.SIGTERM
    until(lambda: all(gone(pid) for pid in workers), 10)


def test_what_one_worker_says_is_the_commands_error(tmp_path, capsys, forked):
    network = tiny_sit()
    torch.nn.init.constant_(network.backbone_parameters()[-1], torch.nan)
    save_network(tmp_path / "teacher", network, ModelCard(label_names=NAMES))
    out = tmp_path / "pairs"
    assert command(*arguments(tmp_path / "teacher", out, "workers=2")) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("error: teacher.path = ") and "is not finite" in said
    assert not list(out.glob("shard_*")) and listed(out) == 0


def test_a_worker_that_dies_stops_the_others_and_is_told(teacher, tmp_path, capsys, forked, monkeypatch):
    make = pairs.make_trajectories

    def dying(*args):
        if args[3] == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.02)
        return make(*args)

    monkeypatch.setattr(pairs, "make_trajectories", dying)
    assert command(*many(teacher, tmp_path, "workers=2")) == 2
    assert "worker 1 ended with code -9; whole shards are kept" in capsys.readouterr().err
    assert listed(tmp_path) < 40
