"""The families of diffusers transformers that can be teachers: one entry each, which says all that differs."""

from pathlib import Path
from typing import Any

from dmd_dar import moved
from dmd_dar.errors import UserError
from dmd_dar.models.families.dit import DIT
from dmd_dar.models.families.flux import FLUX
from dmd_dar.models.families.flux2 import FLUX2
from dmd_dar.models.families.form import Family, FixedInputs, Prompting
from dmd_dar.models.families.pixart import PIXART
from dmd_dar.models.families.qwen_image import QWEN_IMAGE
from dmd_dar.models.families.sana import SANA
from dmd_dar.models.families.sd3 import SD3
from dmd_dar.models.families.z_image import Z_IMAGE

ALL = (DIT, PIXART, SANA, SD3, FLUX, QWEN_IMAGE, Z_IMAGE, FLUX2)
FAMILIES: dict[str, Family] = {family.transformer: family for family in ALL}
PIPELINES: dict[str, Prompting] = {
    name: prompting for family in FAMILIES.values() for name, prompting in family.pipelines.items()
}


def family_of(transformer: Any) -> Family:
    """The family of a transformer. Raises UserError for a class that is in none."""
    name = type(transformer).__name__
    if name not in FAMILIES:
        raise UserError(f"a {name} belongs to no family that is known here: {', '.join(FAMILIES)}")
    return FAMILIES[name]


def fixed_inputs(folder: Path, transformer: Any, requested: FixedInputs) -> FixedInputs:
    """`requested`, with the family's own size where it names none.

    Raises UserError for a transformer that is no teacher, and for a size or guidance that it does not take, or that it
    needs and that is missing.
    """
    family, config = family_of(transformer), transformer.config
    if reason := family.refused(config):
        raise UserError(f"{folder} {reason}")
    guided = bool(config.get("guidance_embeds"))
    if guided and not requested.embedded_guidance:
        raise UserError(
            f"{folder} takes a guidance strength as an input: set teacher.embedded_guidance (diffusers' own"
            f" pipeline gives {family.embedded:g})"
        )
    if requested.embedded_guidance and not guided:
        raise UserError(f"{folder} takes no guidance strength as an input: leave embedded_guidance out")
    if not family.side:
        if requested.input_size not in (0, config.get("sample_size")):
            raise UserError(f"{folder} makes latents of its own size: leave input_size out")
        return FixedInputs()
    size, cells = requested.input_size or family.side, family.cells(config)
    if size % cells:
        raise UserError(
            f"input_size = {size}: {folder} reads {cells} x {cells} latent cells a token, so it must be"
            f" {'even' if cells == 2 else f'a multiple of {cells}'}"
        )
    return FixedInputs(size, requested.embedded_guidance)


moved.keep_names(__name__)
