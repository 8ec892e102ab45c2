"""Train a teacher, residual or DAR, by flow matching: python -m dmd_dar.pretrain config=FILE.yaml [key=value ...]"""

import sys
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dmd_dar import config, flow, losses
from dmd_dar.data.photos import NAMES, DataConfig, Photos, data_hash
from dmd_dar.draws import Draws
from dmd_dar.keys import key
from dmd_dar.methods.generate import ode_generator
from dmd_dar.models.denoiser import velocity_of
from dmd_dar.models.saved import ModelCard, save_network
from dmd_dar.models.sit import SiT, SiTConfig
from dmd_dar.routing.layout import RoutingConfig
from dmd_dar.train.checkpoint import CheckpointConfig
from dmd_dar.train.ema import Ema
from dmd_dar.train.job import open_run, run_cycle
from dmd_dar.train.log import LogConfig
from dmd_dar.train.loop import Metrics, Phase
from dmd_dar.train.optimise import Optimiser, OptimiserConfig
from dmd_dar.train.runtime import LaunchConfig, Runtime

GRID_STEPS = 16  # Heun steps behind the sample grids
FROM_SCRATCH = RoutingConfig(scale="convex", summary="last")  # the paper's form; residual until a query is named


@dataclass(frozen=True)
class PretrainConfig:
    """python -m dmd_dar.pretrain"""

    out_dir: str = key("", "run folder")
    seed: int = key(0, "of every draw, weights included", least=0)
    steps: int = key(25_000, "optimiser steps", unit="steps", least=1)
    batch_size: int = key(64, "images per optimiser step, over all processes", least=1)
    label_dropout: float = key(0.1, "probability that a label is replaced by the unconditional one", least=0, most=1)
    ema: float = key(0.999, "decay of the weight average, which is what is saved", least=0, below=1)
    router_lr: float = key(1e-3, "learning rate of the routers, if model.routing has any", above=0)
    resume: Literal["auto", "never"] = key("auto", "auto: continue the run in out_dir; never: refuse a used folder")
    time: flow.TimeLaw = key(factory=lambda: flow.TimeLaw(law="logit_normal"))
    model: SiTConfig = key(factory=lambda: SiTConfig(num_classes=len(NAMES), routing=FROM_SCRATCH))
    data: DataConfig = key(factory=DataConfig)
    optimiser: OptimiserConfig = key(factory=OptimiserConfig)
    checkpoint: CheckpointConfig = key(factory=CheckpointConfig)
    log: LogConfig = key(factory=LogConfig)
    launch: LaunchConfig = key(factory=LaunchConfig)

    def __post_init__(self) -> None:
        if self.model.input_size != self.data.size:
            raise ValueError(f"model.input_size {self.model.input_size} must equal data.size {self.data.size}")
        if self.model.num_classes != len(NAMES):
            raise ValueError(f"model.num_classes must be {len(NAMES)} for data.name {self.data.name}")


def flow_matching(model: SiT, data: Photos, time: flow.TimeLaw, label_dropout: float):
    """The pretraining loss as a function of the step's draws."""
    velocity = velocity_of(model)

    def loss(draws: Draws) -> tuple[Tensor, Metrics]:
        x0, labels = data.batch(draws)
        dropped = draws.uniform("label_dropout") < label_dropout
        labels = torch.where(dropped, data.num_classes, labels)
        eps, t = draws.normal("eps", *x0.shape[1:]), time.quantile(draws.uniform("t")).to(x0.dtype)
        return losses.flow_matching_loss(velocity(flow.interpolate(x0, eps, t), t, labels), x0, eps), {}

    return loss


def pretrain(cfg: PretrainConfig) -> None:
    """Run, or continue, the job. The averaged weights land in out_dir/student."""
    runtime = Runtime(cfg.launch)
    torch.manual_seed(cfg.seed)
    model = SiT(cfg.model).to(runtime.device)
    data = Photos(cfg.data.size, runtime.device)
    ema = Ema(model, cfg.ema)
    optimiser = Optimiser(cfg.optimiser, model.backbone_parameters(), model.router_parameters(), cfg.router_lr)
    phase = Phase("pretrain", model, optimiser, flow_matching(model, data, cfg.time, cfg.label_dropout), ema)
    identity = {"data": data_hash()}
    card = ModelCard(label_names=NAMES, origin={**identity, "seed": cfg.seed, "steps": cfg.steps})
    with open_run(cfg, runtime) as folder:
        run_cycle(
            cfg,
            runtime,
            folder,
            (phase,),
            identity=identity,
            generator=ode_generator(velocity_of(ema.module), GRID_STEPS),
            shape=data.shape,
            num_classes=data.num_classes,
            save=lambda place: save_network(place, ema.module, card),
        )


if __name__ == "__main__":
    config.run_job(PretrainConfig, pretrain, sys.argv[1:], description=__doc__)
