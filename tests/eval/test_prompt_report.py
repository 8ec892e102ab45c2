"""A report on a student of prompts: CLIP reads its own prompts, and photographs that nobody asked for are no fault."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from PIL import Image
from torch import Tensor

from dmd_dar import config
from dmd_dar.data.images import to_pixels
from dmd_dar.distillation import job as distill
from dmd_dar.draws import Draws
from dmd_dar.encode import EncodeConfig, encode
from dmd_dar.errors import UserError
from dmd_dar.guidance import Velocity
from dmd_dar.methods.generate import Generator, few_step_generator, ode_generator
from dmd_dar.models.codecs import Codec
from dmd_dar.models.denoiser import velocity_of
from dmd_dar.models.guided import guided_velocity
from dmd_dar.models.teachers import TeacherConfig, codec_of, load_teacher
from dmd_dar.sample import SampleConfig, sample
from eval import report
from eval.measure.clip import scored
from eval.measure.ledger import Ledger
from eval.measure.suite import Sources, Suite, wanted
from eval.metrics import perceptual
from eval.metrics.weight_files import CLIP_FILES, VARIABLE, file_hash
from eval.page.grids import GAP, PROMPT_LABEL, wrapped
from eval.report import ReportConfig
from eval.samples.images import UnfitError
from eval.samples.parallel import Processes
from eval.samples.sampling import Bench
from eval.samples.sets import ImageSet, read_set
from eval.study.inputs import sampled
from eval.study.prompts import encoded_for
from tests.eval.tiny_clip import tiny_clip
from tests.models.tiny_pipelines import tiny_sd3

PROMPTS = ["a red cat", "dogs on the grass"]
NEW = ["a red cat", "two dogs", "a cat in a hat, on the green grass of a wide field", "x"]
SMALL = "steps=1 batch_size=2 rungs=[1.0,0.5] fake_score.updates=1 regression.weight=0 log.wandb=disabled"
SMALL += " log.health_samples=2 launch.cpu=true guidance_scale=3.0 preflight=false"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A student of two prompts on 4 x 16 x 16 latents, whose run names no data."""
    root = tmp_path_factory.mktemp("prompted")
    tiny_sd3(root / "sd3", sample_size=16)
    (root / "prompts.jsonl").write_text("\n".join(json.dumps({"prompt": prompt}) for prompt in PROMPTS))
    given = [f"prompts={root / 'prompts.jsonl'}", f"pipeline={root / 'sd3'}", f"out={root / 'prompts'}", "cpu=true"]
    given += ["tokens=12", "negative=a dog"]
    encode(config.load(EncodeConfig, given))
    distill.main(
        [
            f"teacher.path={root / 'sd3'}",
            f"teacher.prompts={root / 'prompts'}",
            f"out_dir={root / 'run'}",
            *SMALL.split(),
        ]
    )
    return root / "run"


def asked(run: Path, out: Path, *more: str) -> ReportConfig:
    argv = [f"runs=[{run}]", f"out={out}", f"cache={out / 'cache'}", "n=64", "solver_steps=1", "cpu=true"]
    return config.load(ReportConfig, [*argv, "metrics=[clip]", "strict=true", *more])


def test_real_images_of_a_folder_stand_beside_the_samples(run, tmp_path):
    for name, side in (("photographs", 32), ("large", 40)):
        (tmp_path / name).mkdir()
        for i in range(6):
            pixels = torch.randint(256, (side, side, 3), generator=torch.Generator().manual_seed(i), dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(tmp_path / name / f"{i}.png")
        (tmp_path / name / "samples.json").write_text(json.dumps({"labels": [0, 1] * 3}))
    ledger, device = Ledger(), torch.device("cpu")
    inputs = sampled(asked(run, tmp_path, f"real={tmp_path / 'photographs'}"), device, ledger, Processes())
    assert (inputs.real.name, inputs.real.count, inputs.real.role) == ("real", 6, "real") and not ledger.skipped
    assert (
        inputs.real.prompted and inputs.real.names == dict(enumerate(PROMPTS)) and inputs.everything[0] is inputs.real
    )
    with pytest.raises(UnfitError, match="real = .*large: images of 40 x 40 px, but the teacher's are of 32"):
        sampled(asked(run, tmp_path, f"real={tmp_path / 'large'}"), device, ledger, Processes())


@torch.no_grad()
def test_a_folder_of_its_samples_knows_its_prompts(run, tmp_path, clip_folder):
    sample(SampleConfig(student=str(run / "student"), out=str(tmp_path), n=4, cpu=True))
    suite = Suite((), clip=perceptual.load_clip(f"local-dir:{clip_folder}"))
    one = read_set(str(tmp_path))
    found = scored(one, suite, {}, Ledger())
    expected = perceptual.clip_score(suite.clip, one.first(4), 2 * PROMPTS)
    assert found.prompt == "{}" and found.score.value == expected.value


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory) -> Path:
    return tiny_clip(tmp_path_factory.mktemp("weights") / "clip")


