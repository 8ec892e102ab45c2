"""Each signal reads what was planted in the samples, and warns of it by the keys that mend it."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dmd_dar.data.kept import Kept
from dmd_dar.distillation import job as distill
from dmd_dar.draws import Draws
from dmd_dar.models.saved import load_network
from dmd_dar.train.disk import checkpoint, log
from dmd_dar.train.loop.optimise import Optimiser, OptimiserConfig
from dmd_dar.train.processes.runtime import LaunchConfig, Runtime
from dmd_dar.train.watch.advice import CALM, Advice, warnings_of
from dmd_dar.train.watch.health import Health, Panel, Samples, diversity, samples_of, signals
from tests.tiny import tiny_teacher

ROOT = Path(__file__).parents[3]
N, CLASSES, SIZE = 32, 4, 32
COND = torch.arange(N) % CLASSES


def fields(seed: int = 0) -> Tensor:
    """(N, 3, 32, 32) smooth random fields within [-1, 1], with some power in every band."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(N, 3, SIZE, SIZE, generator=generator)
    frequency = torch.hypot(torch.fft.fftfreq(SIZE)[:, None], torch.fft.rfftfreq(SIZE)[None, :])
    x = torch.fft.irfft2(torch.fft.rfft2(noise) / (frequency + 0.05), s=(SIZE, SIZE))
    return 0.25 * x / x.std()


def measured(x0: Tensor) -> Samples:
    return samples_of(x0, COND, x0)


@pytest.fixture(scope="module")
def teacher() -> Samples:
    return measured(fields())


def read(x0: Tensor, teacher: Samples) -> dict[str, float]:
    return signals(measured(x0), teacher)


def test_the_teachers_own_samples_are_healthy(teacher):
    found = read(fields(), teacher)
    zeros = ("mean_drift", "hf_gain", "log_spectral_distance", "score", "grid_peak")
    assert all(found[name] == pytest.approx(0, abs=1e-9) for name in zeros)
    assert found["std_ratio"] == pytest.approx(1) and found["diversity"] == pytest.approx(1)
    assert warnings_of(found) == {}


def test_drift_is_signed_and_in_the_teachers_deviations(teacher):
    shifted = fields()
    shifted[:, 1] -= 0.5 * teacher.std[1].item()
    found = read(shifted, teacher)
    assert found["mean_drift"] == pytest.approx(-0.5, rel=1e-4) and found["std_ratio"] == pytest.approx(1, rel=1e-4)
    assert "-0.50 standard deviations" in warnings_of(found)["mean_drift"]


def test_what_the_teacher_has_none_of_is_left_out(teacher):
    found = signals(teacher, dataclasses.replace(teacher, diversity=0.0, hf=math.nan))
    assert {"diversity", "hf_gain", "score"}.isdisjoint(found)
    assert found["log_spectral_distance"] == 0 and found["std_ratio"] == 1


@pytest.mark.parametrize(("factor", "word"), [(0.5, "lost"), (2.0, "overdone")])
def test_contrast_is_the_worst_channels_ratio(teacher, factor, word):
    scaled = fields()
    scaled[:, 2] *= factor
    found = read(scaled, teacher)
    assert found["std_ratio"] == pytest.approx(factor, rel=1e-3)
    assert f"contrast is {word}" in warnings_of(found)["std_ratio"]


