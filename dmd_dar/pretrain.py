"""Train a teacher, residual or DAR, by flow matching: python -m dmd_dar.pretrain config=FILE.yaml [key=value ...]"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from dmd_dar import config, flow, losses
from dmd_dar.atomic import write_atomic
from dmd_dar.data.config import DataConfig
from dmd_dar.data.folder import Folder
from dmd_dar.data.images import png_bytes, tile, to_pixels
from dmd_dar.data.latents import Latents
from dmd_dar.data.sources import Source, open_data
from dmd_dar.draws import Draws, sample_range
from dmd_dar.keys import key
from dmd_dar.messages import LOGGER
from dmd_dar.methods.generate import decoded, ode_generator
from dmd_dar.methods.solvers import Solver
from dmd_dar.models.codecs import Codec, load_codec
from dmd_dar.models.denoiser import velocity_of
from dmd_dar.models.saved import ModelCard
from dmd_dar.models.sit import SiT, SiTConfig
from dmd_dar.routing.layout import RoutingConfig
from dmd_dar.train.disk.checkpoint import CheckpointConfig
from dmd_dar.train.disk.export import export
from dmd_dar.train.disk.folder import RunFolder
from dmd_dar.train.disk.log import LogConfig
from dmd_dar.train.disk.readme import CardConfig
from dmd_dar.train.loop.ema import Ema
from dmd_dar.train.loop.fitting import Rehearsal, fit_run
from dmd_dar.train.loop.job import Pictures, Results, begin, open_run, run_cycle
from dmd_dar.train.loop.loop import Metrics, OpenRun, Phase, Watch
from dmd_dar.train.loop.optimise import Optimiser, OptimiserConfig
from dmd_dar.train.processes import launch
from dmd_dar.train.processes.compiling import compile_run
from dmd_dar.train.processes.runtime import LaunchConfig, Runtime
from dmd_dar.train.watch.failure import Calls
from dmd_dar.train.watch.preflight import check_data, first_batch

SHOWN_CROPS = 64  # in samples/data.png


@dataclass(frozen=True)
class ModelConfig(SiTConfig):
    """The network to train; residual until model.routing.query is named, then in the paper's form."""

    num_classes: int = key(0, "class labels; 0: as many as the data has", least=0)
    routing: RoutingConfig = key(factory=lambda: RoutingConfig(scale="convex", summary="last"))

    def shape(self, data: Source) -> SiTConfig:
        """With the classes of the data; a ConfigError where others are asked for."""
        if self.num_classes not in (0, data.num_classes):
            raise config.ConfigError(
                f"model.num_classes = {self.num_classes}: the data has {data.num_classes}; leave the key out"
            )
        shape = {field.name: getattr(self, field.name) for field in fields(SiTConfig)}
        return SiTConfig(**{**shape, "num_classes": data.num_classes})


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
    codec: str = key(
        "", "of data.name=latents: their VAE, folder or hub id, which shows them and goes with the teacher"
    )
    codec_revision: str = key("", "branch, tag, commit or refs/pr/N of the codec's hub id")
    time: flow.TimeLaw = key(factory=lambda: flow.TimeLaw(law="logit_normal"))
    model: ModelConfig = key(factory=ModelConfig)
    data: DataConfig = key(factory=DataConfig)
    optimiser: OptimiserConfig = key(factory=OptimiserConfig)
    checkpoint: CheckpointConfig = key(factory=CheckpointConfig)
    log: LogConfig = key(factory=LogConfig)
    card: CardConfig = key(factory=CardConfig)
    launch: LaunchConfig = key(factory=LaunchConfig)

    def __post_init__(self) -> None:
        self.checkpoint.require_within(self.steps)
        if (self.data.name == "latents") != bool(self.codec):
            raise ValueError("codec is for data.name=latents, which needs it: name the VAE of these latents")
        if self.data.name == "latents":
            return  # `pretrain` compares with what the folder holds
        if self.model.input_size != self.data.size:
            raise ValueError(f"model.input_size {self.model.input_size} must equal data.size {self.data.size}")
        if self.model.in_channels != 3:
            raise ValueError(f"model.in_channels must be 3, those of RGB, got {self.model.in_channels}")


