"""A teacher's velocity under guidance, by the form of its own pipeline or by one that is asked for."""

from dataclasses import dataclass

from dmd_dar.errors import UserError
from dmd_dar.guidance import Form, GuidanceConfig, Rule, Velocity, guided
from dmd_dar.models.denoiser import Meaning, Prediction, velocity_of
from dmd_dar.models.saved import Denoiser
from dmd_dar.models.sit import SiT


@dataclass(frozen=True)
class OwnGuidance:
    """How a network's own pipeline guides it."""

    form: Form
    cells: int  # latent cells on a side of its tokens
    embedded: bool  # whether a strength is one of its inputs


def own_guidance(network: Denoiser) -> OwnGuidance:
    if isinstance(network, SiT):
        return OwnGuidance("plain", network.config.patch, embedded=False)
    family = network.family
    return OwnGuidance(family.guidance, family.cells(network.transformer.config), network.fixed.embedded_guidance > 0)


def guided_velocity(
    network: Denoiser,
    prediction: Prediction | Meaning,
    guidance_scale: float,
    guidance: GuidanceConfig | None = None,
) -> Velocity:
    """A teacher's guided velocity. Raises what `rule_of` does."""
    rule = rule_of(network, guidance_scale, guidance)
    return guided(velocity_of(network, prediction), guidance_scale, network.num_conditions, rule)


def rule_of(network: Denoiser, guidance_scale: float, guidance: GuidanceConfig | None = None) -> Rule:
    """How the network is guided; None as its own pipeline guides it.

    Raises UserError for guidance of a network of one class, which is unconditional, and for a form that it cannot have.
    """
    if guidance_scale != 1 and network.num_conditions == 1 and network.prompts is None:
        raise UserError(
            f"guidance_scale = {guidance_scale:g}: the teacher knows one class, so there is nothing to guide towards;"
            " set guidance_scale=1"
        )
    guidance, own = guidance or GuidanceConfig(), own_guidance(network)
    if guidance.form == "embedded" and not own.embedded:
        raise UserError("guidance.form = embedded: the teacher takes no guidance as an input; set guidance.form=auto")
    if guidance.form == "embedded" and guidance_scale != 1:
        raise UserError(
            f"guidance_scale = {guidance_scale:g}: guidance.form embedded takes teacher.embedded_guidance;"
            " set guidance_scale=1, or guidance.form=plain for guidance on top"
        )
    if guidance_scale == 1:
        return Rule()
    form = own.form if guidance.form == "auto" else guidance.form
    return Rule("rescaled", own.cells, guidance.interval) if form == "rescaled" else Rule(interval=guidance.interval)
