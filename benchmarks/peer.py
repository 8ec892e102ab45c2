"""A turn of NVIDIA FastGen's DMD2 on our nets, from a checkout that the user names.

FastGen (github.com/NVlabs/FastGen, Apache-2.0) is imported from there at run time. Its own classes compute everything:
`DMD2Model` the losses, `Trainer.train_step` the backward pass and the update, `GradClipCallback` and `EMACallback`
what belongs to it, with the values of its DMD2 configuration but where they say what ours does (rungs, times, float32).
The networks are ours in its protocol. Its lists of networks, data sets, heads and callbacks, which import all that it
has and of which a turn uses nothing, are left empty.

Its image method noises real data. `simulated` gives it the student's own way to the rung instead, by its sampling loop.
"""

import copy
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.turn_cost import Turn
from dmd_dar import flow
from dmd_dar.errors import UserError
from dmd_dar.models.sit import SiT

FILE = Path("fastgen") / "methods" / "distribution_matching" / "dmd2.py"
UNUSED = ("net", "data", "discriminator", "callbacks")  # of fastgen.configs
PACKAGES = ("attrs", "boto3", "diffusers", "einops", "ftfy", "imageio", "loguru", "omegaconf", "scipy", "wandb")
LAST = 0.999  # its rectified flow ends there
AVERAGE = "ema"


class Unused(types.ModuleType):
    """A module in which every name is an empty configuration."""

    def __getattr__(self, name: str) -> dict[str, Any]:
        if name.startswith("__"):
            raise AttributeError(name)
        return {}


@dataclass(frozen=True)
class FastGen:
    """The modules of a checkout that a turn uses."""

    config: Any
    trainer: Any
    network: Any
    grad_clip: Any
    ema: Any
    utils: Any

    @classmethod
    def of(cls, checkout: Path) -> "FastGen":
        """Raises UserError for a folder that is no checkout, and where a package that FastGen imports is missing."""
        if not (checkout / FILE).is_file():
            fault = f"peer = '{checkout}': no checkout of NVIDIA FastGen, {FILE} is not in it"
            raise UserError(f"{fault}; clone github.com/NVlabs/FastGen and name its folder")
        sys.path.insert(0, str(checkout.resolve()))
        for name in UNUSED:
            module = f"fastgen.configs.{name}"
            sys.modules[module] = Unused(module)
        names = ("configs.methods.config_dmd2", "trainer", "networks.network", "callbacks.grad_clip", "callbacks.ema")
        try:
            found = cls(*(import_module(f"fastgen.{name}") for name in (*names, "utils")))
        except ModuleNotFoundError as error:
            fault = f"peer = '{checkout}': FastGen imports {error.name}, which is not installed"
            raise UserError(f"{fault}; pip install {' '.join(PACKAGES)}") from error
        import_module("loguru").logger.remove()  # its messages on every network that it makes
        return found


@dataclass(frozen=True)
class PeerArm:
    """One way to compute its turn."""

    simulated: bool = False
    fused: bool = False  # AdamW, which it leaves off

    @property
    def name(self) -> str:
        return f"FastGen, {'simulated' if self.simulated else 'data'}{', fused AdamW' if self.fused else ''}"


@dataclass(frozen=True)
class Work:
    """What a turn is to do: as many updates of the fake score, then one of the student."""

    updates: int
    batch: int
    rungs: tuple[float, ...]
    at: Iterator[int]  # each update's rung, where the student's input is simulated

    @property
    def times(self) -> list[float]:
        return [*(min(t, LAST) for t in self.rungs), 0.0]


def adapted(fastgen: FastGen, teacher: SiT) -> type[nn.Module]:
    """Our network in FastGen's protocol; every one that it makes starts as `teacher`."""

    class AdaptedSiT(fastgen.network.FastGenNetwork):
        def __init__(self) -> None:
            super().__init__(net_pred_type="flow", schedule_type="rf")
            self.sit = copy.deepcopy(teacher).requires_grad_(True)
            self.sit.pos_embed.requires_grad_(False)

        def forward(
            self, x_t: Tensor, t: Tensor, condition: Tensor, fwd_pred_type: str = "flow", **unused: Any
        ) -> Tensor:
            v = self.sit(x_t, t.to(x_t.dtype), condition)[:, : x_t.shape[1]]
            return self.noise_scheduler.convert_model_output(
                x_t, v, t, src_pred_type="flow", target_pred_type=fwd_pred_type
            )

    return AdaptedSiT