def by_hand(bench: Bench, generator: Generator, codec: Codec) -> Tensor:
    """uint8 images of seed i // 4 of prompt i % 4."""
    draws = Draws(0, "eval", 0, torch.arange(64))
    x0 = generator(torch.arange(64) % 4, draws, draws.normal("noise", *bench.shape))
    return to_pixels(codec.decode(x0))


@torch.no_grad()
def scores(folder: Path, images: Tensor) -> np.ndarray:
    """open_clip's own cosines with the four prompts in turn, (16, 4)."""
    import open_clip

    network, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")([NEW[i % 4] for i in range(64)])
    pixels = torch.stack([preprocess(Image.fromarray(image.permute(1, 2, 0).numpy())) for image in images])
    cosines = torch.nn.functional.cosine_similarity(network.encode_image(pixels), network.encode_text(tokens))
    return 100 * cosines.numpy().reshape(16, 4)


@pytest.mark.stages("report", family="sd3")
@torch.no_grad()
def test_prompts_of_a_file_are_sampled_at_as_many_noises_each_by_all_networks(run, tmp_path, clip_folder):
    rows = "".join(f'"{prompt}",{i}\n' for i, prompt in enumerate(NEW))
    (tmp_path / "new.csv").write_text(f"Caption,seed\n{rows}")
    cfg = asked(run, tmp_path, "n=1024", "seeds=16", f"prompts={tmp_path / 'new.csv'}", f"clip=local-dir:{clip_folder}")
    report.report(cfg)
    result = json.loads((tmp_path / "report.json").read_text())
    assert list(result["class_names"].values()) == NEW and {row["images"] for row in result["sets"]} == {64}
    inputs = sampled(cfg, torch.device("cpu"), Ledger(), Processes())
    student = next(one for one in inputs.sets if one.role == "student")

    # teacher and student are at the same prompts and noise, which neither was trained on or encoded with
    root = run.parent
    given = [f"prompts={tmp_path / 'new.csv'}", f"pipeline={root / 'sd3'}", f"out={tmp_path / 'new'}", "cpu=true"]
    encode(config.load(EncodeConfig, [*given, "tokens=12", "negative=a dog"]))
    teacher = load_teacher(TeacherConfig(str(root / "sd3"), prompts=str(tmp_path / "new")))
    codec = codec_of(teacher)
    velocity = guided_velocity(teacher.network, teacher.prediction, 3.0)
    for one, generator in (
        (inputs.reference, ode_generator(velocity, cfg.ode)),
        (student, few_step_generator(*few_steps_of(run, tmp_path / "new"))),
    ):
        expected = by_hand(inputs.bench, generator, codec)
        assert (one.images.int() - expected.int()).abs().max() <= 1 and one.labels.tolist() == 16 * [0, 1, 2, 3]
        assert (one.images[0].int() - one.images[4].int()).abs().max() > 8  # another noise of the same prompt

    page = (tmp_path / "report.html").read_text()
    assert f"Rows from above: 1. {NEW[0]}; 2. {NEW[1]}; 3. {NEW[2]}; 4. {NEW[3]}; " not in page  # four seeds of each
    assert "; ".join(f"{i}. {prompt}" for i, prompt in enumerate(NEW, 1)) in page and "Agreement with the words" in page
    wide = Image.open(tmp_path / "samples.png").width - len(result["sets"]) * (4 * 32 + GAP)
    assert wide == PROMPT_LABEL

    ours, theirs = (scores(clip_folder, one.images) for one in (student, inputs.reference))
    row = next(row for row in result["sets"] if row["name"] == student.name)
    drawn = np.random.default_rng(0).integers(0, 4, size=(1000, 4))  # prompts, each with all its images
    for found, values in ((row["clip"], ours), (row["against"]["teacher"]["clip_difference"], ours - theirs)):
        interval = np.quantile(values.mean(0)[drawn].mean(1), [0.025, 0.975])
        assert found["value"] == pytest.approx(values.mean(), abs=1e-3)
        assert [found["low"], found["high"]] == pytest.approx(interval.tolist(), abs=1e-3)
    assert row["clip"]["sha256"] == file_hash(clip_folder / CLIP_FILES[0]) and row["clip"]["prompt"] == "{}"
    assert all("clip" in row for row in result["sets"])
    assert row["against"]["teacher"]["diversity_ratio"]["pixels"]["by_class"].keys() == set("0123")
    reasons = {one["metric"]: one["reason"] for one in result["skipped"] if not one["requested"]}
    assert len(reasons) == len(result["skipped"]) and result["real"] is None  # strict passes
    assert "photos: its classes are not the teacher's prompts; name real" in reasons["against real images"]


