"""A checkpoint is whole or absent, and its hashes tell what something else has harmed."""

import errno
import json
import os
import resource
from pathlib import Path

import pytest
import torch

from dmd_dar import atomic
from dmd_dar.errors import DamagedFileError, UserError
from dmd_dar.train.disk import checkpoint
from dmd_dar.train.disk.checkpoint import CheckpointConfig

TWO = CheckpointConfig(every=1, keep_last=2)


def state_of(step: int) -> dict:
    x = torch.arange(6.0).reshape(2, 3) + step
    return {"a": {"x": x, "half": x.bfloat16(), "n": step, "betas": (0.9, 0.999)}, "b": {0: torch.tensor([step])}}


def save(root: Path, *steps: int, config: CheckpointConfig = TWO, **more) -> None:
    for step in steps:
        checkpoint.save(root, step, state_of(step), config, **more)


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def spoil(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("mapped", [False, True])
def test_what_is_loaded_is_what_was_saved(tmp_path, mapped):
    save(tmp_path, 7, identity={"teacher": "t"}, score=0.25)
    assert checkpoint.newest_whole(tmp_path) == 7
    manifest = checkpoint.read_manifest(tmp_path, 7)
    assert (manifest["step"], manifest["identity"], manifest["score"]) == (7, {"teacher": "t"}, 0.25)
    held, given = checkpoint.load(tmp_path, 7, mapped=mapped), state_of(7)
    assert held["a"].keys() == given["a"].keys() and held["a"]["n"] == 7 and held["a"]["betas"] == (0.9, 0.999)
    for ours, theirs in zip(
        (held["a"]["x"], held["a"]["half"], held["b"][0]),
        (given["a"]["x"], given["a"]["half"], given["b"][0]),
        strict=True,
    ):
        assert torch.equal(ours, theirs) and ours.dtype == theirs.dtype


def test_the_size_is_that_of_the_file_and_shared_memory_counts_once(tmp_path):
    x = torch.zeros(250_000)
    state = {"a": x, "again": x, "view": {"part": [x[5:9]]}, "b": torch.zeros(1000, dtype=torch.float64)}
    checkpoint.save(tmp_path, 1, state, TWO)
    assert checkpoint.size(state) == 1_008_000
    assert 1_008_000 < (tmp_path / "step_00000001" / "state.pt").stat().st_size < 1_008_000 + checkpoint.OVERHEAD / 100


def test_pruning_keeps_the_newest_the_multiples_and_the_best(tmp_path):
    config = CheckpointConfig(every=1, keep_last=2, keep_every=4)
    scores = {3: 2.0, 5: 1.0, 7: 1.0, 9: 1.5, 10: float("nan")}
    kept = {}
    for step in range(1, 12):
        save(tmp_path, step, config=config, score=scores.get(step))
        kept[step] = (checkpoint.steps_saved(tmp_path), checkpoint.best(tmp_path))
    assert kept[3] == ([2, 3], 3) and kept[4] == ([3, 4], 3)
    assert kept[6] == ([4, 5, 6], 5)  # 3 was the best until 5 came
    assert kept[11] == ([4, 5, 8, 10, 11], 5)  # of equals the first, and nothing is better than NaN
    assert names(tmp_path) == [f"step_{step:08d}" for step in (4, 5, 8, 10, 11)]


def test_multiples_that_are_never_saved_are_refused():
    with pytest.raises(ValueError, match="keep_every 150 must be a multiple of every, 100"):
        CheckpointConfig(every=100, keep_every=150)


def flip(folder: Path) -> None:
    spoil(folder / "state.pt")


def cut(folder: Path) -> None:
    os.truncate(folder / "state.pt", 100)


def lose(folder: Path) -> None:
    (folder / "state.pt").unlink()


def unlisted(folder: Path) -> None:
    (folder / "checkpoint.json").unlink()


def garbled(folder: Path) -> None:
    (folder / "checkpoint.json").write_text('{"format": 1, "step"')


def described(folder: Path, **changes) -> None:
    path = folder / "checkpoint.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def older(folder: Path) -> None:
    described(folder, format=0)


def elsewhere(folder: Path) -> None:
    described(folder, files={"state.pt": {"bytes": 1, "sha256": ""}, "../../secret": {"bytes": 1, "sha256": ""}})


def linked(folder: Path, name: str = "state.pt") -> Path:
    """As stores of large files leave one; its content elsewhere."""
    outside = folder.parent.parent / f"stored_{name}"
    (folder / name).rename(outside)
    (folder / name).symlink_to(outside)
    return outside


def flip_linked(folder: Path) -> None:
    spoil(linked(folder))


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (flip, "the SHA-256 of state.pt"),
        (cut, "state.pt has 100 bytes, not"),
        (lose, "state.pt: No such file"),
        (unlisted, "checkpoint.json: No such file"),
        (garbled, "is damaged: Expecting"),
        (older, "not of format 1"),
        (flip_linked, "the SHA-256 of state.pt"),
    ],
)
def test_a_damaged_checkpoint_is_told_in_one_line_and_the_one_before_it_is_used(tmp_path, harm, said, capsys):
    root = tmp_path / "checkpoints"
    root.mkdir()
    save(root, 2, 4)
    harm(root / "step_00000004")
    assert checkpoint.newest_whole(root) == 2
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1 and said in told[0]
    assert "set aside as damaged_00000004, continuing from step 2" in told[0]
    assert names(root) == ["damaged_00000004", "step_00000002"]
    assert checkpoint.newest_whole(root) == 2 and capsys.readouterr().err == ""
    save(root, 3, 4)
    assert names(root) == ["damaged_00000004", "step_00000003", "step_00000004"]


