"""Finished runs of several steps as a distillation leaves them, of tiny networks that nobody trained."""

import dataclasses
from pathlib import Path

import torch

from dmd_dar import config
from dmd_dar.data.photos import NAMES
from dmd_dar.distillation.config import DistillConfig, StudentRouting
from dmd_dar.guidance import Velocity
from dmd_dar.models.guided import guided_velocity
from dmd_dar.models.saved import ModelCard, network_hash, save_network
from dmd_dar.models.sit import SiT, with_routing
from dmd_dar.models.teachers import TeacherConfig, load_teacher
from tests.tiny import tiny_sit

RUNGS = {1: (1.0,), 2: (1.0, 0.75), 4: (1.0, 0.9, 0.75, 0.5)}


@torch.no_grad()
def loud(network: SiT) -> SiT:
    """With weights so large that its samples depend on steps and sampler."""
    for parameter in network.backbone_parameters():
        parameter.mul_(12)
    return network


def loud_teacher(folder: Path) -> None:
    save_network(folder, loud(tiny_sit()), ModelCard(label_names=NAMES))


def finished(root: Path, name: str, network_seed: int, **keys) -> str:
    """A run folder as a distillation leaves it; its student is a network of that seed."""
    cfg = DistillConfig(teacher=TeacherConfig(str(root / "teacher")), **keys)
    if "dar" in name:
        routing = StudentRouting(query="timestep", chunk_size=2)
        cfg = dataclasses.replace(cfg, student=dataclasses.replace(cfg.student, routing=routing))
    network = with_routing(loud(tiny_sit(seed=network_seed)), cfg.student.routing.form())
    origin = {"steps": cfg.steps, "teacher": network_hash(root / "teacher"), "data": "photographs"}
    save_network(root / name / "student", network, ModelCard(rungs=cfg.rungs, sampler=cfg.sampler, origin=origin))
    (root / name / "config.yaml").write_text(config.to_yaml(cfg))
    return str(root / name)


def velocity_of(root: Path, guidance_scale: float = 1.0) -> Velocity:
    teacher = load_teacher(TeacherConfig(str(root / "teacher")))
    return guided_velocity(teacher.network, teacher.prediction, guidance_scale)
