"""Whatever ends a run, the same command continues it, and all that it leaves is bit-equal to an uninterrupted run's."""

import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import socket
import time
from pathlib import Path

import pytest

from dmd_dar.models.saved import ModelCard, save_network
from dmd_dar.models.sit import SiTConfig
from dmd_dar.train.disk import checkpoint
from tests.tiny import tiny_sit
from tests.train import crash

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.train.crash"])
TINY = SiTConfig(input_size=32, in_channels=3, patch=16, width=16, depth=2, heads=2, num_classes=8)
SHORT = ("steps=5", "checkpoint.every=2", "checkpoint.keep_last=1", "checkpoint.keep_every=4")
LONG = ("steps=24", "checkpoint.every=3", "checkpoint.keep_last=2", "checkpoint.keep_every=12")
LONG += ("log.health_every=2", "log.health_samples=4")


class Runs:
    """Runs of the job in folders of one teacher and one cache of trajectories."""

    def __init__(self, root: Path):
        self.root = root
        save_network(root / "teacher", tiny_sit(TINY), ModelCard())

    def start(self, name: str, keys: tuple[str, ...], act: str = "", at: int = 0, said: str = "", **world: str):
        places = [f"teacher.path={self.root / 'teacher'}", f"regression.cache={self.root / 'cache'}"]
        keys = [*places, f"out_dir={self.root / name}", *keys]
        process = FORKS.Process(target=crash.train, args=(keys, self.said(said or name), act, at, world))
        process.start()
        return process

    def start_two(self, name: str, keys: tuple[str, ...], act: str = "", at: int = 0) -> list:
        """`act` happens in the first of two processes, the one that writes."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        first = self.start(name, keys, act, at, RANK="0", LOCAL_RANK="0", **world)
        return [first, self.start(name, keys, said=f"{name}_1", RANK="1", LOCAL_RANK="1", **world)]

    def run(self, name: str, keys: tuple[str, ...], act: str = "", at: int = 0) -> int:
        process = self.start(name, keys, act, at)
        process.join()
        return process.exitcode

    def said(self, name: str) -> Path:
        return self.root / f"{name}.said"

    def points(self, name: str) -> list[str]:
        return re.findall(r"^\[(.*)\]$", self.said(name).read_text(), re.MULTILINE)

    def contents(self, name: str) -> dict[str, bytes | list]:
        """Every file of the run folder, and the folders; the log without its speeds."""
        folder, held = self.root / name, {}
        for path in sorted(folder.rglob("*")):
            held[str(path.relative_to(folder))] = path.read_bytes() if path.is_file() else b""
        del held[".lock"]
        held["config.yaml"] = held["config.yaml"].replace(f"out_dir: {folder}".encode(), b"")
        for place in ("student/README.md", "student_best/README.md"):
            if card := held.get(place):
                held[place] = card.replace(f"# {name}\n".encode(), b"")
        records = [json.loads(line) for line in held["log.jsonl"].splitlines()]
        held["log.jsonl"] = [{**record, "steps_per_second": 0} for record in records]
        return held


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def whole(runs) -> dict:
    assert runs.run("warm", SHORT) == 0  # makes the trajectories
    assert runs.run("whole", SHORT) == 0, runs.said("whole").read_text()
    held = runs.contents("whole")
    assert [record["step"] for record in held["log.jsonl"]] == [1, 2, 3, 4, 5]
    assert checkpoint.steps_saved(runs.root / "whole" / "checkpoints") == [4, 5]
    return held


def pruning_save(points: list[str]) -> range:
    """The numbers of the points of the first save that prunes: state, manifest, folder, rename, prune."""
    last = points.index("checkpoint pruned") + 1
    assert points[last - 10 : last] == [
        "file written", "file synced", "file written", "file synced", "folder synced",
        "checkpoint renamed", "folder synced", "before prune", "checkpoint withdrawn", "checkpoint pruned",
    ]  # fmt: skip
    return range(last - 9, last + 1)


def ends_the_same(runs: Runs, name: str, whole: dict, keys: tuple[str, ...] = SHORT) -> None:
    assert runs.run(name, keys) == 0, runs.said(name).read_text()
    assert runs.contents(name) == whole


def killed_at(runs: Runs, whole: dict, points: list[int]) -> None:
    for at in points:
        assert runs.run(f"kill{at}", SHORT, "kill", at) == -9
        assert len(runs.points(f"kill{at}")) == at
        ends_the_same(runs, f"kill{at}", whole)


def test_killed_at_each_point_of_a_save_the_same_command_ends_in_the_same_bytes(runs, whole):
    killed_at(runs, whole, list(pruning_save(runs.points("whole"))))


def test_killed_while_the_configuration_a_picture_or_the_student_is_written(runs, whole):
    last = len(runs.points("whole"))
    killed_at(runs, whole, [2, 14, last - 6, last - 4, last])


@pytest.mark.slow
def test_killed_at_any_point_of_a_run(runs, whole):
    killed_at(runs, whole, list(range(1, len(runs.points("whole")) + 1)))


def test_killed_while_it_resumes(runs, whole):
    """The log is cut to the checkpoint's step in one replacement."""
    assert runs.run("twice", SHORT, "kill", pruning_save(runs.points("whole"))[3]) == -9
    assert [json.loads(line)["step"] for line in (runs.root / "twice" / "log.jsonl").open()] == [1, 2, 3, 4]
    for at in (6, 7):
        assert runs.run("twice", SHORT, "kill", at) == -9
    ends_the_same(runs, "twice", whole)