@pytest.mark.parametrize("name", ["state.pt", "checkpoint.json", "step_00000004"])
def test_a_link_to_what_is_stored_elsewhere_is_followed_or_its_content_asked_for(tmp_path, name):
    root = tmp_path / "run" / "checkpoints"
    root.mkdir(parents=True)
    save(root, 2, 4)
    outside = linked(root if name.startswith("step") else root / "step_00000004", name)
    assert checkpoint.newest_whole(root) == 4
    for mapped in (False, True):
        assert torch.equal(checkpoint.load(root, 4, mapped=mapped)["a"]["x"], state_of(4)["a"]["x"])
    outside.rename(tmp_path / "gone")
    with pytest.raises(UserError, match=f"{name}' is a link to .*, which is not on this machine: fetch it") as told:
        checkpoint.newest_whole(root)
    assert "remove" not in str(told.value) and "damaged" not in str(told.value)
    assert names(root) == ["step_00000002", "step_00000004"]
    (tmp_path / "gone").rename(outside)
    assert checkpoint.newest_whole(root) == 4
    save(root, 5, 6)
    assert names(root) == ["step_00000005", "step_00000006"] and outside.exists()


def test_the_best_checkpoint_whose_content_is_elsewhere_is_left_out(tmp_path, capsys):
    root = tmp_path / "run" / "checkpoints"
    root.mkdir(parents=True)
    save(root, 2, score=1.0)
    linked(root / "step_00000002").unlink()
    assert checkpoint.best_whole(root) is None and "not on this machine" in capsys.readouterr().err


def test_a_name_that_leaves_the_folder_is_refused_unread(tmp_path):
    root = tmp_path / "checkpoints"
    root.mkdir()
    (tmp_path / "secret").write_text("s")
    save(root, 4)
    size = (root / "step_00000004" / "state.pt").stat().st_size
    sha256 = json.loads((root / "step_00000004" / "checkpoint.json").read_text())["files"]["state.pt"]["sha256"]
    for name in ("../../secret", "/etc/hostname", "..", "a/../state.pt"):
        described(
            root / "step_00000004",
            files={"state.pt": {"bytes": size, "sha256": sha256}, name: {"bytes": 1, "sha256": ""}},
        )
        with pytest.raises(DamagedFileError, match="not a file in its own folder"):
            checkpoint.read_manifest(root, 4)


