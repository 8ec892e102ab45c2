import dataclasses
import hashlib
import json
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file

from dmd_dar import config, sample
from dmd_dar.data.config import DataConfig
from dmd_dar.data.kept import Kept
from dmd_dar.data.photos import NAMES
from dmd_dar.data.sources import open_data
from dmd_dar.distillation import identity, method
from dmd_dar.distillation import job as distill
from dmd_dar.distillation.config import DistillConfig
from dmd_dar.distillation.networks import networks_of
from dmd_dar.draws import Draws, sample_range
from dmd_dar.errors import UserError
from dmd_dar.methods.solvers import Solver
from dmd_dar.models.saved import ModelCard, load_network, network_hash, save_network
from dmd_dar.models.sit import with_routing
from dmd_dar.models.teachers import TeacherConfig, load_teacher
from dmd_dar.pairs import Recipe, make_trajectories, trajectories
from dmd_dar.routing.layout import RoutingConfig
from dmd_dar.train.disk import checkpoint, log
from dmd_dar.train.processes.runtime import LaunchConfig, Runtime
from tests.tiny import ON_CPU, TINY, tiny_sit, tiny_teacher

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "configs" / "photos32"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    return tiny_teacher(tmp_path_factory.mktemp("teacher"))


def arguments(teacher: Path, out: Path, *more: str, recipe: str = "dar") -> list[str]:
    return [
        f"config={RECIPES / recipe}.yaml",
        f"teacher.path={teacher}",
        f"out_dir={out}",
        "steps=4",
        "batch_size=4",
        "student.warmup=0",
        "student.routing.chunk_size=2",
        "fake_score.updates=2",
        "regression.count=6",
        "regression.solver_steps=4",
        f"regression.cache={out.parent / 'pairs'}",
        "log.every=1",
        "log.wandb=disabled",
        *ON_CPU,
        "preflight=false",  # random weights denoise nothing
        "log.health_samples=4",
        *more,
    ]


def run(*args, **kwargs) -> dict[str, torch.Tensor]:
    distill.main(arguments(*args, **kwargs))
    return load_file(args[1] / "student" / "transformer" / "model.safetensors")


def test_students_kept_on_the_way_are_those_of_shorter_runs(teacher, tmp_path, capsys):
    """Bit for bit, where the rate does not fall; a run that was stopped in between keeps the same ones."""
    constant = ("student.decay_steps=0", "checkpoint.students=[1,3]")
    run(teacher, tmp_path / "whole", *constant)
    run(teacher, tmp_path / "parts", *constant, "steps=3")
    run(teacher, tmp_path / "parts", *constant)
    for step in (1, 3):
        short = run(teacher, tmp_path / f"short_{step}", "student.decay_steps=0", f"steps={step}")
        for place in (tmp_path / "whole", tmp_path / "parts"):
            kept = place / f"student_step_{step:08d}"
            weights = load_file(kept / "transformer" / "model.safetensors")
            assert weights.keys() == short.keys() and all(torch.equal(weights[name], short[name]) for name in short)
            assert load_network(kept)[1].origin["steps"] == step
    with pytest.raises(SystemExit):
        run(teacher, tmp_path / "never", "checkpoint.students=[2,5]")
    assert "checkpoint.students names [5], but steps is 4" in capsys.readouterr().err


def test_both_arms_draw_the_same_numbers_for_twenty_steps(teacher, tmp_path, monkeypatch):
    hashes = []
    original = Draws._bits

    def hashing(self, name, numel):
        bits = original(self, name, numel)
        record.update(f"{self.phase} {self.step} {name} {self.samples.tolist()}".encode() + bits.numpy().tobytes())
        return bits

    monkeypatch.setattr(Draws, "_bits", hashing)
    for recipe in ("dar", "residual"):
        record = hashlib.sha256()
        run(teacher, tmp_path / recipe, "steps=20", f"regression.cache={tmp_path / recipe}", recipe=recipe)
        hashes.append(record.hexdigest())
    assert hashes[0] == hashes[1]