def test_killed_while_a_finished_run_writes_its_student_again(runs, whole):
    ends_the_same(runs, "again", whole)
    (runs.root / "again" / "student" / "notes.txt").write_text("a user's own")
    whole = {**whole, "student/notes.txt": b"a user's own"}
    ends_the_same(runs, "again", whole)
    points = runs.points("again")
    for point in ("foreign entry kept", "folders exchanged", "folder replaced"):
        assert runs.run("again", SHORT, "kill", points.index(point) + 1) == -9
        ends_the_same(runs, "again", whole)


def killed_at_random(runs: Runs, name: str, kills: int, seed: int) -> None:
    assert runs.run("long", LONG) == 0, runs.said("long").read_text()
    chance, killed, tries = random.Random(seed), 0, 0
    while killed < kills:
        tries += 1
        assert tries <= 3 * kills, "the run is over before it can be killed"
        process = runs.start(name, LONG)
        most = 10 + chance.randrange(20)
        while process.is_alive() and not (runs.said(name).exists() and len(runs.points(name)) >= most):
            time.sleep(0.005)
        time.sleep(chance.random() * 0.2)
        process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        killed += process.exitcode != 0
        if process.exitcode == 0:  # it was done before
            shutil.rmtree(runs.root / name)
        runs.said(name).unlink()
    ends_the_same(runs, name, runs.contents("long"), LONG)


@pytest.mark.slow
def test_killed_at_five_random_moments(runs):
    killed_at_random(runs, "random", 5, seed=1)


@pytest.mark.slow
def test_killed_at_twenty_random_moments(runs):
    killed_at_random(runs, "random", 20, seed=2)


@pytest.mark.parametrize("at, left", [(17, [2]), (19, [2]), (13, [2]), (1, []), (39, [4, 5]), (41, [4, 5])])
def test_a_full_disk_is_one_line_and_leaves_what_was_saved(runs, whole, at, left):
    name = f"full{at}"
    assert runs.run(name, SHORT, "full", at) == 2
    said = [line for line in runs.said(name).read_text().splitlines() if line[0] != "["]
    assert said[-1].startswith("error: ") and "No space left on device" in said[-1] and "Traceback" not in str(said)
    assert at == 1 or "free some space" in said[-1]
    folder = runs.root / name / "checkpoints"
    assert (checkpoint.steps_saved(folder) if folder.exists() else []) == left
    assert not list((runs.root / name).rglob("*.tmp")) and not list(folder.glob("partial_*"))
    ends_the_same(runs, name, whole)