def few_steps_of(run: Path, prompts: Path) -> tuple[Velocity, tuple[float, ...]]:
    student = load_teacher(TeacherConfig(str(run / "student"), prompts=str(prompts)))
    return velocity_of(student.network, student.prediction), student.rungs


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["seeds=3"], "seeds = 3: of 2 prompts that is 6 images, and comparisons need 64 at least; set seeds=32"),
        (["seeds=32", "n=65"], "n = 65, seeds = 32: both say how many images"),
        (["prompts={root}/prompts.jsonl", "text_encoder={root}/other"], "another text encoder"),
    ],
)
def test_what_prompts_cannot_be_is_one_line(run, tmp_path, more, said):
    root = run.parent
    if "other" in str(more):
        tiny_sd3(root / "other", third=False)
    given = [text.format(root=root) for text in more]
    cfg = asked(run, tmp_path, *(given if any(one.startswith("n=") for one in given) else ["n=1024", *given]))
    with pytest.raises(UserError, match=said) as error:
        sampled(cfg, torch.device("cpu"), Ledger(), Processes())
    assert "\n" not in str(error.value)


def test_strict_asks_for_clip_where_there_are_prompts(run, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "none"))
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    ledger, one = Ledger(), ImageSet("a", torch.zeros(8, 3, 32, 32, dtype=torch.uint8), None, "real", False)
    for asked_for, names in (((), set()), (("clip",), {"clip"})):
        ledger = Ledger()
        wanted(("auto",), Sources(asked=asked_for), ledger)
        assert {entry.metric for entry in ledger.skipped if entry.requested} == names
    ledger, suite = Ledger(), Suite((), clip="clip")  # type: ignore[arg-type]
    assert scored(one, suite, {}, ledger) is None and not ledger.skipped[0].requested  # real images need no words
    scored(replace(one, role="images"), suite, {}, ledger)
    assert ledger.skipped[1].requested


def test_a_run_of_class_labels_is_given_no_prompts(run, tmp_path):
    cfg = asked(run, tmp_path, f"prompts={run.parent / 'prompts.jsonl'}")
    with pytest.raises(config.ConfigError, match="prompts.jsonl: out/a reads class labels; leave prompts out"):
        encoded_for(Path("out/a"), {}, cfg, Processes())


def test_a_prompt_beside_its_pictures_is_broken_between_words_and_cut_at_the_end():
    words = "many words of one long prompt " * 9
    lines = wrapped(words, 120, 16, 4)
    assert len(lines) == 4 and lines[3].endswith("…") and " ".join(lines)[:45] == words[:45]
    assert wrapped("a cat", 120, 16, 4) == ["a cat"] and wrapped("x" * 99, 120, 16, 4)[0].endswith("…")