def test_saturation_is_the_share_beyond_one(teacher):
    x0 = fields().clamp(-1, 1)
    x0.flatten()[: x0.numel() // 10] = 1.5
    found = read(x0, teacher)
    assert found["saturation"] == pytest.approx(0.1, abs=1e-3)
    assert "saturation 10% of values (teacher 0%)" in warnings_of(found)["saturation"]
    own = {"saturation": 0.1, "teacher_saturation": 0.09}
    assert "saturation" not in warnings_of(own)


def test_diversity_is_a_distance_within_a_condition():
    x0, cond = torch.zeros(4, 1, 2, 2), torch.tensor([0, 0, 1, 1])
    x0[1], x0[2], x0[3] = 2.0, 100.0, 101.0
    assert diversity(x0, cond) == pytest.approx(1.5)  # (2 + 1) / 2: nothing between the two conditions
    assert math.isnan(diversity(x0, torch.arange(4)))


def test_a_student_of_one_image_each_has_no_diversity(teacher):
    collapsed = fields()[:CLASSES].repeat(N // CLASSES, 1, 1, 1)
    found = read(collapsed + 0.1 * (fields() - collapsed), teacher)
    assert found["diversity"] == pytest.approx(0.1, abs=0.02)
    assert "raise fake_score.updates" in warnings_of(found)["diversity"]


@pytest.mark.parametrize("decibel", [-3.0, 3.0])
def test_the_high_band_and_the_score_are_in_decibel(teacher, decibel):
    images = (fields() + 1) / 2
    transform = torch.fft.rfft2(images)
    frequency = torch.hypot(torch.fft.fftfreq(SIZE)[:, None], torch.fft.rfftfreq(SIZE)[None, :])
    high = torch.fft.irfft2(torch.where(frequency > 0.2, transform * 10 ** (decibel / 20), transform), s=(SIZE, SIZE))
    found = read(2 * high - 1, teacher)
    assert found["hf_gain"] == pytest.approx(decibel, abs=0.25)
    assert found["score"] == pytest.approx(abs(found["hf_gain"]) + found["log_spectral_distance"])
    assert ("hf_gain" in warnings_of(found)) == (decibel > 0)


def test_a_lattice_of_columns_is_a_grid_peak(teacher):
    x0 = fields()
    x0[..., ::2] += 0.05
    found = read(x0, teacher)
    assert found["grid_peak"] > 6 and "pixel grid" in warnings_of(found)["grid_peak"]


def test_images_too_small_for_a_spectrum_have_the_other_signals():
    x0 = fields()[:, :, :16, :16]
    found = signals(measured(x0), measured(x0))
    assert {"mean_drift", "diversity", "saturation"} <= set(found) and not {"hf_gain", "score"} & set(found)


def health_of(student: Tensor, every: int = 2) -> Health:
    """A health whose student and teacher make the given samples, by their place in the batch."""
    pick = {"student": student, "teacher": fields()}
    p = torch.nn.Parameter(torch.zeros(1))

    def generator(name: str):
        return lambda cond, draws, noise: pick[name][draws.samples]

    return Health(
        every=every,
        panel=Panel(N, 0, (3, SIZE, SIZE), CLASSES, None),
        student=generator("student"),
        teacher=generator("teacher"),
        runtime=Runtime(LaunchConfig(cpu=True)),
        optimisers={"student": Optimiser(OptimiserConfig(clip=1.0), [p])},
    )


def test_what_is_measured_of_the_teacher_is_made_once_and_read_alike(tmp_path, caplog):
    caplog.set_level("INFO", logger="dmd_dar")
    student = fields() * 0.8 + 0.01
    kept, alone = Kept.of(tmp_path, torch.device("cpu"), {"teacher": "a"}), health_of(student)
    first, again = (dataclasses.replace(health_of(student), kept=kept) for _ in range(2))
    assert first.measure() == alone.measure()
    made = [record.getMessage() for record in caplog.records]

    def never(cond: Tensor, draws: Draws, noise: Tensor) -> Tensor:
        raise AssertionError("the teacher's samples are made again")

    again.teacher = never
    assert again.measure() == first.measure()
    assert "took" in made[0] and f"are those of {kept.path}" in caplog.text
    assert kept.path.stat().st_size < 10_000  # numbers and no images


def test_samples_too_small_for_a_spectrum_are_kept_alike():
    x0 = fields()[..., :8, :8]
    whole = measured(x0)
    held = Samples.of_tensors(whole.tensors())
    assert held.power is None and held.lines is None and math.isnan(held.hf)
    assert torch.equal(held.mean, whole.mean) and held.diversity == whole.diversity


def step_of(norm: float, gap: float = 1.0) -> dict[str, Tensor]:
    return {
        "student/gradient_norm": torch.tensor(norm),
        "student/fake_to_teacher_rms": torch.tensor(gap),
        "student/dm_gradient": torch.tensor(2 * gap),
        "student/loss": torch.tensor(9.0),
    }


def test_records_hold_the_steps_since_the_last_one():
    health = health_of(fields())
    assert health(1, step_of(0.5, gap=1.0), scored=False) == {}
    record = health(2, step_of(1.5, gap=3.0), scored=False)
    assert record["health/clipped_student"] == 0.5
    assert record["health/gap"] == 2.0 and record["health/dm_gradient"] == 4.0
    assert health(3, step_of(2.0), scored=True)["health/clipped_student"] == 1.0
    assert "health/best_step" not in record and "health/loss" not in record


def test_the_best_is_that_of_the_checkpoints_alone():
    health = health_of(fields(1))
    first = health(1, step_of(0.1), scored=True)
    assert first["health/best_step"] == 1 and first["health/best_score"] == first["health/score"] > 0
    health.student = health.teacher
    assert health(2, step_of(0.1), scored=False)["health/best_step"] == 1
    assert health(3, step_of(0.1), scored=True)["health/best_step"] == 3
    health.student = lambda cond, draws, noise: fields()[draws.samples] * 0.5
    last = health(4, step_of(0.1), scored=True)
    assert last["health/best_step"] == 3 and "above that of step 3" in last["health/warnings"]


def test_a_resumed_health_records_what_an_uninterrupted_one_does():
    whole, first, second = health_of(fields(1)), health_of(fields(1)), health_of(fields(1))
    for health in (whole, first):
        health(1, step_of(2.0, gap=1.5), scored=True)
        health(2, step_of(2.0), scored=False)
        health(3, step_of(0.2, gap=0.7), scored=False)
    second.restore(json.loads(json.dumps(first.state())))
    assert second(4, step_of(1.0), scored=True) == whole(4, step_of(1.0), scored=True)


def test_no_health_where_none_is_asked_for():
    health = health_of(fields(), every=0)
    health.student = health.teacher = None  # type: ignore[assignment]
    assert health(1, step_of(1.0), scored=True) == {}


def test_the_same_noise_and_labels_every_time():
    seen = []
    health = health_of(fields(), every=1)
    inner = health.student
    health.student = lambda cond, draws, noise: seen.append((cond, noise)) or inner(cond, draws, noise)
    for step in (1, 2):
        health(step, step_of(1.0), scored=False)
    assert torch.equal(seen[0][0], seen[1][0]) and torch.equal(seen[0][1], seen[1][1])
    assert torch.equal(seen[0][1], Draws(0, "health", 0, torch.arange(N)).normal("noise", 3, SIZE, SIZE))
    assert seen[0][0].tolist() == COND.tolist()


def test_a_warning_is_said_once_per_onset(capsys):
    advice, clipped = Advice(), {"clipped_student": 1.0}

    def said(found: dict[str, float], records: int) -> int:
        return sum(len(advice.on(found, None).due) for _ in range(records))

    assert [len(advice.on(clipped, None).due) for _ in range(3 * CALM)] == [1] + [0] * (3 * CALM - 1)
    assert len(advice.on(clipped, None).all) == 1 and advice.on({}, None).all == []
    assert sum(said(found, 1) for found in [clipped, {}] * CALM) == 0  # about its limit
    assert said({}, CALM - 2) == 0 and said(clipped, 1) == 0
    assert said({}, CALM) == 0 and said(clipped, 2) == 1
    other = Advice()
    other.restore(json.loads(json.dumps(advice.state())))
    assert other.on(clipped | {"hf_gain": 4.0}, None).due == advice.on({"hf_gain": 4.0}, None).due
    health = health_of(fields() * 3, every=1)
    health(1, step_of(1.0), scored=False)
    health(2, step_of(1.0), scored=False)
    told = capsys.readouterr().err
    assert told.count("warning, step 1: saturation") == 1 and "step 2" not in told


@pytest.mark.parametrize(
    ("found", "name", "part"),
    [
        ({"clipped_fake_score": 1.0}, "clipped_fake_score", "fake_score.clip sets its pace"),
        ({"clipped_discriminator": 1.0}, "clipped_discriminator", "gan.clip"),
        ({"gan_gradient": 12.0, "dm_gradient": 2.0}, "gan_gradient", "6 times that of matching: lower gan.weight"),
    ],
)
def test_what_the_steps_warn_of(found, name, part):
    assert part in warnings_of(found)[name]


def test_a_run_records_its_health_and_keeps_the_best_student(tmp_path, capsys):
    out = tmp_path / "run"
    argv = [f"config={ROOT}/configs/photos32/residual.yaml", f"teacher.path={tiny_teacher(tmp_path / 'teacher')}"]
    argv += ["steps=4", "batch_size=2", "fake_score.updates=1", "regression.weight=0", "preflight=false"]
    argv += ["log.wandb=disabled", "launch.cpu=true", f"out_dir={out}", "student.lr=0.02", "student.warmup=0"]
    argv += ["student.decay_steps=0", "student.ema=0", "checkpoint.every=1", "checkpoint.keep_last=1"]
    distill.main([*argv, "log.every=1", "log.health_every=3", "log.health_samples=8"])
    records = log.read(out / "log.jsonl")
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    names = {"gap", "dm_gradient", "mean_drift", "std_ratio", "saturation", "diversity", "hf_gain", "grid_peak"}
    names |= {"clipped_student", "clipped_fake_score", "score", "best_score", "best_step"}
    assert all(names <= {name.removeprefix("health/") for name in record} for record in records)
    best = min(records, key=lambda record: record["health/score"])["step"]
    assert records[-1]["health/best_step"] == best and best in checkpoint.steps_saved(out / "checkpoints")
    assert f"that of step {best}" in capsys.readouterr().err
    state = checkpoint.load(out / "checkpoints", best, mapped=False)["student"]["ema"]
    network, card = load_network(out / "student_best")
    kept = network.state_dict()
    assert card.origin["steps"] == best and load_network(out / "student")[1].origin["steps"] == 4
    (weights,) = state.values()
    assert all(torch.equal(weights[name], value) for name, value in kept.items())
    measured = (out / "student_best" / "README.md").read_text().split("## Measured")[1].split("## Configuration")[0]
    score = next(record["health/score"] for record in records if record["step"] == best)
    assert f"| step | {best} |" in measured and f"| health/score | {score:.6g} |" in measured
