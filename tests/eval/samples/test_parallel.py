"""Several processes make one report: shares joined in order, and an error of one of them raised in all."""

import json
import os
import socket
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch

from dmd_dar.distillation import job as distill
from eval import report
from eval.measure import latent
from eval.measure.one_set import Reading, measure_one, rows_of
from eval.samples.images import UnfitError
from eval.samples.parallel import Processes
from eval.samples.sets import ImageSet
from tests.tiny import ON_CPU, tiny_teacher

ROOT = Path(__file__).parents[3]


@dataclass
class Line:
    """One process of two, that hears from the other one what `other` holds, in this order."""

    other: list[torch.Tensor]
    rank: int = 0
    processes: int = 2
    sent: list[torch.Tensor] = field(default_factory=list)

    def gather_rows(self, part: torch.Tensor) -> torch.Tensor:
        self.sent.append(part)
        return torch.cat([part, self.other[len(self.sent) - 1]])


NONE = torch.empty(0, dtype=torch.uint8)


def test_rows_are_joined_in_the_order_of_ranks():
    line, asked = Line([NONE, torch.tensor([3, 4])]), []

    def make(rank: int, world: int) -> dict[str, torch.Tensor]:
        asked.append((rank, world))
        return {"x": torch.tensor([0, 1, 2])}

    assert Processes(line).joined(5, make)["x"].tolist() == [0, 1, 2, 3, 4] and asked == [(0, 2)]
    assert Processes(line).joined(1, make)["x"].tolist() == [0, 1, 2] and asked[-1] == (0, 1)  # fewer than processes
    assert Processes().joined(5, make)["x"].tolist() == [0, 1, 2] and asked[-1] == (0, 1)


def test_an_error_in_one_process_is_raised_in_all():
    def broken(rank: int, world: int) -> dict[str, torch.Tensor]:
        raise UnfitError("image 7 is broken")

    with pytest.raises(UnfitError, match="image 7 is broken"):
        Processes(Line([NONE])).joined(5, broken)

    def surprised(rank: int, world: int) -> dict[str, torch.Tensor]:
        raise OSError("no space left")

    line = Line([NONE])
    with pytest.raises(OSError, match="no space left"):
        Processes(line).joined(5, surprised)
    assert bytes(line.sent[0].tolist()) == b"OSError('no space left')"
    told = torch.tensor([*b"image 9 is broken"], dtype=torch.uint8)
    with pytest.raises(UnfitError, match="image 9 is broken"):
        Processes(Line([told])).joined(5, lambda rank, world: {"x": torch.zeros(3)})


@pytest.mark.slow
def test_two_processes_write_the_report_of_one(tmp_path, crops):
    """The networks' images, the features and with them every number, up to a level of rounding in an image; of images
    from a file, up to rounding."""
    np.save(tmp_path / "more.npy", crops(32, 5, 3)[0].numpy())
    distill.main(
        [
            *(f"teacher.path={tiny_teacher(tmp_path / 'teacher')}", f"out_dir={tmp_path / 'dar'}", "steps=1"),
            *("batch_size=2", "student.routing.query=timestep", "student.routing.chunk_size=2", "rungs=[1.0,0.5]"),
            *(
                "fake_score.updates=1",
                "regression.weight=0",
                "log.wandb=disabled",
                *ON_CPU,
                "preflight=false",
            ),
        ]
    )
    shared = [f"runs=[{tmp_path / 'dar'}]", f"images=[{tmp_path / 'more.npy'}]", "n=65", "solver_steps=1"]
    shared += [word.removeprefix("launch.") for word in ON_CPU]
    one, two = (
        [*shared, "metrics=[offline]", f"out={tmp_path / name}", f"cache={tmp_path / name / 'cache'}"]
        for name in ("one", "two")
    )
    report.main(one)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--master_addr=127.0.0.1"]
    command = [sys.executable, *launcher, f"--master_port={port}", "-m", "eval.report", *two]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert ran.stdout.count("report: ") == 1 and "Traceback" not in ran.stderr
    results = [json.loads((tmp_path / name / "report.json").read_text())["sets"] for name in ("one", "two")]
    for one, two in zip(*results, strict=True):
        assert (one["name"], one["images"]) == (two["name"], two["images"])
        same = 1e-12 if one["name"] in ("more", "real") else 1e-3
        assert two["power"] == pytest.approx(one["power"], rel=same)
        assert two["hf_kurtosis"] == pytest.approx(one["hf_kurtosis"], rel=same)
        for key in ("teacher", "real"):
            ours, theirs = one["against"][key], two["against"][key]
            if ours is not None:
                files = one["name"] == "more" and key == "real"
                close = {"rel": 1e-5} if files else {"rel": 0.02, "abs": 0.01}
                for metric in ("fd_wavelet", "fd_pca", "fd_classifier"):
                    if metric in ours:
                        assert theirs[metric]["value"] == pytest.approx(ours[metric]["value"], **close)
                if files:
                    assert theirs["neighbours"].keys() == ours["neighbours"].keys() != set()
                    for metric, near in ours["neighbours"].items():
                        assert theirs["neighbours"][metric]["kid"] == pytest.approx(near["kid"], rel=1e-4, abs=1e-7)
                assert theirs["gain_db"]["HF"]["value"] == pytest.approx(ours["gain_db"]["HF"]["value"], abs=0.01)


def shares(one: ImageSet, world: int) -> dict[str, torch.Tensor]:
    """What `world` processes read and join."""
    parts = [rows_of(one, rank, world) for rank in range(world)]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def test_shares_of_processes_measure_as_one(crops):
    """Spectra, structure, wavelets, lines and maps of 301 images, whose shares are uneven and whose batches begin
    elsewhere. Which patches are flat is decided over the whole set.
    """
    one = ImageSet("x", *crops(40, 43), "student", paired=False)
    whole = measure_one(one, Reading({}, shares(one, 1)), 0)
    for world in (2, 5):
        split = measure_one(one, Reading({}, shares(one, world)), 0)
        for ours, theirs in zip(
            (split.luma, *split.chroma.values()), (whole.luma, *whole.chroma.values()), strict=True
        ):
            assert (ours.size, ours.counts.tolist()) == (theirs.size, theirs.counts.tolist())
            for name, values in ours.rows.items():
                torch.testing.assert_close(values, theirs.rows[name], rtol=1e-12, atol=0, equal_nan=True)
        for name, values in vars(split.structure).items():
            np.testing.assert_allclose(values, vars(whole.structure)[name], rtol=1e-12)
        for name in ("lines", "wavelet_energy", "wavelet_kurtosis"):
            np.testing.assert_allclose(getattr(split, name), getattr(whole, name), rtol=1e-12)
        torch.testing.assert_close(split.plane, whole.plane, rtol=1e-12, atol=0)
    assert whole.luma.power.shape == (19,) and len(whole.structure.flat) == 301


def test_shares_of_latents_measure_as_one():
    latents = torch.randn(301, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    whole, parts = latent.rows_of(latents), [latent.rows_of(latents, rank, 2) for rank in range(2)]
    assert len({name.partition(".")[0] for name in whole}) == 4
    for name, values in whole.items():
        joined = torch.cat([part[name] for part in parts])
        torch.testing.assert_close(joined, values, rtol=1e-12, atol=0, equal_nan=True)
    latents[200, 1, 5, 5] = torch.nan
    with pytest.raises(UnfitError, match="image 200: holds NaN"):
        latent.rows_of(latents, 1, 2)
