"""configs/t2i: planned at the published shapes; the commands of their headers, typed on tiny pipelines of the class."""

import inspect
import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import yaml

from dmd_dar import commands, config, guidance, plan
from dmd_dar.distillation.config import DistillConfig
from dmd_dar.models.families import FAMILIES
from dmd_dar.models.saved import read_card
from dmd_dar.pipeline import load_pipeline
from tests.models.families.test_flux2 import tiny_flux2
from tests.models.families.test_qwen_image import tiny_qwen_image
from tests.models.families.test_z_image import tiny_z_image
from tests.models.published import PUBLISHED
from tests.models.tiny_pipelines import tiny_flux, tiny_pixart, tiny_sana, tiny_sd3

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "configs" / "t2i"
ARMS = {"dar": "timestep", "residual": "residual"}
FAMILY = {"flux1_dev": "flux", "flux2_klein": "flux2", "sd35": "sd3", "pixart_sigma": "pixart"}
MAKERS: dict[str, Callable[[Path], Path]] = {
    "qwen_image": tiny_qwen_image,
    "z_image": tiny_z_image,
    "flux1_dev": tiny_flux,
    "flux2_klein": tiny_flux2,
    "sd35": lambda folder: tiny_sd3(folder, sample_size=16),
    "sana": tiny_sana,
    "pixart_sigma": lambda folder: tiny_pixart(folder, sigma=True, sample_size=16),
}
PROMPTS = ["a red cat", "two dogs on grass", "x"]
# what is small where the recipe is large; behind the keys of a command, where the later one counts
SMALL = {
    "plan": "launch.cpu=true",
    "encode": "cpu=true tokens=128",
    "distill": "steps=3 batch_size=2 checkpoint.every=3 log.every=1 log.samples_every=3 log.health_every=3"
    " log.health_samples=2 log.wandb=disabled launch.cpu=true student.warmup=0",
    "sample": "cpu=true",
    "report": "n=64 solver_steps=1 metrics=[offline] cpu=true cache=cache strict=true",
    "push": "",
}
SIDES = "height=32 width=32"


def recipe(name: str, arm: str = "dar") -> dict[str, Any]:
    return yaml.safe_load((FOLDER / f"{name}_{arm}.yaml").read_text())


def typed(text: str, mark: str = "    ") -> list[list[str]]:
    """The words of the `dmd-dar` commands that stand behind `mark` in a text."""
    lines = re.findall(rf"^{mark}(dmd-dar (?:.*\\\n)*.*)$", text, re.MULTILINE)
    return [shlex.split(one.replace("\\\n#", " ").replace("\\\n", " "))[1:] for one in lines]


def header(name: str, arm: str) -> list[list[str]]:
    """The commands of a recipe's header; of a baseline's, those of its pair with its own name."""
    words = typed((FOLDER / f"{name}_dar.yaml").read_text(), "#     ")
    return [[re.sub(rf"{name}([_/])dar", rf"{name}\1{arm}", word) for word in command] for command in words]


def small(command: str, sized: bool) -> list[str]:
    sides = "sizes=[[32,32],[32,48]]" if sized else SIDES
    return [*SMALL[command].split(), *(sides.split() if command in ("distill", "plan") else [])]


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A working folder with the recipes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    return tmp_path


def test_the_page_types_what_the_header_of_the_papers_recipe_does():
    assert typed((ROOT / "docs" / "t2i.md").read_text()) == header("qwen_image", "dar")


def test_the_page_lists_every_recipe():
    text = (ROOT / "docs" / "t2i.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+)` \| `([^`]+)` \|", text, re.MULTILINE))
    assert rows == {name: recipe(name)["teacher"]["path"] for name in MAKERS}
    assert {file.stem for file in FOLDER.iterdir()} == {f"{name}_{arm}" for name in MAKERS for arm in ARMS}
    pipe = re.search(r"pipe\(.*num_inference_steps=(\d), (\w+)=([\d.]+)\)", text)
    off = FAMILIES[PUBLISHED["qwen_image"].transformer].off
    assert pipe and (int(pipe[1]), pipe[2], float(pipe[3])) == (len(recipe("qwen_image")["rungs"]), *off)


@pytest.mark.parametrize("name", MAKERS)
def test_every_number_has_a_source_or_says_that_it_has_none(name):
    text = (FOLDER / f"{name}_dar.yaml").read_text()
    body = [line for line in text.splitlines() if not line.startswith("#")]
    numbers = [
        line for line in body if re.search(r": .*[1-9]", line) and not re.match(r"(out_dir|log|checkpoint)", line)
    ]
    named = [line for line in numbers if not re.match(r"(teacher|launch|seed)", line)]
    assert len(named) > 8 and not [line for line in named if "#" not in line and not re.search("path:|prompts:", line)]
    assert "Not run" in text.split("\n#\n")[0]


def test_the_papers_recipe_is_what_the_paper_states():
    cfg = config.load(DistillConfig, [f"config={FOLDER / 'qwen_image_dar.yaml'}", "teacher.prompts="])
    assert cfg.weights == "shared_lora" and cfg.lora.rank == 64 and cfg.frozen_dtype == "bfloat16"
    assert (cfg.student.lr, cfg.fake_score.lr, cfg.guidance_scale) == (5e-6, 2e-6, 4.0)
    assert len(cfg.rungs) == 4 and cfg.pixels == ((1024, 1024),) and cfg.launch.microbatch == 1
    assert not cfg.gan.used and not cfg.regression.used


