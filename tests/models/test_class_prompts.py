"""Real data of a teacher that reads prompts: where its classes are the prompts, by name or because it is said."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from dmd_dar import config
from dmd_dar.distillation import job as distill
from dmd_dar.encode import EncodeConfig, encode
from dmd_dar.models.teachers import TeacherConfig, load_teacher
from dmd_dar.train.watch.preflight import check_teacher
from tests.models.tiny_pipelines import tiny_sd3

CLASSES = ["a red cat", "dogs", "two"]
SMALL = "steps=2 batch_size=4 rungs=[1.0,0.5] fake_score.updates=1 regression.weight=0 gan.weight=0.1 data.name=latents"
SMALL += " student_input=data log.every=1 log.wandb=disabled log.health_samples=4 launch.cpu=true"


def encoded(*given: str) -> None:
    encode(config.load(EncodeConfig, [*given, "cpu=true"]))


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """An SD3 of 4 x 16 x 16 latents, the classes' names as its prompts, and latents of two images for each class."""
    root = tmp_path_factory.mktemp("classes")
    tiny_sd3(root / "sd3", sample_size=16)
    (root / "prompts.txt").write_bytes(
        "\r\n \r\n".join(["\ufeff" + CLASSES[0], *CLASSES[1:]]).encode()
    )  # as Windows does
    encoded(f"prompts={root / 'prompts.txt'}", f"pipeline={root / 'sd3'}", f"out={root / 'prompts'}")
    return root


def latents(root: Path, out: Path, names: list[str]) -> Path:
    generator = torch.Generator().manual_seed(0)
    for label, name in enumerate(names):
        (out / "images" / name).mkdir(parents=True)
        for i in range(2):
            pixels = torch.randint(256, (32, 32, 3), dtype=torch.uint8, generator=generator)
            Image.fromarray((pixels // (label + 1)).numpy()).save(out / "images" / name / f"{i}.png")
    images = ["data.name=folder", f"data.path={out / 'images'}", "data.size=32", "data.held_out_share=0"]
    encoded(f"codec={root / 'sd3'}", f"out={out / 'latents'}", *images)
    return out / "latents"


@pytest.mark.parametrize("named", [True, False])
def test_real_data_whose_classes_are_the_prompts(root, tmp_path, capsys, named):
    where = latents(root, tmp_path, CLASSES if named else ["1", "2", "3"])
    given = [f"teacher.path={root / 'sd3'}", f"teacher.prompts={root / 'prompts'}", f"data.path={where}"]
    given += [f"out_dir={tmp_path / 'run'}", *SMALL.split()]
    if not named:
        with pytest.raises(SystemExit) as stop:
            distill.main(given)
        assert stop.value.code == 2 and "its classes are no prompts: encode their names" in capsys.readouterr().err
        given += ["teacher.prompts_are_classes=true"]
    with pytest.raises(SystemExit):
        distill.main(given)
    assert "does not denoise its own data" in capsys.readouterr().err  # random weights, seen on this data
    distill.main([*given, "preflight=false"])
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert any("discriminator/gan" in entry for entry in log)


@torch.no_grad()
def test_prompts_are_known_by_their_texts_in_order(root):
    teacher = load_teacher(TeacherConfig(str(root / "sd3"), prompts=str(root / "prompts")))
    assert teacher.knows(tuple(CLASSES)) and not teacher.knows(tuple(reversed(CLASSES))) and not teacher.knows(("two",))
    data = SimpleNamespace(num_classes=3, label_names=("1", "2", "3"), device="cpu")
    data.batch = lambda draws: (draws.normal("x", 4, 16, 16), draws.integers("label", 3))
    assert "the data's classes are not the teacher's prompts" in check_teacher(teacher, data)  # type: ignore[arg-type]
