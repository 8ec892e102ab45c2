"""Words under pictures."""

import textwrap
from functools import cache

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

SIZE, LINES, MARGIN = 14, 3, 4  # of the letters, lines at most, around the text; pixels
NARROWEST = 96  # pixels of a picture that words are written under
CUT = "..."


@cache
def font() -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default(SIZE)


def captioned(pictures: Tensor, captions: list[str]) -> Tensor:
    """uint8 (N, 3, H, W) -> (N, 3, H', W): each with its caption below, in LINES lines at most, cut after these.

    As they are where they are too narrow to be written under.
    """
    width = pictures.shape[-1]
    if width < NARROWEST:
        return pictures
    texts = [wrapped(caption, width - 2 * MARGIN) for caption in captions]
    line = int(sum(font().getbbox("Ag")[1::2]))
    height = max(text.count("\n") + 1 for text in texts) * line + 2 * MARGIN
    below = torch.stack([_written(text, height, width) for text in texts])
    return torch.cat([pictures, below.to(pictures.device)], dim=-2)


def wrapped(caption: str, width: int) -> str:
    """Lines that fit into `width` pixels, by the width of its own letters on average."""
    caption = " ".join(caption.split()) or " "
    fitting = max(1, int(width * len(caption) / max(font().getlength(caption), 1)) - 1)
    return "\n".join(textwrap.wrap(caption, fitting, max_lines=LINES, placeholder=CUT)) or CUT


def _written(text: str, height: int, width: int) -> Tensor:
    """uint8 (3, height, width), black on white."""
    picture = Image.new("RGB", (width, height), "white")
    ImageDraw.Draw(picture).multiline_text((MARGIN, MARGIN), text, "black", font(), spacing=2)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)
