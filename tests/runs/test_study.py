"""The search of runs/study.py: which settings each arm gets, and which is taken."""

import pytest

from dmd_dar.models.saved import ModelCard, save_network
from runs import study
from tests.tiny import tiny_sit


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


def test_a_seed_without_a_finished_run_is_left_out_of_every_arm(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(study, "ROOT", tmp_path)
    for arm in study.ARMS:
        for seed in study.SEEDS:
            if (arm, seed) != ("dar", 13):
                save_network(tmp_path / study.place(arm, seed) / "student", tiny_sit(), ModelCard())
    assert study.complete() == [11, 12, 14, 15, 16, 17, 18]
    assert "seeds [13] are left out of every arm" in caplog.text
