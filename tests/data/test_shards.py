"""A shard is complete or absent: however a process ends, the folder that is finished later is the same to the byte."""

import contextlib
import errno
import hashlib
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from dmd_dar.data import shards
from dmd_dar.data.batches import Batches
from dmd_dar.data.shards import MANIFEST, Form, Layout, ShardFolder, Shards, fill, shard_name
from dmd_dar.errors import DamagedFileError, UserError

TENSORS = {"states": Form("F32", (3, 2, 2)), "ends": Form("F64", (2,)), "cond": Form("I64", ())}
FORK = multiprocessing.get_context("fork")


def layout(n: int = 7, shard_size: int = 3, **content: object) -> Layout:
    return Layout({"seed": 0, "rungs": (1.0, 0.3), **content}, n, shard_size, TENSORS)


def make(first: int, stop: int) -> dict[str, torch.Tensor]:
    samples = torch.arange(first, stop)
    states = (samples[:, None] + torch.arange(12) / 100).reshape(-1, 3, 2, 2)
    return {"states": states, "ends": torch.stack([samples.double(), -samples.double()], 1), "cond": samples % 4}


def run(path: Path, wanted: Layout | None = None, **options: object) -> bool:
    with ShardFolder(path, wanted or layout()) as folder:
        batches = Batches(options.pop("make", make), options.pop("size", folder.layout.shard_size))
        return fill(folder, batches, stopped=options.pop("stopped", lambda: False), **options)


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("shards") / "whole"
    assert run(path)
    return path


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def listed_shards_are_whole(path: Path) -> int:
    if not (path / MANIFEST).exists():
        return 0
    listed = json.loads((path / MANIFEST).read_text())["shards"]
    for entry in listed:
        assert hashlib.sha256((path / entry["file"]).read_bytes()).hexdigest() == entry["sha256"]
    return len(listed)


