"""python -m dmd_dar.push: what it lists is what the hub is given, and whatever stops it is one line."""

import errno
import fcntl
import json
import os
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import yaml

from dmd_dar import push
from dmd_dar.models.saved import ModelCard
from dmd_dar.train.disk.export import export
from dmd_dar.train.disk.folder import FolderError, RunFolder
from tests.tiny import tiny_sit

REPO = "repo=me/few-steps"


@pytest.fixture
def student(tmp_path) -> Path:
    run = tmp_path / "run"
    run.mkdir()
    config = {"teacher": {"path": "facebook/DiT-XL-2-256"}, "card": {"license": "cc-by-nc-4.0"}, "steps": 7}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    export(run / "student", tiny_sit(), ModelCard(rungs=(1.0, 0.75), origin={"steps": 7}))
    return run / "student"


class Hub:
    """Stands in for HfApi: keeps what it is asked, and what upload_folder would have read."""

    def __init__(self, public: bool = False, refusal: Exception | None = None):
        self.public, self.refusal = public, refusal
        self.held: dict[str | None, list[str]] = {None: [".gitattributes"]}  # by revision
        self.calls: list[tuple] = []
        self.sent: dict[str, bytes] = {}

    def create_repo(self, repo, **given):
        self.calls.append(("create_repo", repo, given))
        return f"hub/{repo}"

    def model_info(self, repo, revision=None):
        names = self.held.get(revision, self.held[None])
        siblings = [{"rfilename": name} for name in names]
        return huggingface_hub.ModelInfo(id=repo, private=not self.public, siblings=siblings)

    def create_branch(self, repo, **given):
        self.calls.append(("create_branch", repo, given))

    def upload_folder(self, *, folder_path, **given):
        if self.refusal:
            raise self.refusal
        self.calls.append(("upload_folder", given))
        found = (path for path in Path(folder_path).glob("**/*") if path.is_file())
        self.sent = {path.relative_to(folder_path).as_posix(): path.read_bytes() for path in found}


@pytest.fixture
def hub(monkeypatch) -> Hub:
    made = Hub()
    monkeypatch.setattr(push, "HfApi", lambda: made)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_none")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    return made


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(capsys, *argv: str) -> str:
    with pytest.raises(SystemExit) as stop:
        push.main(list(argv))
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1 and said.startswith("error: ")
    return said


def test_the_whole_folder_is_sent_in_one_private_commit(student, hub, capsys):
    (student / ".README.md.x.tmp").write_text("of a write that was killed")
    (student / "feature_extractor").mkdir()
    (student / "feature_extractor" / "config.json").write_text("{}")
    push.main([f"student={student}", REPO])
    expected = {name: content for name, content in files_of(student).items() if not name.startswith(".")}
    assert hub.sent == expected and "transformer/model.safetensors" in expected
    commit = {"repo_id": "me/few-steps", "revision": None, "commit_message": "student after 7 steps, by dmd_dar"}
    commit["delete_patterns"] = ["adapter/*", "feature_extractor/*", "scheduler/*", "text_encoder*/*", "tokenizer*/*"]
    commit["delete_patterns"] += ["transformer/*", "vae/*"]
    created = ("create_repo", "me/few-steps", {"private": True, "exist_ok": True})
    assert hub.calls == [created, ("upload_folder", commit)]
    assert capsys.readouterr().out.splitlines()[-1] == f"{len(expected)} files at hub/me/few-steps"


def test_a_branch_a_message_and_everybody(student, hub):
    push.main([f"student={student}", REPO, "private=false", "revision=try", "message=second try"])
    assert hub.calls[0][2]["private"] is False
    assert hub.calls[1] == ("create_branch", "me/few-steps", {"branch": "try", "exist_ok": True})
    assert hub.calls[2][1]["revision"] == "try" and hub.calls[2][1]["commit_message"] == "second try"
    hub.calls.clear()
    push.main([f"student={student}", REPO, "revision=refs/pr/3"])
    assert [call[0] for call in hub.calls] == ["create_repo", "upload_folder"]


