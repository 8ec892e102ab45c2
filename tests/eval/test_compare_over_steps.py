"""One command over students of 1 and 2 steps: an endpoint for each, as if it were alone but for Holm's correction."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dmd_dar import config
from dmd_dar.methods.generate import few_step_generator, ode_generator
from dmd_dar.methods.solvers import Solver
from dmd_dar.models.denoiser import velocity_of as student_velocity
from dmd_dar.models.saved import load_network
from eval import compare
from eval.compare import CompareConfig
from eval.metrics.intervals import holm
from eval.metrics.spectrum import hf_gain_db, spectrum_of
from eval.page.cells import minus
from eval.page.summaries import findings
from eval.samples.images import UnfitError
from eval.samples.sampling import Bench
from eval.study import endpoint, sampled
from eval.study.few_steps import FewSteps
from eval.study.forest import from_file
from eval.study.pairing import read_groups
from eval.study.records import read_studies, read_study
from tests.eval.over_steps import RUNGS, finished, loud_teacher, velocity_of
from tests.tiny import tiny_sit

METHODS = ("two-level bootstrap", "Student-t", "inverted sign-flip")


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """residual_STEPS_SEED and dar_STEPS_SEED; those of two steps follow the ODE."""
    root = tmp_path_factory.mktemp("steps")
    loud_teacher(root / "teacher")
    for place, arm in enumerate(("residual", "dar")):
        for steps in (1, 2):
            for seed in (0, 1):
                sampler = "deterministic" if steps == 2 else "stochastic"
                number = 1 + 4 * place + 2 * steps + seed
                finished(root, f"{arm}_{steps}_{seed}", number, rungs=RUNGS[steps], seed=seed, sampler=sampler)
    return root


def options(root: Path, *steps: int, out: str = "compare", dar: tuple[str, ...] = (), **more: Any) -> CompareConfig:
    """Over both seeds of these steps; `dar` in place of that arm."""
    names = {arm: [f"{arm}_{n}_{seed}" for n in steps for seed in (1, 0)] for arm in ("residual", "dar")}
    names["dar"] = list(dar) or names["dar"]
    argv = [f"arms.{arm}=[{','.join(str(root / name) for name in given)}]" for arm, given in names.items()]
    argv += [f"out={root / out}", "n=64", "solver_steps=2", f"cache={root / 'cache'}", "cpu=true"]
    return config.load(CompareConfig, [*argv, *(f"{name}={value}" for name, value in more.items())])


@pytest.fixture(scope="module")
def written(root) -> dict[str, Any]:
    """compare.json over both steps and, as "alone", that over two steps. Simulations of coverage are left out."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(endpoint, "coverage_of", lambda arms, seed: dict.fromkeys(METHODS, 0.95))
        patched.setattr(sampled, "unfreezable", lambda network: "not in this test")
        compare.compare(options(root, 2, 1))
        compare.compare(options(root, 2, out="alone"))
    read = {name: json.loads((root / name / "compare.json").read_text()) for name in ("compare", "alone")}
    return {**read["compare"], "alone": read["alone"]}


def test_every_number_of_steps_has_its_own_endpoint(root, written):
    bench = Bench.of(options(root, 2, 1), tiny_sit(), torch.device("cpu"))
    reference = spectrum_of(bench.images(ode_generator(velocity_of(root), Solver(solver_steps=2))).images)
    assert list(written["steps"]) == ["1 step", "2 steps"]
    found = []
    for steps, one in zip((1, 2), written["steps"].values(), strict=True):
        sampler = "Euler" if steps == 2 else None
        assert one["few_steps"] == {"rungs": list(RUNGS[steps]), "guidance_scale": 1.0, "sampler": sampler}
        for seed, row in enumerate(one["primary"]["per_seed"]):
            for arm in ("residual", "dar"):
                network, card = load_network(root / f"{arm}_{steps}_{seed}" / "student")
                velocity = student_velocity(network, card.prediction)
                images = bench.images(few_step_generator(velocity, card.rungs, card.sampler)).images
                found.append(hf_gain_db(spectrum_of(images), reference))
                assert row["seed"] == seed and row["gain_db"][arm] == pytest.approx(found[-1], abs=1e-3)
        assert [Path(row["folder"]).name for row in one["runs"]["dar"]] == [f"dar_{steps}_{seed}" for seed in (0, 1)]
    assert min(abs(a - b) for i, a in enumerate(found) for b in found[:i]) > 2e-3


