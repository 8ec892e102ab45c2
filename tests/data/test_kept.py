"""What is made once is found again under all that decides it, and nothing else is taken for it."""

import threading

import pytest
import torch
from safetensors.torch import save_file

from dmd_dar.data.kept import Kept

CPU = torch.device("cpu")
MADE = {"x": torch.arange(6.0).reshape(2, 3), "y": torch.tensor(float("nan"), dtype=torch.float64)}


def test_tensors_are_found_again_bit_for_bit(tmp_path):
    kept = Kept.of(tmp_path / "cache", CPU, {"teacher": "a"})
    assert kept.find() is None
    kept.keep(MADE)
    found = Kept.of(tmp_path / "cache", CPU, {"teacher": "a"}).find()
    assert found is not None and torch.equal(found["x"], MADE["x"]) and found["y"].isnan()
    assert found["y"].dtype == torch.float64 and [path.name for path in kept.folder.iterdir()] == [kept.path.name]


@pytest.mark.parametrize("change", ["teacher", "device", "code", "torch"])
def test_whatever_decides_the_values_changes_the_name(tmp_path, monkeypatch, change):
    before = Kept.of(tmp_path, CPU, {"teacher": "a"})
    before.keep(MADE)
    if change == "code":
        monkeypatch.setattr("dmd_dar.data.kept.code_digest", lambda: "other")
    if change == "torch":
        monkeypatch.setattr(torch, "__version__", "0.0")
    device = torch.device("cuda") if change == "device" else CPU
    after = Kept.of(tmp_path, device, {"teacher": "b" if change == "teacher" else "a"})
    assert after.path != before.path and after.find() is None


@pytest.mark.parametrize("fault", ["cut", "foreign", "bare", "folder"])
def test_a_file_that_is_not_what_its_name_says_is_told_and_made_anew(tmp_path, caplog, fault):
    kept, other = (Kept.of(tmp_path, CPU, {"teacher": name}) for name in "ab")
    kept.keep(MADE)
    if fault == "cut":
        kept.path.write_bytes(kept.path.read_bytes()[:-5])
    if fault == "foreign":
        other.keep({"x": MADE["x"] + 1})
        other.path.replace(kept.path)
    if fault == "bare":
        save_file({"x": MADE["x"] + 1}, kept.path)
    if fault == "folder":
        kept.path.unlink()
        kept.path.mkdir()
    assert kept.find() is None and f"{kept.path} " in caplog.text and "it is made anew" in caplog.text
    kept.keep(MADE)
    if fault == "folder":
        assert "is not kept" in caplog.text
    else:
        found = kept.find()
        assert found is not None and torch.equal(found["x"], MADE["x"])


def test_several_at_once_find_all_or_nothing(tmp_path):
    kept, broken = Kept.of(tmp_path, CPU, {"teacher": "a"}), []
    large = {"x": torch.arange(1 << 18)}

    def work() -> None:
        for _ in range(5):
            found = kept.find()
            if found is not None and not torch.equal(found["x"], large["x"]):
                broken.append(found)
            kept.keep(large)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not broken and [path.name for path in tmp_path.iterdir()] == [kept.path.name]