def test_a_dry_run_lists_names_sizes_and_card_without_token_or_network(student, monkeypatch, capsys):
    monkeypatch.setattr(push, "HfApi", None)
    monkeypatch.setattr(huggingface_hub, "get_token", None)
    push.main([f"student={student}", REPO, "--dry-run"])
    out = capsys.readouterr().out
    files = files_of(student)
    listed = dict(reversed(line[2:].split(" MB  ")) for line in out.splitlines() if " MB  " in line)
    total = listed.pop(f"in {len(files)} files")
    assert {name: float(size) for name, size in listed.items()} == {
        name: pytest.approx(len(content) / 1e6, abs=6e-4) for name, content in files.items()
    }
    assert float(total) == pytest.approx(sum(map(len, files.values())) / 1e6, abs=6e-4)
    for line in ("to me/few-steps, the default branch; private if it is made for this", "student after 7 steps"):
        assert f"# {line}\n" in out
    assert "# base_model: facebook/DiT-XL-2-256\n# license: cc-by-nc-4.0\n" in out


def test_what_lies_behind_links_is_sent_and_said(student, hub, tmp_path, capsys):
    base = tmp_path / "base" / "vae"
    base.mkdir(parents=True)
    (base / "config.json").write_text("{}")
    (student / "vae").symlink_to(base)
    weights = student / "transformer" / "model.safetensors"
    moved = shutil.move(weights, tmp_path / "weights")
    weights.symlink_to(moved)
    push.main([f"student={student}", REPO])
    assert (
        hub.sent["vae/config.json"] == b"{}" and hub.sent["transformer/model.safetensors"] == Path(moved).read_bytes()
    )
    out = capsys.readouterr().out
    assert f"vae/config.json  (a link; the content of {base / 'config.json'})\n" in out
    assert f"transformer/model.safetensors  (a link; the content of {moved})\n" in out and out.count("a link") == 2
    (base / "config.json").unlink()
    (base / "config.json").symlink_to("nowhere")
    assert f"{student}/vae/config.json is no file and leads to none" in refused(capsys, f"student={student}", REPO)


def test_what_is_no_whole_student_is_refused(student, hub, tmp_path, capsys):
    run = student.parent
    assert f"name {student}\n" in refused(capsys, f"student={run}", REPO)
    adapter = student / "adapter"
    adapter.mkdir()
    (adapter / "adapter.json").write_text("{}")
    assert f"it is an adapter, which is uploaded with its student: name {student}" in refused(
        capsys, f"student={adapter}", REPO
    )
    begun = tmp_path / "begun"
    (begun / "student").mkdir(parents=True)
    assert "name the folder that a run exported" in refused(capsys, f"student={begun / 'student'}", REPO)
    (begun / "checkpoints").mkdir()
    assert "its run has not finished" in refused(capsys, f"student={begun / 'student'}", REPO)
    config = json.loads((student / "transformer" / "config.json").read_text())
    (student / "transformer" / "config.json").write_text(json.dumps({**config, "mlp_ratio": 2.0}))
    assert "is not the network that denoiser.json was saved with" in refused(capsys, f"student={student}", REPO)
    assert hub.calls == []


