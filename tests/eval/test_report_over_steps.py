"""A report over students of 1, 2 and 4 steps: each beside its own undistilled twin, all against one reference."""

import colorsys
import dataclasses
import io
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image

from dmd_dar import config
from dmd_dar.errors import UserError
from dmd_dar.methods.generate import few_step_generator, ode_generator
from dmd_dar.methods.solvers import Solver
from eval import report
from eval.measure import suite
from eval.measure.results import jsonable
from eval.metrics.classifier import fit_classifier
from eval.metrics.spectrum import hf_gain_db, spectrum_of
from eval.page import drawing, over_calls
from eval.page.cells import number
from eval.page.csv import numbers
from eval.page.figures import styles
from eval.page.html import templates
from eval.page.sections import chart_sections
from eval.report import ReportConfig
from eval.samples.parallel import Processes
from eval.study import inputs
from tests.eval.over_steps import RUNGS, finished, loud_teacher, velocity_of
from tests.eval.page.test_html import contrast

CPU, SOLVER = torch.device("cpu"), Solver(solver_steps=2)
TWINS = {
    "undistilled, 1 step": (1, "deterministic"),
    "undistilled, 2 steps, Euler": (2, "deterministic"),
    "undistilled, 2 steps, re-noised": (2, "stochastic"),
    "undistilled, 4 steps, Euler": (4, "deterministic"),
    "undistilled, 4 steps, re-noised": (4, "stochastic"),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("steps")
    loud_teacher(root / "teacher")
    return root


@pytest.fixture(scope="module")
def runs(root) -> dict[str, str]:
    """Both arms; those of 2 steps follow the ODE."""
    made = {}
    for seed, name in enumerate(("residual_1", "residual_2", "dar_2", "dar_4"), 1):
        steps = int(name[-1])
        keys = {"rungs": RUNGS[steps], "sampler": "deterministic" if steps == 2 else "stochastic"}
        made[name] = finished(root, name, seed, **keys)
    return made


def options(root: Path, *runs: str, **more) -> ReportConfig:
    argv = [f"runs=[{','.join(runs)}]", f"out={root / 'report'}", f"cache={root / 'cache'}", "n=64", "cpu=true"]
    return config.load(
        ReportConfig, [*argv, "solver_steps=2", "metrics=[offline]", *(f"{k}={v}" for k, v in more.items())]
    )


def sampled(cfg: ReportConfig) -> inputs.Inputs:
    return inputs.sampled(cfg, CPU, suite.Ledger(), Processes())


@pytest.fixture(scope="module")
def measured(root, runs) -> tuple[report.Report, inputs.Inputs]:
    """The report over all runs as it would be written, which takes longer than all else, with what it is of.

    Without real images, against which every set would be measured once more.
    """
    written = {}

    def unfit(*_: object) -> None:
        raise UserError("no images of this kind")

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(inputs, "open_fitting", unfit)
        patched.setattr(suite, "fit_classifier", partial(fit_classifier, steps=5))
        patched.setattr(report, "publish", lambda cfg, whole, made, readings: written.update(found=(whole, made)))
        report.report(options(root, *runs.values()))
    return written["found"]


def test_every_student_stands_beside_the_undistilled_teacher_of_its_own_steps(root, measured):
    whole, made = measured
    assert [row.name for row in whole.sets if row.role == "undistilled"] == list(TWINS)
    velocity = velocity_of(root)
    reference = made.bench.images(ode_generator(velocity, SOLVER)).images
    gains = {}
    for name, (steps, sampler) in TWINS.items():
        images = made.bench.images(few_step_generator(velocity, RUNGS[steps], sampler)).images
        gains[name] = hf_gain_db(spectrum_of(images), spectrum_of(reference))
        row = whole.row(name)
        assert row.against.teacher.gain_db["HF"].value == pytest.approx(gains[name], abs=1e-3)
        assert row.facts.network.evaluations == steps and row.facts.rungs == RUNGS[steps]
    assert min(abs(a - b) for a in gains.values() for b in gains.values() if a is not b) > 0.02

    assert [one.name for one in whole.checks] == ["residual_1", "residual_2", "dar_2", "dar_4"]
    for one in whole.checks:
        own = [name for name, (steps, _) in TWINS.items() if steps == int(one.name[-1])]
        distances = {name: whole.row(name).against.teacher.distances["fd_wavelet"] for name in own}
        best = min(own, key=lambda name: distances[name].value)
        assert one.baseline == best and one.hf_gain_db_baseline == pytest.approx(gains[best], abs=1e-3)
        excess = whole.row(one.name).against.teacher.distances["fd_wavelet"].excess
        if one.fd_excess_share is not None:
            assert one.fd_excess_share == pytest.approx(excess / distances[best].excess)
        assert any(line.startswith(f"{one.name}: ") and f"'{best}'" in line for line in whole.conclusions)


def test_all_are_against_one_reference_and_facts_tell_them_apart(measured):
    whole, _ = measured
    facts = {row["name"]: row["facts"] for row in jsonable(whole)["sets"]}
    assert [row.name for row in whole.sets if row.role == "teacher"] == ["teacher"]
    assert {row.against.teacher.reference for row in whole.sets if row.against.teacher} == {"teacher"}
    assert facts["teacher"]["guidance_scale"] == 1.0 and "rungs" not in facts["teacher"]
    told = {key: facts["dar_2"][key] for key in ("rungs", "guidance_scale", "sampler", "kind")}
    assert told == {"rungs": [1.0, 0.75], "guidance_scale": 1.0, "sampler": "Euler", "kind": "DAR, Euler"}
    assert facts["residual_1"]["kind"] == facts["residual_2"]["kind"] == "residual"  # one step knows no sampler
    pairs = [line for line in whole.conclusions if " against " in line.partition(":")[0]]
    assert len(pairs) == 1 and pairs[0].startswith("dar_2 against residual_2: ")
    assert any(
        "dar_4 and residual_1 differ in rungs" in line and "not a comparison" in line for line in whole.conclusions
    )
    placed = {(one.name, one.value) for one in numbers(whole) if one.metric == "evaluations"}
    assert {("undistilled, 1 step", 1), ("undistilled, 4 steps, re-noised", 4), ("dar_4", 4)} < placed


def test_quality_is_drawn_over_calls_and_milliseconds(measured):
    whole, _ = measured
    lines = {line.kind: [one.row.name for one in line.points] for line in over_calls.lines(whole)}
    assert lines == {
        "DAR, Euler": ["dar_2"],
        "DAR, re-noised": ["dar_4"],
        "residual": ["residual_1", "residual_2"],
        "undistilled, Euler": [name for name in TWINS if "re-noised" not in name],
        "undistilled, re-noised": [name for name in TWINS if "Euler" not in name],
    }
    png = over_calls.drawn(whole)
    assert min(Image.open(io.BytesIO(png)).size) > 1000
    drawn = dict.fromkeys(("gain", "bands", "psd", "maps", "calls"), png)
    first = chart_sections(whole, drawn)[0]
    assert first.heading == over_calls.HEADING
    shown = templates().from_string('{% import "parts.html" as parts %}{{ parts.figure(one) }}').render(one=first)
    for name in (*TWINS, *(one.name for one in whole.checks)):
        row = whole.row(name)
        gain, distance = row.against.teacher.gain_db["HF"], row.against.teacher.distances["fd_wavelet"]
        assert f"<td>{number(gain.value, signed=True)}<" in shown
        assert f"<td>{number(distance.value - distance.null)}<" in shown
        assert f"<td>{row.facts.network.evaluations}</td><td>{row.facts.cost.latency_ms_per_image:.4g}<" in shown


def test_a_line_runs_through_the_mean_of_equal_calls(measured):
    """|gain| of each, not of their mean: of two seeds either side of 0, the mean is no 0."""
    whole, _ = measured

    def point(calls: int, gain: float) -> over_calls.Point:
        row = whole.row("dar_2")
        facts = dataclasses.replace(row.facts, network=dataclasses.replace(row.facts.network, evaluations=calls))
        bands = row.against.teacher.gain_db
        against = dataclasses.replace(
            row.against.teacher, gain_db={**bands, "HF": dataclasses.replace(bands["HF"], value=gain)}
        )
        return over_calls.Point(dataclasses.replace(row, facts=facts), against)

    means = over_calls.Line("DAR", (point(4, -2.0), point(1, 3.0), point(4, 1.0))).means()
    assert means[:, 0].tolist() == [1, 4] and means[:, 2].tolist() == [3.0, 1.5]
    assert means[1, 1] == pytest.approx(whole.row("dar_2").facts.cost.latency_ms_per_image)


def test_students_of_one_number_of_calls_have_no_such_chart(measured):
    whole, _ = measured
    few = [row for row in whole.sets if row.name not in ("residual_1", "dar_4")]
    assert over_calls.lines(dataclasses.replace(whole, sets=few)) == []


def test_runs_of_equal_steps_keep_names_and_facts(root, runs):
    made = sampled(options(root, runs["residual_2"], runs["dar_2"]))
    names = [one.name for one in made.sets if one.role == "undistilled"]
    assert names == ["undistilled, Euler", "undistilled, re-noised"]
    facts = [one.facts.as_json() for one in made.everything]
    assert not any({"rungs", "guidance_scale", "sampler", "kind"} & one.keys() for one in facts)


def test_where_guidance_differs_the_reference_has_the_one_that_is_named(root, runs):
    guided = finished(root, "guided_2", 1, rungs=RUNGS[2], guidance_scale=2.0)
    message = r"guidance_scale is 1\.0 in residual_2, 2\.0 in guided_2; say which the reference has, guidance_scale=1"
    with pytest.raises(config.ConfigError, match=message):
        sampled(options(root, runs["residual_2"], guided))
    made = sampled(options(root, runs["residual_2"], guided, guidance_scale=2.0))
    sets = {one.name: one for one in made.sets}
    images = []
    for scale in (1.0, 2.0):
        velocity = velocity_of(root, scale)
        images.append(made.bench.images(few_step_generator(velocity, RUNGS[2], "deterministic")).images)
        twin = sets[f"undistilled, guidance {scale:g}, Euler"]
        assert torch.equal(twin.first(64), images[-1]) and twin.facts.guidance_scale == scale
    assert (images[0].int() - images[1].int()).abs().max() > 20
    reference = made.bench.images(ode_generator(velocity_of(root, 2.0), SOLVER)).images
    assert torch.equal(made.reference.first(64), reference) and made.reference.facts.guidance_scale == 2.0
    assert sets["guided_2"].facts.kind == "residual, guidance 2, re-noised"


def test_the_lines_of_the_charts_can_be_seen_and_told_apart(measured):
    whole, _ = measured
    colours = (*drawing.FURTHER, *drawing.UNDISTILLED, *drawing.VERMILIONS, *drawing.GREENS)
    assert len(set(colours)) == len(colours) and min(contrast(colour, "#ffffff") for colour in colours) >= 3
    looks = styles(whole.sets)
    assert len({(look.colour, look.dash) for look in looks.values()}) == len(looks)
    assert looks["residual_1"].colour == looks["residual_2"].colour == drawing.RESIDUAL
    assert looks["residual_2"].dash == looks["dar_2"].dash != looks["dar_4"].dash


def test_kinds_keep_the_hue_of_their_arm():
    kinds = [f"{arm}{sampler}" for arm in ("residual", "DAR") for sampler in ("", ", Euler", ", re-noised")]
    chosen = drawing.kind_colours(kinds)
    assert chosen["residual"] == drawing.RESIDUAL and chosen["DAR"] == drawing.DAR and len(set(chosen.values())) == 6
    for kind, colour in chosen.items():
        own = drawing.RESIDUAL if kind.startswith("residual") else drawing.DAR
        hues = [colorsys.rgb_to_hsv(*bytes.fromhex(one[1:]))[0] for one in (colour, own)]
        assert abs(hues[0] - hues[1]) < 0.1  # a tenth of the circle; vermilion and green are 0.38 apart


def test_a_legend_is_no_wider_than_its_figure():
    short, long = (
        ["teacher", "real", "residual", "dar", "regression"],
        [f"undistilled, {n} steps, re-noised" for n in "2468"],
    )
    assert [drawing.legend_columns(names) for names in (short, long, ["x" * 90, "y"], ["x"])] == [4, 2, 1, 1]
