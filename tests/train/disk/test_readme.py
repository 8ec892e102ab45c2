"""README.md: its front matter is YAML, its text is what the run folder says, and names cannot break out of it."""

import json
from pathlib import Path

import pytest
import yaml

from dmd_dar.models.saved import ModelCard
from dmd_dar.train.disk.readme import CardConfig, readme
from tests.tiny import tiny_sit

HOSTILE = (
    "</code><script>alert(1)</script>",
    "a | b",
    "---\nlicense: mit\n---",
    "[x](https://evil.example)",
    "`rm -rf`",
)
DIGEST = "ab" * 32


def card_in(run: Path, **changes) -> tuple[dict, str]:
    """(front matter, body)."""
    fields = dict(
        rungs=(1.0, 0.75), label_names=HOSTILE, origin={"teacher": "cd" * 32, "guidance_scale": 1.5, "steps": 7}
    )
    text = readme(run, tiny_sit(), ModelCard(**{**fields, **changes}), DIGEST)
    empty, front, body = text.split("---\n", 2)
    assert empty == ""
    return yaml.safe_load(front), body


@pytest.fixture
def run(tmp_path) -> Path:
    config = {"out_dir": "x", "teacher": {"path": "facebook/DiT-XL-2-256"}, "card": {"license": "cc-by-nc-4.0"}}
    config |= {"steps": 7, "student": {"lr": 1e-4, "routing": {"query": "residual"}}, "log": {"every": 3}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "log.jsonl").write_text(
        '{"step": 6, "student/dm": 0.5}\n{"step": 7, "student/dm": 0.25, "health/x": 2}\n'
    )
    return tmp_path


def test_front_matter_and_text_say_what_the_run_says(run):
    front, body = card_in(run)
    assert front["library_name"] == "dmd_dar" and front["license"] == "cc-by-nc-4.0"
    assert front["base_model"] == "facebook/DiT-XL-2-256" and {"few-step", "distillation"} <= set(front["tags"])
    assert "cd" * 32 in body and DIGEST in body and "1, 0.75 (1 is noise), sampler stochastic" in body
    assert "**Guidance**: 1.5" in body and "**Steps of training**: 7" in body
    assert (
        "| student/dm | 0.25 |" in body
        and "| health/x | 2 |" in body
        and "0.5" not in body.split("## Configuration")[0].replace("1.5", "").replace("0.75", "")
    )
    assert "| student.lr | 0.0001 |" in body and "log.every" not in body and "out\\_dir" not in body
    assert 'pipe = dmd_dar.load_pipeline("FOLDER")' in body
    compile(body.split("```python\n")[1].split("```")[0], "card", "exec")


def test_the_front_matter_is_in_this_order(run):
    text = readme(run, tiny_sit(), ModelCard(rungs=(1.0, 0.75)), DIGEST)
    assert text.startswith(
        "---\nlibrary_name: dmd_dar\nlicense: cc-by-nc-4.0\ntags:\n- diffusion\n- few-step\n- distillation\n"
        "base_model: facebook/DiT-XL-2-256\n---\n\n# "
    )


@pytest.mark.parametrize(("steps", "value"), [(6, "0.5"), (7, "0.25"), (8, "0.25")])
def test_the_record_is_that_of_the_networks_own_step(run, steps, value):
    measured = card_in(run, origin={"steps": steps})[1].split("## Measured")[1].split("## Configuration")[0]
    assert f"| step | {min(steps, 7)} |" in measured and f"| student/dm | {value} |" in measured
    assert measured.count("student/dm") == 1


def test_hostile_names_stay_text(run):
    _, body = card_in(run)
    line = next(line for line in body.splitlines() if line.startswith("- **Labels**"))
    assert "<script" not in body and "](http" not in body and "https://evil" not in body
    assert "&lt;script&gt;" in line and "a \\| b" in line and "\\`rm -rf\\`" in line and "--- license: mit ---" in line
    assert "\n---" not in body


def test_nothing_is_invented(tmp_path):
    front, body = card_in(tmp_path / "nowhere", label_names=(), origin={}, rungs=())
    assert front["license"] == "unknown" and "base_model" not in front and "few-step" not in front["tags"]
    assert "No configuration is recorded" in body and "No report of its images was at hand" in body
    for name in ("Teacher", "Guidance", "Rungs", "Steps of training"):
        assert f"**{name}**" not in body
    assert "**Labels**: 7, without names" in body