def simulating(dmd2: Any, work: Work) -> type[nn.Module]:
    """FastGen's DMD2 whose student gets what its own sampling loop makes from noise down to the update's rung."""

    class SimulatingDMD2(dmd2):
        def _prepare_training_data(self, data: dict[str, Any]) -> Any:
            self.labels = data["condition"]
            return super()._prepare_training_data(data)

        def _generate_noise_and_time(self, real_data: Tensor) -> tuple[Tensor, ...]:
            _, _, t, eps = super()._generate_noise_and_time(real_data)
            schedule, rung = self.net.noise_scheduler, next(work.at)
            times = torch.tensor(work.times, dtype=schedule.t_precision, device=real_data.device)
            state, t_student = schedule.latents(torch.randn_like(real_data), times[0]), times[rung].expand(len(t))
            if rung:
                with torch.no_grad():
                    x0 = self._student_sample_loop(self.net, state, times[: rung + 1], condition=self.labels)
                state = schedule.forward_process(x0, torch.randn_like(x0), t_student)
            return state, t_student, t, eps

    return SimulatingDMD2


def configured(fastgen: FastGen, teacher: SiT, work: Work, fused: bool) -> Any:
    """FastGen's configuration of DMD2, made to do what our turn does; no GAN, no guidance."""
    lazy, config = fastgen.utils.LazyCall, fastgen.config.Config()
    model = config.model
    model.net, model.input_shape, model.device = lazy(adapted(fastgen, teacher))(), list(teacher.shape), "cpu"
    model.gan_loss_weight_gen, model.student_update_freq = 0.0, work.updates + 1
    model.student_sample_steps, model.use_ema = len(work.rungs), [AVERAGE]
    times = model.sample_t_cfg
    times.time_dist_type, times.min_t, times.max_t, times.t_list = "uniform", 0.02, 0.98, work.times
    model.net_optimizer["fused"] = model.fake_score_optimizer["fused"] = fused
    clip = lazy(fastgen.grad_clip.GradClipCallback)(grad_norm=10.0, model_key="net")  # the values of its configurations
    config.trainer.callbacks = {"grad_clip": clip}
    return config


def build(fastgen: FastGen, teacher: SiT, arm: PeerArm, work: Work) -> Turn:
    """Its turn, by its trainer's step; the average follows after the student's update only, as ours does."""
    config = configured(fastgen, teacher, work, arm.fused)
    dmd2 = fastgen.config.DMD2Model
    model: Any = (simulating(dmd2, work) if arm.simulated else dmd2)(config.model)
    model.on_train_begin()
    model.init_optimizers()
    callbacks = fastgen.trainer.CallbackDict(config, None)
    averaging = fastgen.ema.EMACallback(beta=0.99, ema_name=AVERAGE)
    trainer, steps = types.SimpleNamespace(config=config, callbacks=callbacks), count(1)
    real, labels = torch.randn(work.batch, *teacher.shape), torch.arange(work.batch) % teacher.num_conditions
    data = {"real": real, "condition": labels, "neg_condition": labels}

    def run() -> None:
        for step in (next(steps) for _ in range(work.updates + 1)):
            losses, outputs = fastgen.trainer.Trainer.train_step(trainer, model, model, data, step, 0)
        averaging.on_training_step_end(model, data, outputs, losses, step)

    optimising = [(model, "optimizers_schedulers_step"), (callbacks._callbacks["grad_clip"], "on_optimizer_step_begin")]
    networks = {"student": model.net, "teacher": model.teacher, "fake_score": model.fake_score}
    return Turn(run, networks, [model.ema], [model.net_optimizer, model.fake_score_optimizer], optimising)


def check_same(turn: Turn, teacher: SiT) -> None:
    """Raises ValueError where one of its networks, before any update, says another x0 than ours."""
    x, t = torch.randn(2, *teacher.shape), torch.tensor([0.2, 0.9], dtype=torch.float64)
    labels = torch.arange(2) % teacher.num_conditions
    with torch.no_grad():
        ours = flow.velocity_to_x0(teacher(x, t.float(), labels)[:, : x.shape[1]], x, t.float())
        for name, network in turn.networks.items():
            theirs = network(x, t, labels, fwd_pred_type="x0")
            if not torch.allclose(theirs, ours, rtol=1e-4, atol=1e-4):
                raise ValueError(f"FastGen's {name} differs from ours by {(theirs - ours).abs().max():.2g}")
