"""Where weights are looked for, that they are verified, and that what is missing says how to get it."""

import dataclasses
import hashlib
import json
import shutil

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

from dmd_dar.config import run_job
from dmd_dar.errors import DamagedFileError, MissingWeightsError
from eval.metrics import weight_files as weights
from eval.metrics.weight_files import (
    ALEXNET,
    INCEPTION,
    clip_weights,
    dinov2_weights,
    find,
    load_state,
    locate,
)
from eval.weights import WeightsConfig, show

REQUESTED = dataclasses.replace(ALEXNET, file="some.pth", sha256=hashlib.sha256(b"right").hexdigest()[:8])


@pytest.fixture
def places(tmp_path, monkeypatch):
    """(own folder, torch hub's cache, Hugging Face's), all empty."""
    own, hub, face = tmp_path / "own", tmp_path / "torch" / "hub" / "checkpoints", tmp_path / "face"
    for folder in (own, hub, face):
        folder.mkdir(parents=True)
    monkeypatch.setenv(weights.VARIABLE, str(own))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(face))
    return own, hub, face


def keep_in_hub_cache(face, repo, name, content):
    """As the Hugging Face hub lays files out: a link to a blob that is named by its hash."""
    folder = face / f"models--{repo.replace('/', '--')}"
    blob = folder / "blobs" / hashlib.sha256(content).hexdigest()
    snapshot = folder / "snapshots" / ("0" * 40)
    for made in (blob.parent, snapshot, folder / "refs"):
        made.mkdir(parents=True, exist_ok=True)
    blob.write_bytes(content)
    (folder / "refs" / "main").write_text("0" * 40)
    (snapshot / name).symlink_to(blob)
    return snapshot / name


def test_the_order_is_path_variable_cache_download(places, tmp_path, monkeypatch):
    own, hub, _ = places
    for folder in (own, hub, tmp_path):
        (folder / "some.pth").write_bytes(b"right")
    assert locate(REQUESTED, tmp_path / "some.pth").path == tmp_path / "some.pth"
    assert locate(REQUESTED, allow_download=True).path == own / "some.pth"
    (own / "some.pth").unlink()
    assert locate(REQUESTED, allow_download=True).path == hub / "some.pth"
    (hub / "some.pth").unlink()

    def fetch(url, target, hash_prefix):
        assert (url, hash_prefix) == (ALEXNET.url, REQUESTED.sha256)
        shutil.copy(tmp_path / "some.pth", target)

    monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
    with pytest.raises(MissingWeightsError):
        locate(REQUESTED)
    assert not (hub / "some.pth").exists(), "nothing is downloaded unasked"
    found = locate(REQUESTED, allow_download=True)
    assert found.path == hub / "some.pth" and found.verified
    assert found.sha256 == hashlib.sha256(b"right").hexdigest()


def test_what_is_missing_is_told_whole(places):
    with pytest.raises(MissingWeightsError) as error:
        locate(INCEPTION)
    parts = [INCEPTION.file, "mseitzer/pytorch-fid", "91 MB", "6726825d", str(places[0]), str(places[1])]
    parts += ["DMD_DAR_WEIGHTS_DIR", "allow_download", "fd_wavelet", "FID"]
    assert all(part in str(error.value) for part in parts) and "\n" not in str(error.value)


def test_a_download_that_fails_gives_its_reason(places, monkeypatch):
    def fetch(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
    with pytest.raises(MissingWeightsError, match="the download failed: no route to host"):
        locate(REQUESTED, allow_download=True)


def test_a_path_that_is_no_file_does_not_fall_back(places, tmp_path):
    (places[0] / "some.pth").write_bytes(b"right")
    with pytest.raises(MissingWeightsError, match="elsewhere.pth: no such file"):
        locate(REQUESTED, tmp_path / "elsewhere.pth")


def test_a_wrong_hash_is_refused(places):
    (places[0] / "some.pth").write_bytes(b"wrong")
    with pytest.raises(DamagedFileError, match=f"some.pth: sha256 .*, not {REQUESTED.sha256}"):
        locate(REQUESTED)


def test_torchvision_s_inception_is_refused_by_its_hash(places, monkeypatch, tmp_path):
    path = tmp_path / "inception_v3_google.pth"
    path.write_bytes(b"another network")
    monkeypatch.setattr(weights, "TORCHVISION_INCEPTION", (hashlib.sha256(b"another network").hexdigest()[:8],))
    with pytest.raises(DamagedFileError, match="is torchvision's Inception.*take pt_inception-2015-12-05"):
        locate(INCEPTION, path)


def test_the_same_inception_under_its_other_name_is_found(places):
    (places[1] / INCEPTION.other_names[0]).touch()
    assert find(INCEPTION) == places[1] / INCEPTION.other_names[0]


@pytest.mark.parametrize(
    ("wanted", "name"), [(dinov2_weights(), "model.safetensors"), (clip_weights(), "open_clip_pytorch_model.bin")]
)
def test_the_hugging_face_cache_is_read_and_verified(places, wanted, name):
    own, _, face = places
    kept = keep_in_hub_cache(face, wanted.repo, name, b"weights")
    assert locate(wanted) == weights.Found(kept, hashlib.sha256(b"weights").hexdigest(), True)
    (own / "model.safetensors").touch()
    assert locate(wanted).path == kept, "another model's file"
    kept.resolve().write_bytes(b"damaged")
    with pytest.raises(DamagedFileError):
        locate(wanted)
    mine = own / wanted.file
    mine.parent.mkdir(exist_ok=True)
    mine.write_bytes(b"mine")
    assert locate(wanted).path == mine and not locate(wanted).verified


class Trap:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was run",))


def test_only_plain_tensors_are_loaded(tmp_path):
    tensors = {"a": torch.arange(3.0)}
    torch.save(tensors, tmp_path / "a.pth")
    save_file(tensors, tmp_path / "a.safetensors")
    for name in ("a.pth", "a.safetensors"):
        assert torch.equal(load_state(tmp_path / name)["a"], tensors["a"])
    torch.save({"a": Trap()}, tmp_path / "trap.pth")
    torch.save({"a": 1}, tmp_path / "other.pth")
    (tmp_path / "cut.safetensors").write_bytes(b"\x10")
    for name in ("trap.pth", "other.pth", "cut.safetensors"):
        with pytest.raises(DamagedFileError, match=name):
            load_state(tmp_path / name)


def test_the_command_lists_every_file(places, capsys):
    own, hub, face = places
    (own / ALEXNET.file).write_bytes(b"damaged")
    (own / dinov2_weights().file).write_bytes(b"somebody's")
    show(WeightsConfig())
    table = capsys.readouterr().out
    lines = {line.split()[0]: line for line in reversed(table.splitlines()) if line}
    assert "missing" in lines[INCEPTION.file] and "FID" in lines[INCEPTION.file]
    assert "damaged" in lines[ALEXNET.file] and "present" in lines[dinov2_weights().file]
    assert all(str(folder) in table for folder in places)
    run_job(WeightsConfig, show, ["json=true"])
    rows = json.loads(capsys.readouterr().out)["weights"]
    assert [row["state"] for row in rows] == ["missing", "present", "missing", "damaged", "missing"]
    assert rows[3]["path"] == str(own / ALEXNET.file) and "7be5be79" in rows[3]["problem"]
    assert all(row["unlocks"] and row["instead"] and row["owner"] for row in rows)
