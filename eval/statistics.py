"""FID features of images as a file for `statistics=`: python -m eval.statistics images=FOLDER out=FILE.npz"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dmd_dar import config
from dmd_dar.atomic import make_folder
from dmd_dar.device import chosen_device
from dmd_dar.keys import key

from .metrics import inception
from .metrics.features import extract_moments
from .metrics.moments import save_reference
from .samples.images import open_images


@dataclass(frozen=True)
class StatisticsConfig:
    """python -m eval.statistics"""

    images: str = key("", "folder of PNG or npy files, or one npy file", path=True)
    out: str = key("out/statistics.npz", "file for mu, sigma and count")
    inception: str = key("", "file of FID's Inception; empty looks where eval.weights does", path=True)
    allow_download: bool = key(False, "fetch weights that are missing")
    batch_size: int = key(64, "images at a time; changes no number beyond rounding", least=1)
    cpu: bool = key(False, "compute on the CPU although a GPU is there")

    def __post_init__(self) -> None:
        if not self.images:
            raise ValueError("images is empty: name a folder of PNG or npy files, images=FOLDER")


def statistics(cfg: StatisticsConfig) -> None:
    """Write mean and covariance of the features, batch by batch, so that a set may be larger than memory."""
    device = chosen_device(cfg.cpu)
    stream = open_images(cfg.images)
    extractor = inception.fid(cfg.inception or None, cfg.allow_download, device)
    gaussian = extract_moments(stream, extractor, cfg.batch_size).gaussian()
    make_folder(Path(cfg.out).parent)
    save_reference(cfg.out, gaussian)
    left_out = f"; other files, left out: {stream.others}" * bool(stream.others)
    print(f"written: {cfg.out}, {gaussian.count} images{left_out}")


def main(argv: Sequence[str] | None = None) -> None:
    config.run_job(StatisticsConfig, statistics, argv, description=__doc__ or "")


if __name__ == "__main__":
    main()