def test_a_run_leaves_what_a_run_folder_holds_and_its_student_samples(teacher, tmp_path, capsys):
    out = tmp_path / "run"
    run(teacher, out)
    assert [r["step"] for r in log.read(out / "log.jsonl")] == [1, 2, 3, 4]
    assert {"student/dm", "student/regression", "fake_score/loss"} <= set(log.read(out / "log.jsonl")[-1])
    assert (out / "samples" / "step_00000004.png").is_file() and (out / "config.yaml").is_file()
    network, card = load_network(out / "student")
    assert card.rungs == (1.0, 0.9, 0.75, 0.5) and network.dar is not None
    assert card.origin["steps"] == 4 and card.origin["teacher"] == network_hash(teacher)
    images = {}
    for batch in (2, 5):
        folder = tmp_path / f"images{batch}"
        argv = [f"student={out / 'student'}", f"out={folder}", "n=5", f"batch_size={batch}"]
        sample.sample(config.load(sample.SampleConfig, argv))
        images[batch] = [(folder / f"{i:06d}.png").read_bytes() for i in range(5)]
    assert images[2] == images[5] and len(set(images[2])) == 5
    assert json.loads((folder / "samples.json").read_text())["labels"] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("wrong", ["steps=2", "rungs=[1.0,0.5]", "rungs=[1.0,0.9027,0.75,0.5]", "label=7"])
def test_sampling_otherwise_than_trained_is_one_clear_error(teacher, tmp_path, wrong, capsys):
    run(teacher, tmp_path / "run")
    with pytest.raises(SystemExit) as stop:
        argv = [f"student={tmp_path / 'run' / 'student'}", f"out={tmp_path / 'images'}", wrong]
        config.run_job(sample.SampleConfig, sample.sample, argv)
    message = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and wrong.split("=")[0] in message
    assert not (tmp_path / "images").exists()


def test_a_teacher_is_no_few_step_student(teacher, tmp_path):
    cfg = config.load(sample.SampleConfig, [f"student={teacher}", f"out={tmp_path}"])
    with pytest.raises(UserError, match="no few-step student"):
        sample.sample(cfg)


@pytest.mark.parametrize("recipe", ["dar", "residual"])
def test_resumed_equals_uninterrupted_bit_for_bit(teacher, tmp_path, recipe):
    whole = run(teacher, tmp_path / "whole", "checkpoint.every=2", recipe=recipe)
    run(teacher, tmp_path / "parts", "checkpoint.every=2", "steps=2", recipe=recipe)
    parts = run(teacher, tmp_path / "parts", "checkpoint.every=2", recipe=recipe)
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    records = [log.read(tmp_path / name / "log.jsonl") for name in ("whole", "parts")]
    for ours, theirs in zip(*records, strict=True):
        assert {**ours, "steps_per_second": 0} == {**theirs, "steps_per_second": 0}


ALL_LOSSES = (
    "gan.weight=0.1",
    "gan.r1_weight=0.1",
    "gan.feature_weight=0.1",
    "gan.updates=2",
    "regression.metric=spectrum",
)
ALL_LOSSES += ("student.ema=[0.1,0.9]", "sampler=deterministic", "student_input=data", "fake_score.space=x0")
ALL_LOSSES += ("fake_score.follow=0.1",)


def test_all_losses_resume_bit_for_bit_and_every_average_is_saved(teacher, tmp_path):
    whole = run(teacher, tmp_path / "whole", *ALL_LOSSES)
    run(teacher, tmp_path / "parts", *ALL_LOSSES, "steps=2")
    parts = run(teacher, tmp_path / "parts", *ALL_LOSSES)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    slow = [load_network(tmp_path / name / "student_ema_0.9")[0].state_dict() for name in ("whole", "parts")]
    assert all(torch.equal(a, b) for a, b in zip(slow[0].values(), slow[1].values(), strict=True))
    start = load_network(teacher)[0].state_dict()
    moved = [sum((w[name] - start[name]).abs().sum().item() for name in start) for w in (whole, slow[0])]
    assert 0 < moved[1] < moved[0]
    last = log.read(tmp_path / "whole" / "log.jsonl")[-1]
    wanted = {
        "student/dm",
        "student/regression",
        "student/gan",
        "discriminator/r1",
        "fake_score/gan",
        "fake_score/flow",
    }
    assert wanted | {"student/dm_gradient", "student/gan_gradient"} <= set(last)
    assert load_network(tmp_path / "whole" / "student")[1].sampler == "deterministic"
    images = tmp_path / "images"
    argv = [f"student={tmp_path / 'whole' / 'student'}", f"out={images}", "n=1"]
    sample.sample(config.load(sample.SampleConfig, argv))
    assert json.loads((images / "samples.json").read_text())["sampler"] == "deterministic"


