"""The command over real runs of tiny networks: pairing by seed, the numbers it writes, and what it refuses."""

import contextlib
import dataclasses
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from dmd_dar import config
from dmd_dar.distillation import job as distill
from dmd_dar.flow import Schedule
from dmd_dar.methods.generate import few_step_generator
from dmd_dar.methods.solvers import Solver
from dmd_dar.models import teachers
from dmd_dar.models.denoiser import Meaning, velocity_of
from dmd_dar.models.saved import ModelCard, load_network, save_network
from dmd_dar.models.sit import with_routing
from dmd_dar.routing.layout import RoutingConfig
from dmd_dar.spectrum import radial_psd
from eval import compare
from eval.compare import CompareConfig
from eval.measure.provenance import contract_hash
from eval.metrics.intervals import holm
from eval.metrics.spectrum import hf_gain_db, spectrum_of
from eval.samples.sampling import Bench
from eval.samples.sets import ImageSet
from eval.study import pairing, twins
from eval.study import runs as arms
from eval.study.controls import frozen_at_mean
from eval.study.differences import _log_distance, conclude, paired
from eval.study.pairing import ArmsConfig, read_groups
from eval.study.records import read_study, text_of
from eval.study.sampled import AT_MEAN, SampledNetwork, SampledSet, Study, Yardstick, against_teacher, seed_students
from eval.study.wording import seed_table
from tests.eval.opened import of, weights_opened
from tests.eval.study.rows import network_row
from tests.tiny import tiny_sit, tiny_teacher

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "configs" / "photos32"
QUERIES = {"residual": "residual", "dar": "timestep", "frozen": "static"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """residual_0, residual_1, dar_0 ... of two training seeds, two steps each."""
    root = tmp_path_factory.mktemp("runs")
    folder = tiny_teacher(root / "teacher")
    for name in QUERIES:
        for seed in (0, 1):
            distill.main(
                [
                    f"config={RECIPES / f'pilot_{name}.yaml'}",
                    f"teacher.path={folder}",
                    f"out_dir={root / f'{name}_{seed}'}",
                    f"seed={seed}",
                    f"regression.cache={root / 'pairs'}",
                    "steps=2",
                    "batch_size=4",
                    "student.lr=0.03",
                    "student.warmup=0",
                    "student.ema=0.0",
                    "student.routing.chunk_size=2",
                    "student.routing.lr=3.0",
                    "fake_score.updates=1",
                    "regression.count=4",
                    "regression.solver_steps=4",
                    "launch.cpu=true",
                    "preflight=false",
                    "log.health_samples=4",
                    "checkpoint.students=[1]",
                ]
            )
    return root


def words(root: Path, folder: str = "", **groups: tuple[str, ...]) -> list[str]:
    given = {"residual": ("residual_0", "residual_1"), "dar": ("dar_1", "dar_0"), **groups}
    argv = [f"arms.{role}=[{','.join(str(root / name) for name in names)}]" for role, names in given.items()]
    place = root / folder
    return [*argv, f"out={place / 'compare'}", "n=70", "solver_steps=2", f"cache={place / 'cache'}", "cpu=true"]


def options(root: Path, **groups: tuple[str, ...]) -> CompareConfig:
    return config.load(CompareConfig, words(root, **groups))


@pytest.fixture(scope="module")
def written(runs) -> dict:
    with weights_opened() as opened:
        compare.compare(options(runs, frozen=("frozen_0", "frozen_1")))
    written = json.loads((runs / "compare" / "compare.json").read_text())
    return {**written, "opened": opened}


def test_students_kept_on_the_way_are_compared_with_those_of_the_same_step(runs):
    kept = {
        arm: [str(runs / f"{arm}_{seed}" / "student_step_00000001") for seed in (0, 1)] for arm in ("residual", "dar")
    }
    (group,) = read_groups(ArmsConfig(residual=tuple(kept["residual"]), dar=tuple(kept["dar"]))).values()
    assert [run.updates for runs in group.values() for run in runs] == [1] * 4
    assert group["dar"][1].name == "dar_1_step_00000001" and group["dar"][1].home == runs / "dar_1"
    last = arms.read_run(str(runs / "dar_1"))
    assert last.updates == 2 and last.saved.digest != group["dar"][1].saved.digest
    with pytest.raises(config.ConfigError, match="is a student of 2 steps"):
        read_groups(ArmsConfig(residual=tuple(kept["residual"]), dar=tuple(str(runs / f"dar_{s}") for s in (0, 1))))
    with pytest.raises(config.ConfigError, match="holds no config.yaml"):
        arms.read_run(str(runs / "dar_0" / "checkpoints"))


def test_gains_are_those_of_the_runs_paired_by_seed(runs, written):
    """Against images made here from the same noise: whatever the order on the command line, seeds meet."""
    cfg, device = options(runs), torch.device("cpu")
    (arm,) = arms.read_runs((str(runs / "dar_0"),))
    teacher = arms.GuidedTeacher.of(arm, device)
    bench = Bench.of(cfg, teacher.network, device)
    reference = teacher.sample_set(bench, Solver(solver_steps=2)).images
    powers, apart = {"residual": [], "dar": []}, []
    for seed, row in enumerate(written["primary"]["per_seed"]):
        expected = {}
        for role in ("residual", "dar"):
            network, card = load_network(runs / f"{role}_{seed}" / "student")
            made = bench.images(few_step_generator(velocity_of(network, card.prediction), card.rungs))
            expected[role] = hf_gain_db(spectrum_of(made.images), spectrum_of(reference))
            powers[role].append(radial_psd(made.images.double() / 255)[1])
        assert row["seed"] == seed and row["gain_db"] == pytest.approx(expected, abs=1e-3)
        difference = abs(expected["residual"]) - abs(expected["dar"])
        assert row["difference_db"]["value"] == pytest.approx(difference, abs=1e-3)
        apart.append(abs(difference))
    assert max(apart) > 0.02  # so that a wrong sign would show

    curve, theirs = written["primary"]["curve"], radial_psd(reference.double() / 255)[1]
    gains = {role: 10 * torch.log10(torch.stack(found) / theirs) for role, found in powers.items()}
    for role, gain in gains.items():
        assert curve[role]["value"] == pytest.approx(gain.mean(0).tolist(), abs=2e-3)
    nearer = (gains["residual"].abs() - gains["dar"].abs()).mean(0)
    assert curve["difference"]["value"] == pytest.approx(nearer.tolist(), abs=2e-3) and nearer.abs().max() > 0.02
    assert len(curve["frequencies"]) == len(theirs) == len(curve["difference"]["low"])


@pytest.mark.slow
def test_two_processes_compare_as_one(runs, written):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--master_addr=127.0.0.1"]
    command = [sys.executable, *launcher, f"--master_port={port}", "-m", "eval.compare"]
    command += words(runs, "two", frozen=("frozen_0", "frozen_1"))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert ran.stdout.count("written: ") == 1 and "Traceback" not in ran.stderr
    two = json.loads((runs / "two" / "compare" / "compare.json").read_text())
    assert two["runs"].keys() == written["runs"].keys() and two["controls"].keys() == written["controls"].keys()
    for ours, theirs in zip(two["primary"]["per_seed"], written["primary"]["per_seed"], strict=True):
        assert ours["gain_db"] == pytest.approx(theirs["gain_db"], abs=0.01)
    assert all(row["latency_ms_per_image"] > 0 for rows in two["runs"].values() for row in rows)


def test_each_network_is_hashed_and_loaded_once(runs, written):
    for name in ("teacher", *(f"{role}_{seed}/student" for role in QUERIES for seed in (0, 1))):
        assert of(written["opened"], runs / name) == {"hash": 1, "load": 1}, name


def test_two_seeds_are_a_pilot_everywhere(runs, written):
    assert written["label"].startswith("pilot") and written["primary"]["pilot"]
    assert written["conclusion"].startswith("Pilot: 2 training seeds cannot decide")
    assert seed_table(read_study(runs / "compare" / "compare.json")).startswith("PILOT")
    assert all(control["pilot"] for control in written["controls"].values())
    assert written["primary"]["p"] >= written["primary"]["least_p"] == 0.5


def test_secondaries_are_residual_minus_dar_and_controls_a_family_of_their_own(written):
    rows, secondaries, controls = written["runs"], written["secondaries"], written["controls"]
    lsd = [sum(row["lsd"] for row in rows[arm]) / 2 for arm in ("residual", "dar")]
    assert secondaries["lsd"]["difference"]["value"] == pytest.approx(lsd[0] - lsd[1])
    for family in (secondaries, controls):
        tested = {name: one["p"] for name, one in family.items() if one["p"] is not None}
        assert {name: family[name]["p_holm"] for name in tested} == holm(tested) and len(tested) > 1
    costs = written["costs"]
    latency = [sum(row["latency_ms_per_image"] for row in rows[arm]) / 2 for arm in ("residual", "dar")]
    assert costs["latency_ms"]["difference"]["value"] == pytest.approx(latency[0] - latency[1])
    assert "p_holm" not in costs["latency_ms"]
    assert list(costs) == ["latency_ms", "peak_memory_mb", "gflops", "training_step_seconds", "parameters"]
    for arm in ("residual", "dar"):
        assert all(row["peak_memory_mb"] > 0 and row["gflops_per_image"] > 0 for row in rows[arm])
        for row in rows[arm]:
            log = [json.loads(line) for line in (Path(row["folder"]) / "log.jsonl").read_text().splitlines()]
            assert row["training_step_seconds"] == pytest.approx(1 / log[-1]["steps_per_second"])
    assert 0 < -costs["gflops"]["difference"]["value"] < 0.1 * costs["gflops"]["residual"]
    assert all(f"times the {what}" in written["conclusion"] for what in ("peak memory", "FLOPs", "time of a training"))
    assert costs["parameters"]["difference"]["value"] == -rows["dar"][0]["router_parameters"]


def test_frozen_routers_are_other_networks_of_the_same_runs(written):
    assert list(written["controls"]) == ["frozen_at_mean", "frozen"]
    trained, held = written["runs"]["dar"], written["runs"]["frozen_at_mean"]
    assert [row["folder"] for row in trained] == [row["folder"] for row in held]
    assert trained[0]["gain_db"]["HF"] != held[0]["gain_db"]["HF"]
    assert trained[0]["router_parameters"] > held[0]["router_parameters"] > 0
    assert "parameter-matched" not in written["conclusion"]  # routers add less than 1 % here


@pytest.mark.parametrize(
    ("prediction", "times"),
    [
        ("flow", (1.0, 0.5)),
        ("sit", (0.0, 0.5)),
        ("dit", tuple(Schedule().timestep(torch.tensor([1.0, 0.5], dtype=torch.float64)).tolist())),
        (Meaning("flow", time_scale=1000.0), (1000.0, 500.0)),
        (Meaning("eps", time_scale=10.0), (9.99, 5.0)),
    ],
    ids=str,
)
def test_routers_are_held_at_the_times_that_the_network_is_asked(prediction, times):
    """One rung after another: frozen there, a student makes what it made at that rung alone."""
    network = with_routing(tiny_sit(), RoutingConfig("timestep", 2)).eval()
    with torch.no_grad():
        network.dar.gate.normal_(std=40.0, generator=torch.Generator().manual_seed(1))

    class Run:
        def student(self, device):
            return teachers.Teacher(network, prediction, "digest", rungs=(1.0, 0.5))

    held = seed_students({"dar": Run()}, torch.device("cpu"))[AT_MEAN].network
    torch.testing.assert_close(held.dar.query, frozen_at_mean(network, times).dar.query, rtol=1e-4, atol=1e-6)


def test_resetting_the_routers_shows_what_they_did(runs, written):
    network, card = load_network(runs / "dar_0" / "student")
    bench = Bench.of(options(runs), network, torch.device("cpu"))
    images = []
    for _ in range(2):
        images.append(bench.images(few_step_generator(velocity_of(network, card.prediction), card.rungs)).images)
        network.dar.reset()
    shift = written["runs"]["dar"][0]["reset_shift_db"]
    assert shift == pytest.approx(hf_gain_db(*map(spectrum_of, images[::-1])), abs=1e-3) and abs(shift) > 0.01


def test_a_matched_arm_of_another_size_is_refused(tmp_path):
    found = []
    for query in ("residual", "dynamic"):
        save_network(tmp_path / query / "student", with_routing(tiny_sit(), RoutingConfig(query, 2)), ModelCard())
        found.append(arms.Run(query, tmp_path / query, distill.DistillConfig(), {}))
    with pytest.raises(config.ConfigError, match=r"arms\.matched: .*residual has \d+ parameters, .*dynamic .* has \d+"):
        pairing._require_same_size(*found)
    pairing._require_same_size(found[0], found[0])


def test_the_command_is_told_so_that_it_can_be_given_again(runs, written):
    cfg = options(runs, frozen=("frozen_0", "frozen_1"))
    command = written["provenance"]["command"]
    assert config.load(CompareConfig, command.removeprefix("python -m eval.compare ").replace("'", "").split()) == cfg


def test_provenance_is_that_of_a_report_and_goes_with_every_run(runs, written):
    origin = written["provenance"]
    assert {"commit", "dirty"} == origin["git"].keys() and origin["contract_hash"] == contract_hash()
    assert {"torch", "numpy", "scipy"} <= origin["versions"].keys() and origin["seconds"] > 0
    assert origin["configs"][str(runs / "dar_0")]["student"]["routing"]["query"] == "timestep"
    record = json.loads((runs / "compare" / "runs" / "dar_seed0.json").read_text())
    assert record["provenance"] == {name: origin[name] for name in ("git", "contract_hash", "versions")}
    assert written["schema_version"] == 2


def changed(run: Path, folder: Path, name: str, value: object) -> str:
    """A copy of a run whose configuration says otherwise in one key."""
    shutil.copytree(run, folder, ignore=shutil.ignore_patterns("checkpoints", "samples"))
    saved = OmegaConf.load(folder / "config.yaml")
    OmegaConf.update(saved, name, value)
    OmegaConf.save(saved, folder / "config.yaml")
    return str(folder)


@pytest.mark.parametrize(
    ("role", "name", "value"),
    [
        ("dar", "rungs", [1.0, 0.9, 0.7, 0.5]),
        ("dar", "guidance_scale", 1.5),
        ("dar", "data.size", 64),
        ("dar", "matching.weight", 0.5),
        ("dar", "student.lr", 1e-3),
        ("residual", "batch_size", 8),
        ("residual", "launch.precision", "bf16"),
        ("frozen", "student.routing.lr", 1.0),
        ("matched", "student.ema", 0.5),
    ],
)
def test_runs_that_differ_in_more_than_their_arm_are_refused(runs, tmp_path, role, name, value):
    groups = {one: tuple(str(runs / f"{one}_{seed}") for seed in (0, 1)) for one in QUERIES}
    groups["matched"] = groups["residual"]
    for changes in ((0, 1), (1,)):  # the whole arm, or one run of it
        new = list(groups[role])
        for seed in changes:
            source = Path(groups[role][seed])
            new[seed] = changed(source, tmp_path / f"{len(changes)}{role}_{seed}", name, value)
        with pytest.raises(config.ConfigError, match=rf"arms\.\w+: .* has {name} = .*, but .* has ") as error:
            read_groups(ArmsConfig(**{**groups, role: tuple(new)}))
        assert str(value) in str(error.value)


def test_book_keeping_may_differ_and_a_residual_arm_of_the_same_size_is_a_matched_one(runs, tmp_path):
    dar = tuple(changed(runs / f"dar_{s}", tmp_path / f"dar_{s}", "log.every", 3 + s) for s in (1, 0))
    (groups,) = read_groups(
        options(runs, dar=dar, matched=("residual_0", "residual_1"), frozen=("frozen_1", "frozen_0")).arms
    ).values()
    assert all([run.cfg.seed for run in group] == [0, 1] for group in groups.values()) and len(groups) == 4


def test_machines_may_differ_for_both_commands_and_precision_for_neither():
    base = distill.DistillConfig()
    for changes, unequal in (
        ({"processes": 2, "checkpointing": True}, []),
        ({"precision": "bf16"}, ["launch.precision"]),
    ):
        other = dataclasses.replace(base, launch=dataclasses.replace(base.launch, **changes))
        assert twins.unequal(base, other) == unequal
        runs = [arms.Run(name, Path(name), cfg, {}) for name, cfg in (("a", base), ("b", other))]
        with pytest.raises(config.ConfigError, match="precision") if unequal else contextlib.nullcontext():
            pairing._require_same_keys("dar", runs[0], "dar", runs[1], ())


def test_wrong_seeds_arms_and_folders_are_named(runs, tmp_path):
    other = changed(runs / "dar_1", tmp_path / "dar_7", "seed", 7)
    twin = changed(runs / "dar_0", tmp_path / "dar_9", "seed", 9)
    pairs = {"residual": ("residual_0", "residual_1")}
    for dar, message in (
        (("dar_0", other), r"arms\.dar: no run of seed = 1, the partner of .*residual_1 in arms\.residual"),
        (("dar_0", "dar_0"), r"arms\.dar: .*dar_0 and .*dar_0 both have seed = 0"),
        (("dar_0", twin), r"arms\.dar: .*dar_0 and .*dar_9 hold the same student"),
        (("dar_0", "residual_1"), r"arms\.dar: .*residual_1 has student.routing.query = residual, where timestep"),
        (("dar_0", "teacher"), r"arms\.dar: .*teacher holds no config.yaml"),
    ):
        with pytest.raises(config.ConfigError, match=message):
            read_groups(options(runs, **pairs, dar=dar).arms)
    with pytest.raises(config.ConfigError, match=r"arms\.dar names 1 runs: name 2 to 16"):
        options(runs, dar=("dar_0",))


def test_a_run_on_other_data_is_refused(runs, tmp_path):
    copy = Path(changed(runs / "dar_1", tmp_path / "dar_1", "log.every", 3))
    card = copy / "student" / "denoiser.json"
    card.write_text(card.read_text().replace('"data": "', '"data": "other'))
    cfg = options(runs, dar=("dar_0", str(copy)))
    with pytest.raises(config.ConfigError, match=r"arms\.dar: .*dar_1 was trained on data of hash other"):
        read_groups(cfg.arms)


def test_fewer_images_than_classes_are_compared_all_the_same():
    """64 images of 1000 classes: no class has a second image, so class diversity is told as undefined."""

    def images(seed):
        generator = torch.Generator().manual_seed(seed)
        pixels = torch.randint(0, 256, (64, 3, 32, 32), generator=generator, dtype=torch.uint8)
        return SampledSet.of(ImageSet("set", pixels, torch.arange(64), "student", True))

    teacher, sets = images(0), {"residual": [images(1), images(2)], "dar": [images(3), images(4)]}

    def measured(seed, one, arm):
        against = against_teacher(one, Yardstick(teacher, 1.0), arm)
        return SampledNetwork(network_row(seed, against=against, reset_shift_db=0.2), one)

    networks = {arm: [measured(seed, one, arm) for seed, one in enumerate(held)] for arm, held in sets.items()}
    result = conclude(Study(teacher, networks), 64, 0)
    assert result.secondaries["diversity_ratio"].skipped == "undefined for a run"
    assert result.costs["training_step_seconds"].skipped and "training step" not in result.conclusion
    for one in result.primary.per_seed:
        assert one.difference_db.high - one.difference_db.low > 0.05
    assert '"p_holm": null' in text_of(result)


def test_an_undefined_metric_is_skipped_and_the_rest_kept():
    result = paired("title", np.array([1.0, float("nan")]), np.array([1.0, 2.0]))
    assert result.p is None and result.skipped
    assert _log_distance(0.5) == pytest.approx(_log_distance(2.0)) and _log_distance(-1.0) > 1e9


def test_arms_may_differ_in_keys_that_are_named(runs):
    names = {arm: [arms.read_run(str(runs / f"{arm}_{seed}")) for seed in (0, 1)] for arm in ("residual", "dar")}
    for run in names["dar"]:
        student = dataclasses.replace(run.cfg.student, lr=0.01)
        object.__setattr__(run, "cfg", dataclasses.replace(run.cfg, student=student))
    with pytest.raises(config.ConfigError, match="student.lr"):
        pairing._require_alike(names)
    pairing._require_alike(names, ("student.lr",))