def test_a_local_teacher_is_no_base_model_of_the_hub(run):
    (run / "config.yaml").write_text(yaml.safe_dump({"teacher": {"path": "teachers/photos32"}}))
    front, body = card_in(run)
    assert (
        "base_model" not in front and "**Teacher**: photos32, SHA-256" in body and "that of the teacher applies" in body
    )


def test_of_local_paths_the_last_part_is_told(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine" / "cats").mkdir(parents=True)
    config = {"teacher": {"path": "/home/me/secret/base", "codec": "owner/vae", "revision": "refs/pr/3"}}
    config |= {"data": {"path": "mine/cats"}, "regression": {"cache": "/scratch/me/pairs/"}, "files": ["/home/me/a"]}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    body = card_in(run)[1]
    rows = ("teacher.path | base", "data.path | cats", "regression.cache | pairs", "files | \\['a'\\]")
    for row in (*rows, "teacher.codec | owner/vae", "teacher.revision | refs/pr/3"):
        assert f"| {row} |" in body
    assert "**Teacher**: base, SHA-256" in body and "mine/" not in body
    assert "/me/" not in body


@pytest.mark.parametrize("own", [True, False])
def test_a_report_is_quoted_only_where_it_is_of_this_network(run, own):
    gain = {"HF": {"value": -0.3, "low": -0.52, "high": -0.07}}
    row = {"facts": {"network": DIGEST if own else "other"}, "images": 1024}
    row["against"] = {"teacher": {"verdict": {"word": "inconclusive"}, "gain_db": gain}}
    if own:
        row["against"]["teacher"]["colour"] = {"verdict": {"word": "washed out"}}
    (run / "report.json").write_text(json.dumps({"sets": [row]}))
    body = card_in(run)[1]
    assert ("-0.30 from -0.52 to -0.07" in body and "inconclusive" in body and "washed out" in body) == own


@pytest.mark.parametrize(
    ("error", "told"),
    [({}, "reduced"), ({"converged": True}, "reduced"), ({"converged": False}, "reduced, unconverged reference")],
)
def test_a_verdict_against_a_teacher_that_is_not_converged_says_so(run, error, told):
    gain = {"HF": {"value": -0.9, "low": -1.0, "high": -0.8}}
    against = {"teacher": {"verdict": {"word": "reduced"}, "gain_db": gain}}
    row = {"facts": {"network": DIGEST}, "images": 1024, "against": against}
    (run / "report.json").write_text(json.dumps({"sets": [row], "discretisation": error or None}))
    assert f"| verdict | {told} |" in card_in(run)[1]


@pytest.mark.parametrize("text", ["{", "[]", '{"sets": 3}', '{"sets": [{"facts": 1}]}'])
def test_a_report_of_another_form_is_left_out(run, text):
    (run / "report.json").write_text(text)
    assert "No report of its images" in card_in(run)[1]


@pytest.mark.parametrize("cached", [True, False])
def test_the_licence_is_the_teachers_own_where_its_readme_says_one(run, tmp_path, monkeypatch, cached):
    teacher = tmp_path / "base"
    (teacher / "transformer").mkdir(parents=True)
    told = {"license": "other", "license_name": "theirs-1.0", "license_link": "LICENSE.md"}
    (teacher / "README.md").write_text(f"---\n{yaml.safe_dump(told)}---\n# Base\n")
    asked = []

    def in_cache(name, file, revision):
        asked.append((name, file, revision))
        return str(teacher / file)

    monkeypatch.setattr("dmd_dar.train.disk.readme.try_to_load_from_cache", in_cache)
    named = {"path": "owner/base", "revision": "v1"} if cached else {"path": str(teacher / "transformer")}
    (run / "config.yaml").write_text(yaml.safe_dump({"teacher": named}))
    front, body = card_in(run)
    assert (front["license"], front["license_name"]) == ("other", "theirs-1.0") and "**License**: theirs-1.0\n" in body
    if cached:
        assert set(asked) == {("owner/base", "README.md", "v1")} and front["base_model"] == "owner/base"
        assert front["license_link"].endswith("owner/base/resolve/main/LICENSE.md")
    else:
        assert not asked and "license_link" not in front and "base_model" not in front
    named["path"] = str(teacher)
    own = {"license": "apache-2.0", "base_model": "owner/base"}
    (run / "config.yaml").write_text(yaml.safe_dump({"teacher": named, "card": own}))
    front = card_in(run)[0]
    assert own.items() <= front.items() and "license_name" not in front


def test_a_base_model_is_a_hub_id():
    assert CardConfig(base_model="owner/base").license == "unknown"
    with pytest.raises(ValueError, match="base_model must be a hub id"):
        CardConfig(base_model="my/local/folder")
