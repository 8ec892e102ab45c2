"""A folder's statistics are those of its features, in a file that a report can take."""

import numpy as np
import pytest
import torch

from dmd_dar.config import ConfigError, load, run_job
from dmd_dar.data.images import png_bytes
from eval.metrics import frechet, inception
from eval.metrics.features import Extractor
from eval.metrics.moments import load_reference
from eval.samples.images import UnfitError
from eval.statistics import StatisticsConfig, statistics

IMAGES = torch.randint(0, 256, (11, 3, 6, 10), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def means(images: torch.Tensor) -> torch.Tensor:
    """(n, 3, H, W) -> (n, 3)"""
    return images.float().mean((2, 3))


def test_the_file_holds_the_moments_of_all_images(tmp_path, monkeypatch, capsys):
    (tmp_path / "images").mkdir()
    for i, image in enumerate(IMAGES):
        (tmp_path / "images" / f"{i:06d}.png").write_bytes(png_bytes(image))
    (tmp_path / "images" / "another.jpg").write_bytes(b"")
    monkeypatch.setattr(inception, "fid", lambda *given: Extractor("fid", means))
    file = tmp_path / "new" / "real.npz"
    statistics(load(StatisticsConfig, [f"images={tmp_path / 'images'}", f"out={file}", "batch_size=4", "cpu=true"]))
    mean, covariance = frechet.statistics(means(IMAGES).double())
    told = load_reference(file)
    torch.testing.assert_close(told.mean, mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(told.covariance, covariance, rtol=1e-5, atol=1e-6)
    assert told.count == 11 and "11 images; other files, left out: 1 .jpg" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", ["V2", "U1", "S1", "c8"])
def test_files_of_no_numbers_end_the_command_with_one_line(tmp_path, capsys, dtype):
    (tmp_path / "images").mkdir()
    np.save(tmp_path / "images" / "a.npy", np.zeros((4, 3, 32, 32), dtype))
    with pytest.raises(SystemExit) as stop:
        run_job(StatisticsConfig, statistics, [f"images={tmp_path / 'images'}", f"out={tmp_path / 'out.npz'}"])
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and "a.npy" in line and "save" in line and not (tmp_path / "out.npz").exists()


def test_a_command_without_images_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="images=FOLDER"):
        load(StatisticsConfig, [])
    with pytest.raises(UnfitError, match="neither a folder"):
        statistics(StatisticsConfig(images=str(tmp_path / "absent")))