def test_where_none_is_whole_all_stay_and_the_remedy_is_named(tmp_path):
    save(tmp_path, 2, 4)
    for step in (2, 4):
        flip(tmp_path / f"step_{step:08d}")
    with pytest.raises(DamagedFileError, match="no checkpoint is whole: .*00004.*00002.*restore one from a copy, or"):
        checkpoint.newest_whole(tmp_path)
    assert names(tmp_path) == ["step_00000002", "step_00000004"]


def test_no_checkpoint_is_a_fresh_start(tmp_path):
    assert checkpoint.newest_whole(tmp_path / "absent") is None
    (tmp_path / "partial_00000003").mkdir()
    assert checkpoint.newest_whole(tmp_path) is None and names(tmp_path) == []


def test_loading_runs_no_code(tmp_path):
    class Trap:
        def __reduce__(self):
            return os.system, ("touch " + str(tmp_path / "ran"),)

    save(tmp_path, 1)
    torch.save({"a": Trap()}, tmp_path / "step_00000001" / "state.pt")
    with pytest.raises(DamagedFileError, match="cannot be read"):
        checkpoint.load(tmp_path, 1, mapped=False)
    assert not (tmp_path / "ran").exists()


def test_without_room_nothing_is_written_and_the_line_says_how_much_is_needed(tmp_path, monkeypatch):
    save(tmp_path, 2)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 500_000}))
    with pytest.raises(UserError) as caught:
        save(tmp_path, 4)
    assert "checkpoint of step 4 was not saved, it needs 1.0 MB, and 0.5 MB of the disk are free" in str(caught.value)
    assert "that of step 2 is whole: free some space (checkpoint.keep_last" in str(caught.value)
    assert names(tmp_path) == ["step_00000002"]


class Full:
    """A file on a disk with room for `room` more bytes."""

    def __init__(self, file, room: int):
        self.file, self.room = file, room

    def write(self, data) -> int:
        if memoryview(data).nbytes > self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.room -= memoryview(data).nbytes
        return self.file.write(data)

    def __getattr__(self, name):
        return getattr(self.file, name)


@pytest.mark.parametrize("room", [0, 300, 100_000])
def test_a_disk_that_fills_up_in_the_middle_of_a_save_leaves_the_old_one(tmp_path, monkeypatch, room):
    save(tmp_path, 2)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_Hashed", lambda file, hashed=checkpoint._Hashed: hashed(Full(file, room)))
        with pytest.raises(UserError) as caught:
            checkpoint.save(tmp_path, 4, {"a": torch.zeros(50_000), "b": torch.zeros(50_000)}, TWO)
    assert "No space left on device; that of step 2 is whole: free some space" in str(caught.value)
    assert names(tmp_path) == ["step_00000002"]
    save(tmp_path, 4)
    assert checkpoint.newest_whole(tmp_path) == 4


def test_the_kernel_refusing_to_write_leaves_the_old_one(tmp_path):
    save(tmp_path, 2)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(UserError, match="File too large; that of step 2 is whole: mend that"):
            checkpoint.save(tmp_path, 4, {"a": torch.zeros(50_000)}, TWO)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names(tmp_path) == ["step_00000002"]


def test_all_is_on_the_disk_before_the_name_is(tmp_path, monkeypatch):
    order = []
    monkeypatch.setattr(atomic, "reached", order.append)
    save(tmp_path, 1)
    save(tmp_path, 2, config=CheckpointConfig(every=1, keep_last=1))
    written = ["file written", "file synced"] * 2 + ["folder synced", "checkpoint renamed", "folder synced"]
    pruned = ["checkpoint withdrawn", "checkpoint pruned"]
    assert order == [*written, "before prune", *written, "before prune", *pruned]


def test_a_step_is_saved_once(tmp_path):
    save(tmp_path, 4)
    with pytest.raises(UserError, match="step 4 was not saved, Directory not empty; that of step 4 is whole"):
        save(tmp_path, 4)
    assert checkpoint.newest_whole(tmp_path) == 4
