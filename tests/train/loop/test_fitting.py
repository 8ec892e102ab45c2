"""`launch.microbatch`: the largest that fits, found without a trace in what is trained."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor

from dmd_dar import config
from dmd_dar.distillation import job
from dmd_dar.distillation.config import DistillConfig
from dmd_dar.errors import UserError
from dmd_dar.models.sit import SiT
from dmd_dar.train.disk import checkpoint, log
from dmd_dar.train.loop import fitting
from dmd_dar.train.loop.fitting import Rehearsal, fit_run, largest
from dmd_dar.train.loop.loop import update
from dmd_dar.train.processes.memory import out_of_memory
from dmd_dar.train.processes.runtime import LaunchConfig, Runtime
from tests.distillation.test_job import arguments
from tests.tiny import tiny_teacher
from tests.train.loop.test_loop import phase_of, states

AUTO = SimpleNamespace(launch=LaunchConfig(cpu=True, microbatch="auto"), batch_size=8)
FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.")


def run(teacher: Path, out: Path, *more: str) -> dict[str, Any]:
    """The last checkpoint of a short run with all kinds of losses."""
    losses = ("gan.weight=0.1", "gan.end_weight=0.2", "gan.ramp_steps=1", "checkpoint.every=1")
    job.main(arguments(teacher, out, "batch_size=6", "steps=2", *losses, "log.health_every=0", *more))
    steps = checkpoint.steps_saved(out / "checkpoints")
    return checkpoint.load(out / "checkpoints", steps[-1], mapped=False)


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[name], b[name]) for name in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if isinstance(a, Tensor) else a == b


@pytest.fixture
def small_gpu(monkeypatch) -> list[int]:
    """A device on which no network can train on more than two samples at a time; the sizes that were tried."""
    tried, forward, fits = [], SiT.forward, Rehearsal.fits

    def limited(self, x, *rest):
        if torch.is_grad_enabled() and len(x) > 2:
            raise FULL
        return forward(self, x, *rest)

    def noting(self, runtime, size, parts):
        tried.append(size)
        return fits(self, runtime, size, parts)

    monkeypatch.setattr(SiT, "forward", limited)
    monkeypatch.setattr(Rehearsal, "fits", noting)
    monkeypatch.setattr(fitting, "says_when_full", lambda device: True)
    return tried


def test_a_run_with_auto_is_the_run_with_the_number_found_bit_for_bit(small_gpu, tmp_path, caplog):
    teacher = tiny_teacher(tmp_path / "teacher")
    with caplog.at_level("INFO", logger="dmd_dar"):
        found = run(teacher, tmp_path / "auto", "launch.microbatch=auto")
    assert small_gpu == [6, 3, 2] and "auto: 2 of 6 samples of a process at a time; 3 did not fit" in caplog.text
    assert equal(run(teacher, tmp_path / "given", "launch.microbatch=2"), found)
    records = [log.read(tmp_path / name / "log.jsonl") for name in ("auto", "given")]
    assert records[0][0] == {"step": 0, "microbatch": 2} and len(records[0]) == 3
    for ours, theirs in zip(records[0][1:], records[1], strict=True):
        assert {**ours, "steps_per_second": 0} == {**theirs, "steps_per_second": 0}
    assert OmegaConf.load(tmp_path / "auto" / "config.yaml").launch.microbatch == 2
    continued = run(teacher, tmp_path / "auto", "launch.microbatch=auto", "steps=3")
    assert small_gpu == [6, 3, 2]  # nothing is tried again
    assert equal(run(teacher, tmp_path / "given", "launch.accumulation=3", "steps=3"), continued)
    assert [record["step"] for record in log.read(tmp_path / "auto" / "log.jsonl")] == [0, 1, 2, 3]


def test_on_a_cpu_auto_is_the_whole_batch_and_nothing_is_tried(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(Rehearsal, "fits", None)
    runtime, folder = Runtime(AUTO.launch), SimpleNamespace(cfg={"launch": {"microbatch": "auto"}})
    with caplog.at_level("INFO", logger="dmd_dar"):
        assert fit_run(AUTO, runtime, folder, Rehearsal((phase_of(),), 0)) == {}  # type: ignore[arg-type]
    assert "all 8 samples" in caplog.text and folder.cfg["launch"]["microbatch"] == "auto"
    assert [len(part) for part in runtime.micro_batches(8)] == [8]


@pytest.mark.parametrize("error", [FULL, RuntimeError("MPS backend out of memory"), ValueError("shapes"), None])
def test_a_rehearsal_leaves_networks_moments_averages_and_random_numbers_alone(error):
    phase, untouched, runtime, seen = phase_of(), phase_of(), Runtime(AUTO.launch), []
    inner = phase.loss

    def loss(draws):
        seen.append((len(draws.samples), [p.grad is not None for p in phase.network.parameters()]))
        torch.rand(3)
        value, metrics = inner(draws)
        value.backward(retain_graph=True)
        if error is not None:
            raise error
        return value, metrics

    phase.loss, forgotten, before = loss, [], torch.get_rng_state()
    rehearsal = Rehearsal((phase,), 0, forget=lambda: forgotten.append(True))
    assert rehearsal.fits(runtime, 4, 2) == (error is None or isinstance(error, ValueError))
    rehearsal.fits(runtime, 8, 1)
    assert seen == [(4, [True, True]), (8, [False, False])]  # only a second micro-batch meets gradients
    assert torch.equal(torch.get_rng_state(), before) and len(forgotten) == 2 and phase.steps == 0
    assert all(p.grad is None for p in phase.network.parameters()) and not phase.optimiser.adamw.state
    assert all(torch.equal(a, b) for a, b in zip(states(phase), states(untouched), strict=True))


def test_a_rehearsal_makes_the_updates_of_its_turn():
    fake, student, seen = phase_of("fake_score"), phase_of("student"), []
    for phase in (fake, student):
        inner = phase.loss
        phase.loss = lambda draws, inner=inner: seen.append((draws.phase, draws.step)) or inner(draws)
    assert Rehearsal((fake, fake, fake, student), 0, turn=7).fits(Runtime(AUTO.launch), 4, 2)
    assert seen == [("fake_score", 21), ("student", 7)]


def test_what_a_step_needs_beside_is_kept_free(monkeypatch):
    wide, narrow, runtime = phase_of("student", width=10), phase_of("fake_score"), Runtime(AUTO.launch)
    rehearsal, of_wide, of_narrow = Rehearsal((narrow, narrow, wide), 0), 8 * 110, 8 * 20  # bytes
    assert rehearsal._beside(runtime) == 2 * (of_wide + of_narrow)
    update(wide, 0, 8, runtime)
    assert rehearsal._beside(runtime) == 2 * of_narrow
    runtime.processes = 2
    assert rehearsal._beside(runtime) == 2 * of_narrow + of_wide
    monkeypatch.setattr(fitting, "memory_of", lambda device: 1000)
    assert rehearsal._beside(runtime) == 2 * of_narrow + of_wide + 50


@pytest.mark.parametrize(
    ("here", "elsewhere", "found"), [(12, 12, 12), (6, 12, 6), (12, 5, 4), (1, 2, 1), (2, 1, 1), (0, 12, None)]
)
def test_the_largest_divisor_that_fits_in_every_process(here, elsewhere, found):
    tried = []

    def fits(runtime, size, parts):
        assert size * parts == 12
        tried.append(size)
        return size <= here

    rehearsal = SimpleNamespace(fits=fits)
    runtime = SimpleNamespace(any=lambda flag: flag or tried[-1] > elsewhere, sharded=False, is_main=False)
    if found is None:
        with pytest.raises(UserError, match="not even one sample.*launch.checkpointing=true"):
            largest(runtime, rehearsal, 12)  # type: ignore[arg-type]
    else:
        assert largest(runtime, rehearsal, 12) == found  # type: ignore[arg-type]
    assert tried == [size for size in (12, 6, 4, 3, 2, 1) if size >= (found or 1)]


@pytest.mark.parametrize(("before", "expected"), [(4, 4), (3, 2), (0, 2), ("auto", 2)])
def test_a_continued_run_keeps_its_number_while_that_divides_its_samples(before, expected, monkeypatch):
    monkeypatch.setattr(fitting, "says_when_full", lambda device: True)
    runtime, rehearsal = Runtime(AUTO.launch), SimpleNamespace(fits=lambda runtime, size, parts: size <= 2)
    folder = SimpleNamespace(cfg={"launch": {"microbatch": "auto"}}, before={"launch": {"microbatch": before}})
    logged = fit_run(AUTO, runtime, folder, rehearsal)  # type: ignore[arg-type]
    assert logged == ({} if before == 4 else {"microbatch": 2}) and folder.cfg["launch"]["microbatch"] == expected
    assert [len(part) for part in runtime.micro_batches(8)] == [expected] * (8 // expected)


def test_sharded_networks_need_a_number():
    runtime = SimpleNamespace(sharded=True)
    with pytest.raises(UserError, match="launch.sharding = fsdp2.*give a number"):
        largest(runtime, Rehearsal((), 0), 8)  # type: ignore[arg-type]


def test_a_number_is_the_same_split_as_accumulation_and_both_are_a_contradiction():
    for more in ({"accumulation": 4}, {"microbatch": 2}):
        parts = Runtime(LaunchConfig(cpu=True, **more)).micro_batches(8)  # type: ignore[arg-type]
        assert [part.tolist() for part in parts] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    with pytest.raises(UserError, match="batch_size 8 .*2 processes with launch.microbatch 3: make it a multiple of 6"):
        LaunchConfig(microbatch=3).samples_at_a_time(8, 2)
    assert LaunchConfig(microbatch="auto").samples_at_a_time(8, 2) == 4
    for wrong in ("launch.microbatch=2", "launch.microbatch=auto"):
        with pytest.raises(config.ConfigError, match=r"launch.*microbatch (2|auto) and accumulation 4.*leave one out"):
            config.load(DistillConfig, ["out_dir=unused", "launch.accumulation=4", wrong])
    with pytest.raises(config.ConfigError, match="launch.microbatch = 'most'.*expected int or auto"):
        config.load(DistillConfig, ["out_dir=unused", "launch.microbatch=most"])


def test_the_turn_that_is_rehearsed_has_all_losses_that_any_has():
    def turn(regression: dict, gan: dict, matching: dict | None = None) -> int:
        values = {"steps": 100, "matching": matching or {}, "gan": gan, "regression": {"weight": 0.0} | regression}
        return job.fullest_turn(config.from_dict(DistillConfig, values, where="test"))

    late = {"weight": 0.0, "end_weight": 1.0, "ramp_start": 40, "ramp_steps": 20}
    gone = {"weight": 1.0, "end_weight": 0.0, "ramp_start": 10, "ramp_steps": 50}
    assert turn({"weight": 1.0}, {}) == turn({}, {}) == turn({"weight": 1.0}, {"weight": 1.0}) == 0
    assert turn({"weight": 1.0}, late) == 41 and turn(gone, late) == 41
    assert turn({"weight": 1.0}, {}, {"start": 50}) == 50
    assert turn({"weight": 1.0}, {"weight": 0.01, "feature_weight": 0.01}, {"start": 50}) == 50


def test_what_says_that_memory_is_full():
    assert out_of_memory(FULL) and out_of_memory(torch.OutOfMemoryError("of another wording"))
    assert not out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB."), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported later"), True),
        (RuntimeError("CUDA error: device-side assert triggered"), False),
        (ValueError("CUDA error: out of memory"), False),
    ],
)
def test_a_full_gpu_is_known_whoever_says_it(error, full):
    assert out_of_memory(error) is full


def test_what_the_losses_keep_for_other_micro_batches_counts(monkeypatch):
    reserved, empty = [], torch.empty

    def noting(size, **options):
        reserved.append(size)
        return empty(0, **options)

    rehearsal = Rehearsal((), 0, kept=1000)
    monkeypatch.setattr(fitting.torch, "empty", noting)
    monkeypatch.setattr(Rehearsal, "_beside", lambda self, runtime: 7)
    assert rehearsal.fits(Runtime(LaunchConfig(cpu=True)), 4, 3) and reserved == [7 + 1000 * 4 * 2]
