"""Keep a finished run's student in the repository: python runs/ship.py run=RUN out=students/NAME

The folder is a run's as far as reports and sampling ask: config.yaml, log.jsonl and student/, whose weights are rounded
to bfloat16, half the size. Its student is another network than the run's, so it is measured by itself.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from dmd_dar import config
from dmd_dar.atomic import make_folder, write_atomic
from dmd_dar.keys import key
from dmd_dar.models.saved import load_network
from dmd_dar.train.disk.export import export


@dataclass(frozen=True)
class ShipConfig:
    """python runs/ship.py"""

    run: str = key("", "folder of a finished run, whose teacher is a SiT of this project")
    out: str = key("", "folder to write")

    def __post_init__(self) -> None:
        if not (self.run and self.out):
            raise ValueError("run and out must both be named: run=RUN out=students/NAME")


def ship(cfg: ShipConfig) -> None:
    run, out = Path(cfg.run), make_folder(cfg.out)
    network, card = load_network(run / "student")
    for name in ("config.yaml", "log.jsonl"):
        write_atomic(out / name, (run / name).read_text())
    export(out / "student", network.to(torch.bfloat16), card)


if __name__ == "__main__":
    config.run_job(ShipConfig, ship, description=__doc__ or "")