@pytest.mark.parametrize("shard_size", [1, 3, 7, 100])
def test_rows_are_the_samples_in_any_order(tmp_path, shard_size):
    run(tmp_path, layout(shard_size=shard_size))
    held, truth = Shards(tmp_path), make(0, 7)
    index = torch.tensor([6, 0, 3, 3, 2, 5])
    assert len(held) == 7 and len(held.shards) == -(-7 // shard_size)
    for name, form in TENSORS.items():
        rows = held.rows(name, index)
        assert torch.equal(rows, truth[name][index]) and rows.shape == (6, *form.shape)
    assert torch.equal(held.rows("states", index, 2), truth["states"][index, 2])
    assert torch.equal(held.rows("ends", index, 1), -index.double())
    for outside in (-1, 7):
        with pytest.raises(IndexError, match=f"sample {outside}"):
            held.rows("cond", torch.tensor([0, outside]))


def test_only_the_shards_that_are_asked_for_are_read(copy):
    (copy / shard_name(1)).write_bytes(bytes(len((copy / shard_name(1)).read_bytes())))
    held = Shards(copy)
    assert held.rows("cond", torch.tensor([0, 6])).tolist() == [0, 2]
    with pytest.raises(DamagedFileError, match=f"{shard_name(1)} is damaged.*delete it and run"):
        held.rows("cond", torch.tensor([0, 4]))


def killed_at(path: Path, call: int, before: bool) -> bool:
    """Whether a process that fills `path` was killed just before or after its `call`-th fsync or rename."""

    def dying() -> None:
        calls = 0

        def counted(function: Callable) -> Callable:
            def wrapped(*args):
                nonlocal calls
                calls += 1
                if before and calls == call:
                    os.kill(os.getpid(), signal.SIGKILL)
                function(*args)
                if calls == call:
                    os.kill(os.getpid(), signal.SIGKILL)

            return wrapped

        os.fsync, os.replace = counted(os.fsync), counted(os.replace)
        run(path)

    process = FORK.Process(target=dying)
    process.start()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


@pytest.mark.parametrize("before", [True, False])
def test_killed_at_every_write_the_same_command_ends_in_the_same_bytes(whole, tmp_path, before):
    call, seen = 1, []
    while killed_at(path := tmp_path / str(call), call, before):
        seen.append(listed_shards_are_whole(path))
        run(path)
        assert contents(path) == contents(whole)
        call += 1
    assert call - 1 == 3 * (1 + 2 * 3)  # file, rename, folder: the first manifest, then each shard and its manifest
    assert seen == sorted(seen) and set(seen) == {0, 1, 2, 3}


def test_processes_share_the_shards_and_make_each_once(tmp_path):
    wanted, many = layout(n=60), 3

    def logged(rank: int) -> None:
        def making(first: int, stop: int) -> dict[str, torch.Tensor]:
            with open(tmp_path / "log", "a") as log:
                log.write(f"{rank} {first}\n")
            time.sleep(0.005)
            return make(first, stop)

        assert run(tmp_path / "shared", wanted, make=making, rank=rank % 2, processes=2)  # two of them collide

    processes = [FORK.Process(target=logged, args=(rank,)) for rank in range(many)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * many
    lines = [line.split() for line in (tmp_path / "log").read_text().splitlines()]
    assert sorted(int(first) for _, first in lines) == list(range(0, 60, 3)) and len({rank for rank, _ in lines}) > 1
    run(tmp_path / "alone", wanted)
    assert contents(tmp_path / "shared") == contents(tmp_path / "alone")


def test_a_shard_whose_process_was_killed_is_taken_over(whole, tmp_path):
    path, began = tmp_path / "folder", FORK.Event()

    def hanging(first: int, stop: int) -> dict[str, torch.Tensor]:
        began.set()
        time.sleep(60)
        raise AssertionError

    hung = FORK.Process(target=run, args=(path,), kwargs={"make": hanging})
    hung.start()
    assert began.wait(10)
    asked = []

    def wait_a_while() -> bool:  # shards 1 and 2 are made meanwhile; 0 cannot be had
        asked.append(len(os.listdir(path)))
        return len(asked) > 4

    assert not run(path, stopped=wait_a_while)
    assert [entry["first"] for entry in json.loads((path / MANIFEST).read_text())["shards"]] == [3, 6]
    hung.kill()
    hung.join()
    assert run(path) and contents(path) == contents(whole)


def test_stopped_between_shards_and_continued(whole, tmp_path):
    made = []

    def counting(first: int, stop: int) -> dict[str, torch.Tensor]:
        made.append(first)
        return make(first, stop)

    heard = []
    assert not run(tmp_path, make=counting, stopped=lambda: len(made) == 2, report=heard.append)
    with pytest.raises(UserError, match="not complete .2 of 3 shards"):
        Shards(tmp_path)
    assert run(tmp_path, make=counting, report=heard.append, rank=1, processes=4)
    assert made == [0, 3, 6] and heard == [3, 6, 7] and contents(tmp_path) == contents(whole)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (layout(seed=1), "seed: 0 -> 1"),
        (layout(rungs=(1.0, 0.301)), "rungs: [1.0, 0.3] -> [1.0, 0.301]"),
        (layout(guidance=2.0), 'guidance: "(absent)" -> 2.0'),
        (layout(n=8), "n: 7 -> 8"),
        (layout(shard_size=2), "shard_size: 3 -> 2"),
        (Layout(layout().content, 7, 3, {**TENSORS, "ends": Form("F32", (2,))}), "tensors: "),
    ],
)
def test_a_folder_of_other_samples_is_refused_and_left_alone(copy, whole, other, said):
    with pytest.raises(UserError) as refused:
        ShardFolder(copy, other)
    assert said in str(refused.value) and "Use another folder" in str(refused.value) and str(copy) in str(refused.value)
    assert str(refused.value).count(" -> ") == 1 and contents(copy) == contents(whole)


def test_shards_without_their_manifest_are_not_written_over(copy):
    (copy / MANIFEST).unlink()
    before = contents(copy)
    with pytest.raises(UserError, match="holds shards but no manifest.json"):
        ShardFolder(copy, layout())
    with pytest.raises(UserError, match="manifest.json cannot be read"):
        Shards(copy)
    assert contents(copy) == before


def edited(path: Path, edit: Callable[[dict], None]) -> None:
    values = json.loads((path / MANIFEST).read_text())
    edit(values)
    (path / MANIFEST).write_text(json.dumps(values))


def shard(index: int, **changes: object) -> Callable[[dict], None]:
    return lambda values: values["shards"][index].update(changes)


@pytest.mark.parametrize(
    "edit",
    [
        shard(0, file="../shard_000000.safetensors"),
        shard(0, file="/etc/passwd"),
        shard(0, file="./shard_000000.safetensors"),
        shard(0, file="folder/shard_000000.safetensors"),
        shard(0, file=shard_name(1)),
        shard(0, file=["shard_000000.safetensors"]),
        shard(0, file=""),
        shard(0, sha256=7),
        shard(0, bytes=-1),
        shard(1, first=2),
        shard(1, first=0, stop=3, file=shard_name(0)),
        shard(2, stop=9),
        shard(2, first=9, stop=12, file=shard_name(3)),
        lambda values: values.update(n=True),
        lambda values: values.update(n=-7),
        lambda values: values.update(n=4),
        lambda values: values.update(shard_size=0),
        lambda values: values.update(format=2),
        lambda values: values.update(shards={"a": 1}),
        lambda values: values.update(shards=[7]),
        lambda values: values.update(tensors={}),
        lambda values: values["tensors"]["cond"].update(dtype="O"),
        lambda values: values["tensors"]["cond"].update(dtype=["F32"]),
        lambda values: values["tensors"]["ends"].update(shape=[-2]),
        lambda values: values["tensors"]["ends"].update(shape=2),
        lambda values: values.update(content=[]),
        lambda values: values.pop("content"),
        lambda values: values.pop("format"),
    ],
)
def test_a_manifest_that_leads_elsewhere_or_contradicts_itself_is_refused(copy, edit):
    edited(copy, edit)
    for read in (Shards, lambda path: ShardFolder(path, layout())):
        with pytest.raises(DamagedFileError, match="manifest.json .*restore it, or make the folder anew"):
            read(copy)


