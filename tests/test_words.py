"""Prompts in words: sampled as the same prompts encoded ahead are, by the text encoder of the student's own prompts."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dmd_dar import config, load_pipeline
from dmd_dar.data.captions import LINES, captioned, wrapped
from dmd_dar.encode import EncodeConfig, encode
from dmd_dar.errors import UserError
from dmd_dar.models.codecs import load_codec
from dmd_dar.models.saved import ModelCard, save_network
from dmd_dar.models.teachers import TeacherConfig, load_teacher, origin_of
from dmd_dar.sample import SampleConfig, sample
from tests.models.tiny_pipelines import tiny_pixart, tiny_sd3, tiny_t5

ROOT = Path(__file__).parents[1]
RUNGS = (1.0, 0.6)
NEW = ["a cat in a hat", "two dogs", "a cat in a hat"]
MAKERS = {"pixart": tiny_pixart, "sd3": tiny_sd3}


def encoded(file: Path, pipeline: Path, out: Path, *more: str) -> str:
    given = [f"prompts={file}", f"pipeline={pipeline}", f"out={out}", "batch_size=2", "cpu=true", "dtype=float32"]
    encode(config.load(EncodeConfig, [*given, *more]))
    return str(out)


def student_of(pipeline: Path, prompts: str, folder: Path) -> str:
    """The teacher itself as a student of two steps, with the card that a run gives it."""
    teacher, codec = load_teacher(TeacherConfig(str(pipeline), prompts=prompts)), load_codec(str(pipeline))
    card = ModelCard(teacher.prediction, RUNGS, origin={"teacher": teacher.digest, **origin_of(teacher, codec)})
    save_network(folder, teacher.network, card, codec)
    return str(folder)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Two pipelines, prompts of their students, the students, and new prompts, encoded ahead."""
    root = tmp_path_factory.mktemp("words")
    (root / "own.txt").write_text("a red cat\ndogs\n")
    (root / "new.txt").write_text("\n".join(NEW) + "\n")
    for name, make in MAKERS.items():
        pipeline = make(root / name)
        own = encoded(root / "own.txt", pipeline, root / f"{name}_own", "tokens=24")
        encoded(root / "new.txt", pipeline, root / f"{name}_new", "tokens=24")
        student_of(pipeline, own, root / f"{name}_student")
    return root


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.stages("words", by="name")
def test_words_are_the_same_prompts_encoded_ahead(root, name):
    student = str(root / f"{name}_student")
    ahead = load_pipeline(student, prompts=str(root / f"{name}_new"))
    pipe = load_pipeline(student)
    expected, images = ahead([0, 1, 2], seed=7), pipe(NEW, seed=7)
    assert expected.std() > 0.1 and (images - expected).abs().max() <= 5e-6  # alone, or beside others in a batch
    assert (pipe([NEW[1], *NEW[1:]], seed=7) - expected)[0].abs().max() > 1e-4  # it is the prompt that decides
    assert pipe.words is not None and pipe.words.held is None and set(pipe.words.known) == set(NEW)
    torch.testing.assert_close(pipe(NEW[0], n=2, seed=7)[0], expected[0], rtol=0, atol=5e-6)
    own = load_pipeline(student)([1, 0], seed=7)
    assert torch.equal(pipe([1, 0], seed=7), own) and pipe.student.network.prompts.count == 2


def test_the_student_s_own_prompts_may_be_gone_but_not_its_text_encoder(root, tmp_path):
    without = shutil.ignore_patterns("text_encoder")  # of the base, which stands in a student's folder, too
    shutil.copytree(root / "pixart_student", tmp_path / "student", ignore=without)
    shutil.copytree(root / "pixart", tmp_path / "pipeline")
    card = json.loads((tmp_path / "student" / "denoiser.json").read_text())
    card["origin"] |= {"prompts": str(tmp_path / "gone"), "text_encoder": str(tmp_path / "pipeline")}
    (tmp_path / "student" / "denoiser.json").write_text(json.dumps(card))
    expected = load_pipeline(str(root / "pixart_student"))(NEW, seed=1)
    pipe = load_pipeline(str(tmp_path / "student"))
    assert (pipe(NEW, seed=1) - expected).abs().max() <= 5e-6
    with pytest.raises(UserError, match="own prompts are not at .*gone: give prompts in words"):
        pipe(n=2)
    shutil.rmtree(tmp_path / "pipeline" / "text_encoder")
    with pytest.raises(UserError, match=f"none in .*{tmp_path}/pipeline; name the teacher's pipeline, text_encoder="):
        load_pipeline(str(tmp_path / "student"))(NEW)
    named = load_pipeline(str(tmp_path / "student"), text_encoder=str(root / "pixart"), keep_text_encoder=True)
    assert (named(NEW, seed=1) - expected).abs().max() <= 5e-6 and named.words.held is not None


def test_another_text_encoder_is_refused(root, tmp_path):
    shutil.copytree(root / "pixart", tmp_path / "other")
    tiny_t5(seed=7)[1].save_pretrained(tmp_path / "other" / "text_encoder")
    with pytest.raises(UserError, match="another text encoder .* than the one that the student's prompts"):
        load_pipeline(str(root / "pixart_student"), text_encoder=str(tmp_path / "other"))("a cat")
    with pytest.raises(UserError, match="reads class labels: leave text_encoder out"):
        load_pipeline(str(classes(tmp_path)), text_encoder=str(root / "pixart"))


