"""Pictures for tests, as arrays and as the bytes of files, some of them hostile."""

import io
import struct
import zlib

import numpy as np
from PIL import Image


def picture(height: int = 48, width: int = 64) -> np.ndarray:
    """uint8 (H, W, 3), smooth enough for JPEG, no two corners alike."""
    y, x = np.mgrid[:height, :width].astype(np.float64)
    planes = [x / width, y / height, (x + y) / (height + width) / 2]
    return (np.stack(planes, -1) * 255).round().astype(np.uint8)


def noise(height: int = 40, width: int = 56, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encoded(image: Image.Image | np.ndarray, kind: str = "PNG", **options) -> bytes:
    image = Image.fromarray(np.ascontiguousarray(image)) if isinstance(image, np.ndarray) else image
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def bomb(width: int, height: int) -> bytes:
    """A PNG of few bytes whose header promises many pixels."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(10))) + chunk(b"IEND", b"")
