"""The three networks of a distillation: the frozen teacher, and the student and fake score that start as it."""

import copy
from dataclasses import dataclass

from dmd_dar.errors import UserError
from dmd_dar.models.diffusers_denoiser import routed_copy
from dmd_dar.models.sit import SiT, with_routing
from dmd_dar.models.teachers import Denoiser
from dmd_dar.routing.layout import RoutingConfig


@dataclass(frozen=True)
class Networks:
    """Three modules of one surface: forward (x, t, cond), `config`, `router_parameters`, `backbone_parameters`."""

    teacher: Denoiser
    student: Denoiser
    fake_score: Denoiser


def build_networks(teacher: Denoiser, routing: RoutingConfig, allow_change: bool = False) -> Networks:
    """Student, under `routing`, and fake score, both starting as the teacher's function.

    Raises UserError where the routing would change that function and `allow_change` is not set.
    """
    routed = with_routing if isinstance(teacher, SiT) else routed_copy
    try:
        student = routed(teacher, routing, allow_change)  # type: ignore[arg-type]
    except ValueError as error:
        raise UserError(f"student.{error}") from error
    fake_score = copy.deepcopy(teacher)
    for network in (student, fake_score):
        network.train().requires_grad_(True)
        if isinstance(network, SiT):
            network.pos_embed.requires_grad_(False)
    return Networks(teacher, student, fake_score)