def test_the_primaries_are_one_family_and_the_rest_is_that_of_each_alone(root, written):
    steps, alone = written["steps"], written["alone"]
    adjusted = holm({title: one["primary"]["p"] for title, one in steps.items()})
    assert {title: one["primary"]["p_holm"] for title, one in steps.items()} == adjusted
    assert "steps" not in alone and "few_steps" not in alone and "p_holm" not in alone["primary"]
    same = {name: value for name, value in steps["2 steps"]["primary"].items() if name != "p_holm"}
    assert same == alone["primary"] and steps["2 steps"]["secondaries"] == alone["secondaries"]
    assert (written["schema_version"], alone["schema_version"]) == (3, 2)
    assert written["reference"] == alone["reference"] and written["provenance"]["contract_hash"]
    assert written["label"] == alone["label"] and written["label"].startswith("pilot")
    for title, one in steps.items():
        assert f"{title}: Pilot: 2 training seeds cannot decide" in written["conclusion"]
        assert "(1 after Holm's correction over the steps)" in one["conclusion"]
    assert "none of 2 tests can pass Holm's correction (p is at least 1)" in written["conclusion"]


def test_its_files_are_read_back(root, written):
    path = root / "compare" / "compare.json"
    names = {
        f"{arm}_{n}_seed{seed}.json" for arm in ("residual", "dar") for n in ("1_step", "2_steps") for seed in (0, 1)
    }
    assert {one.name for one in (root / "compare" / "runs").iterdir()} == names
    studies = read_studies(path)
    assert studies["2 steps"].few_steps == FewSteps(RUNGS[2], 1.0, "Euler")
    assert list(read_studies(root / "alone" / "compare.json")) == [""]
    with pytest.raises(UnfitError, match="compares 1 step, 2 steps; read_studies gives each"):
        read_study(path)
    drawn = from_file(path)
    assert [one.steps for one in drawn.comparisons] == ["1 step", "2 steps"] and drawn.curve is None
    told = SimpleNamespace(forest=drawn, discretisation=None, conclusions=[])
    assert findings(told) == [minus(written["conclusion"])]  # type: ignore[arg-type]
    assert drawn.comparisons[1].difference_db.value == studies["2 steps"].primary.difference_db.value


def test_runs_without_a_partner_of_their_steps_are_refused(root, tmp_path):
    missing = options(root, 1, 2, dar=("dar_1_0", "dar_1_1"))
    message = r"arms\.residual: .*residual_2_0 has rungs = \[1\.0, 0\.75\], but no run in arms\.dar has it"
    with pytest.raises(config.ConfigError, match=message):
        read_groups(missing.arms)
    uneven = options(root, 1, 2, dar=("dar_1_0", "dar_1_1", "dar_2_0"))
    with pytest.raises(config.ConfigError, match=r"arms\.dar: no run of seed = 1, the partner of .*residual_2_1"):
        read_groups(uneven.arms)
    twice = shutil.copytree(root / "dar_2_0", tmp_path / "again")
    double = options(root, 1, 2, dar=("dar_1_0", "dar_1_1", "dar_2_0", "dar_2_1", str(twice)))
    with pytest.raises(config.ConfigError, match=r"arms\.dar: .* both have seed = 0; name one run for each"):
        read_groups(double.arms)
    argv = [f"arms.{arm}=[{root}/{arm}_1_0,{root}/{arm}_2_1]" for arm in ("residual", "dar")]
    one_seed = config.load(CompareConfig, argv)
    with pytest.raises(config.ConfigError, match=r"arms\.residual names 1 runs of rungs = \[1\.0\]: name 2 to 16"):
        read_groups(one_seed.arms)