@pytest.mark.parametrize("text", ["", "7", "[]", "{", "null", '"format"', "[" * 100_000, b"\xff\xfe"])
def test_a_manifest_that_is_none_is_refused(copy, text):
    (copy / MANIFEST).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DamagedFileError, match="manifest.json is not a manifest"):
        Shards(copy)


def test_a_link_out_of_the_folder_is_refused_whatever_it_leads_to(copy, whole):
    (copy / shard_name(1)).unlink()
    (copy / shard_name(1)).symlink_to(whole / shard_name(1))
    with pytest.raises(DamagedFileError, match=f"{shard_name(1)} is a link out of its folder"):
        Shards(copy)


@pytest.mark.parametrize("damage", ["gone", "short", "bit"])
def test_a_damaged_shard_is_named_and_made_anew(copy, whole, damage):
    path = copy / shard_name(2)
    file = path.read_bytes()
    path.unlink()
    if damage != "gone":
        path.write_bytes(file[:-1] if damage == "short" else file[:-1] + bytes([file[-1] ^ 1]))
    with pytest.raises(DamagedFileError, match=f"{path}.*anew"):
        Shards(copy).rows("cond", torch.tensor([6]))
    if damage == "bit":
        path.unlink()
    assert run(copy) and contents(copy) == contents(whole)


@pytest.mark.parametrize(
    ("file", "said"),
    [
        (pickle.dumps({"cond": [1]}), "cannot be read"),
        (save({"cond": torch.zeros(1, dtype=torch.int64)}), "does not hold the tensors"),
        (save({**make(6, 7), "ends": torch.zeros(1, 2)}), "does not hold the tensors"),
        (save({**make(6, 7), "more": torch.zeros(1)}), "does not hold the tensors"),
        (save(make(5, 7)), "does not hold the tensors"),
    ],
)
def test_a_shard_of_another_form_is_refused_although_its_hash_fits(copy, file, said):
    (copy / shard_name(2)).write_bytes(file)
    edited(copy, shard(2, sha256=hashlib.sha256(file).hexdigest(), bytes=len(file)))
    with pytest.raises(DamagedFileError, match=f"{shard_name(2)} {said}"):
        Shards(copy).rows("cond", torch.tensor([6]))


@pytest.mark.parametrize("call", range(1, 15))
def test_a_full_disk_leaves_what_is_complete(whole, tmp_path, call, monkeypatch):
    calls, sync = 0, os.fsync

    def full(handle: int) -> None:
        nonlocal calls
        calls += 1
        if calls == call:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match="No space left on device while .*free some space") as said:
            run(tmp_path)
    assert str(tmp_path) in str(said.value)
    assert listed_shards_are_whole(tmp_path) == max(0, (call - 2) // 4)
    assert run(tmp_path) and contents(tmp_path) == contents(whole)


def test_a_disk_without_room_is_refused_before_the_work(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    with ShardFolder(tmp_path, layout()) as folder:
        folder.require_space()
        need = sum(layout().bytes(index) for index in range(3))
        for free, refused in ((need, False), (need - 1, True)):
            monkeypatch.setattr(shards.shutil, "disk_usage", lambda path, free=free: usage._replace(free=free))
            with pytest.raises(UserError, match="MB more") if refused else contextlib.nullcontext():
                folder.require_space()
        folder.write(0, make(0, 3))
        folder.require_space()
        assert (tmp_path / shard_name(0)).stat().st_size <= layout().bytes(0)


@pytest.mark.parametrize(
    "wrong", [{"ends": torch.zeros(3, 2)}, {"cond": torch.zeros(2).long()}, {"states": torch.zeros(3, 3, 2)}]
)
def test_tensors_of_another_form_are_not_written(tmp_path, wrong):
    with ShardFolder(tmp_path, layout()) as folder, pytest.raises(ValueError, match=f"{next(iter(wrong))} of shard 0"):
        folder.write(0, {**make(0, 3), **wrong})
    assert not list(tmp_path.glob("shard_*"))