def flow_matching(model: SiT, data: Source, time: flow.TimeLaw, label_dropout: float, calls: Calls | None = None):
    """The pretraining loss as a function of the step's draws; `calls` remembers the network's last call."""
    velocity = (calls or Calls()).watch("network", velocity_of(model))

    def loss(draws: Draws) -> tuple[Tensor, Metrics]:
        x0, labels = data.batch(draws)
        dropped = draws.uniform("label_dropout") < label_dropout
        labels = torch.where(dropped, data.num_classes, labels)
        eps, t = draws.normal("eps", *x0.shape[1:]), time.quantile(draws.uniform("t")).to(x0.dtype)
        return losses.flow_matching_loss(velocity(flow.interpolate(x0, eps, t), t, labels), x0, eps), {}

    return loss


def open_codec(cfg: PretrainConfig, data: Source, device: torch.device) -> Codec | None:
    """The codec of latents, None for images; a ConfigError where data, codec and network do not fit each other."""
    if not isinstance(data, Latents):
        return None
    codec = load_codec(cfg.codec, cfg.codec_revision).to(device)
    data.require(codec.digest(), data.shape)
    channels, size = data.shape[:2]
    if (cfg.model.in_channels, cfg.model.input_size) != (channels, size):
        raise config.ConfigError(
            f"data.path = {cfg.data.path}: its latents are {list(data.shape)}: set model.in_channels={channels} and"
            f" model.input_size={size}"
        )
    return codec


@torch.no_grad()
def show(data: Source, codec: Codec | None, seed: int, folder: RunFolder) -> None:
    """What the network will learn from, for a look: crops in samples/data.png, one line for the user's own images."""
    crops, _ = data.batch(Draws(seed, "shown", 0, sample_range(0, SHOWN_CROPS, data.device)))
    crops = crops if codec is None else codec.decode(crops)
    write_atomic(folder.samples / "data.png", png_bytes(tile(to_pixels(crops))))
    if isinstance(data, Folder):
        LOGGER.info(f"data: {data}")


def pretrain(cfg: PretrainConfig) -> None:
    """Run, or continue, the job. The averaged weights land in out_dir/student."""
    runtime = Runtime(cfg.launch)
    with open_run(cfg, runtime) as folder:
        train(cfg, runtime, folder)


def train(cfg: PretrainConfig, runtime: Runtime, folder: RunFolder | None) -> None:
    """The job in its folder, which is None in all processes but the main one."""
    data = open_data(cfg.data, runtime.device)
    codec = open_codec(cfg, data, runtime.device)
    check_data(first_batch(data, cfg.seed)[0])
    torch.manual_seed(cfg.seed)
    model = SiT(cfg.model.shape(data)).to(runtime.device)
    ema = Ema(model, cfg.ema)
    runtime.shard(model, ema.module)
    optimiser = Optimiser(cfg.optimiser, model.backbone_parameters(), (model.router_parameters(), cfg.router_lr))
    calls = Calls()
    phase = Phase("pretrain", model, optimiser, flow_matching(model, data, cfg.time, cfg.label_dropout, calls), ema)
    identity = {"data": data.hash}
    origin = {**identity, "seed": cfg.seed, "steps": cfg.steps}
    if codec is not None:
        identity["codec"] = codec.digest()
        origin |= {"codec": cfg.codec, "codec_revision": cfg.codec_revision, "codec_digest": codec.digest()}
    card = ModelCard(label_names=data.label_names, origin=origin)
    averaged = calls.watch("averaged_network", velocity_of(ema.module))
    found = fit_run(cfg, runtime, folder, Rehearsal((phase,), cfg.seed))
    turns = compile_run(cfg, runtime, folder, {"network": model})
    begin(runtime, folder)
    if folder is not None:
        show(data, codec, cfg.seed, folder)
    run_cycle(
        cfg,
        OpenRun(runtime, folder, identity, Path(cfg.out_dir)),
        (phase,),
        watch=Watch(calls, turns=turns, found=found),
        pictures=Pictures(
            decoded(ode_generator(averaged, Solver()), codec and codec.decode), data.shape, data.num_classes
        ),
        results=Results({"student": ema.module}, lambda place, network, _: export(place, network, card, codec)),
    )


def main(argv: Sequence[str] | None = None) -> None:
    config.run_job(PretrainConfig, functools.partial(launch.run, pretrain), argv, description=__doc__ or "")


if __name__ == "__main__":
    main()
