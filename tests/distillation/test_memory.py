"""The whole job with one frozen base, with activations computed again, with frozen weights stored elsewhere."""

from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

from dmd_dar import config, load_pipeline, sample
from dmd_dar.distillation import job as distill
from dmd_dar.models.saved import load_network
from dmd_dar.models.teachers import TeacherConfig, load_teacher
from dmd_dar.train.disk import checkpoint
from tests.distillation.test_job import arguments, run, teacher  # noqa: F401
from tests.models.test_teacher_jobs import run as distil_teacher
from tests.models.tiny_pipelines import tiny_pipeline

SHARED = ("weights=shared_lora", "lora.rank=4", "student.lr=1e-2", "fake_score.lr=1e-2")


def states(out: Path) -> dict:
    root = out / "checkpoints"
    step = checkpoint.newest_whole(root)
    assert step is not None
    return checkpoint.load(root, step, mapped=False)


def test_shared_lora_trains_stops_resumes_bit_for_bit_and_samples(teacher, tmp_path):  # noqa: F811
    whole = run(teacher, tmp_path / "whole", *SHARED)
    run(teacher, tmp_path / "parts", "steps=2", *SHARED)
    parts = run(teacher, tmp_path / "parts", *SHARED)
    assert whole.keys() == parts.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)
    network, card = load_network(tmp_path / "whole" / "student")
    assert card.rungs and network.dar is not None and network.dar.query.abs().max() > 0
    start = load_network(teacher)[0].state_dict()
    assert max(float((whole[name] - value).abs().max()) for name, value in start.items()) > 1e-4
    argv = [f"student={tmp_path / 'whole' / 'student'}", f"out={tmp_path / 'images'}", "n=2"]
    sample.sample(config.load(sample.SampleConfig, argv))
    assert len(list((tmp_path / "images").glob("0*.png"))) == 2


def test_an_adapter_alone_is_handed_out_and_is_the_student_on_its_base(teacher, tmp_path):  # noqa: F811
    distill.main(arguments(teacher, tmp_path / "run", "steps=1", "export=adapter", *SHARED))
    student = tmp_path / "run" / "student"
    assert {path.name for path in student.iterdir()} == {"adapter", "README.md"}
    alone = load_pipeline(str(student / "adapter"), base=str(teacher))
    run(teacher, tmp_path / "run", "steps=1", "export=both", *SHARED)  # finished: it hands out once more
    whole = load_pipeline(str(student))
    torch.testing.assert_close(alone(n=2, seed=1), whole(n=2, seed=1), rtol=1e-4, atol=1e-4)
    run(teacher, tmp_path / "run", "steps=1", "export=merged", *SHARED)
    assert not (student / "adapter").exists() and (student / "denoiser.json").exists()


def test_a_checkpoint_of_shared_lora_holds_what_is_trained_only(teacher, tmp_path):  # noqa: F811
    run(teacher, tmp_path / "run", "steps=1", *SHARED)
    state = states(tmp_path / "run")
    for name in ("student", "fake_score"):
        own = (".lora.", "dar.", *((".rungs.",) if name == "fake_score" else ()))
        assert all(any(part in key for part in own) for key in state[name]["network"])
    assert any("dar." in key for key in state["student"]["network"])
    assert not any("dar." in key for key in state["fake_score"]["network"])
    averages = state["student"]["ema"].values()
    assert all(average.keys() == state["student"]["network"].keys() for average in averages)


@pytest.mark.parametrize("weights", [(), SHARED], ids=["full", "shared_lora"])
def test_checkpointing_and_offload_give_the_same_students(teacher, tmp_path, weights):  # noqa: F811
    plain = run(teacher, tmp_path / "plain", "steps=2", *weights)
    other = run(teacher, tmp_path / "other", "steps=2", "launch.checkpointing=true", "launch.offload=true", *weights)
    for key, value in plain.items():
        torch.testing.assert_close(other[key], value, rtol=1e-5, atol=1e-6, msg=key)


@pytest.fixture
def another_precision():
    """accelerate holds the first precision of a process for good."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_shared_lora_with_a_bfloat16_base_a_gan_and_accumulation(teacher, tmp_path, another_precision):  # noqa: F811
    more = ("frozen_dtype=bfloat16", "launch.precision=bf16", "launch.checkpointing=true", "launch.accumulation=2")
    trained = run(teacher, tmp_path / "run", "steps=2", "gan.weight=0.1", *SHARED, *more)
    assert all(value.dtype == torch.float32 and value.isfinite().all() for value in trained.values())
    moments = states(tmp_path / "run")["student"]["optimiser"]["state"]
    assert {entry["exp_avg"].dtype for entry in moments.values()} == {torch.float32}


@pytest.mark.stages("DAR", "shared_lora", family="dit")
def test_shared_lora_of_a_diffusers_pipeline(tmp_path):
    more = ("steps=1", "batch_size=2", "regression.weight=0", "teacher.prediction=auto", "launch.checkpointing=true")
    student = distil_teacher(tiny_pipeline(tmp_path / "pipeline"), tmp_path / "run", *SHARED, *more)
    network = load_teacher(TeacherConfig(str(student))).network
    assert network.config.routing.query == "timestep" and not any("lora" in name for name in network.state_dict())


@pytest.mark.parametrize("wrong", ["lora.rank=0", "lora.targets=[to_q]", "weights=lora"])
def test_mistakes_are_one_line(teacher, tmp_path, wrong, capsys):  # noqa: F811
    with pytest.raises(SystemExit) as stop:
        run(teacher, tmp_path / "run", *SHARED, wrong)
    message = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and message.startswith("error: ") and wrong.split("=")[0] in message