CONVENTIONS = {"qwen_image": "qwen_image", "z_image": "z_image", "flux2_klein": "flux2_klein"}


@pytest.mark.parametrize("name", [name for name in MAKERS if name != "sd35"])  # whose model card names another number
def test_guidance_is_that_of_the_pipelines_own_call(name):
    call = inspect.signature(getattr(diffusers, PUBLISHED[name].pipeline).__call__).parameters
    used = call["true_cfg_scale" if name == "qwen_image" else "guidance_scale"].default
    values = recipe(name)
    if name == "flux1_dev":
        assert values["teacher"]["embedded_guidance"] == used and values["guidance_scale"] == 1.0
    else:
        assert values["guidance_scale"] == guidance.convert(used, CONVENTIONS.get(name, "diffusers"))


PLANS = [
    pytest.param(name, arm, marks=() if arm == "dar" and name in ("qwen_image", "flux2_klein") else pytest.mark.slow)
    for name in MAKERS
    for arm in ARMS
]


@pytest.mark.parametrize(("name", "arm"), PLANS)
def test_a_recipe_is_planned_at_the_published_shape(here, monkeypatch, capsys, name, arm):
    """Without the trace of a call, which takes minutes for the large ones."""
    shapes = []
    monkeypatch.setattr(plan, "footprint", lambda *given: shapes.append(given[-1]) or plan.Footprint(10**9, 10**9))
    PUBLISHED[name].write(here)
    commands.main(["distill", f"config=configs/t2i/{name}_{arm}.yaml", "teacher.prompts=", "--dry-run"])
    said = capsys.readouterr().out
    teacher = int(re.search(r"# teacher +([\d,]+) ", said)[1].replace(",", ""))  # type: ignore[index]
    student = re.search(r"# student +([\d,]+) +([\d,]+) ", said)
    assert teacher == pytest.approx(1e9 * PUBLISHED[name].billions, rel=0.1)
    trained = int(student[2].replace(",", ""))  # type: ignore[index]
    lora = "lora" in recipe(name)
    assert (trained < 0.1 * teacher) if lora else (teacher <= trained < 1.01 * teacher)
    cells = {"flux2_klein": (128, 64, 64), "sana": (32, 32, 32), "pixart_sigma": (4, 128, 128)}
    assert shapes == 2 * [cells.get(name, (16, 128, 128))] and f"query: {ARMS[arm]}" in said


TOLD = {
    name: float(told[1])
    for name in MAKERS
    if (told := re.search(r"one process: ([\d.]+) GB", (FOLDER / f"{name}_dar.yaml").read_text()))
}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "told"), TOLD.items())
def test_what_a_header_says_of_memory_is_the_plans(here, name, told):
    PUBLISHED[name].write(here)
    cfg = config.load(DistillConfig, [f"config=configs/t2i/{name}_dar.yaml", "teacher.prompts="])
    assert plan.plan_of(cfg).total / 1e9 == pytest.approx(told, rel=0.05)


CASES = [
    pytest.param(FAMILY.get(name, name), name, query, recipe(name).get("weights", "full"), id=f"{name}-{arm}")
    for name in MAKERS
    for arm, query in ARMS.items()
]
QUICK = ("pixart_sigma-dar",)
CASES = [one if one.id in QUICK else pytest.param(*one.values, id=one.id, marks=pytest.mark.slow) for one in CASES]


@pytest.mark.stages("encode", "distil", "words", "report", by="family")
@pytest.mark.parametrize(("family", "name", "query", "weights"), CASES)
def test_the_commands_of_a_header_make_a_student(here, capsys, family, name, query, weights):
    """plan, encode, distill, sample in words, report, push --dry-run, as they are typed, on a tiny pipeline."""
    values, arm = recipe(name), next(arm for arm, one in ARMS.items() if one == query)
    MAKERS[name](here / values["teacher"]["path"])
    (here / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    for command, *words in header(name, arm):
        commands.main([command, *words, *small(command, "sizes" in values)])
    said, out = capsys.readouterr().out, Path("out/t2i") / name
    student = out / arm / "student"
    card = read_card(student).card
    assert " MB  transformer/" in said and "# to OWNER/NAME" in said and card.rungs == (1.0, 0.9, 0.75, 0.5)
    index = json.loads((student / "model_index.json").read_text())
    assert index["_class_name"] == PUBLISHED[name].pipeline and PUBLISHED[name].transformer in index["transformer"]
    assert (student / "adapter").is_dir() == (weights == "shared_lora")
    drawn = json.loads((out / "images" / "samples.json").read_text())
    assert drawn["captions"] == 4 * ["a cat in a hat"] and len(list((out / "images").glob("0*.png"))) == 4
    report = json.loads((out / "report" / "report.json").read_text())
    row = next(one for one in report["sets"] if one["name"] == arm)
    assert torch.tensor(row["against"]["teacher"]["gain_db"]["HF"]["value"]).isfinite()
    network = load_pipeline(str(student), device="cpu").student.network
    assert network.routing.query == query
    moved = [value for key, value in network.state_dict().items() if ".dar." in key and key.endswith("query")]
    assert bool(moved) == (arm == "dar") and all(value.any() for value in moved)
