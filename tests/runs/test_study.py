"""The search of runs/study.py: which settings each arm gets, and which is taken."""

import pytest

from runs import study


def test_every_arm_is_searched_as_long_as_the_others():
    for arm in study.ARMS:
        first = [study.Setting(arm, lr, study.ROUTERS_FIRST) for lr in study.BACKBONE]
        further = study.more(first[1])
        assert len({*first, *further}) == 5
    assert [one.lr for one in study.more(study.Setting("residual", 3e-4, 2e-3))] == [2e-4, 4.5e-4]
    assert [one.routers for one in study.more(study.Setting("dar", 6e-4, 2e-3))] == [5e-4, 8e-3]


def test_the_least_distance_is_taken_within_an_arm():
    found = {study.Setting(arm, lr, 2e-3): lr + (arm == "dar") for arm in ("residual", "dar") for lr in (3e-4, 1.5e-4)}
    assert study.best_of(found, "dar") == study.Setting("dar", 1.5e-4, 2e-3)


def test_students_on_the_way_lie_where_a_run_keeps_them():
    assert study.place("dar", 11).as_posix() == "out/study/dar_seed11"
    assert study.place("dar", 11, 200).as_posix() == "out/study/dar_seed11/student_step_00000200"


def test_a_command_that_fails_is_told_after_the_others_ended(tmp_path):
    done = tmp_path / "done"
    with pytest.raises(study.subprocess.CalledProcessError):
        study.run_all([["-c", "raise SystemExit(3)"], ["-c", f"open({str(done)!r}, 'w').close()"]], jobs=1)
    assert done.exists()
