"""What `dmd_dar.plan` says, against what training holds."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from dmd_dar import config, plan
from dmd_dar.distillation import job as distill
from dmd_dar.distillation.identity import Inputs
from dmd_dar.distillation.method import build_method
from dmd_dar.distillation.networks import networks_of
from dmd_dar.draws import Draws, sample_range
from dmd_dar.models.diffusers_denoiser import load_transformer
from dmd_dar.models.families.form import FixedInputs
from dmd_dar.models.footprint import nbytes, tensors
from dmd_dar.models.sit import SiT
from dmd_dar.models.teachers import Teacher, TeacherConfig, load_teacher
from dmd_dar.models.text import load_text_encoder
from dmd_dar.models.unencoded import Unencoded
from dmd_dar.routing.attach import attach
from dmd_dar.routing.layout import RoutingConfig
from dmd_dar.train.loop.ema import Ema
from dmd_dar.train.loop.optimise import Optimiser
from dmd_dar.train.processes.runtime import Runtime
from tests.models.families.test_qwen_image import tiny_qwen_image
from tests.models.tiny_pipelines import tiny_dit, tiny_pipeline, tiny_sd3
from tests.tiny import tiny_teacher

ROOT = Path(__file__).parents[1]
BATCH = 4


def load(recipe: str, *more: str) -> distill.DistillConfig:
    given = [f"config={ROOT / 'configs' / recipe}.yaml", "out_dir=unused", "launch.cpu=true", *more]
    return config.load(distill.DistillConfig, given)


def photos(recipe: str, tmp_path: Path, *more: str) -> distill.DistillConfig:
    cheap = [f"batch_size={BATCH}", "regression.count=2", "regression.solver_steps=4"]
    paths = [f"teacher.path={ROOT / 'teachers' / 'photos32'}", f"regression.cache={tmp_path}"]
    return load(f"photos32/{recipe}", *cheap, *paths, *more)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> list[str]:
    """What makes a plan of two blocks, which is quick."""
    return [f"teacher.path={tiny_teacher(tmp_path_factory.mktemp('teacher'))}", "student.routing.chunk_size=2"]


def saved_bytes(loss, weights: set[int]) -> int:
    """Distinct storages that autograd keeps for the backward pass of `loss()`, and the backward pass.

    Not those of a branch that ended before the loss, such as the last block's text, which are gone with it.
    """
    found: dict[int, tuple[StorageWeakRef, int]] = {}

    def keep(value: torch.Tensor) -> torch.Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in weights:
            found[storage.data_ptr()] = StorageWeakRef(storage), storage.nbytes()
        return value

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        value = loss()
    kept = sum(count for reference, count in found.values() if not reference.expired())
    value.backward()
    return kept


def measured(cfg: distill.DistillConfig, teacher: Teacher | None = None) -> tuple[int, int]:
    """Bytes of parameters, gradients and optimiser state of all networks, and of the tensors saved in one step."""
    teacher, runtime = teacher or load_teacher(cfg.teacher), Runtime(cfg.launch)
    networks = networks_of(cfg, teacher.network)
    method = build_method(cfg, Inputs(teacher), networks, runtime)
    every = [networks.teacher, networks.student, networks.fake_score, Ema(networks.student, *cfg.student.decays).module]
    held = {x.untyped_storage().data_ptr(): x for network in every for x in tensors(network)}
    saved, gradients, state = [], [], 0
    for network, loss in ((networks.student, method.student_loss), (networks.fake_score, method.fake_score_loss)):
        optimiser = Optimiser(
            cfg.student,
            network.backbone_parameters(),
            (network.router_parameters(), 1e-3),
            (network.rung_parameters(), 1e-3),
        )
        draws = Draws(0, "student", 0, sample_range(0, BATCH))
        saved.append(saved_bytes(lambda loss=loss, draws=draws: loss(draws)[0], set(held)))
        gradients.append(nbytes(p.grad for p in network.parameters() if p.grad is not None))
        optimiser.adamw.step()
        entries = [entry for kept in optimiser.adamw.state.values() for entry in kept.values()]
        state += nbytes(entries)
        network.zero_grad()
    return nbytes(held.values()) + max(gradients) + state, max(saved)


GAN = ("gan={weight: 0.01, feature_weight: 0.1, r1_weight: 0.1}",)


@pytest.mark.parametrize(
    "recipe, more",
    [("residual", ()), ("dar", ()), ("dar", ("weights=shared_lora",)), ("residual", GAN)],
    ids=["residual", "dar", "shared", "gan"],
)
def test_the_plan_is_within_15_percent_of_what_a_step_holds(recipe, more, tmp_path):
    cfg = photos(recipe, tmp_path, *more)
    assert sum(measured(cfg)) == pytest.approx(plan.plan_of(cfg).total, rel=0.15)


@pytest.mark.parametrize("recipe, more", [("residual", ()), ("dar", ()), ("dar", ("launch.checkpointing=true",))])
def test_a_large_batch_is_planned_from_two_small_ones_as_if_it_were_traced(recipe, more, tmp_path, tiny, monkeypatch):
    cfg = photos(recipe, tmp_path, *tiny, *more, "batch_size=24")
    traced = plan.plan_of(cfg)
    monkeypatch.setattr(plan, "FEW", 8)
    found = plan.plan_of(cfg)
    assert found.activations == pytest.approx(traced.activations, rel=1e-3)
    assert found.total == pytest.approx(traced.total, rel=0.01)


def test_without_matching_the_fake_score_has_no_part_but_its_weights(tmp_path, tiny):
    both, alone = (plan.plan_of(photos("dar", tmp_path, *tiny, *more)) for more in ((), ("matching.weight=0",)))
    assert "fake_score" not in alone.trained and alone.weights == both.weights
    assert alone.optimiser < 0.6 * both.optimiser and alone.activations < 0.6 * both.activations


def test_processes_accumulation_sharding_and_checkpointing_take_their_parts(tmp_path, tiny):
    tiny = [*tiny, "batch_size=32"]
    whole = plan.plan_of(photos("dar", tmp_path, *tiny))
    split = plan.plan_of(photos("dar", tmp_path, *tiny, "launch.processes=2", "launch.accumulation=2"))
    assert (whole.batch, split.batch) == (32, 8) and split.weights == whole.weights
    assert split.activations < 0.4 * whole.activations and split.optimiser == whole.optimiser
    sharded = plan.plan_of(photos("dar", tmp_path, *tiny, "launch.processes=4", "launch.sharding=fsdp2"))
    for part in ("weights", "gradients", "optimiser"):
        assert getattr(sharded, part) == pytest.approx(getattr(whole, part) / 4, rel=1e-3)
    less = plan.plan_of(photos("dar", tmp_path, *tiny, "launch.checkpointing=true"))
    assert less.activations < 0.4 * whole.activations


def test_a_shared_frozen_base_counts_once_and_moves_to_the_cpu(tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "footprint", lambda *given: plan.Footprint(kept=0, peak=0))
    full = plan.plan_of(photos("dar", tmp_path))
    shared = plan.plan_of(photos("dar", tmp_path, "weights=shared_lora"))
    assert shared.stored["teacher"] == full.stored["teacher"] and shared.optimiser < 0.2 * full.optimiser
    assert shared.stored["student"] == 4 * shared.parameters["student"] < 0.2 * full.stored["student"]
    away = plan.plan_of(photos("dar", tmp_path, "weights=shared_lora", "launch.offload=true", "frozen_dtype=bfloat16"))
    assert away.weights + away.cpu < shared.weights - 0.8 * away.cpu and away.cpu > 0.4 * full.stored["teacher"]


def test_xl_is_planned_without_its_files_and_says_what_fits(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plan, "footprint", lambda *given: plan.Footprint(kept=10**9, peak=10**9))
    for recipe in ("sit_xl", "dit_xl"):
        plan.main([f"config={ROOT / 'configs' / 'imagenet256' / recipe}.yaml", "launch.accumulation=32"])
        said = capsys.readouterr().out
        assert "675,129,632" in said and "24 GB no" in said and "40 GB yes" in said and "141 GB yes" in said


def test_names_of_public_networks_say_their_shape():
    network = plan.outline(TeacherConfig(path="nowhere/DiT-B-4-512x512.pt"))
    assert isinstance(network, SiT) and next(network.parameters()).is_meta
    shape = network.config
    assert (shape.width, shape.depth, shape.patch, shape.input_size, shape.learn_sigma) == (768, 12, 4, 64, True)


def test_a_diffusers_teacher_is_planned_without_computing(tmp_path):
    pipeline = tiny_pipeline(tmp_path / "pipeline")
    cfg = load("imagenet256/sit_xl", f"teacher.path={pipeline}", "teacher.prediction=auto", "teacher.codec=")
    cfg = replace(cfg, batch_size=2)
    found = plan.plan_of(cfg)
    assert found.trained["student"] > found.trained["fake_score"] > 0 and found.activations > 0
    routed: Any = attach(tiny_dit(), RoutingConfig("timestep", 4), check=False)
    routed.save_pretrained(tmp_path / "routed")
    planned = plan.plan_of(replace(cfg, teacher=replace(cfg.teacher, path=str(tmp_path / "routed"), prediction="dit")))
    assert planned.trained["student"] > 0


MAKERS = {"sd3": (tiny_sd3, ()), "qwen": (tiny_qwen_image, ("teacher.input_size=8",))}


@pytest.mark.parametrize("name", MAKERS)
def test_a_pipeline_is_planned_by_its_configurations_alone_as_a_step_of_it_holds(tmp_path, name):
    make, more = MAKERS[name]
    whole = make(tmp_path / "whole")
    bare = tmp_path / "bare"
    shutil.copytree(
        whole, bare, ignore=lambda folder, names: [one for one in names if not one.endswith(".json") and "." in one]
    )
    assert not list(bare.rglob("*.safetensors"))
    given = ["teacher.prediction=auto", "teacher.codec=", "student.routing.chunk_size=2", f"batch_size={BATCH}", *more]
    given += ["matching.weight=1", "regression.weight=0", "regression.end_weight=0", "preflight=false"]
    cfg = load("imagenet256/sit_xl", f"teacher.path={bare}", *given)
    found = plan.plan_of(cfg)
    prompts = plan.outline(cfg.teacher).prompts
    assert isinstance(prompts, Unencoded)
    fixed = FixedInputs(8 if name == "qwen" else 0)
    network = load_transformer(whole / "transformer", prompts, fixed)
    held, saved = measured(cfg, Teacher(network, "flow", "digest"))
    assert saved == pytest.approx(found.activations, rel=0.15)
    assert held == pytest.approx(found.total - found.activations - found.backward, rel=0.15)
    assert found.encoders == encoders_of(whole)
    assert f"{found.encoders['text_encoder']:,} parameters" in plan.table(found)


def encoders_of(folder: Path) -> dict[str, int]:
    parts = vars(load_text_encoder(str(folder)).pipeline)
    return {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items() if name.startswith("text_")}


def test_a_hub_id_is_planned_by_what_is_fetched_of_it_its_configurations(tmp_path, monkeypatch):
    pipeline, asked = tiny_sd3(tmp_path / "pipeline"), []

    def snapshot(name: str, **given) -> str:
        asked.append((name, given["revision"], given["allow_patterns"]))
        return str(pipeline)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    network = plan.outline(TeacherConfig("someone/a-pipeline", revision="v1"))
    assert asked == [("someone/a-pipeline", "v1", ["*.json"])]
    assert next(network.parameters()).is_meta and network.shape == (4, 8, 8)
    for weights in pipeline.rglob("*.safetensors"):
        weights.unlink()
    sized = load("imagenet256/sit_xl", "teacher.path=someone/a-pipeline", "teacher.codec=", "height=8", "width=16")
    assert plan.largest_of(sized, network) == (4, 4, 8)  # a latent cell is 2 x 2 pixels, says the VAE's config.json
    named = load("imagenet256/sit_xl", f"teacher.codec={pipeline}", "teacher.path=nowhere/SiT-XL-2.pt", "height=8")
    assert plan.largest_of(named, network) == (4, 4, 8)


def test_of_a_shared_base_in_parts_nothing_else_is_divided(tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "footprint", lambda *given: plan.Footprint(kept=0, peak=0))
    shared = ("weights=shared_lora", "batch_size=16")
    whole = plan.plan_of(photos("dar", tmp_path, *shared))
    split = plan.plan_of(photos("dar", tmp_path, *shared, "launch.processes=4", "launch.sharding=fsdp2"))
    assert (split.optimiser, split.gradients) == (whole.optimiser, whole.gradients)
    assert whole.weights - split.weights == pytest.approx(0.75 * whole.divided, rel=1e-6)
    assert 0.8 * whole.stored["teacher"] < whole.divided < whole.stored["teacher"]


@pytest.mark.parametrize(
    "wrong, said", [("teacher.path=nowhere", "teacher.path"), ("launch.accumulation=3", "batch_size")]
)
def test_mistakes_are_one_line(tmp_path, wrong, said, capsys):
    with pytest.raises(SystemExit) as stop:
        plan.main([f"config={ROOT / 'configs' / 'photos32' / 'dar'}.yaml", wrong])
    message = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(message) == 1 and said in message[0]