def test_a_run_that_is_still_going_is_waited_for(student, hub, capsys):
    lock = os.open(student.parent / ".lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(lock, fcntl.LOCK_EX)
    assert "its run has not finished and may replace the folder" in refused(capsys, f"student={student}", REPO)
    os.close(lock)
    push.main([f"student={student}", REPO])
    assert hub.sent


def test_its_run_cannot_go_on_while_it_is_sent(student, hub, monkeypatch):
    config, lock = yaml.safe_load((student.parent / "config.yaml").read_text()), student.parent / ".lock"
    lock.touch()
    send, seen = push.send, []

    def sending(*given):
        with pytest.raises(FolderError, match="or its student is being pushed; wait for it"):
            RunFolder.claim(student.parent, config)
        seen.append(1)
        return send(*given)

    monkeypatch.setattr(push, "send", sending)
    push.main([f"student={student}", REPO])
    assert seen and hub.sent
    RunFolder.claim(student.parent, config).close()


def test_where_nothing_can_be_locked_a_line_warns(student, hub, monkeypatch, capsys):
    def failing(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    (student.parent / ".lock").touch()
    monkeypatch.setattr(fcntl, "flock", failing)
    push.main([f"student={student}", REPO])
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "cannot be locked (No locks available): see to it that no run" in said and hub.sent


@pytest.mark.parametrize("revision", [None, "try"])
def test_another_model_is_left_alone(student, hub, capsys, revision):
    hub.held[revision] = [".gitattributes", "README.md", "model_index.json", "vae/config.json"]
    argv = [f"student={student}", REPO, *([f"revision={revision}"] if revision else [])]
    said = refused(capsys, *argv)
    assert "repo = me/few-steps: it holds files (model_index.json, vae/config.json) and no denoiser.json" in said
    assert "choose another name" in said and hub.sent == {}
    hub.held[revision].append("denoiser.json")
    push.main(argv)
    assert hub.sent


@pytest.mark.parametrize("public", [True, False])
def test_what_the_repo_is_is_said_not_what_was_asked(student, hub, capsys, public):
    hub.public = public
    push.main([f"student={student}", REPO, "private=false"])
    assert f"\nme/few-steps is {'public' if public else 'private'}\n" in capsys.readouterr().out


def test_local_paths_in_files_are_told(student, capsys):
    card = json.loads((student / "denoiser.json").read_text())
    card["origin"] |= {"codec": "/home/me/vae", "at": "https://example.org/a/b", "base": "owner/name"}
    (student / "denoiser.json").write_text(json.dumps(card))
    push.main([f"student={student}", REPO, "--dry-run"])
    told = [line for line in capsys.readouterr().out.splitlines() if "paths on this machine" in line]
    assert told == ["# denoiser.json tells of paths on this machine: /home/me/vae"]


@pytest.mark.parametrize("repo", ["", "few-steps", "me/few/steps", "/tmp/x", "me/a--b", "me/a.git"])
def test_a_repo_that_is_none_is_refused(student, repo, capsys):
    assert "repo = " in refused(capsys, f"student={student}", f"repo={repo}", "--dry-run")


def test_the_hubs_refusals_are_one_line(student, hub, monkeypatch, capsys):
    hub.refusal = OSError("403 Forbidden:\n you may not write here")
    assert "(403 Forbidden: you may not write here); mend that" in refused(capsys, f"student={student}", REPO)
    hub.refusal = RuntimeError("Error while uploading 'x' to the Hub.")
    assert "(Error while uploading 'x' to the Hub.); mend that" in refused(capsys, f"student={student}", REPO)
    hub.refusal, hub.public = None, True
    assert "it is there and public; private=false uploads" in refused(capsys, f"student={student}", REPO)
    assert hub.sent == {}
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    assert "`hf auth login`, or set HF_TOKEN" in refused(capsys, f"student={student}", REPO)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "set HF_HUB_OFFLINE=0" in refused(capsys, f"student={student}", REPO)


def test_a_card_that_does_not_know_says_how_it_can(student, capsys):
    (student / "README.md").write_text("---\nlicense: unknown\n---\n")
    push.main([f"student={student}", REPO, "--dry-run"])
    out = capsys.readouterr().out
    assert "# base_model: unknown; card.base_model=OWNER/NAME" in out and "# license: unknown; card.license=ID" in out
    (student / "README.md").write_text("---\nlicense: [\n---\n")
    assert "its front matter is no YAML" in refused(capsys, f"student={student}", REPO, "--dry-run")


def test_what_only_we_load_brings_its_code_to_a_repo(student, hub):
    named = {"transformer": ["dmd_dar", "SD3Transformer2DModel"], "scheduler": ["dmd_dar", "StudentScheduler"]}
    (student / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusion3Pipeline", **named}))
    push.main([f"student={student}", REPO])
    assert b"class StudentScheduler" in hub.sent["scheduler/dmd_dar.py"]
    assert b'import_module("dmd_dar").__getattr__' in hub.sent["transformer/dmd_dar.py"]
    assert not list(student.rglob("*.py"))
