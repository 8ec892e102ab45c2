"""Image files of many kinds -> upright RGB, uint8 (H, W, 3).

Orientation as EXIF says, where that can be read; transparency over white; 16 bits of grey rounded to 8, of colour cut
to their high byte; the first picture of several. Colour profiles are ignored: values are taken as sRGB, CMYK as plain
complements.
"""

from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF")  # what a file holds, whatever its name ends with
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp", ".gif")
UPRIGHT = 1
TURNS = {  # EXIF orientation -> what makes it upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
NESTED = (ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo, ExifTags.IFD.Interop)  # directories that a TIFF's own points to

Image.init()  # without it, `open` knows no TIFF by `formats`


class ImageError(ValueError):
    """Why a file gives no image; the message does not name the file."""


def read_image(file: BinaryIO, max_megapixels: float, shorter_side: int = 0) -> np.ndarray:
    """uint8 (H, W, 3); a larger image is shrunk to `shorter_side` unless that is 0. Raises ImageError.

    An image of more than `max_megapixels` is refused by its header, before its pixels are decoded.
    """
    try:
        image = Image.open(file, formats=FORMATS)
        megapixels = image.width * image.height / 1e6
        if megapixels > max_megapixels:
            raise ImageError(f"{image.width} x {image.height}, more than data.max_megapixels {max_megapixels:g}")
        if image.format == "TIFF":
            _keep_the_orientation_alone(image)
        image.load()
        return np.asarray(_shrunk(to_rgb(_upright(image)), shorter_side))
    except (ImageError, MemoryError):
        raise
    except UnidentifiedImageError as error:
        raise ImageError(f"not one of {', '.join(FORMATS)}") from error
    except Image.DecompressionBombError as error:
        raise ImageError(f"more pixels than data.max_megapixels {max_megapixels:g} allows") from error
    except Exception as error:  # Pillow raises all kinds on damaged files
        raise ImageError(" ".join(str(error).split()) or type(error).__name__) from error


def _upright(image: Image.Image) -> Image.Image:
    """Turned as EXIF says, if it can be read; a loaded TIFF has been turned and says nothing."""
    try:
        turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation, UPRIGHT))
    except Exception:  # Pillow raises all kinds on damaged EXIF and XMP; the pixels are whole
        return image
    return image if turn is None else image.transpose(turn)


def _keep_the_orientation_alone(image: Image.Image) -> None:
    """Loading a TIFF turns it and reads its whole EXIF; nothing but the orientation is needed, so no other can fail."""
    if not isinstance(image.info.get("xmp", b""), bytes):
        del image.info["xmp"]
    exif = image.getexif()
    for directory in NESTED:
        exif.pop(directory, None)


def to_rgb(image: Image.Image) -> Image.Image:
    """An image of any mode as RGB. Raises ImageError for values of 32 bits, whose range no file states."""
    if image.mode in ("I", "F"):
        raise ImageError("32 bits a channel, of unknown range; save it with 8 or 16")
    if image.mode.startswith("I;16"):
        grey = np.asarray(image).astype(np.int32)
        grey[grey == image.info.get("transparency")] = 65535
        image = Image.fromarray(((grey + 128) // 257).astype(np.uint8))  # 65535 / 255 = 257
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _shrunk(image: Image.Image, shorter_side: int) -> Image.Image:
    """Antialiased (Lanczos, on the values as they are), or as it is where that would enlarge it."""
    least = min(image.size)
    if not 0 < shorter_side < least:
        return image
    width, height = (max(shorter_side, round(side * shorter_side / least)) for side in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS)
