"""Which of several processes failed first, and what the others are told."""

import time

import pytest

from dmd_dar.stop import StopRequest
from dmd_dar.train.processes import supervisor
from dmd_dar.train.processes.supervisor import Ending

HANGING = Ending(lambda rank: None, grace=0.05)


class Mortal:
    """A process that is seen alive a few times, and ends with a code."""

    sentinel = 0

    def __init__(self, code: int, looks: int):
        self.code, self.looks = code, looks

    def is_alive(self) -> bool:
        self.looks -= 1
        return self.looks >= 0

    @property
    def exitcode(self) -> int | None:
        return None if self.looks >= 0 else self.code

    def kill(self) -> None:
        self.code, self.looks = -9, 0


@pytest.mark.parametrize(
    ("ends", "first"),
    [
        ([(2, 1), (-9, 3)], 1),  # the other saw its peer's connection close before the system had buried it
        ([(-9, 3), (2, 1)], 0),
        ([(2, 1), (0, 3)], 0),
        ([(0, 1), (0, 3)], None),
        ([(2, 1), (0, 10**9)], 0),  # killed here
    ],
)
def test_who_ended_first(monkeypatch, ends, first):
    monkeypatch.setattr(supervisor, "wait", lambda *_: time.sleep(0.001))
    assert supervisor.watch([Mortal(*end) for end in ends], StopRequest(), HANGING) == first


class Quick:
    """A process that has ended by the second time it is asked."""

    pid, sentinel = 0, 0

    def __init__(self, code: int):
        self.code, self.exitcode = code, None
        self.answers = iter([True, False])

    def is_alive(self) -> bool:
        alive = next(self.answers)
        self.exitcode = None if alive else self.code
        return alive


@pytest.mark.parametrize("codes, failed", [((2, 2), 0), ((0, 2), 1), ((0, 0), None)])
def test_processes_that_end_between_two_looks_are_seen_to_have_failed(monkeypatch, codes, failed):
    monkeypatch.setattr(supervisor, "wait", lambda sentinels, timeout: None)
    assert supervisor.watch([Quick(code) for code in codes], StopRequest(), HANGING) == failed


@pytest.mark.parametrize(("grace", "told"), [(None, [1, 2]), (60.0, [])])
def test_independent_processes_are_asked_to_stop_once_one_has_failed(monkeypatch, grace, told):
    monkeypatch.setattr(supervisor, "wait", lambda *_: None)
    asked: list[int] = []
    team = [Mortal(2, 1), Mortal(0, 4), Mortal(0, 4)]
    assert supervisor.watch(team, StopRequest(), Ending(asked.append, grace)) == 0
    assert asked == told


def test_a_stop_is_passed_on_once_and_every_look_is_reported(monkeypatch):
    monkeypatch.setattr(supervisor, "wait", lambda *_: None)
    asked: list[int] = []
    looks: list[None] = []
    stop = StopRequest()
    stop.asked = True
    assert (
        supervisor.watch([Mortal(0, 3), Mortal(0, 2)], stop, Ending(asked.append), lambda: looks.append(None)) is None
    )
    assert asked == [0, 1] and len(looks) == 3
