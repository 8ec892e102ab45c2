"""Images between the model's range and files: uint8 (N, 3, H, W), quantised once, stored without loss."""

import io
import math

import torch
from PIL import Image
from torch import Tensor


def to_model_range(images: Tensor) -> Tensor:
    """uint8 -> float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_pixels(x: Tensor) -> Tensor:
    """[-1, 1] floats -> uint8: clamped, quantised once by rounding."""
    return levels(x).to(torch.uint8)


def levels(x: Tensor) -> Tensor:
    """The same as floats, 0 to 255: what is not a number stays so."""
    return ((x.float().clamp(-1, 1) + 1) * 127.5).round()


def tile(images: Tensor, columns: int = 0, zoom: int = 2, gap: int = 2) -> Tensor:
    """One uint8 picture (3, H', W') of all images, row by row, enlarged by pixel repetition, on white."""
    columns = columns or math.ceil(math.sqrt(len(images)))
    images = images.repeat_interleave(zoom, -1).repeat_interleave(zoom, -2)
    n, _, height, width = images.shape
    rows = math.ceil(n / columns)
    picture = torch.full((3, rows * (height + gap) - gap, columns * (width + gap) - gap), 255, dtype=torch.uint8)
    for i, image in enumerate(images.cpu()):
        y, x = i // columns * (height + gap), i % columns * (width + gap)
        picture[:, y : y + height, x : x + width] = image
    return picture


def png_bytes(picture: Tensor) -> bytes:
    """uint8 (3, H, W) -> the bytes of a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(picture.permute(1, 2, 0).cpu().numpy()).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()