@pytest.mark.parametrize("recipe", ["dar", "residual"])
def test_heads_do_not_depend_on_the_arm(teacher, tmp_path, recipe):
    cfg = config.load(distill.DistillConfig, arguments(teacher, tmp_path, "gan.weight=1", recipe=recipe))
    networks = networks_of(cfg, load_network(teacher)[0])
    heads = method.build_gan(cfg, "flow", networks, lambda draws: None, torch.device("cpu")).heads
    with torch.random.fork_rng():
        torch.manual_seed(cfg.seed)
        assert torch.equal(heads.heads[0][1].weight, torch.nn.Linear(16, 256).weight)


def test_another_configuration_in_the_same_folder_is_refused(teacher, tmp_path, capsys):
    before = run(teacher, tmp_path / "run", "steps=1")
    with pytest.raises(SystemExit) as stop:
        run(teacher, tmp_path / "run", "student.lr=0.5", "seed=3")
    message = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and "student.lr" in message and "seed" in message
    after = load_file(tmp_path / "run" / "student" / "transformer" / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_run_of_before_there_were_these_keys_goes_on_as_it_was(teacher, tmp_path, capsys):
    """Fresh roll-outs, and trajectories by Heun on an even grid; the evaluation reads it so too."""
    before = ("rollouts=fresh", "regression.solver=heun", "regression.solver_grid=even")
    whole = run(teacher, tmp_path / "whole", "steps=2", *before)
    run(teacher, tmp_path / "run", "steps=1", *before)
    config_file = tmp_path / "run" / "config.yaml"
    saved = OmegaConf.load(config_file)
    for name, keys in {
        "regression": ("solver", "solver_grid", "by_rung"),
        "matching": ("above_next_rung", "start"),
    }.items():
        for one in keys:
            del saved[name][one]
    del saved["rollouts"], saved["guidance"], saved["fake_score"]["follow"], saved["checkpoint"]["students"]
    OmegaConf.save(saved, config_file)
    with pytest.raises(SystemExit) as stop:
        run(teacher, tmp_path / "run", "steps=2")
    refusal = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2
    for change in ('rollouts: "fresh" -> "shared"', 'solver: "heun" -> "dpm"', 'solver_grid: "even" -> "cosine"'):
        assert change in refusal
    read = config.from_dict(DistillConfig, config.read_saved(config_file))
    assert (read.rollouts, read.regression.solver, read.regression.solver_grid) == ("fresh", "heun", "even")
    continued = run(teacher, tmp_path / "run", "steps=2", *before)
    assert all(torch.equal(whole[name], continued[name]) for name in whole)


def test_a_replaced_teacher_is_noticed(tmp_path, capsys):
    folder = tiny_teacher(tmp_path / "teacher")
    run(folder, tmp_path / "run", "steps=1")
    save_network(folder, tiny_sit(seed=1), ModelCard(label_names=NAMES))
    with pytest.raises(SystemExit) as stop:
        run(folder, tmp_path / "run")
    assert stop.value.code == 2 and "teacher has changed" in capsys.readouterr().err


def test_sampling_does_not_mix_two_requests_in_one_folder(teacher, tmp_path, monkeypatch):
    run(teacher, tmp_path / "run", "steps=1")
    argv = [f"student={tmp_path / 'run' / 'student'}", f"out={tmp_path / 'images'}"]
    for _ in range(2):
        sample.sample(config.load(sample.SampleConfig, [*argv, "n=3"]))
    with pytest.raises(config.ConfigError, match="another request"):
        sample.sample(config.load(sample.SampleConfig, [*argv, "n=2"]))
    assert len(list((tmp_path / "images").glob("0*.png"))) == 3
    (tmp_path / "images" / "samples.json").write_text("")
    with pytest.raises(config.ConfigError, match="samples.json cannot be read .*remove the folder, or name another"):
        sample.sample(config.load(sample.SampleConfig, [*argv, "n=3"]))
    killed = tmp_path / "killed"
    monkeypatch.setattr(sample, "png_bytes", lambda image: sys.exit(9))
    with pytest.raises(SystemExit):
        sample.sample(config.load(sample.SampleConfig, [argv[0], f"out={killed}", "n=3"]))
    with pytest.raises(config.ConfigError, match="another request"):
        sample.sample(config.load(sample.SampleConfig, [argv[0], f"out={killed}", "n=3", "seed=1"]))


def test_router_rate_reaches_the_routers_alone(teacher, tmp_path):
    start = load_network(teacher)[0].state_dict()
    trained = run(teacher, tmp_path / "run", "student.lr=1e-9", "student.routing.lr=0.1", "student.ema=0")
    assert trained["dar.query"].abs().max() > 0.05
    assert all((trained[name] - value).abs().max() < 1e-6 for name, value in start.items())


def test_bf16_autocast_reaches_every_parameter_with_a_gradient(teacher):
    """A no_grad call inside autocast must not leave the later call's weights cast without a graph."""
    cfg = config.load(distill.DistillConfig, arguments(teacher, Path("unused"), "regression.weight=0"))
    opened = load_teacher(TeacherConfig(str(teacher)))
    networks = networks_of(cfg, opened.network)
    dmd = method.build_method(cfg, identity.Inputs(opened), networks, Runtime(LaunchConfig(cpu=bool(ON_CPU))))
    step = next(s for s in range(50) if Draws(0, "student", s, sample_range(0, 1)).shared_integer("rung", 4) == 3)
    with torch.autocast("cpu", torch.bfloat16):
        loss, metrics = dmd.student_loss(Draws(0, "student", step, sample_range(0, 4)))
    assert loss.dtype == torch.float32 and metrics["dm"].dtype == torch.float32
    loss.backward()
    without = [name for name, p in networks.student.named_parameters() if p.requires_grad and p.grad is None]
    assert not without


def test_images_are_opened_once_and_not_for_a_run_without_them(teacher, tmp_path, monkeypatch):
    opened = []
    monkeypatch.setattr(identity, "open_data", lambda *given: opened.append(given) or open_data(*given))
    monkeypatch.setattr(distill, "preflight", lambda *given: None)
    monkeypatch.setattr(distill, "run_cycle", lambda *given, **more: None)
    for out, count in (("without", 0), ("with", 1)):
        opened.clear()
        more = ["regression.weight=0"] + ["gan.weight=0.1", "preflight=true"] * count
        distill.main(arguments(teacher, tmp_path / out, *more))
        assert len(opened) == count


def test_a_teacher_of_other_classes_is_distilled_and_sampled(tmp_path):
    folder = tmp_path / "teacher"
    save_network(folder, tiny_sit(dataclasses.replace(TINY, num_classes=30)), ModelCard())
    run(folder, tmp_path / "run", "steps=1")
    argv = [f"student={tmp_path / 'run' / 'student'}", f"out={tmp_path / 'images'}", "n=2", "label=29"]
    sample.sample(config.load(sample.SampleConfig, argv))
    assert json.loads((tmp_path / "images" / "samples.json").read_text())["labels"] == [29, 29]


def test_a_dar_teacher_hands_its_routers_to_student_and_fake_score(tmp_path):
    routing = RoutingConfig(query="timestep", chunk_size=2)
    routed = with_routing(tiny_sit(), routing)
    torch.nn.init.normal_(routed.dar.query)
    save_network(tmp_path / "teacher", routed, ModelCard(label_names=NAMES))
    first = run(tmp_path / "teacher", tmp_path / "run", "steps=1", "student.routing.lr=1e-9", "student.lr=1e-9")
    torch.testing.assert_close(first["dar.query"], routed.dar.query.detach(), rtol=1e-4, atol=1e-6)


def test_a_dar_teacher_refuses_another_routing(tmp_path, capsys):
    routed = with_routing(tiny_sit(), RoutingConfig(query="timestep", chunk_size=2))
    torch.nn.init.normal_(routed.dar.query)
    save_network(tmp_path / "teacher", routed, ModelCard(label_names=NAMES))
    with pytest.raises(SystemExit):
        run(tmp_path / "teacher", tmp_path / "run", recipe="residual")
    assert "student.routing" in capsys.readouterr().err.splitlines()[-1]


def test_regression_alone_trains_without_a_fake_score(teacher, tmp_path):
    run(teacher, tmp_path / "run", "matching.weight=0")
    last = log.read(tmp_path / "run" / "log.jsonl")[-1]
    assert "student/regression" in last and not any(key.startswith("fake_score") for key in last)


def test_matching_may_start_late_and_the_fake_score_with_it(teacher, tmp_path):
    """Until then the run is one of regression alone, bit for bit; a run stopped in between goes on as the whole one."""
    late = ("matching.start=2", "checkpoint.every=2", "checkpoint.students=[2]")
    whole = run(teacher, tmp_path / "whole", *late)
    run(teacher, tmp_path / "parts", *late[:2], "steps=3")
    parts = run(teacher, tmp_path / "parts", *late[:2])
    assert all(torch.equal(parts[name], whole[name]) for name in whole)
    alone = run(teacher, tmp_path / "alone", "matching.weight=0", "steps=2")
    kept = load_file(tmp_path / "whole" / "student_step_00000002" / "transformer" / "model.safetensors")
    assert all(torch.equal(kept[name], alone[name]) for name in alone)
    records = log.read(tmp_path / "whole" / "log.jsonl")
    assert ["student/dm" in record for record in records] == [False, False, True, True]
    assert ["fake_score/loss" in record for record in records] == [False, False, True, True]
    state = checkpoint.load(tmp_path / "whole" / "checkpoints", 4, mapped=False)
    assert state["student"]["steps"] == 4 and state["fake_score"]["steps"] == 2 * 2


@pytest.mark.parametrize("sabotage", ["preflight", "data"])
def test_a_run_whose_teacher_or_data_is_unfit_never_begins(teacher, tmp_path, sabotage, capsys, monkeypatch):
    """The teacher's weights are random; then, images that are all one value."""
    if sabotage == "data":
        own = type(open_data(DataConfig())).batch
        monkeypatch.setattr(type(open_data(DataConfig())), "batch", lambda *given: (0 * own(*given)[0], own(*given)[1]))
    with pytest.raises(SystemExit) as stop:
        distill.main(arguments(teacher, tmp_path / "run", "preflight=true"))
    said = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and ("does not denoise its own data" if sabotage == "preflight" else "data.") in said
    assert not (tmp_path / "run").exists()


def recipe_of(**changes) -> Recipe:
    fields = {"teacher": "t", "guidance_scale": 1.0, "rungs": (1.0, 0.5), "solver": Solver(solver_steps=2)}
    return Recipe(**{**fields, "seed": 0, "count": 3, "num_classes": 7, "shape": (3, 32, 32), **changes})


def test_trajectories_are_kept_by_their_recipe_and_a_damaged_file_is_made_anew(tmp_path):
    calls, network = [], tiny_sit()

    def velocity(x_t, t, cond):
        calls.append(len(x_t))
        return network(x_t, t, cond)

    device = torch.device("cpu")
    first = trajectories(recipe_of(), velocity, str(tmp_path), device)
    made = len(calls)
    again = trajectories(recipe_of(), velocity, str(tmp_path), device)
    assert len(calls) == made and torch.equal(first.ends, again.ends) and torch.equal(first.states, again.states)
    trajectories(recipe_of(guidance_scale=2.0), velocity, str(tmp_path), device)
    assert len(calls) == 2 * made
    kept = Kept(tmp_path, recipe_of().decides()).path
    kept.write_bytes(kept.read_bytes()[:-7])
    repaired = trajectories(recipe_of(), velocity, str(tmp_path), device)
    assert len(calls) == 3 * made and torch.equal(first.ends, repaired.ends)


def test_noise_of_trajectories_and_of_evaluation_is_disjoint():
    recipe = recipe_of(count=40, shape=(1, 32, 32))
    noise = make_trajectories(recipe, lambda x, t, c: torch.zeros_like(x), torch.device("cpu")).states[:, 0]
    for phase in ("eval", "sample", "grid", "latency"):
        other = Draws(0, phase, 0, sample_range(0, 40)).normal("noise", 1, 32, 32)
        correlation = torch.corrcoef(torch.cat([noise.flatten(1), other.flatten(1)]))[:40, 40:]
        assert correlation.abs().max() < 0.2
