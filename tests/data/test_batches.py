"""Batches are full whatever the size of a shard, and the same whoever makes them."""

import os
from pathlib import Path

import pytest
import torch

from dmd_dar.data.batches import Batches
from dmd_dar.data.shards import ShardFolder, fill
from tests.data.test_shards import FORK, contents, layout, make


class Noting(Batches):
    """Remembers the batches that were made; with `tells` a sample says which it was made in."""

    def __init__(self, size: int, tells: bool = False):
        self.made: list[tuple[int, int]] = []

        def noting(first: int, stop: int) -> dict[str, torch.Tensor]:
            self.made.append((first, stop))
            rows = make(first, stop)
            return {**rows, "states": rows["states"] + 100.0 * first} if tells else rows

        super().__init__(noting, size)


def run(path: Path, batches: Batches, n: int, shard_size: int, **options) -> bool:
    with ShardFolder(path, layout(n, shard_size)) as folder:
        return fill(folder, batches, stopped=options.pop("stopped", lambda: False), **options)


@pytest.mark.parametrize(
    ("size", "shard_size", "expected"),
    [
        (3, 3, [(0, 3), (3, 6), (6, 9), (9, 12), (12, 14)]),
        (1, 7, [(i, i + 1) for i in range(14)]),
        (6, 3, [(0, 6), (6, 12), (12, 14)]),  # a batch of two shards
        (100, 3, [(0, 14)]),  # of all that there are
        (7, 3, [(0, 7), (7, 14)]),  # across the edges of shards
        (4, 6, [(0, 4), (4, 8), (8, 12), (12, 14)]),
        (9, 10, [(0, 9), (9, 10), (10, 14)]),  # full ones would take more shards than MOST
        (11, 5, [(0, 10), (10, 14)]),  # so would these
    ],
)
def test_batches_are_full_and_no_sample_is_made_twice(tmp_path, size, shard_size, expected):
    batches = Noting(size)
    assert run(tmp_path / "many", batches, 14, shard_size) and batches.made == expected
    run(tmp_path / "each", Batches(make, 1), 14, shard_size)
    assert contents(tmp_path / "many") == contents(tmp_path / "each")


def test_a_stop_keeps_what_is_made(tmp_path):
    batches = Noting(6)
    assert not run(tmp_path, batches, 14, 3, stopped=lambda: bool(batches.made))
    assert batches.made == [(0, 6)] and len([name for name in contents(tmp_path) if name.startswith("shard")]) == 2


@pytest.mark.parametrize(("size", "shard_size"), [(4, 3), (6, 3), (4, 6), (9, 10)])
def test_a_sample_is_of_the_same_batch_whoever_makes_it_and_whatever_is_there(tmp_path, size, shard_size):
    run(tmp_path / "whole", Noting(size, tells=True), 31, shard_size)
    whole = contents(tmp_path / "whole")
    shards = [name for name in whole if name.startswith("shard")]
    for number, gone in enumerate(shards):
        (tmp_path / "whole" / gone).unlink()
        again = Noting(size, tells=True)
        run(tmp_path / "whole", again, 31, shard_size, rank=number, processes=3)
        assert contents(tmp_path / "whole") == whole and len(again.made) <= -(-shard_size // size) + 1
    batches = Noting(size, tells=True)
    asked = iter([False, False, True])
    assert not run(tmp_path / "parts", batches, 31, shard_size, stopped=lambda: next(asked), rank=1, processes=2)
    assert sum(name.startswith("shard") for name in contents(tmp_path / "parts")) == 2
    assert run(tmp_path / "parts", Noting(size, tells=True), 31, shard_size) and contents(tmp_path / "parts") == whole


def test_a_group_of_which_another_process_makes_a_shard_is_left_to_it(tmp_path):
    def other() -> None:
        folder = ShardFolder(tmp_path, layout(12, 3))
        with folder.claim(range(1, 3)) as some, folder.claim(range(2, 4)) as free:
            os._exit(0 if (some, free) == ([], [2, 3]) else 1)

    with ShardFolder(tmp_path, layout(12, 3)) as folder, folder.claim(range(2)) as mine:
        assert mine == [0, 1]
        process = FORK.Process(target=other)
        process.start()
        process.join()
        assert process.exitcode == 0
        folder.write(0, make(0, 3))
    with ShardFolder(tmp_path, layout(12, 3)) as folder, folder.claim(range(2)) as mine:
        assert mine == [1]