def classes(folder: Path) -> Path:
    """A student of classes."""
    network = load_teacher(TeacherConfig(str(ROOT / "teachers" / "photos32"))).network
    save_network(folder / "classes", network, ModelCard(rungs=RUNGS))
    return folder / "classes"


def test_seeds_of_their_own(root):
    pipe = load_pipeline(str(root / "pixart_student"))
    three = pipe(NEW, seed=[7, 8, 7], sampler="stochastic")
    first, second = pipe(NEW[0], seed=7)[0], pipe(NEW[1], seed=8)[0]
    for one, other in zip(three, (first, second, first), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
    assert (first - second).abs().max() > 0.01
    torch.testing.assert_close(pipe(NEW, seed=[7, 8, 7], batch_size=2), three, rtol=0, atol=1e-6)
    torch.testing.assert_close(pipe(NEW[0], seed=np.int64(7))[0], first, rtol=0, atol=0)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="labels for 3 images, seed for 2 images"):
        pipe(NEW, seed=[1, 2])


def described(out: Path) -> dict:
    return json.loads((out / "samples.json").read_text())


def test_the_command_takes_words_and_says_them(root, tmp_path):
    student = str(root / "pixart_student")
    given = [f"student={student}", "prompt=a cat in a hat", "n=3", "seed=7", f"out={tmp_path / 'one'}", "cpu=true"]
    sample(config.load(SampleConfig, given))
    images = load_pipeline(student)("a cat in a hat", n=3, seed=7, output="pil")
    for i, image in enumerate(images):
        assert Image.open(tmp_path / "one" / f"{i:06d}.png").tobytes() == image.tobytes()
    facts = described(tmp_path / "one")
    assert facts["captions"] == ["a cat in a hat"] * 3 and facts["labels"] == [0, 0, 0] and facts["prompted"]
    assert facts["names"] == {"0": "a cat in a hat"} and facts["seed"] == 7
    (tmp_path / "more.jsonl").write_text('{"text": "two dogs", "seed": 5}\n{"text": "a red cat"}\n')
    sample(SampleConfig(student=student, prompts=str(tmp_path / "more.jsonl"), out=str(tmp_path / "two"), cpu=True))
    facts = described(tmp_path / "two")
    assert facts["captions"] == ["two dogs", "a red cat"] and facts["seeds"] == [5, 1] and facts["n"] == 2
    drawn = load_pipeline(student)(["two dogs", "a red cat"], seed=[5, 1], output="pil")
    assert Image.open(tmp_path / "two" / "000001.png").tobytes() == drawn[1].tobytes()
    for other in ("prompt=a dog", "decode=slices"):
        with pytest.raises(config.ConfigError, match="images of another request"):
            sample(config.load(SampleConfig, [*given, other]))
    (tmp_path / "seeded.jsonl").write_text('{"text": "a cat in a hat", "seed": 5}\n')
    with pytest.raises(config.ConfigError, match="images of another request"):
        sample(config.load(SampleConfig, [*given, "prompt=", f"prompts={tmp_path / 'seeded.jsonl'}"]))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["prompt=a", "prompts={root}/new.txt"], "leave one of them out"),
        (["prompt=a", "label=1"], "label is a class or the number of an encoded prompt"),
        (["prompt=a", "column=text"], "column is of a file of prompts"),
        (["prompts={root}/new.txt", "column=text"], "is a text without columns"),
        (["prompt=a", "student={classes}"], "reads class labels: leave prompt and prompts out"),
        (["prompt=a", "text_encoder={root}/sd3"], "another text encoder"),
    ],
)
def test_what_words_cannot_be_is_one_line(root, tmp_path, capsys, more, said):
    names = {"root": root, "classes": classes(tmp_path) if "classes" in str(more) else ""}
    given = [f"student={root / 'pixart_student'}", f"out={tmp_path / 'out'}", "cpu=true"]
    with pytest.raises(SystemExit) as stop:
        config.run_job(SampleConfig, sample, [*given, *(text.format(**names) for text in more)])
    assert stop.value.code == 2 and said in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.glob("out/*.png"))


def test_captions_stand_below_their_pictures_or_are_cut():
    pictures = torch.randint(0, 255, (2, 3, 40, 128), dtype=torch.uint8)
    made = captioned(pictures, ["a cat", "many words " * 40])
    assert torch.equal(made[..., :40, :], pictures) and made.shape[-2] > 40 + 3 * 14
    below = made[..., 40:, :].float().mean(1)
    assert 0 < (below[0] < 128).sum() < (below[1] < 128).sum()
    assert (below[0][22:] == 255).all()  # one line, the other has three
    text = wrapped("many words " * 40, 120)
    assert text.count("\n") + 1 <= LINES and text.endswith("...") and "\n" not in wrapped("a cat", 120)
    assert captioned(pictures[..., :32], ["a", "b"]).shape == (2, 3, 40, 32)