@pytest.mark.parametrize("act, at, reached", [("term", 2, 0), ("interrupt", 13, 3), ("term", 18, 4), ("term", 20, 4)])
def test_a_signal_at_any_time_ends_the_run_with_what_it_has(runs, whole, act, at, reached):
    name = f"{act}{at}"
    assert runs.run(name, SHORT, act, at) == 143
    assert ("stopped" if not reached else f"stopped at step {reached} of 5; the same command continues") in (
        runs.said(name).read_text().splitlines()
    )
    assert checkpoint.steps_saved(runs.root / name / "checkpoints")[-1:] == ([reached] if reached else [])
    ends_the_same(runs, name, whole)


def test_a_signal_after_the_last_step_changes_nothing(runs, whole):
    assert runs.run("late", SHORT, "term", 40) == 0
    assert runs.contents("late") == whole


def test_a_damaged_checkpoint_costs_the_steps_since_the_one_before(runs, whole):
    assert runs.run("damaged", ("steps=4", *SHORT[1:], "checkpoint.keep_last=2")) == 0
    folder = runs.root / "damaged" / "checkpoints"
    content = bytearray((folder / "step_00000004" / "state.pt").read_bytes())
    content[-5000] ^= 1
    (folder / "step_00000004" / "state.pt").write_bytes(content)
    assert runs.run("damaged", SHORT) == 0
    told = [line for line in runs.said("damaged").read_text().splitlines() if "is damaged" in line]
    assert len(told) == 1 and "set aside as damaged_00000004, continuing from step 2" in told[0]
    shutil.rmtree(folder / "damaged_00000004")
    (runs.root / "damaged" / "samples" / "step_00000004.png").unlink()  # of the end that step 4 was
    assert runs.contents("damaged") == whole


def codes(processes: list) -> list[int]:
    for process in processes:
        process.join(60)
    return [process.exitcode for process in processes]


@pytest.mark.parametrize("ranks", [(1,), (0, 1)])
def test_a_signal_to_any_of_two_processes_stops_both_at_one_step_and_one_process_continues(runs, whole, ranks):
    name = f"two{len(ranks)}"
    processes = runs.start_two(name, LONG)
    while not (runs.said(name).exists() and len(runs.points(name)) >= 13):
        time.sleep(0.005)
        assert processes[0].is_alive(), runs.said(name).read_text()
    for rank in ranks:
        os.kill(processes[rank].pid, signal.SIGTERM)
    assert codes(processes) == [143, 143], runs.said(name).read_text()
    folder = runs.root / name
    reached = checkpoint.steps_saved(folder / "checkpoints")[-1]
    assert 3 <= reached < 24 and f"stopped at step {reached} of 24" in runs.said(name).read_text()
    saved = checkpoint.load(folder / "checkpoints", reached, mapped=False)
    assert (saved["student"]["steps"], saved["fake_score"]["steps"]) == (reached, 2 * reached)
    assert runs.run(name, LONG) == 0, runs.said(name).read_text()
    assert [record["step"] for record in runs.contents(name)["log.jsonl"]] == list(range(1, 25))


def test_a_save_that_fails_ends_both_processes(runs, whole):
    assert codes(runs.start_two("both", SHORT, "full", 17)) == [2, 2]
    said = runs.said("both").read_text()
    assert "error: " in said and "Traceback" not in said + runs.said("both_1").read_text()
    assert codes(runs.start_two("both", SHORT)) == [0, 0]


def test_where_no_checkpoint_is_whole_both_processes_end(runs, whole):
    assert runs.run("none", ("steps=2", *SHORT[1:])) == 0
    (runs.root / "none" / "checkpoints" / "step_00000002" / "checkpoint.json").unlink()
    assert codes(runs.start_two("none", SHORT)) == [2, 2]
    assert "no checkpoint is whole" in runs.said("none").read_text()
