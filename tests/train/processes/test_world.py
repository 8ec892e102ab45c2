"""What a launcher, or a shell that forgot one, left in the environment: a plain run, or a line of what is missing."""

import socket

import pytest
import torch
from accelerate.state import AcceleratorState

from dmd_dar import encode, pairs
from dmd_dar.distillation import job as distill
from dmd_dar.errors import UserError
from dmd_dar.train.processes.runtime import LaunchConfig, Runtime
from dmd_dar.train.processes.world import MEETING, World, launched
from eval.samples.parallel import Processes
from tests.distillation.test_job import arguments
from tests.tiny import ON_CPU

NAMES = ("WORLD_SIZE", "LOCAL_WORLD_SIZE", *MEETING)
WHOLE = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """No such variables, and no process state of accelerate's, which it holds for a process's life."""
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def leave(monkeypatch, **left: str) -> None:
    for name, value in left.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    "left",
    [
        {"LOCAL_RANK": "0"},
        {"LOCAL_RANK": "3"},
        {"RANK": "1"},
        {"RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "gone", "MASTER_PORT": "1"},
        {"WORLD_SIZE": "1"},
        {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"},
        {"WORLD_SIZE": ""},
    ],
    ids=str,
)
@pytest.mark.parametrize("cpu", [False, True])
def test_what_is_left_of_one_process_is_a_plain_run(monkeypatch, left, cpu):
    leave(monkeypatch, **left)
    runtime = Runtime(LaunchConfig(cpu=cpu or bool(ON_CPU)))
    assert (runtime.processes, runtime.rank, runtime.is_main) == (1, 0, True)
    assert not torch.distributed.is_initialized()
    assert not runtime.any(False) and runtime.of_main(3) == 3


def lacking(*names: str) -> dict[str, str]:
    return {name: value for name, value in WHOLE.items() if name not in names}


@pytest.mark.parametrize(
    ("left", "told"),
    [
        (lacking("MASTER_ADDR", "MASTER_PORT"), "MASTER_ADDR, MASTER_PORT are not set"),
        (lacking("MASTER_PORT"), "MASTER_PORT is not set"),
        (lacking("LOCAL_RANK"), "LOCAL_RANK is not set"),
        ({"WORLD_SIZE": "2"}, "RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT are not set"),
        ({**WHOLE, "WORLD_SIZE": "two"}, "WORLD_SIZE = 'two' in the environment: must be a number"),
        ({**WHOLE, "WORLD_SIZE": "0"}, "WORLD_SIZE = '0' in the environment: must be a number from 1"),
        ({**WHOLE, "RANK": "2"}, "RANK = '2' in the environment: must be a number from 0 to 1"),
        ({**WHOLE, "LOCAL_RANK": "-1"}, "LOCAL_RANK = '-1' in the environment"),
        ({**WHOLE, "MASTER_PORT": "http"}, "MASTER_PORT = 'http' in the environment: must be a number from 1"),
    ],
    ids=str,
)
def test_what_several_processes_lack_is_one_line_and_nothing_is_written(monkeypatch, capsys, tmp_path, left, told):
    leave(monkeypatch, **left)
    with pytest.raises(SystemExit) as stop:
        distill.main(arguments(tmp_path, tmp_path / "run"))
    said = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(said) == 1 and said[0].startswith("error: ") and told in said[0]
    assert "unset WORLD_SIZE" in said[0] and not (tmp_path / "run").exists()


@pytest.mark.parametrize("cpu", [False, True])
def test_evaluations_say_it_too(monkeypatch, cpu):
    leave(monkeypatch, LOCAL_RANK="0")
    assert Processes.of(cpu) == Processes()
    leave(monkeypatch, **lacking("MASTER_PORT"))
    with pytest.raises(UserError, match="MASTER_PORT is not set"):
        Processes.of(cpu)


@pytest.mark.parametrize("rank", ["x", "7"])
def test_processes_that_share_a_folder_need_no_meeting_but_whole_numbers(monkeypatch, tmp_path, rank):
    leave(monkeypatch, WORLD_SIZE="2")
    assert launched() == World(2, 0, 0)
    leave(monkeypatch, RANK="1")
    assert launched() == World(2, 1, 1)
    leave(monkeypatch, RANK=rank)
    for fill, cfg in (
        (pairs.make_pairs, pairs.PairsConfig(out=str(tmp_path / "out"))),
        (encode.encode, encode.EncodeConfig(out=str(tmp_path / "out"), codec="none", n=8)),
    ):
        with pytest.raises(UserError, match=f"RANK = '{rank}' in the environment"):
            fill(cfg)
    assert not (tmp_path / "out").exists()


def test_a_meeting_place_that_is_taken_is_one_line(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        leave(monkeypatch, **{**WHOLE, "RANK": "0", "LOCAL_RANK": "0", "MASTER_PORT": str(taken.getsockname()[1])})
        with pytest.raises(UserError, match="no process was found at MASTER_ADDR:MASTER_PORT 127.0.0.1:") as told:
            Runtime(LaunchConfig(cpu=bool(ON_CPU)))
    assert "\n" not in str(told.value) and not torch.distributed.is_initialized()
